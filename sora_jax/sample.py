"""Samples videos and images from a trained model.

  python -m sora_jax.sample --checkpoint=runs/quickstart \
    --prompt="a red circle moves right" --size=64x64 --frames=17 --out=x.mp4

  python -m sora_jax.sample --config=configs/quickstart.py

The second form is the stage "sample" of a run: the prompts of config.sample.
"""

import dataclasses
import functools
import json
import pathlib
import re
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from sora_jax import checkpoint, metrics, patches, sampler, sharding, stages
from sora_jax import recipe as recipes
from sora_jax.autoencoder import Autoencoder, from_json
from sora_jax.data import pack, sources, tokenizer, video
from sora_jax.data.clips import read_manifest
from sora_jax.encode import frame_bucket
from sora_jax.models.dit import DiTConfig
from sora_jax.models.text import TextEncoderConfig
from sora_jax.tasks import dit as dit_task


@dataclasses.dataclass(frozen=True)
class Request:
  """One video to make; frames 1 is an image. Equal requests give equal videos."""

  prompt: str
  width: int
  height: int
  frames: int
  fps: float
  seed: int = 0


class Sampler:
  """Packs requests of any sizes into rows, integrates them together, and decodes."""

  def __init__(self, params, meta, autoencoder, vocabulary, dtype):
    """Args: as `from_checkpoint` loads them; vocabulary is a sentencepiece file."""
    self.params, self.meta, self.autoencoder = params, meta, autoencoder
    self.mesh = autoencoder.mesh
    self.model = DiTConfig(**from_json(meta["model"]))
    self._tokenizer = tokenizer.Tokenizer(str(vocabulary))
    text = TextEncoderConfig(**from_json(meta["text"]))
    self._integrate = jax.jit(
      functools.partial(_integrate, self.model, text, dtype),
      static_argnames=("method", "guided"),
    )

  @classmethod
  def from_checkpoint(cls, folder, mesh=None, dtype=None) -> "Sampler":
    """Loads a run's folder, with vae/model and dit/model in it.

    Raises:
      ValueError: if one of the models is missing, damaged, or made for another.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
      raise ValueError(f"{folder}: no such checkpoint folder")
    if dtype is None:
      dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices())
    autoencoder = Autoencoder(folder / "vae" / "model", mesh, dtype)
    params, meta = checkpoint.load_model(
      folder / "dit" / "model",
      lambda shapes: sharding.param_shardings(shapes, dit_task.SHARDING_RULES, mesh),
    )
    if "vae" not in meta or meta["vae"] != autoencoder.meta.get("id"):
      raise ValueError(
        f"{folder}: dit/model was trained on latents of another VAE than vae/model "
        f"({meta.get('vae')} and {autoencoder.meta.get('id')}); take both of one run"
      )
    vocabulary = folder / "dit" / "model" / "tokenizer.model"
    return cls(params, meta, autoencoder, vocabulary, dtype)

  @property
  def size_multiple(self) -> int:
    """Widths and heights are multiples of it."""
    return self.autoencoder.config.space_factor * self.model.patch_size[1]

  def legal(self, request: Request) -> Request:
    """The nearest request that the model can make; logs what it changed."""
    multiple = self.size_multiple
    legal = dataclasses.replace(
      request,
      width=max(multiple, round(request.width / multiple) * multiple),
      height=max(multiple, round(request.height / multiple) * multiple),
      frames=sources.legal_frames(request.frames),
    )
    if legal != request:
      logging.warning(
        "%dx%d, %d frames is off the model's grid (multiples of %d, 1 + 4k frames): "
        "making %dx%d, %d frames",
        *(request.width, request.height, request.frames, multiple),
        *(legal.width, legal.height, legal.frames),
      )
    return legal

  def sample(
    self,
    requests: Sequence[Request],
    *,
    steps: int = 32,
    method: str = "euler",
    guidance_scale: float = 3.0,
    shift: float = 1.0,
    rows: int = 4,
  ) -> list[np.ndarray]:
    """Videos of the requests, in order: uint8 [T, H, W, 3] each, of legal sizes.

    Args:
      requests: what to make.
      steps, method, shift: of the ODE solver, see `sampler`.
      guidance_scale: of classifier-free guidance; 1 = none, and half the work.
      rows: packed rows computed at once.
    """
    requests = [self.legal(request) for request in requests]
    if not self.meta["conditional"]:
      if any(request.prompt for request in requests):
        logging.warning("the model was trained without captions: it ignores prompts")
      requests = [dataclasses.replace(request, prompt="") for request in requests]
      guidance_scale = 1.0
    grids = [self._grid(request) for request in requests]
    texts = [
      self._tokenizer.encode(r.prompt, self.meta["max_text_tokens"]) for r in requests
    ]
    budget = pack.Budget(
      # Longer clips than in training get a longer row, in steps, for few compiles.
      _row_length(self.meta["tokens"], max(np.prod(grid) for grid in grids)),
      self.meta["text_tokens"],
      self.meta["segments"],
    )
    lengths = [
      (int(np.prod(grid)), len(ids)) for grid, ids in zip(grids, texts, strict=True)
    ]
    planned = pack.plan(lengths, budget, seed=0, epoch=0)
    rows = self.autoencoder.batch_size(min(rows, len(planned)))
    levels = sampler.schedule(steps, shift)
    latents, begin = {}, time.monotonic()
    for i in range(0, len(planned), rows):
      part = planned[i : i + rows]
      batch = self._batch(part, rows, budget, requests, grids, texts)
      with jax.set_mesh(self.mesh):
        patch_BLP = self._integrate(
          self.params,
          sharding.shard_batch(batch, self.mesh),
          levels,
          guidance_scale,
          method=method,
          guided=guidance_scale != 1.0,
        )
      patch_BLP = np.asarray(jax.device_get(patch_BLP))
      for row, indices in enumerate(part):
        start = 0
        for index in indices:
          stop = start + lengths[index][0]
          latents[index] = patches.unpatchify(
            patch_BLP[row, start:stop], grids[index], self.model.patch_size
          )
          start = stop
      done = len(latents)
      eta = (time.monotonic() - begin) / done * (len(requests) - done)
      logging.info(
        "sampled %d/%d, ETA %s", done, len(requests), metrics.format_seconds(eta)
      )
    return self._decode([latents[i] for i in range(len(requests))], requests)

  def _grid(self, request):
    shape = self.autoencoder.config.latent_shape(
      request.frames, request.height, request.width
    )
    return patches.grid_shape(shape, self.model.patch_size)

  def _batch(self, part, rows, budget, requests, grids, texts):
    L, S, P = budget.tokens, budget.text_tokens, self.model.patch_width
    batch = {
      "noise_LP": np.zeros((rows, L, P), np.float32),
      "segment_L": np.zeros((rows, L), np.int32),
      "position_L3": np.zeros((rows, L, 3), np.float32),
      "group_L": np.zeros((rows, L), np.int32),
    }
    for name in ("text_S", "text_segment_S", "text_position_S"):
      batch[name] = np.zeros((rows, S), np.int32)
      batch[f"empty_{name}"] = np.zeros((rows, S), np.int32)
    batch["t_scale_G"] = np.tile(
      np.array([1.0, 0.0], np.float32), (rows, self.meta["segments"])
    )
    for row, indices in enumerate(part):
      start = text_start = 0
      for n, index in enumerate(indices):
        request, grid = requests[index], grids[index]
        here = slice(start, start + int(np.prod(grid)))
        # Noise of its own for each request: it does not depend on its company.
        rng = np.random.default_rng(request.seed)
        batch["noise_LP"][row, here] = rng.standard_normal(
          (here.stop - start, P), np.float32
        )
        position_L3 = patches.grid_positions(grid)
        scale = self.meta["reference_fps"] / request.fps
        position_L3[:, 0] *= self.model.patch_size[0] * scale
        batch["position_L3"][row, here] = position_L3
        batch["segment_L"][row, here] = n + 1
        batch["group_L"][row, here] = 2 * n
        there = slice(text_start, text_start + len(texts[index]))
        batch["text_S"][row, there] = texts[index]
        batch["text_segment_S"][row, there] = n + 1
        batch["text_position_S"][row, there] = np.arange(len(texts[index]))
        batch["empty_text_S"][row, n] = tokenizer.EOS
        batch["empty_text_segment_S"][row, n] = n + 1
        start, text_start = here.stop, there.stop
    return batch

  def _decode(self, latents, requests) -> list[np.ndarray]:
    groups = {}
    for i, request in enumerate(requests):
      key = (request.height, request.width, request.frames == 1)
      groups.setdefault(key, []).append(i)
    videos = {}
    for group in groups.values():
      # One length for all of a size: the decoder is causal, so padding is exact.
      frames = frame_bucket(max(requests[i].frames for i in group))
      length = self.autoencoder.config.latent_shape(
        frames, requests[group[0]].height, requests[group[0]].width
      )[0]
      size = self.autoencoder.batch_size(min(8, len(group)))
      for start in range(0, len(group), size):
        part = group[start : start + size]
        padded = [latents[i] for i in part] + [latents[part[0]]] * (size - len(part))
        batch = np.stack(
          [
            np.pad(x, ((0, length - len(x)), (0, 0), (0, 0), (0, 0)), mode="edge")
            for x in padded
          ]
        )
        decoded = self.autoencoder.decode(batch)
        for i, video_THWC in zip(part, decoded, strict=False):
          videos[i] = video_THWC[: requests[i].frames]
    return [videos[i] for i in range(len(requests))]


def _integrate(
  model, text, dtype, params, batch, levels, guidance_scale, *, method, guided
):
  """Noise to latents of packed rows; pure."""

  def text_of(prefix):
    names = ("text_S", "text_segment_S", "text_position_S")
    packed = {name: batch[prefix + name] for name in names}
    return packed, dit_task.encode_text(text, params, packed, dtype)

  (packed, text_BSE), (empty, empty_BSE) = text_of(""), text_of("empty_")

  def velocity(x_BLP, t):
    def predict(x_BLP, t_scale_BG, context, text_BSE):
      return dit_task.predict(
        model, params, x_BLP, t * t_scale_BG, context, text_BSE, dtype
      )

    context = {**batch, **packed}
    if not guided:
      return predict(x_BLP, batch["t_scale_G"], context, text_BSE)
    # Both in one call of twice the rows.
    twice = {
      name: jnp.concatenate([context[name], {**context, **empty}[name]])
      for name in ("segment_L", "position_L3", "group_L", "text_segment_S")
    }
    v = predict(
      jnp.concatenate([x_BLP, x_BLP]),
      jnp.concatenate([batch["t_scale_G"]] * 2),
      twice,
      jnp.concatenate([text_BSE, empty_BSE]),
    )
    return sampler.guide(*jnp.split(v, 2), guidance_scale)

  return sampler.integrate(velocity, batch["noise_LP"], levels, method)


def _row_length(tokens: int, longest: int) -> int:
  """Row length for clips of up to `longest` tokens: that of training, or doubled."""
  while tokens < longest:
    tokens *= 2
  return int(tokens)


# --- the stage


def run(recipe: recipes.Recipe, workdir) -> None:
  """Makes the prompts of config.sample: files, a contact sheet, samples.jsonl."""
  folder, config = pathlib.Path(workdir) / "sample", recipe.sample
  requests = requests_of(recipe, workdir)
  model = Sampler.from_checkpoint(workdir, dtype=recipe.dtype)
  videos = model.sample(
    requests,
    steps=config.steps,
    method=config.method,
    guidance_scale=config.guidance_scale,
    shift=config.shift,
    rows=config.rows,
  )
  write_samples(folder, requests, videos)
  logging.info("%d samples and contact_sheet.png are in %s", len(videos), folder)


def write_samples(folder, requests, videos, shown: int = 16) -> list[pathlib.Path]:
  """Writes a file each, samples.jsonl and a sheet of up to `shown`; the paths."""
  paths, rows = [], []
  for i, (request, video_THWC) in enumerate(zip(requests, videos, strict=True)):
    words = re.sub(r"\W+", "-", request.prompt.lower()).strip("-")[:60]
    suffix = ".png" if len(video_THWC) == 1 else ".mp4"
    paths.append(folder / f"{i:03d}-{words}{suffix}")
    metadata = {"comment": request.prompt}
    video.write(paths[-1], video_THWC, request.fps, metadata=metadata)
    rows.append({"file": paths[-1].name, **dataclasses.asdict(request)})
  chosen = range(0, len(videos), -(-len(videos) // shown))
  video.contact_sheet(
    folder / "contact_sheet.png",
    [videos[i] for i in chosen],
    [requests[i].prompt for i in chosen],
  )
  (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return paths


def requests_of(recipe: recipes.Recipe, workdir, count=8) -> list[Request]:
  """The prompts of config.sample, or else first captions of `count` held-out clips."""
  if not recipe.sample.prompts:
    clips = read_manifest(pathlib.Path(workdir) / "data" / "manifest.jsonl")
    heldout = [clip for clip in clips if clip.split == "heldout"][:count]
    return [
      Request(
        *(clip.captions[:1] or ("",)), clip.width, clip.height, clip.frames, clip.fps, i
      )
      for i, clip in enumerate(heldout)
    ]
  return [
    Request(prompt, width, height, frames, fps or recipe.dit.reference_fps, seed)
    for seed, (prompt, (width, height), frames, fps) in enumerate(recipe.sample.prompts)
  ]


# --- the command


def _define_flags():
  flags.DEFINE_string("checkpoint", None, "Folder of a run, with vae/ and dit/ in it.")
  flags.DEFINE_multi_string("prompt", [], "What to make; may be given several times.")
  flags.DEFINE_string("prompts_file", None, "Text file with one prompt a line.")
  flags.DEFINE_string("size", "64x64", "WIDTHxHEIGHT in pixels.")
  flags.DEFINE_integer("frames", None, "Frames; 17 by default, 1 for images.", 1)
  flags.DEFINE_float("fps", 12.0, "Frames per second.", 0.1)
  flags.DEFINE_integer("seed", 0, "Seed of the first prompt; the next gets the next.")
  flags.DEFINE_string("out", "sample.mp4", "File to write: .mp4, .webm, .gif or .png.")
  flags.DEFINE_string("sheet", None, "Also write a contact sheet, a .png.")
  flags.DEFINE_integer("steps", 32, "Steps of the solver.", 1)
  flags.DEFINE_enum("method", "euler", sampler.METHODS, "Solver.")
  flags.DEFINE_float("guidance_scale", 3.0, "Classifier-free guidance; 1 = none.")
  flags.DEFINE_float("shift", 1.0, "Shift of the noise levels; above 1: more noise.")


def _main(argv):
  stages.start_logging()
  args = flags.FLAGS
  if len(argv) > 1:
    raise ValueError(f"unexpected arguments {argv[1:]}; quote the prompt")
  if stages.CONFIG.value is not None:
    if args.checkpoint or args.prompt or args.prompts_file:
      raise ValueError(
        "--config runs the stage; for prompts of your own give --checkpoint instead"
      )
    recipe = recipes.read(stages.CONFIG.value)
    return stages.run(("sample",), recipe, stages.workdir())
  if not args.checkpoint:
    raise ValueError("--checkpoint is missing: the folder of a run, as runs/quickstart")
  prompts = list(args.prompt)
  if args.prompts_file:
    path = pathlib.Path(args.prompts_file)
    if not path.is_file():
      raise ValueError(f"--prompts_file: {path} is not a file")
    prompts += [line.strip() for line in path.read_text().splitlines() if line.strip()]
  if not prompts:
    raise ValueError("no prompt: give --prompt or --prompts_file")
  size = re.fullmatch(r"(\d+)x(\d+)", args.size)
  if not size or "0" in size.groups():
    raise ValueError(f"--size={args.size} is not WIDTHxHEIGHT, such as 64x64")
  out = pathlib.Path(args.out)
  if out.suffix not in (".mp4", ".webm", ".gif", ".png"):
    raise ValueError(f"--out={out}: the name must end in .mp4, .webm, .gif or .png")
  frames = args.frames or (1 if out.suffix == ".png" else 17)
  if out.suffix == ".png" and frames > 1:
    raise ValueError(f"--out={out} holds one image, but --frames={frames}")
  requests = [
    Request(prompt, int(size[1]), int(size[2]), frames, args.fps, args.seed + i)
    for i, prompt in enumerate(prompts)
  ]
  videos = Sampler.from_checkpoint(args.checkpoint).sample(
    requests,
    steps=args.steps,
    method=args.method,
    guidance_scale=args.guidance_scale,
    shift=args.shift,
  )
  for i, (request, video_THWC) in enumerate(zip(requests, videos, strict=True)):
    name = out.name if len(videos) == 1 else f"{out.stem}-{i:03d}{out.suffix}"
    path = out.with_name(name)
    video.write(path, video_THWC, request.fps, metadata={"comment": request.prompt})
    logging.info("%s: %s", path, request.prompt)
  if args.sheet:
    video.contact_sheet(args.sheet, videos, prompts)
    logging.info("%s: contact sheet", args.sheet)


if __name__ == "__main__":
  _define_flags()
  stages.run_app(_main)
