"""Speed of DiT training on one GPU beside the same model in PyTorch.

  pip install -e ".[cuda]" torch
  python launch/benchmarks/compare_gpu.py
  python launch/benchmarks/compare_gpu.py --models=XL --remat=matmuls_saved
  python launch/benchmarks/compare_gpu.py --sides=ours --attention=chunked  # no torch
  python launch/benchmarks/compare_gpu.py --sides=ours,torch --small  # a CPU will do

Times whole training steps on a packed row of --clips equal clips (--tokens in total,
--text_tokens for each clip's caption): forward and backward pass, clipping by the
global norm, AdamW and the EMA. Params, moments and EMA are float32, the computation is
bfloat16 (float32 on CPU). "ours" is the step that `sora_jax.main` runs. "torch" is the
same network in PyTorch, params of the same shapes (torch_dit.py): attention is
scaled_dot_product_attention by its FlashAttention backend in a loop over the clips,
AdamW is fused, and blocks keep for the backward pass what ours keep (--remat).
"compiled" is that given whole to torch.compile.

Each side has a process of its own, one after the other, with JAX's preallocation off.
Before anything is timed, our backends of attention are compared with plain attention on
this device, outputs and gradients, and loss and gradients of ours and torch (as it is,
not compiled) at equal params, for a network of one block; a difference ends the run.
The table has medians of --steps steps after --warmup; MFU counts what the model needs,
so what is computed again for the backward pass lowers it; memory is the peak of the
framework's allocator, and ratio the time of a step by that of the first side. The
figures are kept in runs/benchmarks.jsonl, see record.py.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import record  # noqa: E402
from absl import app, flags  # noqa: E402

from sora_jax.models import attention, dit, layers  # noqa: E402
from sora_jax.models.attention import blockwise, flash_gpu, per_head  # noqa: E402
from sora_jax.packing import packed_row, patches, planner  # noqa: E402
from sora_jax.runtime import sharding  # noqa: E402
from sora_jax.tasks import dit as dit_task  # noqa: E402
from sora_jax.training import loop, metrics  # noqa: E402

REMATS = ("none", "full", "attention_saved", "matmuls_saved")
MODELS = flags.DEFINE_list("models", ["XL", "2b"], "Presets of sora_jax.models.dit.")
SIDES = flags.DEFINE_list(
  "sides", ["ours", "torch", "compiled"], "Who is timed, in order: see above."
)
ATTENTION = flags.DEFINE_enum(
  "attention", "auto", ["auto", "flash", "chunked"], "Our backend of attention."
)
REMAT = flags.DEFINE_enum("remat", "attention_saved", REMATS, "Of both sides.")
TOKENS = flags.DEFINE_integer("tokens", 32_768, "Tokens of a row.", 1)
CLIPS = flags.DEFINE_integer("clips", 4, "Clips of a row, of equal length.", 1)
TEXT = flags.DEFINE_integer("text_tokens", 256, "Text tokens of each clip.", 1)
ROWS = flags.DEFINE_integer("rows", 1, "Rows of a step.", 1)
STEPS = flags.DEFINE_integer("steps", 10, "Steps to time.", 1)
WARMUP = flags.DEFINE_integer("warmup", 3, "Steps before them.", 1)
SMALL = flags.DEFINE_bool("small", False, "Sizes that a CPU can do, to try the script.")
EXCHANGE = flags.DEFINE_list("exchange", [], "Set by the script itself.")
record.define_flag()
TRAIN = loop.TrainConfig(steps=10**6, weight_decay=0.01)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of a step."""

  model: dit.DiTConfig
  tokens: int
  clips: int
  text: int
  rows: int

  @property
  def flops(self) -> float:
    """Of the forward and backward pass."""
    clip, text = self.tokens // self.clips, self.text
    pairs = self.clips * clip * (clip + text)
    tokens, texts = self.clips * clip, self.clips * text
    return 3 * self.rows * dit.num_flops(self.model, tokens, texts, pairs)


def sizes_of(name: str) -> Sizes:
  """As the flags say."""
  if SMALL.value:
    model = dit.DiTConfig(
      width=96, depth=2, heads=2, mlp_width=192, text_width=16, remat=REMAT.value
    )
    return Sizes(model, 96, 2, 8, 2)
  if name not in dit.PRESETS:
    raise SystemExit(f"--models={name} is none of {', '.join(dit.PRESETS)}")
  if CLIPS.value > TOKENS.value:
    raise SystemExit(f"--clips={CLIPS.value} is more than --tokens={TOKENS.value}")
  model = dataclasses.replace(dit.PRESETS[name], remat=REMAT.value)
  return Sizes(model, TOKENS.value, CLIPS.value, TEXT.value, ROWS.value)


def make_batch(sizes: Sizes) -> dict[str, np.ndarray]:
  """Rows as `train_dit` has them, of noise; tokens that do not divide are padding."""
  budget = planner.Budget(sizes.tokens, sizes.clips * sizes.text, sizes.clips)
  size = packed_row.RowSize(budget, sizes.model.patch_width, sizes.model.text_width)
  row = packed_row.empty(packed_row.PackedRow, size)
  del row["clip_N"]
  rng = np.random.default_rng(0)
  clip = sizes.tokens // sizes.clips
  side = max(1, math.isqrt(clip // 8))
  grid = patches.grid_positions((-(-clip // side**2), side, side))[:clip]
  for n in range(sizes.clips):
    here = slice(n * clip, (n + 1) * clip)
    row["segment_L"][here], row["group_L"][here] = n + 1, 2 * n
    row["position_L3"][here] = grid
    row["text_segment_S"][n * sizes.text : (n + 1) * sizes.text] = n + 1
  row["patch_LP"][:] = rng.standard_normal(row["patch_LP"].shape)
  row["text_SE"][:] = rng.standard_normal(row["text_SE"].shape)
  return {name: np.stack([value] * sizes.rows) for name, value in row.items()}


# --- ours


def choose_attention(width: int, dtype) -> str:
  """Has our networks use --attention, and returns its name."""
  name, reason = attention.backend(width, dtype)
  if ATTENTION.value == "flash" and name != "flash":
    raise SystemExit(f"--attention=flash: {reason or 'only GPUs have it'}")
  if ATTENTION.value != "auto":
    name = ATTENTION.value
    attention.backend = lambda *_: (name, "--attention")
  return name


def check_attention(width: int, dtype) -> None:
  """Compares our backends of attention with the plain one on this device."""
  rng = np.random.default_rng(0)
  total = 256 if SMALL.value else 2048
  lengths = np.array([90, 40, 110, 16]) * (total // 256)  # and padding
  segments = np.repeat([1, 2, 3, 0], lengths)[None]
  texts = np.repeat([1, 2, 3, 0], (77, 10, 50, 19))[None]
  backends = {"chunked": blockwise.chunked_attention}
  if jax.default_backend() == "cpu":
    backends["by_head"] = per_head.attention_by_head
  if attention.backend(width, dtype)[0] == "flash":
    backends["flash"] = flash_gpu.flash_attention
  limit = 0.02 if dtype == jnp.bfloat16 else 1e-4
  for what, keys in (("clips", segments), ("captions", texts)):
    S = keys.shape[1]
    shapes = [(1, n, 2, width) for n in (total, S, S, total)]
    *qkv, dout = (jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)
    dout *= (segments > 0)[..., None, None]

    @functools.partial(jax.jit, static_argnums=0)
    def run(backend, dout, *qkv, keys=keys):
      ids = jnp.asarray(segments, jnp.int32), jnp.asarray(keys, jnp.int32)
      out, pull = jax.vjp(lambda *qkv: backend(*qkv, *ids), *qkv)
      real = (ids[0] > 0)[..., None, None]
      return [x.astype(jnp.float32) for x in (out * real, *pull(dout))]

    with jax.default_matmul_precision("highest"):
      exact = [x.astype(jnp.float32) for x in (dout, *qkv)]
      expected = run(attention.reference_attention, *exact)
    for name, backend in backends.items():
      found = run(backend, dout, *qkv)
      errors = [
        float(jnp.abs(a - b).max() / jnp.abs(b).max())
        for a, b in zip(found, expected, strict=True)
      ]
      print(
        f"attention, {what}, {name}: largest error of out, dq, dk, dv: "
        + ", ".join(f"{error:.1e}" for error in errors),
        flush=True,
      )
      if not max(errors) < limit:
        raise SystemExit(f"{name} differs from plain attention by more than {limit}")


def check_network(sizes: Sizes, dtype, path: pathlib.Path) -> None:
  """Writes inputs, params, loss and gradients' norm of one block for the other side."""
  model = dataclasses.replace(sizes.model, depth=1)
  sizes = dataclasses.replace(sizes, model=model, tokens=min(sizes.tokens, 1025))
  sizes = dataclasses.replace(sizes, rows=1)
  task = dit_task.make(model, None, dit_task.DiTLossConfig(), sizes.clips, dtype)
  rng = np.random.default_rng(1)
  # Layers that start at zero would hide what is before them.
  params = jax.tree.map(
    lambda x: np.asarray(x + 0.02 * rng.standard_normal(x.shape), np.float32),
    jax.jit(task.init)(jax.random.key(0)),
  )
  batch = make_batch(sizes)
  t_BG = rng.uniform(size=(1, 2 * sizes.clips)).astype(np.float32)
  noise_BLP = rng.standard_normal(batch["patch_LP"].shape).astype(np.float32)

  @jax.jit
  def both(params, batch, t_BG, noise_BLP):
    def loss(params):
      context = dit.Context.of_batch(batch, batch["text_SE"])
      out = dit_task.predict(model, params, batch["patch_LP"], t_BG, context, dtype)
      real_BL1 = (batch["segment_L"] > 0)[..., None]
      return jnp.sum(jnp.square(out - noise_BLP) * real_BL1) / real_BL1.sum()

    value, gradients = jax.value_and_grad(loss)(params)
    return value, sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)) ** 0.5

  values = np.array([float(x) for x in both(params, batch, t_BG, noise_BLP)])
  batch["text_SE"] = batch["text_SE"].astype(np.float32)
  flat = jax.tree_util.tree_leaves_with_path(params["dit"])
  params = {
    "params/" + jax.tree_util.keystr(key, simple=True, separator="/"): leaf
    for key, leaf in flat
  }
  np.savez(path, **params, **batch, t=t_BG, noise=noise_BLP, values=values)


def measure_ours(sizes: Sizes, path: pathlib.Path) -> dict:
  """Row of the table; path: where the other side looks for what it checks."""
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  width = sizes.model.width // sizes.model.heads
  check_attention(width, dtype)
  backend = choose_attention(width, dtype)
  if len(SIDES.value) > 1:
    check_network(sizes, dtype, path)
  device = jax.local_devices()[0]
  mesh = sharding.make_mesh(devices=[device])
  task = dit_task.make(sizes.model, None, dit_task.DiTLossConfig(), sizes.clips, dtype)
  built = loop.build(task, TRAIN, mesh, dit_task.DIT_RULES, 0)
  with jax.set_mesh(mesh):
    batch = sharding.shard_batch(make_batch(sizes), mesh)
    state = built.init()
    seconds = []
    for _ in range(WARMUP.value + STEPS.value):
      begin = time.perf_counter()
      state, values = built.update(state, batch)
      loss = float(values["loss"])  # waits for the step
      seconds.append(time.perf_counter() - begin)
  if not math.isfinite(loss):
    raise SystemExit(f"our loss is {loss}")
  stats = device.memory_stats() or {}
  return {
    "side": "ours",
    "attention": backend,
    "device": device.device_kind,
    "seconds": statistics.median(seconds[WARMUP.value :]),
    "bytes": stats.get("peak_bytes_in_use"),
  }


# --- PyTorch


def load_torch():
  """(torch, our module with the network in it); a clear exit without torch."""
  try:
    import torch
  except ImportError as error:
    raise SystemExit(
      f"{error}. The other side needs it: pip install torch, or --sides=ours"
    ) from error
  import torch_dit

  return torch, torch_dit


def torch_inputs(torch, batch, device, config):
  """(patches, groups, rope, text) of a batch of ours."""
  dims = layers.video_rope_dims(config.width // config.heads)
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    rope = layers.rope_angles(jnp.asarray(batch["position_L3"]), dims)
  move = lambda x: torch.from_numpy(np.array(x)).to(device)  # noqa: E731
  return (
    move(batch["patch_LP"]),
    move(batch["group_L"]).long(),
    tuple(move(x)[:, :, None] for x in rope),
    move(batch["text_SE"].astype(np.float32)),
  )


def error_of(torch, network, x_BLP, target_BLP, t_BG, segment_BL, inputs):
  """Mean over real tokens of the squared error, as the task's."""
  group_BL, rope, text_BSE = inputs
  out = network(x_BLP, t_BG, group_BL, rope, text_BSE)
  real_BL = (segment_BL > 0).float()
  return (torch.square(out - target_BLP).mean(-1) * real_BL).sum() / real_BL.sum()


def check_torch(
  torch, torch_dit, sizes: Sizes, dtype, device, path: pathlib.Path
) -> None:
  """Loss and gradients' norm of one block, with our params, are ours."""
  with np.load(path) as arrays:
    arrays = dict(arrays)
  clip = arrays["segment_L"].shape[1] // sizes.clips
  config = dataclasses.replace(sizes.model, depth=1)
  network = torch_dit.make_network(config, sizes.clips, clip, sizes.text, dtype)
  torch_dit.set_params(network, arrays, config)
  network.to(device)
  x_BLP, *inputs = torch_inputs(torch, arrays, device, config)
  move = lambda name: torch.from_numpy(arrays[name]).to(device)  # noqa: E731
  mean = error_of(
    torch, network, x_BLP, move("noise"), move("t"), move("segment_L"), inputs
  )
  (mean * config.patch_width).backward()
  squares = (float(p.grad.square().sum()) for p in network.parameters())
  found = [float(mean.detach()) * config.patch_width, math.sqrt(sum(squares))]
  print(
    "one block at equal params: loss and norm of the gradients: ours "
    "{:.6g}, {:.6g}; torch {:.6g}, {:.6g}".format(*arrays["values"], *found),
    flush=True,
  )
  limit = 0.02 if dtype == torch.bfloat16 else 1e-4
  if not np.allclose(found, arrays["values"], rtol=limit):
    raise SystemExit(f"the sides differ by more than {limit}: nothing is timed")


def measure_torch(sizes: Sizes, path: pathlib.Path, compiled: bool) -> dict:
  """Row of the table; path: what `check_network` wrote, if ours was before."""
  torch, torch_dit = load_torch()
  gpu = torch.cuda.is_available()
  device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
  torch.manual_seed(0)
  if gpu:
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
  if path.exists():
    check_torch(torch, torch_dit, sizes, dtype, device, path)
  else:
    print("loss and gradients are not compared: ours is not among the sides before")
  config, clip = sizes.model, sizes.tokens // sizes.clips
  with torch.device(device):
    network = torch_dit.make_network(config, sizes.clips, clip, sizes.text, dtype)
  params = list(network.parameters())
  ema = [p.detach().clone() for p in params]
  decayed = [p for n, p in network.named_parameters() if n.endswith(".weight")]
  rest = [p for n, p in network.named_parameters() if not n.endswith(".weight")]
  groups = [
    {"params": decayed, "weight_decay": TRAIN.weight_decay},
    {"params": rest, "weight_decay": 0.0},
  ]
  optimizer = torch.optim.AdamW(groups, lr=TRAIN.learning_rate, fused=True)
  batch = make_batch(sizes)
  x0_BLP, *inputs = torch_inputs(torch, batch, device, config)
  segment_BL = torch.from_numpy(batch["segment_L"]).to(device)
  forward = torch.compile(network) if compiled else network

  def step():
    t_BN = torch.sigmoid(torch.randn(sizes.rows, sizes.clips, device=device))
    t_BG = torch.stack([t_BN, torch.zeros_like(t_BN)], -1).flatten(1)
    t_BL1 = t_BG.gather(1, inputs[0])[..., None]
    eps_BLP = torch.randn_like(x0_BLP)
    x_BLP = (1 - t_BL1) * x0_BLP + t_BL1 * eps_BLP
    target_BLP = eps_BLP - x0_BLP
    loss = error_of(torch, forward, x_BLP, target_BLP, t_BG, segment_BL, inputs)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, TRAIN.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - TRAIN.ema_decay)
    return float(loss.detach())  # waits for the pass, `synchronize` for the update

  seconds = []
  for _ in range(WARMUP.value + STEPS.value):
    begin = time.perf_counter()
    loss = step()
    if gpu:
      torch.cuda.synchronize()
    seconds.append(time.perf_counter() - begin)
  if not math.isfinite(loss):
    raise SystemExit(f"torch's loss is {loss}")
  return {
    "side": "compiled" if compiled else "torch",
    "attention": "SDPA flash" if gpu else "SDPA",
    "device": torch.cuda.get_device_name() if gpu else "cpu",
    "seconds": statistics.median(seconds[WARMUP.value :]),
    "bytes": torch.cuda.max_memory_allocated() if gpu else None,
  }


# --- the table


def measure(name: str, side: str, folder: pathlib.Path) -> None:
  """One side, in this process; its row goes to a file of the folder."""
  sizes, path = sizes_of(name), folder / "check.npz"
  if side == "ours":
    row = measure_ours(sizes, path)
  else:
    row = measure_torch(sizes, path, side == "compiled")
  (folder / f"{side}.json").write_text(json.dumps(row))


def line(name: str, row: dict, first: float) -> str:
  """A row of the table; first: seconds of the first side's step."""
  sizes, seconds = sizes_of(name), row["seconds"]
  tflops = sizes.flops / seconds / 1e12
  peak = metrics.peak_tflops(row["device"])
  memory = f"{row['bytes'] / 1e9:.1f}" if row["bytes"] else "-"
  return (
    f"| {'small' if SMALL.value else name} | {row['side']} | {row['attention']} | "
    f"{sizes.rows * sizes.tokens} | {1e3 * seconds:.1f} | {tflops:.3g} | "
    f"{f'{tflops / peak:.1%}' if peak else '-'} | {memory} | {seconds / first:.2f} |"
  )


def figures_of(name: str, row: dict) -> dict[str, record.Figure]:
  """What is kept of a side."""
  name = f"{name}, {row['side']}"
  figures = {f"{name}: step": record.Figure(1e3 * row["seconds"], "ms")}
  if row["bytes"]:
    figures[f"{name}: peak memory"] = record.Figure(row["bytes"] / 1e9, "GB")
  return figures


def main(argv):
  if unknown := set(SIDES.value) - {"ours", "torch", "compiled"}:
    raise SystemExit(f"--sides: {', '.join(unknown)} is none of ours, torch, compiled")
  if EXCHANGE.value:
    side, folder = EXCHANGE.value
    measure(MODELS.value[0], side, pathlib.Path(folder))
    return
  if SIDES.value != ["ours"]:
    load_torch()
  lines, figures, models = [], {}, ["small"] if SMALL.value else MODELS.value
  if not models:
    raise SystemExit("--models is empty")
  for name in models:
    sizes_of(name)  # refuses what there is not
  for name in models:
    with tempfile.TemporaryDirectory() as folder:
      rows = []
      for side in SIDES.value:
        # JAX has no use of the GPU where torch has it.
        env = os.environ | ({} if side == "ours" else {"JAX_PLATFORMS": "cpu"})
        told = [f"--models={name}", f"--exchange={side},{folder}"]
        command = [sys.executable, *sys.argv, *told]
        if code := subprocess.run(command, env=env, check=False).returncode:
          print("\n".join(lines))
          raise SystemExit(f"{name}, {side}: failed with code {code}, see above")
        rows.append(json.loads((pathlib.Path(folder) / f"{side}.json").read_text()))
    lines += [line(name, row, rows[0]["seconds"]) for row in rows]
    for row in rows:
      figures |= figures_of("small" if SMALL.value else name, row)
  sizes = sizes_of(name)
  print(
    f"\n{rows[0]['device']}; a row has {sizes.clips} clips of "
    f"{sizes.tokens // sizes.clips} tokens and {sizes.text} text tokens; remat "
    f"{REMAT.value}\n\n"
    "| model | side | attention | tokens | step ms | TFLOP/s | MFU | peak GB | ratio |"
    "\n| :-- | :-- | :-- | --: | --: | --: | --: | --: | --: |"
  )
  print("\n".join(lines))
  names = ("attention", "remat", "tokens", "clips", "text_tokens", "rows")
  settings = {n: flags.FLAGS[n].value for n in names}
  # Not from JAX: this process starts no backend, which would take the GPU's memory.
  platform = "cpu" if rows[0]["device"] == "cpu" else "gpu"
  device = record.Device(platform, rows[0]["device"], 1)
  record.append("compare_gpu", settings, figures, device=device)


if __name__ == "__main__":
  app.run(main)
