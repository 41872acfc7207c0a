"""The typed form of a config: every key, its default and what has to fit together.

A config file returns a ConfigDict; `read` turns it into a `Recipe`, so that an unknown
key, a wrong type or sizes that do not go together fail before any work is done.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sora_jax.data import pixel_cache
from sora_jax.data.intake.filters import LEAST_RATIO, Filter
from sora_jax.diffusion import solvers
from sora_jax.models.caption_encoder import TextEncoderConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.models.lora import LoRAConfig
from sora_jax.models.vae import VAEConfig
from sora_jax.packing import time_grid
from sora_jax.packing.time_grid import TIME_FACTOR
from sora_jax.run import convert
from sora_jax.runtime.fields import extends, free
from sora_jax.tasks.dit import DiTLossConfig
from sora_jax.tasks.vae import VAELossConfig
from sora_jax.training import optim
from sora_jax.training.config import TrainConfig
from sora_jax.training.profiling import Profile

# Keys of the DiT that are the VAE's and the text encoder's to decide.
_DERIVED = {"channels", "text_width"}
CACHES = ("auto", "none", *pixel_cache.CODECS)
STAGES = ("data", "vae", "encode", "dit", "sample", "evaluate")


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Sizes of the device mesh's axes; -1 takes what is left."""

  data: int = 1
  fsdp: int = -1
  context: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Data:
  """Where clips come from and what size they get.

  source: "shapes" (generated), a folder of videos and images, or "tfds:NAME", a
    TFDS data set that is prepared, see data/tfds_source.py.
  world: what generated clips can show, "whole" or "simple", see data/shapes.py.
  train_clips, heldout_clips: number of generated clips.
  max_frames, max_pixels: of a clip; longer videos are cut, larger ones made smaller.
  size_multiple: height and width are multiples of it.
  fps: frames are taken at most at this rate; 0 = the video's own.
  heldout_share: of a folder's clips, where its manifest does not say; chosen by what is
    in the files, so that copies are on one side. heldout_min: clips at least, but no
    more than a quarter; with a share of 0 it is one.
  measure: decode each file of a folder once, to find cuts, damage, and what `filter`
    and `crop_borders` go by; False reads headers only.
  cut_threshold: a frame that differs from the one before this many times as much as
    its neighbours do begins a scene, and no clip goes on into it; 0 cuts nowhere.
  crop_borders: cut off black bars that are on all frames. score_fn: "module:function"
    that scores clips, see data/intake/score.py. filter: see data/intake/filters.py.
  allow_outside: captions and entries of a manifest may be outside of the folder.
  workers: processes that read batches; 0 = a thread, -1 = what the machine has.
  cache: "raw" or "h264" keep clips at training size on disk for the VAE's training, see
    data/pixel_cache.py; "none" decodes files at each visit. "auto" is raw where clips
    of files are visited more than once and half of the free disk holds them.
  """

  source: str = "shapes"
  world: str = "whole"
  train_clips: int = 1000
  heldout_clips: int = 100
  max_frames: int = 33
  max_pixels: int = 96 * 64
  size_multiple: int = 16
  fps: float = 0.0
  heldout_share: float = 0.05
  heldout_min: int = 4
  measure: bool = True
  cut_threshold: float = extends(3.0)
  crop_borders: bool = extends(False)
  score_fn: str = extends("")
  filter: Filter = Filter()
  allow_outside: bool = False
  workers: int = free(-1)
  cache: str = free("auto")


@dataclasses.dataclass(frozen=True)
class VAEStage:
  """folder: that holds vae/model, which is taken as it is, and all other keys but
  `model` have no effect; "" = the stage trains one.

  crop: (frames, height, width) that clips are cut or padded to for training.
  """

  train: TrainConfig
  folder: str = ""
  model: VAEConfig = VAEConfig()
  loss: VAELossConfig = VAELossConfig()
  batch_size: int = 8
  crop: tuple[int, int, int] = (17, 64, 64)
  eval_batches: int = free(4)


@dataclasses.dataclass(frozen=True)
class Encode:
  """batch_size: clips encoded at once. clips_per_shard: of the written files.

  devices_per_clip: of a host, that share the height of each clip's frames, so that a
  clip may be larger than one of them holds; also when the VAE is evaluated. extras:
  single frames also kept as images, for key frames. max_sizes: most frame sizes to
  compile for; clips of rarer sizes are fitted to the nearest. frame_buckets: lengths
  (1 + 4k) to compile for, clips are padded to the next; () = powers of two.
  """

  batch_size: int = free(8)
  devices_per_clip: int = free(1)
  clips_per_shard: int = 256
  extras: int = 2
  max_sizes: int = 32
  frame_buckets: tuple[int, ...] = free(())


@dataclasses.dataclass(frozen=True)
class Text:
  """A frozen text encoder, in place of the small one that the DiT is trained with.

  folder: that holds text/model; "" = none, and the other keys have no effect. Its
  features of captions are encoded and stored with the latents. width: of them.
  max_tokens: longest caption, its end included. pad_to: zero features, which are
  attended, fill up each caption to that many, as Wan was trained with 512; 0 = none.
  """

  folder: str = ""
  width: int = 4096
  max_tokens: int = 512
  pad_to: int = 0


@dataclasses.dataclass(frozen=True)
class DiTStage:
  """rows: packed rows of a batch, each of `tokens`, `text_tokens` and `segments`.

  init_from: folder whose dit/model training begins with; "" = from nothing. It needs
  the VAE that this was trained on: config.vae.folder. lora: train only adapters of it.
  text, max_text_tokens: the small text encoder and its longest caption; neither has an
  effect with config.text.folder. reference_fps: frame rate at which one latent frame
  is one step of the time position. caption_dropout, given_prob, extra_prob: shares of
  visits without caption, with given tokens, with extra image tokens.
  """

  train: TrainConfig
  init_from: str = ""
  lora: LoRAConfig = LoRAConfig()
  model: DiTConfig = DiTConfig()
  text: TextEncoderConfig = TextEncoderConfig()
  loss: DiTLossConfig = DiTLossConfig()
  rows: int = 4
  tokens: int = 512
  text_tokens: int = 128
  segments: int = 16
  max_text_tokens: int = 48
  reference_fps: float = 16.0
  caption_dropout: float = 0.1
  given_prob: float = 0.3
  extra_prob: float = 0.2
  eval_batches: int = free(4)


@dataclasses.dataclass(frozen=True)
class Sample(solvers.Options):
  """What the sample stage makes, and how sampling is done everywhere.

  prompts: (text, (width, height), frames, fps) each; fps 0 = reference_fps.
  negative_prompt: what guidance leads away from. rows: packed rows computed at once.
  """

  prompts: tuple[tuple[str, tuple[int, int], int, float], ...] = extends(())
  negative_prompt: str = ""
  rows: int = free(4)


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """clips: held-out clips reconstructed, and prompts of them sampled.

  Of generated shapes there may be more prompts than held-out clips. seeds: samples of
  each prompt. split: "heldout", or "train" to see what has been memorised.
  """

  clips: int = extends(64)
  seeds: int = extends(1)
  split: str = extends("heldout")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A whole run. precision: "auto" is bfloat16 on TPU and GPU, float32 on CPU.

  matmul_precision: of float32 matmuls, a name that `jax.default_matmul_precision`
  takes; "" is the device's own. "BF16_BF16_F32" is what TPUs do by default; CPUs with
  AMX (Xeons since 2023) then train up to 1.5 times as fast.

  What a change of a field means for a run that has begun is said with the field, see
  `runtime.fields`; of those of a section that is free, all are.
  """

  data: Data
  vae: VAEStage
  dit: DiTStage
  encode: Encode = Encode()
  text: Text = Text()
  sample: Sample = Sample()
  evaluate: Evaluate = Evaluate()
  mesh: Mesh = free(Mesh())
  profile: Profile = free(Profile())
  stages: tuple[str, ...] = free(STAGES)
  seed: int = 0
  precision: str = free("auto")
  matmul_precision: str = free("")

  def matmuls(self):
    """A context in which float32 matmuls have the precision of the config."""
    if not self.matmul_precision:
      return contextlib.nullcontext()
    return jax.default_matmul_precision(self.matmul_precision)

  @property
  def dtype(self):
    """Dtype of the computation; params stay float32."""
    if self.precision == "auto":
      return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(self.precision)


def read(config) -> Recipe:
  """Typed form of a ConfigDict (or nested dict).

  Raises:
    ValueError: naming the key, for an unknown or missing key, a value of a wrong type,
      or sizes that do not go together.
  """
  config = config.to_dict() if hasattr(config, "to_dict") else config
  recipe = convert.to_dataclass(Recipe, config, "config")
  for key in _DERIVED & set(config["dit"].get("model", {})):
    raise ValueError(
      f"config.dit.model.{key} is not a key: it follows from config.vae.model and "
      "config.dit.text, or config.text with a folder"
    )
  model = dataclasses.replace(
    recipe.dit.model,
    channels=recipe.vae.model.latent_channels,
    text_width=recipe.text.width if recipe.text.folder else recipe.dit.text.width,
  )
  recipe = dataclasses.replace(recipe, dit=dataclasses.replace(recipe.dit, model=model))
  _check(recipe)
  return recipe


def complete(config: ConfigDict) -> ConfigDict:
  """Adds every key that a config leaves out, so that a flag can set it; returns it."""
  convert.fill_in(Recipe, config, "config", {"config.dit.model": _DERIVED})
  return config


def preset(presets: Mapping[str, Any], name: str) -> ConfigDict:
  """Model section of a config with the sizes of a preset, for a config file to change.

    c.vae.model = recipe.preset(vae.PRESETS, "wan2.1")
    c.dit.model = recipe.preset(dit.PRESETS, "B")

  Without the keys that follow from others: a latent's channels are the VAE's.
  ValueError listing the names, for one that there is not.
  """
  if name not in presets:
    raise ValueError(f"there is no preset {name!r}, only {', '.join(presets)}")
  sizes = dataclasses.asdict(presets[name])
  return ConfigDict({key: sizes[key] for key in sizes if key not in _DERIVED})


def _check(recipe: Recipe) -> None:
  """Raises ValueError, naming the key, for what does not go together."""
  _check_run(recipe)
  _check_sizes(recipe)
  _check_training(recipe)
  _check_texts(recipe)
  _check_data(recipe)
  _check_counts(recipe)


def _check_run(recipe):
  if recipe.evaluate.split not in ("heldout", "train"):
    raise ValueError(
      f"config.evaluate.split {recipe.evaluate.split!r} is not heldout or train"
    )
  if unknown := set(recipe.stages) - set(STAGES):
    raise ValueError(f"config.stages: {sorted(unknown)} are none of {STAGES}")
  _check_reading(recipe.data)
  if recipe.matmul_precision:
    _check_matmuls(recipe)
  if recipe.precision not in ("auto", "float32", "bfloat16"):
    raise ValueError(
      f"config.precision {recipe.precision!r} is not auto, float32 or bfloat16"
    )


def _check_reading(data):
  if data.workers < -1:
    raise ValueError(
      f"config.data.workers {data.workers} must be at least -1, which is what the "
      "machine has"
    )
  if data.cache not in CACHES:
    raise ValueError(f"config.data.cache {data.cache!r} is none of {CACHES}")


def _check_matmuls(recipe):
  """Raises ValueError for a precision that jax, or this device, does not have."""
  x = jax.ShapeDtypeStruct((2, 2), jnp.float32)
  try:
    with recipe.matmuls():
      jax.jit(jnp.dot).lower(x, x)
  except (ValueError, NotImplementedError) as error:
    raise ValueError(
      f"config.matmul_precision {recipe.matmul_precision!r}: {error}"
    ) from error


def _check_sizes(recipe):
  """Clips, the VAE's grid, the DiT's patches and its rows fit into each other."""
  data, vae, dit = recipe.data, recipe.vae.model, recipe.dit
  pt, ph, pw = dit.model.patch_size
  if pt != 1 or ph != pw:
    # An image is one latent frame, and sizes have one size_multiple.
    raise ValueError(
      f"config.dit.model.patch_size {dit.model.patch_size} must be (1, n, n)"
    )
  multiple = vae.space_factor * ph
  if data.size_multiple % multiple:
    raise ValueError(
      f"config.data.size_multiple {data.size_multiple} must be a multiple of "
      f"{multiple}: the VAE's space factor {vae.space_factor} x the DiT's patch {ph}"
    )
  if vae.time_factor != TIME_FACTOR:
    raise ValueError(
      f"config.vae.model compresses time {vae.time_factor} times, not {TIME_FACTOR}"
    )
  if data.max_pixels < data.size_multiple**2:
    raise ValueError(
      f"config.data.max_pixels {data.max_pixels} is less than one square of "
      f"size_multiple {data.size_multiple}"
    )
  with convert.naming("config.vae.crop"):
    vae.latent_shape(*recipe.vae.crop)
  for frames in recipe.encode.frame_buckets:
    if not time_grid.is_on_grid(frames):
      raise ValueError(f"config.encode.frame_buckets: {frames} is not 1 + 4k")
  most = longest_clip(recipe)
  if most > dit.tokens:
    raise ValueError(
      f"config.dit.tokens {dit.tokens}: a clip of config.data.max_frames "
      f"{data.max_frames} and max_pixels {data.max_pixels} can have {most} tokens"
    )


def _check_training(recipe):
  """Schedules, adapters, the sampler; what a later stage would find after hours."""
  dit, vae = recipe.dit, recipe.vae
  for name in ("dit",) if vae.folder else ("vae", "dit"):
    with convert.naming(f"config.{name}.train"):
      optim.make_schedule(getattr(recipe, name).train, 1.0)
  if dit.lora.rank and not dit.init_from:
    raise ValueError(
      f"config.dit.lora.rank {dit.lora.rank} needs a model that the adapters are of: "
      "config.dit.init_from"
    )
  with convert.naming("config.sample"):
    recipe.sample.check(
      dit.loss.process, dit.loss.target, recipe.sample.negative_prompt
    )
  regexes = [regex for regex, _ in vae.train.learning_rates]
  if vae.loss.gan_weight > 0 and not any("discriminator" in r for r in regexes):
    raise ValueError(
      "config.vae.loss.gan_weight needs an optimizer of its own for the discriminator: "
      'config.vae.train.learning_rates = (("discriminator/.*", 1e-4),)'
    )


def _check_texts(recipe):
  """Captions fit into a row."""
  text, dit, key = recipe.text, recipe.dit, "config.dit.max_text_tokens"
  if text.folder:
    if min(text.max_tokens, text.width) < 1:
      raise ValueError("config.text.max_tokens and width must be at least 1")
    if 0 < text.pad_to < text.max_tokens or text.pad_to < 0:
      raise ValueError(
        f"config.text.pad_to {text.pad_to} must be 0, or at least config.text."
        f"max_tokens {text.max_tokens}"
      )
    key = "config.text.pad_to" if text.pad_to else "config.text.max_tokens"
  if longest_text(recipe) > dit.text_tokens:
    raise ValueError(
      f"{key} {longest_text(recipe)} is more than a row has: config.dit.text_tokens "
      f"{dit.text_tokens}"
    )
  if dit.text.vocab_size < 261:
    raise ValueError(
      f"config.dit.text.vocab_size {dit.text.vocab_size} is less than 261: 256 bytes, "
      "3 special pieces and a few characters"
    )


def _check_data(recipe):
  """What is asked of clips can be known."""
  data = recipe.data
  if not 0 <= data.heldout_share < 1 or data.heldout_min < 1:
    raise ValueError(
      f"config.data.heldout_share {data.heldout_share:g} must be from 0 to 1, and "
      f"heldout_min {data.heldout_min} at least 1"
    )
  if data.cut_threshold and data.cut_threshold < LEAST_RATIO:
    raise ValueError(
      f"config.data.cut_threshold {data.cut_threshold:g} must be 0, or at least "
      f"{LEAST_RATIO:g}: of lesser changes nothing is kept"
    )
  if data.filter.scores and not data.score_fn:
    raise ValueError("config.data.filter.scores needs config.data.score_fn")
  asked = data.crop_borders or data.filter.measures()
  if data.source == "shapes" and (asked or data.score_fn):
    raise ValueError(
      'config.data.source "shapes": generated clips are not measured, so that '
      "crop_borders, score_fn and limits of config.data.filter, but for captions, are "
      "for other sources"
    )
  if not data.measure and asked:
    raise ValueError(
      "config.data.measure=False measures nothing that crop_borders, filter and scores "
      "could go by"
    )


def _check_counts(recipe):
  for key, value in (
    ("config.vae.eval_batches", recipe.vae.eval_batches),
    ("config.dit.eval_batches", recipe.dit.eval_batches),
    ("config.evaluate.clips", recipe.evaluate.clips),
    ("config.evaluate.seeds", recipe.evaluate.seeds),
  ):
    if value < 1:
      raise ValueError(f"{key} must be at least 1, not {value}")


def longest_clip(recipe: Recipe) -> int:
  """Most tokens that a clip can have."""
  data, vae = recipe.data, recipe.vae.model
  edge = vae.space_factor * recipe.dit.model.patch_size[1]
  # Rounding sizes to the grid keeps their area below max_pixels.
  frames = time_grid.whole_latent_frames(data.max_frames)
  return frames * (data.max_pixels // edge**2)


def longest_text(recipe: Recipe) -> int:
  """Most tokens that a caption can take of a row."""
  if not recipe.text.folder:
    return recipe.dit.max_text_tokens
  return max(recipe.text.pad_to, recipe.text.max_tokens)
