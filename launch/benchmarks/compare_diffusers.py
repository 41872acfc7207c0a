"""Speed of the DiT and the VAE on CPU beside diffusers', at equal shapes and weights.

  pip install torch diffusers
  export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
  export XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=individual_dot  # for the DiT
  python launch/benchmarks/compare_diffusers.py [--only=dit] [--rounds=5]

Times a forward and backward pass (gradients of all params of a squared error) in
float32 on two cores. The two sides take turns in one process, and the table has the
medians of their passes; the first pass of a turn is not counted, since it pays for
memory that was given back meanwhile. The tunable has the C library ask for memory in
huge pages, for both sides: XLA takes its memory anew at every step. The flag keeps XLA
from giving sums of products to a library that takes ten times as long for them as its
own loops; the VAE, and a DiT as small as the quickstart's, are quicker without it.

The DiT has three blocks of Wan 2.1 1.3B's width, on a clip of 1024 tokens and 128 text
tokens; the VAE is Wan 2.1's at a smaller width. Losses and gradients are compared
before anything is timed. `remat` is what the DiT's blocks keep for the backward pass;
diffusers keeps all. The figures are kept in runs/benchmarks.jsonl, see record.py.
"""

import dataclasses
import math
import os
import statistics
import time

CORES = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, CORES)  # before jax makes its threads: as many as cores
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import record  # noqa: E402
from absl import app, flags  # noqa: E402

from sora_jax.models import vae as vae_models  # noqa: E402
from sora_jax.models.dit import REMAT_POLICIES, DiT, DiTConfig  # noqa: E402
from sora_jax.models.vae import VAE  # noqa: E402
from sora_jax.packing import patches  # noqa: E402
from sora_jax.weights import dit as dit_names  # noqa: E402
from sora_jax.weights import vae as vae_names  # noqa: E402
from sora_jax.weights.mapping import assemble  # noqa: E402

ONLY = flags.DEFINE_enum("only", None, ["dit", "vae"], "Compare one of them.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns that each side takes.", 1)
PASSES = 2  # counted, in a turn
REMAT = flags.DEFINE_multi_enum(
  "remat", ["matmuls_saved", "full"], list(REMAT_POLICIES), "Of our DiT, a row each."
)
WIDTH = flags.DEFINE_integer("width", 1536, "Of the DiT; heads have 128 channels.")
DEPTH = flags.DEFINE_integer("depth", 3, "Of the DiT.")
GRID = flags.DEFINE_list("grid", ["4", "16", "16"], "Tokens (t, h, w) of the clip.")
TEXT = flags.DEFINE_integer("text", 128, "Text tokens of the clip.")
VAE_WIDTH = flags.DEFINE_integer("vae_width", 32, "Channels of the finest stage.")
FRAMES = flags.DEFINE_integer("frames", 5, "Frames of the VAE's clip, 1 + 4k.")
PIXELS = flags.DEFINE_integer("pixels", 64, "Height and width of the VAE's clip.")
record.define_flag()


def load_torch():
  """(torch, diffusers) on as many threads as cores; a clear exit without them."""
  try:
    import diffusers
    import torch
  except ImportError as error:
    raise SystemExit(
      f"{error}. This comparison needs torch and diffusers in the same environment: "
      "pip install torch diffusers"
    ) from error
  torch.set_num_threads(len(CORES))
  torch.manual_seed(0)
  return torch, diffusers


def compare_dit(remats):
  """Sides of the DiT: {label: function that does one pass}, theirs first."""
  torch, diffusers = load_torch()
  grid = tuple(int(n) for n in GRID.value)
  L, S, text_width = math.prod(grid), TEXT.value, 512
  config = DiTConfig(
    width=WIDTH.value,
    depth=DEPTH.value,
    heads=WIDTH.value // 128,
    mlp_width=4 * WIDTH.value,
    text_width=text_width,
  )
  model = diffusers.WanTransformer3DModel(
    num_attention_heads=config.heads,
    attention_head_dim=128,
    in_channels=config.channels,
    out_channels=config.channels,
    text_dim=text_width,
    ffn_dim=config.mlp_width,
    num_layers=config.depth,
  )
  shape = [n * p for n, p in zip(grid, config.patch_size, strict=True)]
  rng = np.random.default_rng(0)
  latent_BCTHW = rng.standard_normal((1, config.channels, *shape), np.float32)
  text_BSE = rng.standard_normal((1, S, text_width), np.float32)
  inputs = [torch.from_numpy(x) for x in (latent_BCTHW, text_BSE)]
  timestep_B = torch.tensor([500.0])

  def theirs():
    out = model(inputs[0], timestep_B, inputs[1], return_dict=False)[0]
    return _torch_pass(model, out)

  params = _params(model, dit_names.entries(config, "diffusers"))
  rows = (
    patches.patchify(latent_BCTHW.transpose(0, 2, 3, 4, 1), config.patch_size),
    np.full((1, 2), 0.5, np.float32),
    np.zeros((1, L), np.int32),
    np.ones((1, L), np.int32),
    patches.grid_positions(grid)[None],
    text_BSE,
    np.ones((1, S), np.int32),
  )
  sides = {"diffusers": theirs}
  for remat in remats:
    network = DiT(dataclasses.replace(config, remat=remat))
    sides[remat] = _jax_pass(network.apply, params, *rows)
  return sides


def compare_vae():
  """Sides of the VAE: encoding to the mean and decoding it."""
  torch, diffusers = load_torch()
  config = dataclasses.replace(vae_models.PRESETS["wan2.1"], width=VAE_WIDTH.value)
  model = diffusers.AutoencoderKLWan(base_dim=VAE_WIDTH.value)
  rng = np.random.default_rng(0)
  shape = (1, 3, FRAMES.value, PIXELS.value, PIXELS.value)
  video_BCTHW = rng.uniform(-1, 1, shape).astype(np.float32)
  video = torch.from_numpy(video_BCTHW)
  params = _params(model, vae_names.entries(config, "diffusers"))

  def ours(params, video_BTHWC):
    return jnp.clip(VAE(config).apply(params, video_BTHWC), -1, 1)  # as diffusers

  return {
    "diffusers": lambda: _torch_pass(model, model(video).sample),
    "-": _jax_pass(ours, params, video_BCTHW.transpose(0, 2, 3, 4, 1)),
  }


def _params(model, entries):
  tensors = {k: v.detach().numpy() for k, v in model.state_dict().items()}
  return jax.device_put({"params": assemble(entries, tensors.__getitem__)})


def _torch_pass(model, out):
  """Gradients in the params' .grad; the loss and the gradients' squared norm."""
  for param in model.parameters():
    param.grad = None
  loss = (out - 1).square().mean()
  loss.backward()
  return loss.detach(), lambda: sum(
    float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None
  )


def _jax_pass(apply, params, *inputs):
  def loss(params, *inputs):
    return jnp.square(apply(params, *inputs) - 1).mean()

  step = jax.jit(jax.value_and_grad(loss))
  inputs = jax.device_put(inputs)

  def run():
    value, gradients = jax.block_until_ready(step(params, *inputs))
    return value, lambda: sum(
      float(jnp.square(g).sum()) for g in jax.tree.leaves(gradients)
    )

  return run


def measure(sides, rounds) -> dict[str, tuple[float, float]]:
  """Median (wall, CPU) seconds of each side; they take turns.

  ValueError if a side's loss or gradients are not those of the first.
  """
  expected = None
  for label, side in sides.items():  # also compiles
    loss, squared_norm = side()
    found = np.array([float(loss), squared_norm()])
    expected = found if expected is None else expected
    if not np.allclose(found, expected, rtol=1e-3):
      raise ValueError(
        f"{label}: loss and squared norm of the gradients are {found}, not {expected}"
      )
  times = {label: [] for label in sides}
  for _ in range(rounds):
    for label, side in sides.items():
      side()
      for _ in range(PASSES):
        wall, cpu = time.perf_counter(), time.process_time()
        side()
        times[label].append((time.perf_counter() - wall, time.process_time() - cpu))
  return {
    label: tuple(statistics.median(column) for column in zip(*turns, strict=True))
    for label, turns in times.items()
  }


def main(_):
  jobs = {"dit": lambda: compare_dit(REMAT.value), "vae": compare_vae}
  load_torch()
  print(
    f"{len(CORES)} cores, load {os.getloadavg()[0]:.1f}, "
    f"GLIBC_TUNABLES {os.environ.get('GLIBC_TUNABLES', '-')}; "
    "ratio = diffusers / ours\n\n"
    "| network | remat | diffusers s | ours s | ratio | CPU s | CPU s | ratio |\n"
    "| :-- | :-- | --: | --: | --: | --: | --: | --: |"
  )
  figures = {}
  for name in [ONLY.value] if ONLY.value else jobs:
    measured = measure(jobs[name](), ROUNDS.value)
    wall, cpu = measured.pop("diffusers")
    for label, (our_wall, our_cpu) in measured.items():
      print(
        f"| {name} | {label} | {wall:.3f} | {our_wall:.3f} | {wall / our_wall:.2f} "
        f"| {cpu:.3f} | {our_cpu:.3f} | {cpu / our_cpu:.2f} |",
        flush=True,
      )
      label = f"{name}, {label}" if name == "dit" else name
      figures[f"{label}: ours"] = record.Figure(our_wall, "s")
      figures[f"{label}: diffusers / ours"] = record.Figure(
        wall / our_wall, "ratio", "higher"
      )
  names = ("width", "depth", "grid", "text", "vae_width", "frames", "pixels")
  settings = {name: flags.FLAGS[name].value for name in names}
  # Both change the time of a step by half, see above.
  settings |= {v: os.environ.get(v, "") for v in ("GLIBC_TUNABLES", "XLA_FLAGS")}
  record.append("compare_diffusers", settings, figures)


if __name__ == "__main__":
  app.run(main)
