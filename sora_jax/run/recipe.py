"""The typed form of a config: every key, its default and what has to fit together.

A config file returns a ConfigDict; `read` turns it into a `Recipe`, so that an unknown
key, a wrong type or sizes that do not go together fail before any work is done.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sora_jax.data.intake.filters import Filter
from sora_jax.diffusion import solvers
from sora_jax.models import rounded_matmul
from sora_jax.models.caption_encoder import TextEncoderConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.models.lora import LoRAConfig
from sora_jax.models.vae import VAEConfig
from sora_jax.run import convert, recipe_checks
from sora_jax.run.captioner_stage import CaptionerStage
from sora_jax.run.expander_stage import ExpanderStage
from sora_jax.run.recipe_checks import DEFAULT_STAGES as DEFAULT_STAGES
from sora_jax.run.recipe_checks import STAGES as STAGES
from sora_jax.run.recipe_checks import check_captioner as check_captioner
from sora_jax.run.recipe_checks import longest_clip as longest_clip
from sora_jax.run.recipe_checks import longest_text as longest_text
from sora_jax.runtime import cpu
from sora_jax.runtime.fields import extends, free
from sora_jax.tasks.dit import DiTLossConfig
from sora_jax.tasks.vae import VAELossConfig
from sora_jax.training.config import TrainConfig
from sora_jax.training.profiling import Profile

# Keys of the DiT that are the VAE's and the text encoder's to decide.
_DERIVED = {"channels", "text_width"}


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

  source: "shapes" (generated), a folder of videos and images, a manifest, tar files,
    "tfds:NAME", any of these at gs://, s3:// or https://, see data/listing.py, or
    "mixture".
  mixture: (source, share of visits) of each, if the source is "mixture", see
    data/mixture.py.
  world: what generated clips can show, one of `shape_worlds.WORLDS`.
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
    that scores clips, or "module:maker:argument", see data/intake/score.py. filter:
    see data/intake/filters.py.
  allow_outside: captions and entries of a manifest may be outside of the folder.
  leave_out: ids of clips that no stage reads any more; their place in the order of the
    data stays, so that a run under way goes on with all others as they were.
  max_unreadable: share of the clips that may be unreadable; above it a stage ends
    before it saves anything more. Less than 8 clips, and chance, are no reason.
  copy_remote: keep copies of remote files in data/remote; else they are read over the
    network at each visit.
  workers: processes that read batches; 0 = a thread, -1 = what the machine has.
  cache: "raw" or "h264" keep clips at training size on disk for the VAE's training, see
    data/pixel_cache.py; "none" decodes files at each visit. "auto" is raw where clips
    of files are visited more than once and half of the free disk holds them.
  beam: flags of an Apache Beam pipeline that measures files in place of this host's
    cores, as those behind `prepare --beam --`, see data/intake/beam_pipeline.py.
  """

  source: str = "shapes"
  mixture: tuple[tuple[str, float], ...] = ()
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
  leave_out: tuple[str, ...] = free(())
  max_unreadable: float = free(0.05)
  copy_remote: bool = True
  workers: int = free(-1)
  cache: str = free("auto")
  beam: tuple[str, ...] = free(())


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
  (1 + 4k) to compile for, clips are padded to the next; () = powers of two. budgets:
  (max_pixels, max_frames) of each size that all clips are encoded at, for
  config.dit.schedule; () = as they are. stream_frames: clips of more frames are read
  and encoded by parts of so many, so that memory does not grow with their length.
  """

  batch_size: int = free(8)
  devices_per_clip: int = free(1)
  clips_per_shard: int = 256
  extras: int = 2
  max_sizes: int = 32
  frame_buckets: tuple[int, ...] = free(())
  budgets: tuple[tuple[int, int], ...] = ()
  stream_frames: int = free(128)


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
  the VAE that this was trained on: config.vae.folder. low_noise: with dit_low/model
  instead, the second of two experts. lora: train only adapters of it.
  text, max_text_tokens: the small text encoder and its longest caption; neither has an
  effect with config.text.folder. reference_fps: frame rate at which one latent frame
  is one step of the time position. caption_dropout, given_prob, extra_prob: shares of
  visits without caption, with given tokens, with extra image tokens. schedule: first
  step of each of config.encode.budgets, see data/schedule.py; () = only the last one.
  image_share: share of visits that are images, of each part of the schedule; () = what
  there is. synthetic_captions: share of visits with a caption of `recaption`, where a
  clip has captions of its own, too (DALL-E 3: 0.95).
  """

  train: TrainConfig
  init_from: str = ""
  low_noise: bool = False
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
  schedule: tuple[int, ...] = ()
  image_share: tuple[float, ...] = ()
  synthetic_captions: float = 0.95
  eval_batches: int = free(4)


@dataclasses.dataclass(frozen=True)
class Sample(solvers.Options):
  """What the sample stage makes, and how sampling is done everywhere.

  prompts: (text, (width, height), frames, fps) each; fps 0 = reference_fps.
  negative_prompt: what guidance leads away from. rows: packed rows computed at once.
  weights: how the DiT's kernels are held: "" as they were saved, "bfloat16", which is
  the same for a computation in bfloat16, or "float8".
  """

  prompts: tuple[tuple[str, tuple[int, int], int, float], ...] = extends(())
  negative_prompt: str = ""
  weights: str = ""
  rows: int = free(4)


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """clips: held-out clips reconstructed, and prompts of them sampled.

  Of generated shapes there may be more prompts than held-out clips. seeds: samples of
  each prompt. split: "heldout", or "train" to see what has been memorised. captioner:
  folder of one, which says how well samples and real clips go with their captions.
  """

  clips: int = extends(64)
  seeds: int = extends(1)
  split: str = extends("heldout")
  captioner: str = extends("")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A whole run. precision: "auto" is bfloat16 on TPU and GPU, float32 on CPU.

  matmul_precision: of float32 matmuls, a name that `jax.default_matmul_precision`
  takes; "" is the device's own. "BF16_BF16_F32" is what TPUs do by default; CPUs with
  AMX (Xeons since 2023) then train up to 1.5 times as fast, and those without bfloat16
  multiply the same rounded values in float32. replay: a step of train_vae or train_dit
  that is repeated instead of training, see training/replay.py; 0 = none.

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
  captioner: CaptionerStage = CaptionerStage()
  expander: ExpanderStage = ExpanderStage()
  mesh: Mesh = free(Mesh())
  profile: Profile = free(Profile())
  stages: tuple[str, ...] = free(DEFAULT_STAGES)
  seed: int = 0
  precision: str = free("auto")
  matmul_precision: str = free("")
  replay: int = free(0)

  @contextlib.contextmanager
  def matmuls(self) -> Iterator[None]:
    """A context in which float32 matmuls have the precision of the config."""
    if not self.matmul_precision:
      yield
      return
    native = jax.default_backend() != "cpu" or cpu.multiplies_bfloat16()
    with (
      rounded_matmul.native(native),
      jax.default_matmul_precision(self.matmul_precision),
    ):
      yield

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
  recipe_checks.check(recipe)
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
