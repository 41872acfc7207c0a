"""Other sizes, lengths and shares of clips from given steps on, in one run.

The stage "encode" makes latents of each clip at each budget of `encode.budgets`, and
training takes those of its step: 256p first, then 480p, then 1080p. A row of packed
tokens has one size whatever is in it, so training compiles one program for all of them.
Which element a step reads follows from the step alone, so a run resumes exactly.
"""

import bisect
from collections.abc import Sequence

from sora_jax.data.endless import Batch, EndlessDataset
from sora_jax.data.packed_dataset import PackedDataset


class Scheduled(EndlessDataset):
  """Elements of one data set after the other, each from its own beginning."""

  def __init__(self, datasets: Sequence[PackedDataset], starts: Sequence[int]):
    """Args: starts: element that each data set begins with; the first is 0."""
    assert len(datasets) == len(starts) and starts[0] == 0, starts
    self._datasets, self._begins = list(datasets), list(starts)
    super().__init__(["schedule", self._begins, [d.fingerprint for d in datasets]])

  def __getitem__(self, index: int) -> Batch:
    number = self._number(index)
    return self._datasets[number][index - self._begins[number]]

  def last(self) -> PackedDataset:
    """The data set that training ends with."""
    return self._datasets[-1]

  def epoch_starts(self, index: int) -> list:
    """[data set] what its own `epoch_starts` returns; of those to come nothing."""
    number = self._number(index)
    return [
      dataset.epoch_starts(max(0, min(index, end) - begin))
      for dataset, begin, end in zip(
        self._datasets[: number + 1],
        self._begins,
        [*self._begins[1:], index],
        strict=False,
      )
    ]

  def set_epoch_starts(self, starts: Sequence) -> None:
    """Takes over what `epoch_starts` returned for the same data set."""
    for dataset, of_dataset in zip(self._datasets, starts, strict=False):
      dataset.set_epoch_starts(of_dataset)

  def _number(self, index):
    return bisect.bisect_right(self._begins, index) - 1
