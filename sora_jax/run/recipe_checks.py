"""What has to go together in a recipe; `recipe.read` asks before any work is done."""

from typing import Any

import jax
import jax.numpy as jnp

from sora_jax.data import pixel_cache, tokenizer
from sora_jax.data.intake.filters import LEAST_RATIO
from sora_jax.packing import time_grid
from sora_jax.packing.time_grid import TIME_FACTOR
from sora_jax.run import captioner_stage, convert, expander_stage, parts
from sora_jax.tasks.dit import WEIGHTS
from sora_jax.training import optim

CACHES = ("auto", "none", *pixel_cache.CODECS)
STAGES = ("data", "vae", "encode", "captioner", "dit", "expander", "sample", "evaluate")
# Without those that a config has to ask for.
DEFAULT_STAGES = tuple(name for name in STAGES if name not in ("captioner", "expander"))


def check(recipe: Any) -> None:
  """Raises ValueError, naming the key, for what does not go together."""
  _check_run(recipe)
  _check_sizes(recipe)
  parts.check(recipe)
  _check_training(recipe)
  _check_texts(recipe)
  _check_given(recipe.dit)
  _check_data(recipe)
  _check_counts(recipe)
  if "captioner" in recipe.stages or recipe.captioner.train.steps:
    check_captioner(recipe)
  expander_stage.check(recipe.expander)


def check_captioner(recipe: Any) -> None:
  """Raises ValueError, naming the key, unless the captioner can be trained."""
  data, vae = recipe.data, recipe.vae.model
  most = time_grid.whole_latent_frames(data.max_frames), data.max_pixels
  captioner_stage.check(recipe.captioner, most, data.size_multiple, vae.space_factor)


def _check_run(recipe):
  if recipe.evaluate.split not in ("heldout", "train"):
    raise ValueError(
      f"config.evaluate.split {recipe.evaluate.split!r} is not heldout or train"
    )
  if unknown := set(recipe.stages) - set(STAGES):
    raise ValueError(f"config.stages: {sorted(unknown)} are none of {STAGES}")
  _check_reading(recipe.data)
  if recipe.sample.weights not in ("", *WEIGHTS):
    raise ValueError(
      f"config.sample.weights {recipe.sample.weights!r} is none of {', '.join(WEIGHTS)}"
    )
  if recipe.matmul_precision:
    _check_matmuls(recipe)
  if recipe.precision not in ("auto", "float32", "bfloat16"):
    raise ValueError(
      f"config.precision {recipe.precision!r} is not auto, float32 or bfloat16"
    )


def _check_given(stage):
  model = stage.model
  if not model.condition_channels:
    return
  for key in ("given_prob", "extra_prob"):
    if getattr(stage, key):
      raise ValueError(
        f"config.dit.{key} is {getattr(stage, key)}, but this model reads given frames "
        "as channels and not as tokens: set it to 0"
      )
  if model.image_width and not stage.init_from:
    raise ValueError(
      "config.dit.model.image_width needs an image encoder: set config.dit.init_from "
      "to a checkpoint with image/model"
    )


def _check_reading(data):
  if data.workers < -1:
    raise ValueError(
      f"config.data.workers {data.workers} must be at least -1, which is what the "
      "machine has"
    )
  if not 0 <= data.max_unreadable <= 1:
    raise ValueError(
      f"config.data.max_unreadable {data.max_unreadable:g} must be from 0 to 1"
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
  tokenizer.check_size(dit.text.vocab_size, "config.dit.text.vocab_size")


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
  share = recipe.dit.synthetic_captions
  if not 0 <= share <= 1:
    raise ValueError(f"config.dit.synthetic_captions {share:g} is not from 0 to 1")
  for key, value in (
    ("config.vae.eval_batches", recipe.vae.eval_batches),
    ("config.dit.eval_batches", recipe.dit.eval_batches),
    ("config.evaluate.clips", recipe.evaluate.clips),
    ("config.evaluate.seeds", recipe.evaluate.seeds),
  ):
    if value < 1:
      raise ValueError(f"{key} must be at least 1, not {value}")


def longest_clip(recipe: Any) -> int:
  """Most tokens that a clip can have."""
  data, vae = recipe.data, recipe.vae.model
  edge = vae.space_factor * recipe.dit.model.patch_size[1]
  # Rounding sizes to the grid keeps their area below max_pixels.
  frames = time_grid.whole_latent_frames(data.max_frames)
  return frames * (data.max_pixels // edge**2)


def longest_text(recipe: Any) -> int:
  """Most tokens that a caption can take of a row."""
  if not recipe.text.folder:
    return recipe.dit.max_text_tokens
  return max(recipe.text.pad_to, recipe.text.max_tokens)
