"""Endless data sets with random access, which an iterator resumes exactly.

Element i is found from i alone, through epoch plans that every process computes alike,
and its random draws depend on (seed, epoch, clip) only. So the state of an iterator is
one global index, and a run goes on exactly where it stopped, on any number of hosts and
workers.
"""

import hashlib
import json
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


class EndlessDataset:
  """Elements 0, 1, 2, ... of epochs of different sizes.

  `fingerprint` tells data sets apart whose elements differ. A subclass has
  `_plan(epoch)` -> a sequence with one entry an element, and `_load(epoch, entry)` ->
  the element. Plans are kept for the last two epochs only.
  """

  def __init__(self, fingerprint):
    self.fingerprint = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:16]
    self._starts = [0]  # element that each epoch begins with
    self._plans: dict[int, Sequence] = {}
    self._lock = threading.Lock()

  def __len__(self):
    return sys.maxsize

  def __getitem__(self, index: int) -> Batch:
    with self._lock:
      epoch, offset = self._find(index)
      entry = self._epoch_plan(epoch)[offset]
    return self._load(epoch, entry)

  def elements_per_epoch(self, epoch: int = 0) -> int:
    """Number of elements of an epoch."""
    with self._lock:
      return len(self._epoch_plan(epoch))

  def epoch_starts(self, index: int) -> list[int]:
    """First elements of all epochs up to the one of `index`, that one included.

    Kept in checkpoints: without them, resuming in epoch n makes n plans anew.
    """
    with self._lock:
      epoch, _ = self._find(index)
      return self._starts[: epoch + 1]

  def set_epoch_starts(self, starts: Sequence[int]) -> None:
    """Takes over what `epoch_starts` returned for the same data set."""
    with self._lock:
      if len(starts) > len(self._starts):
        self._starts = [int(start) for start in starts]

  def _plan(self, epoch: int) -> Sequence:
    """What makes each element of an epoch."""
    raise NotImplementedError

  def _load(self, epoch: int, entry) -> Any:
    """The element of an entry of the epoch's plan."""
    raise NotImplementedError

  def _find(self, index):
    while index >= self._starts[-1]:
      plan = self._epoch_plan(len(self._starts) - 1)
      self._starts.append(self._starts[-1] + len(plan))
    # The newest epoch, but for a few elements around its start.
    epoch = len(self._starts) - 2
    while index < self._starts[epoch]:
      epoch -= 1
    return epoch, index - self._starts[epoch]

  def _epoch_plan(self, epoch):
    if epoch not in self._plans:
      if len(self._plans) > 1:
        del self._plans[next(iter(self._plans))]
      self._plans[epoch] = self._plan(epoch)
    return self._plans[epoch]

  def __getstate__(self):
    return {**self.__dict__, "_plans": {}, "_lock": None}

  def __setstate__(self, state):
    self.__dict__.update(state, _lock=threading.Lock())


def split_indices(clips: Sequence, split: str) -> np.ndarray:
  """Indices of the clips of a split; ValueError if there are none."""
  indices = np.flatnonzero([clip.split == split for clip in clips])
  if not len(indices):
    splits = sorted({clip.split for clip in clips})
    raise ValueError(f"no clip of split {split!r} among {len(clips)} clips of {splits}")
  return indices
