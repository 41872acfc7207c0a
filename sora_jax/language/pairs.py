"""Pairs of a short and a descriptive caption of one clip, for an expander to learn."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.data.clips import Clip
from sora_jax.data.draws import ORDER
from sora_jax.data.endless import Batch, EndlessDataset
from sora_jax.data.tokenizer import Tokenizer
from sora_jax.language.expansion import descriptive


class Pair(NamedTuple):
  """Captions of one clip; a long one may be its own short one."""

  short: str
  long: str


def pairs_of(clips: Sequence[Clip], split: str = "train") -> list[Pair]:
  """The different pairs of the clips of a split, in their order.

  A descriptive caption is also paired with itself: what is long enough stays. Images
  are left out where there are videos: of a few words that say no motion a prompt for a
  video is to be made.

  Raises:
    ValueError: no clip has a short caption beside a longer one.
  """
  found: dict[Pair, None] = {}
  clips = [clip for clip in clips if clip.split == split]
  for clip in [clip for clip in clips if clip.frames > 1] or clips:
    if not (long := descriptive(clip)):
      continue
    shorter = [text for text in clip.training_captions if len(text) < len(long)]
    for short in shorter:
      found[Pair(short, long)] = None
    if shorter:
      found[Pair(long, long)] = None
  if not found:
    raise ValueError(
      f"no {split} clip has a short caption and a longer one: `recaption` writes both"
    )
  return list(found)


def as_given(text: str) -> str:
  """A short text as an expander reads it: people write RED as they write red."""
  return text.lower()


class PairDataset(EndlessDataset):
  """Rows of `ids_S` (short, end, long, end, padding), and where the long one is.

  `long_S` is 1 for the tokens of the long caption and its end. A pair that does not
  fit is left out.
  """

  def __init__(
    self, pairs: Sequence[Pair], tokenizer: Tokenizer, max_tokens: int, seed: int
  ):
    """Raises ValueError if not one pair fits into max_tokens."""
    self._seed, self._size = seed, max_tokens
    rows = [
      [tokenizer.encode(text, max_tokens + 1) for text in (as_given(short), long)]
      for short, long in pairs
    ]
    self._rows = [row for row in rows if sum(map(len, row)) <= max_tokens]
    if not self._rows:
      shortest = min(sum(map(len, row)) for row in rows)
      raise ValueError(
        f"config.expander.max_tokens {max_tokens}: the shortest pair of captions has "
        f"{shortest} tokens"
      )
    self.left_out = len(rows) - len(self._rows)
    super().__init__(["pairs", seed, max_tokens, [len(row[0]) for row in self._rows]])

  def _plan(self, epoch):
    rng = np.random.default_rng((self._seed, epoch, ORDER))
    return rng.permutation(len(self._rows))

  def _load(self, epoch, entry) -> Batch:
    short, long = self._rows[int(entry)]
    ids_S, long_S = np.zeros((2, self._size), np.int32)
    end = len(short) + len(long)
    ids_S[:end], long_S[len(short) : end] = [*short, *long], 1
    return {"ids_S": ids_S, "long_S": long_S}
