"""Which clips an epoch visits, and in which epoch of their own: where orders begin."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Visits(Protocol):
  """Rounds of visits, a function of their number alone."""

  @property
  def fingerprint(self) -> Sequence[Any]:
    """What tells other visits of the same clips apart; empty for `EachOnce`."""

  def of_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(clip_V, epoch_V): the clip of each visit, and the epoch that draws go by.

    A clip may be there several times, but not twice with the same epoch. The order
    means nothing.
    """


class EachOnce:
  """Each of N clips once: a round is an epoch."""

  fingerprint = ()

  def __init__(self, clips: int):
    self._clips = clips

  def of_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """All clips."""
    return np.arange(self._clips), np.full(self._clips, number)
