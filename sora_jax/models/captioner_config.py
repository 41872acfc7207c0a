"""Sizes of the captioner, and what they cost."""

import dataclasses

from sora_jax.models.dit import REMAT_POLICIES
from sora_jax.runtime import fields

_AT_LEAST_ONE = (
  "depth",
  "text_depth",
  "caption_depth",
  "summary_tokens",
  "stem_pieces",
  "stem_width",
  "absolute_positions",
)


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
  """Sizes of the captioner.

  Attributes:
    width, heads, mlp_width: of all blocks.
    depth: blocks of the clip's encoder. text_depth: of the text alone. caption_depth:
      of the decoder with cross-attention.
    embed_width: of the embeddings that are compared.
    vocab_size: the tokenizer has at most that many pieces.
    summary_tokens: of a clip, which the decoder sees.
    stem_pieces: pieces a side that a patch is cut into, each read by one small network
      of stem_width; 1 = none, so that a patch is read by a matrix alone.
    absolute_positions, rope_theta: as of `dit.DiTConfig`.
    remat: a key of `dit.REMAT_POLICIES`.
  """

  width: int = 128
  depth: int = 4
  heads: int = 2
  mlp_width: int = 512
  text_depth: int = 1
  caption_depth: int = 2
  embed_width: int = 128
  vocab_size: int = 512
  summary_tokens: int = 8
  stem_pieces: int = 1
  stem_width: int = 64
  absolute_positions: int = 16
  rope_theta: float = 100.0
  remat: str = fields.free("none")

  def __post_init__(self):
    if self.width % self.heads or (self.width // self.heads) % 2:
      raise ValueError(
        f"captioner width {self.width} over {self.heads} heads must be an even whole "
        "number"
      )
    for name in _AT_LEAST_ONE:
      if getattr(self, name) < 1:
        raise ValueError(f"captioner {name} {getattr(self, name)} must be at least 1")
    if self.remat not in REMAT_POLICIES:
      raise ValueError(
        f"captioner remat {self.remat!r} is not one of {list(REMAT_POLICIES)}"
      )

  @property
  def head_dim(self) -> int:
    """Channels of a head."""
    return self.width // self.heads


PRESETS = {
  # For generated shapes on a CPU; then CoCa's base, and its large for 1024 wide texts.
  "tiny": CaptionerConfig(),
  "B": CaptionerConfig(768, 12, 12, 3072, 6, 6, 512, 32768, 16, rope_theta=1e4),
  "L": CaptionerConfig(1024, 24, 16, 4096, 12, 12, 768, 32768, 16, rope_theta=1e4),
}


def num_flops(
  config: CaptionerConfig,
  patch_width: int,
  clips: float,
  tokens: float,
  text_tokens: float,
  pairs: float,
) -> float:
  """FLOPs of one forward pass: matmuls, and attention over the pairs that meet.

  Args:
    config: sizes.
    patch_width: numbers of a patch.
    clips: how many there are, with a text each.
    tokens, text_tokens: real ones, padding not counted.
    pairs: sum over clips of tokens squared.
  """
  c = config
  D = c.width
  block = 4 * D * D + 2 * D * c.mlp_width
  pieces = c.stem_pieces**2
  stem = patch_width * D
  if pieces > 1:
    stem = patch_width * c.stem_width + pieces * c.stem_width * D
  text = (c.text_depth + c.caption_depth) * block + c.caption_depth * 2 * D * D
  summary = (2 * c.caption_depth + 1) * D * D
  matmuls = tokens * (stem + c.depth * block + 2 * D * D)
  matmuls += text_tokens * (text + D * c.vocab_size)
  matmuls += clips * c.summary_tokens * summary
  seen = c.summary_tokens * (tokens + c.caption_depth * text_tokens)
  return 2.0 * matmuls + 4.0 * D * (c.depth * pairs + seen)
