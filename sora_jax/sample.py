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

from sora_jax import (
  checkpoint,
  diffusion,
  finetune,
  metrics,
  patches,
  sampler,
  sharding,
  stages,
)
from sora_jax import recipe as recipes
from sora_jax.autoencoder import Autoencoder, from_json
from sora_jax.data import pack, sources, tokenizer, video
from sora_jax.data.clips import read_manifest
from sora_jax.encode import frame_bucket
from sora_jax.models.dit import DiTConfig
from sora_jax.models.text import TextEncoderConfig
from sora_jax.tasks import dit as dit_task
from sora_jax.text_encoder import FrozenTextEncoder


@dataclasses.dataclass(frozen=True)
class Request:
  """One video to make; frames 1 is an image. Equal requests give equal videos.

  negative_prompt is what guidance leads away from, instead of from no caption at all.
  """

  prompt: str
  width: int
  height: int
  frames: int
  fps: float
  seed: int = 0
  negative_prompt: str = ""


class Sampler:
  """Packs requests of any sizes into rows, integrates them together, and decodes."""

  def __init__(self, params, meta, autoencoder, vocabulary, dtype, encode_text=None):
    """Args: as `from_checkpoint` loads them; vocabulary is a sentencepiece file.

    encode_text: (texts, max_tokens) -> features of each, for a model that was trained
    on those of a frozen text encoder, and takes the place of the vocabulary.
    """
    self.params, self.meta, self.autoencoder = params, meta, autoencoder
    self.vocabulary, self.dtype = vocabulary, dtype
    self.mesh = autoencoder.mesh
    self.model = DiTConfig(**from_json(meta["model"]))
    self._encode_text, text = encode_text, None
    if "features" not in meta["text"]:
      self._tokenizer = tokenizer.Tokenizer(str(vocabulary))
      text = TextEncoderConfig(**from_json(meta["text"]))
    noise = meta.get("noise", {"process": "flow", "target": "velocity"})
    self._process, self._target = noise["process"], noise["target"]
    self._integrate = jax.jit(
      functools.partial(_integrate, self.model, text, dtype, **noise),
      static_argnames="options",
    )

  @classmethod
  def from_checkpoint(
    cls, folder, mesh=None, dtype=None, loras: Sequence[tuple[str, float]] = ()
  ) -> "Sampler":
    """Loads a run's folder, with vae/model and dit/model in it.

    A frozen text encoder is in text/model, or where it was in training.

    Args:
      folder: of the run, or of an imported checkpoint.
      mesh: that params are sharded over; the local devices by default.
      dtype: of the computation.
      loras: safetensors files of adapters that are merged in, and how strongly; 1 is
        as they were trained.

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
    text = checkpoint.load_meta(folder / "dit" / "model")["text"]
    rules = dit_task.DIT_RULES if "features" in text else dit_task.SHARDING_RULES
    params, meta = checkpoint.load_model(
      folder / "dit" / "model",
      lambda shapes: sharding.param_shardings(shapes, rules, mesh),
    )
    if "vae" not in meta or meta["vae"] != autoencoder.meta.get("id"):
      raise ValueError(
        f"{folder}: dit/model was trained on latents of another VAE than vae/model "
        f"({meta.get('vae')} and {autoencoder.meta.get('id')}); take both of one run"
      )
    for path, strength in loras:
      config = DiTConfig(**from_json(meta["model"]))
      params = finetune.merge_file(params, path, config, mesh, strength)
    encode_text = None
    if "features" in text:
      place = folder
      if not (folder / "text" / "model").is_dir():
        place = pathlib.Path(text.get("folder", folder))
      encode_text = FrozenTextEncoder(place, mesh, dtype, text["features"]).encode
    vocabulary = folder / "dit" / "model" / "tokenizer.model"
    return cls(params, meta, autoencoder, vocabulary, dtype, encode_text)

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
    options: sampler.Options | None = None,
    *,
    rows: int = 4,
  ) -> list[np.ndarray]:
    """Videos of the requests, in order: uint8 [T, H, W, 3] each, of legal sizes.

    Args:
      requests: what to make.
      options: of the solver and of guidance (guidance_scale 1 is half the work); the
        defaults of `sampler.Options` if not given.
      rows: packed rows computed at once.

    Raises:
      ValueError: for options that the model's noise process cannot be sampled with.
    """
    options = options or sampler.Options()
    negative_prompts = "".join(request.negative_prompt for request in requests)
    options.check(self._process, self._target, negative_prompts)
    requests = [self.legal(request) for request in requests]
    if not self.meta["conditional"]:
      if any(request.prompt for request in requests):
        logging.warning("the model was trained without captions: it ignores prompts")
      requests = [
        dataclasses.replace(request, prompt="", negative_prompt="")
        for request in requests
      ]
      options = dataclasses.replace(
        options, guidance_scale=1.0, guidance_rescale=0.0, cfg_zero=False
      )
    grids = [self._grid(request) for request in requests]
    texts = self._texts(
      [(request.prompt, request.negative_prompt) for request in requests]
    )
    budget = pack.Budget(
      # Longer clips than in training get a longer row, in steps, for few compiles.
      _row_length(self.meta["tokens"], max(np.prod(grid) for grid in grids)),
      self.meta["text_tokens"],
      self.meta["segments"],
    )
    lengths = [
      (int(np.prod(grid)), max(map(len, both)))
      for grid, both in zip(grids, texts, strict=True)
    ]
    planned = pack.plan(lengths, budget, seed=0, epoch=0)
    rows = self.autoencoder.batch_size(min(rows, len(planned)))
    latents, begin = {}, time.monotonic()
    for i in range(0, len(planned), rows):
      part = planned[i : i + rows]
      batch = self._batch(part, rows, budget, requests, grids, texts)
      with jax.set_mesh(self.mesh):
        patch_BLP = self._integrate(
          self.params,
          sharding.shard_batch(batch, self.mesh),
          self._table(batch, options),
          options.guidance_scale,
          # What is an array anyway must not make another program.
          options=dataclasses.replace(
            options,
            steps=1,
            shift=1.0,
            shift_tokens=0,
            guidance_scale=float(options.guidance_scale != 1.0),
          ),
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

  def _texts(self, wanted):
    """Ids or features, in place of each text of pairs."""
    limit, texts = self.meta["max_text_tokens"], sorted(set(sum(wanted, ())))
    if self._encode_text is None:
      made = [np.array(self._tokenizer.encode(text, limit), np.int32) for text in texts]
    else:
      pad_to = self.meta["text"]["pad_to"]
      made = [
        np.pad(features_SE, ((0, max(0, pad_to - len(features_SE))), (0, 0)))
        for features_SE in self._encode_text(texts, limit)
      ]
    known = dict(zip(texts, made, strict=True))
    return [tuple(known[text] for text in pair) for pair in wanted]

  def _table(self, batch, options) -> sampler.Table:
    """The solver's coefficients for each clip of the rows: [calls, ..., B, N]."""
    ids_N = 1 + np.arange(self.meta["segments"])
    tokens_BN = (batch["segment_L"][:, :, None] == ids_N).sum(axis=1)
    shift_BN = diffusion.resolution_shift(
      options.shift, np.maximum(tokens_BN, 1.0), options.shift_tokens
    )
    levels = sampler.schedule(options.steps, np.broadcast_to(shift_BN, tokens_BN.shape))
    return sampler.make_table(options.method, levels, self._process, options.eta)

  def _batch(self, part, rows, budget, requests, grids, texts):
    L, S, P = budget.tokens, budget.text_tokens, self.model.patch_width
    batch = {
      "noise_LP": np.zeros((rows, L, P), np.float32),
      "segment_L": np.zeros((rows, L), np.int32),
      "position_L3": np.zeros((rows, L, 3), np.float32),
      "group_L": np.zeros((rows, L), np.int32),
      "seed_L": np.zeros((rows, L), np.uint32),
      "token_L": np.zeros((rows, L), np.uint32),
    }
    text_name = "text_S" if self._encode_text is None else "text_SE"
    for prefix in ("", "empty_"):
      for name in ("text_segment_S", "text_position_S"):
        batch[prefix + name] = np.zeros((rows, S), np.int32)
      like = texts[0][0]
      batch[prefix + text_name] = np.zeros((rows, S, *like.shape[1:]), like.dtype)
    for row, indices in enumerate(part):
      start, text_starts = 0, [0, 0]
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
        batch["seed_L"][row, here] = request.seed % 2**32
        batch["token_L"][row, here] = np.arange(here.stop - here.start)
        for k, (prefix, text) in enumerate(
          zip(("", "empty_"), texts[index], strict=True)
        ):
          there = slice(text_starts[k], text_starts[k] + len(text))
          batch[prefix + text_name][row, there] = text
          batch[f"{prefix}text_segment_S"][row, there] = n + 1
          batch[f"{prefix}text_position_S"][row, there] = np.arange(len(text))
          text_starts[k] = there.stop
        start = here.stop
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
  model,
  text,
  dtype,
  params,
  batch,
  table,
  guidance_scale,
  *,
  process,
  target,
  options,
):
  """Noise to latents of packed rows; pure.

  In noise_LP given tokens (of odd groups) hold their data, and keep it. Of options the
  guidance_scale is 0 for no guidance; how much is the argument.
  """
  segment_BL, given_BL = batch["segment_L"], batch["group_L"] % 2 == 1

  def text_of(prefix):
    names = ("text_S" if text else "text_SE", "text_segment_S", "text_position_S")
    packed = {name: batch[prefix + name] for name in names}
    return packed, dit_task.encode_text(text, params, packed, dtype)

  (packed, text_BSE), (empty, empty_BSE) = text_of(""), text_of("empty_")
  context = {**batch, **packed}
  # Both in one call of twice the rows.
  twice = {
    name: jnp.concatenate([context[name], {**context, **empty}[name]])
    for name in ("segment_L", "position_L3", "group_L", "text_segment_S")
  }
  ids_N = 1 + jnp.arange(table.level.shape[-1])
  counts_BLN = (segment_BL[:, :, None] == ids_N) & ~given_BL[:, :, None]

  def per_token(c_BN):
    # No matmul with a one-hot: accelerators round a float32 matmul's inputs.
    c_BL = jnp.take_along_axis(c_BN, jnp.maximum(segment_BL - 1, 0), axis=1)
    return jnp.where(segment_BL > 0, c_BL, 0.0)[..., None]

  def clip_mean(x_BL):
    total_BN = jnp.sum(jnp.where(counts_BLN, x_BL[:, :, None], 0.0), axis=1)
    return per_token(total_BN / jnp.maximum(counts_BLN.sum(axis=1), 1))[..., 0]

  def network(x_BLP, level_BN, context, text_BSE):
    # Each clip has two groups: noisy tokens, and given ones at level 0.
    t_BG = jnp.stack([level_BN, jnp.zeros_like(level_BN)], -1).reshape(
      len(level_BN), -1
    )
    return dit_task.predict(model, params, x_BLP, t_BG, context, text_BSE, dtype)

  def plain(x_BLP, level_BN):
    return network(x_BLP, level_BN, context, text_BSE)

  def guided(x_BLP, level_BN):
    predicted = network(
      jnp.concatenate([x_BLP, x_BLP]),
      jnp.concatenate([level_BN, level_BN]),
      twice,
      jnp.concatenate([text_BSE, empty_BSE]),
    )
    low, high = options.guidance_interval
    inside_BN = (level_BN >= low) & (level_BN <= high)
    scale_BL1 = per_token(jnp.where(inside_BN, guidance_scale, 1.0))
    return sampler.guide(*jnp.split(predicted, 2), scale_BL1, options, clip_mean)

  def data(x_BLP, level_BN, index):
    low, high = options.guidance_interval
    if not options.guidance_scale:
      predicted = plain(x_BLP, level_BN)
    elif (low, high) == (0.0, 1.0):
      predicted = guided(x_BLP, level_BN)
    else:
      inside = jnp.any((level_BN >= low) & (level_BN <= high))
      predicted = jax.lax.cond(inside, guided, plain, x_BLP, level_BN)
    if options.cfg_zero:
      step = index // 2 if options.method == "heun" else index
      predicted = jnp.where(step < options.zero_steps, 0.0, predicted)
    return diffusion.to_x0(predicted, x_BLP, per_token(level_BN), target, process)

  def noise(index):
    """Of each token by its clip's seed, so that it does not depend on the row."""

    def draw(seed, token):
      key = jax.random.fold_in(jax.random.key(seed), index)
      return jax.random.normal(jax.random.fold_in(key, token), (model.patch_width,))

    return jax.vmap(jax.vmap(draw))(batch["seed_L"], batch["token_L"])

  return sampler.integrate(
    data,
    batch["noise_LP"],
    table,
    noise if options.stochastic else None,
    per_token,
    given_BL[..., None],
  )


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
  videos = model.sample(requests, config, rows=config.rows)
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
        *(clip.captions[:1] or ("",)),
        *(clip.width, clip.height, clip.frames, clip.fps, i),
        recipe.sample.negative_prompt,
      )
      for i, clip in enumerate(heldout)
    ]
  return [
    Request(
      *(prompt, width, height, frames, fps or recipe.dit.reference_fps, seed),
      recipe.sample.negative_prompt,
    )
    for seed, (prompt, (width, height), frames, fps) in enumerate(recipe.sample.prompts)
  ]


# --- the command


def _define_flags():
  flags.DEFINE_string("checkpoint", None, "Folder of a run, with vae/ and dit/ in it.")
  flags.DEFINE_multi_string("lora", [], "Adapters to merge in, .safetensors files.")
  flags.DEFINE_float("lora_strength", 1.0, "How strongly; 1 is as they were trained.")
  flags.DEFINE_multi_string("prompt", [], "What to make; may be given several times.")
  flags.DEFINE_string("prompts_file", None, "Text file with one prompt a line.")
  flags.DEFINE_string("size", "64x64", "WIDTHxHEIGHT in pixels.")
  flags.DEFINE_integer("frames", None, "Frames; 17 by default, 1 for images.", 1)
  flags.DEFINE_float("fps", 12.0, "Frames per second.", 0.1)
  flags.DEFINE_integer("seed", 0, "Seed of the first prompt; the next gets the next.")
  flags.DEFINE_string("out", "sample.mp4", "File to write: .mp4, .webm, .gif or .png.")
  flags.DEFINE_string("sheet", None, "Also write a contact sheet, a .png.")
  flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
  default = sampler.Options()
  flags.DEFINE_integer("steps", default.steps, "Steps of the solver.", 1)
  flags.DEFINE_enum("method", default.method, sampler.METHODS, "Solver.")
  flags.DEFINE_float("eta", default.eta, "Noise of ddim, 0 to 1.")
  flags.DEFINE_float("shift", default.shift, "Above 1: more steps at much noise.")
  flags.DEFINE_integer(
    "shift_tokens", 0, "Tokens that `shift` is for; others get more or less. 0 = all."
  )
  flags.DEFINE_float(
    "guidance_scale", default.guidance_scale, "Classifier-free guidance; 1 = none."
  )
  flags.DEFINE_list("guidance_interval", ["0", "1"], "Noise levels where it acts.")
  flags.DEFINE_float("guidance_rescale", 0.0, "Against too much contrast, 0 to 1.")
  flags.DEFINE_bool("cfg_zero", default.cfg_zero, "CFG-Zero* guidance.")
  flags.DEFINE_integer("zero_steps", default.zero_steps, "Its still first steps.")


def _options(args) -> sampler.Options:
  values = {
    field.name: getattr(args, field.name)
    for field in dataclasses.fields(sampler.Options)
  }
  try:
    low, high = map(float, args.guidance_interval)
  except ValueError:
    raise ValueError(
      f"--guidance_interval={','.join(args.guidance_interval)} is not LOW,HIGH"
    ) from None
  return sampler.Options(**{**values, "guidance_interval": (low, high)})


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
    Request(
      *(prompt, int(size[1]), int(size[2]), frames, args.fps, args.seed + i),
      args.negative_prompt,
    )
    for i, prompt in enumerate(prompts)
  ]
  options = _options(args)
  loras = [(path, args.lora_strength) for path in args.lora]
  model = Sampler.from_checkpoint(args.checkpoint, loras=loras)
  videos = model.sample(requests, options)
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
