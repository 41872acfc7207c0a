"""The section config.captioner: its keys, and what has to fit together."""

import dataclasses

from sora_jax.data import tokenizer
from sora_jax.models.captioner import CaptionerConfig
from sora_jax.run import convert
from sora_jax.runtime.fields import free
from sora_jax.tasks.captioner import CaptionerLossConfig
from sora_jax.training import optim
from sora_jax.training.config import TrainConfig

INPUTS = ("pixels", "latents")


@dataclasses.dataclass(frozen=True)
class CaptionerStage:
  """A captioner that is trained on the clips' own captions; config.stages asks for it.

  input: "pixels", or the "latents" of the stage encode. patch_size: (t, h, w) of one
  token, in pixels, of which four frames lie over each other, or in latent pixels; t is
  1. rows: packed rows of a batch, each of `tokens`, `text_tokens` and `segments`.
  max_text_tokens: longest caption, its style and its end included. reference_fps: as of
  the DiT.
  """

  train: TrainConfig = TrainConfig(steps=0)
  input: str = "pixels"
  patch_size: tuple[int, int, int] = (1, 16, 16)
  model: CaptionerConfig = CaptionerConfig()
  loss: CaptionerLossConfig = CaptionerLossConfig()
  rows: int = 8
  tokens: int = 256
  text_tokens: int = 256
  segments: int = 16
  max_text_tokens: int = 64
  reference_fps: float = 16.0
  eval_batches: int = free(4)


def check(
  stage: CaptionerStage, longest: tuple[int, int], size_multiple: int, space_factor: int
) -> None:
  """Checks that a captioner can be trained with these keys.

  Args:
    stage: the section.
    longest: (latent frames, pixels of a frame) of the largest clip that there can be.
    size_multiple: that height and width of clips are multiples of.
    space_factor: of the VAE.

  Raises:
    ValueError: naming the key.
  """
  if stage.input not in INPUTS:
    raise ValueError(f"config.captioner.input {stage.input!r} is none of {INPUTS}")
  if stage.train.steps < 1:
    raise ValueError(
      "config.captioner.train.steps must be at least 1, as in configs/captioner.py"
    )
  with convert.naming("config.captioner.train"):
    optim.make_schedule(stage.train, 1.0)
  pt, ph, pw = stage.patch_size
  if pt != 1 or ph != pw or ph < 1:
    raise ValueError(
      f"config.captioner.patch_size {stage.patch_size} must be (1, n, n)"
    )
  if ph % stage.model.stem_pieces:
    raise ValueError(
      f"config.captioner.model.stem_pieces {stage.model.stem_pieces} must divide "
      f"config.captioner.patch_size {ph}"
    )
  edge = ph * (space_factor if stage.input == "latents" else 1)
  if size_multiple % edge:
    raise ValueError(
      f"config.data.size_multiple {size_multiple} must be a multiple of {edge}, "
      f"the pixels of config.captioner.patch_size {ph}"
    )
  frames, pixels = longest
  if (most := frames * (pixels // edge**2)) > stage.tokens:
    raise ValueError(
      f"config.captioner.tokens {stage.tokens}: a clip of config.data.max_frames and "
      f"max_pixels, {frames} latent frames of {pixels} pixels, can have {most} tokens"
    )
  if not 3 <= stage.max_text_tokens <= stage.text_tokens:
    raise ValueError(
      f"config.captioner.max_text_tokens {stage.max_text_tokens} must be at least 3, "
      f"and fit into a row: config.captioner.text_tokens {stage.text_tokens}"
    )
  tokenizer.check_size(stage.model.vocab_size, "config.captioner.model.vocab_size")
  if min(stage.eval_batches, stage.segments, stage.rows) < 1:
    raise ValueError(
      "config.captioner.rows, segments and eval_batches must be at least 1"
    )
