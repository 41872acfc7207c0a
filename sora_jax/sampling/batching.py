"""Which prompts share packed rows while sampling, and how long those are.

A *unit* is what must be in one row: the clip of a prompt, or two of them whose
predictions are blended. For training `packing.planner` plans epochs; here a clip may
need several texts, and a row grows for one that does not fit.
"""

import dataclasses

import numpy as np

from sora_jax.models.meta import DiTMeta
from sora_jax.packing.planner import Budget
from sora_jax.sampling.conditioning import Prompt

# Where padding costs less than compiling for another length, and what lengths are a
# multiple of, so that they divide by the chips that share them.
_LEAST, _STEP = 4096, 1024


@dataclasses.dataclass
class RowClip:
  """A clip of a row: one prompt, or one of the two texts that a prompt blends."""

  prompt: Prompt
  texts: list[tuple[np.ndarray, np.ndarray]]  # of each slot: own and negative one
  shot_T: np.ndarray  # slot of each latent frame

  @property
  def size(self) -> tuple[int, int, int]:
    """(tokens, text tokens, slots)."""
    t, h, w = self.prompt.grid
    text = max(sum(map(len, side)) for side in zip(*self.texts, strict=True))
    return (t + len(self.prompt.extras)) * h * w, text, len(self.texts)


def size_of(unit: list[RowClip]) -> tuple[int, int, int]:
  """(tokens, text tokens, slots) of a unit."""
  tokens, texts, slots = map(sum, zip(*[clip.size for clip in unit], strict=True))
  return tokens, texts, slots


def budget_of(sizes, meta: DiTMeta, batch_shards: int = 1) -> Budget:
  """Row of training, or of another length for clips that need more or less.

  Tokens change by themselves, texts and slots together: a long video has one text.

  Args:
    sizes: (tokens, text tokens, slots) of each clip.
    meta: of the model.
    batch_shards: rows that are computed side by side in any case.
  """
  tokens, texts, slots = meta.tokens, meta.text_tokens, meta.segments
  share = -(-sum(size[0] for size in sizes) // batch_shards)
  tokens = row_length(max(min(share, tokens), *(size[0] for size in sizes)), tokens)
  while any(size[1] > texts or size[2] > slots for size in sizes):
    texts, slots = 2 * texts, 2 * slots
  return Budget(tokens, texts, slots)


def row_length(wanted: int, trained: int) -> int:
  """Tokens of a row: at least `wanted`, and of few lengths, as each is compiled.

  They are the `trained` length times powers of two; from 4096 on also 5, 6 and 7
  eighths of those, in steps of 1024. A row is not cut below 4096.
  """
  length = trained
  while length < wanted:
    length *= 2
  while length % 2 == 0 and length // 2 >= max(wanted, _LEAST):
    length //= 2
  for eighths in (5, 6, 7):
    part = -(-length * eighths // 8 // _STEP) * _STEP
    if max(wanted, _LEAST) <= part < length:
      return part
  return length


def plan_rows(sizes, budget: Budget) -> list[list[int]]:
  """Rows of indices: each clip, longest first, into the first row with room."""
  rows: list[list[int]] = []
  for index in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
    for row in rows:
      if budget.fits(sizes[index], *(sizes[i] for i in row)):
        row.append(index)
        break
    else:
      rows.append([index])
  return rows
