"""Shares of samples that are right, and how sure they are."""

from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

_CONFIDENCE = 0.95


class Share(NamedTuple):
  """A share of n, and its 95 % interval after Wilson (1927).

  Unlike the normal approximation the interval is right for few samples, and near 0 and
  1, too. It takes the samples for independent of each other.
  """

  value: float
  low: float
  high: float
  n: int


def share_of(rights: Sequence[bool]) -> Share:
  """Returns the share of those that are right; there must be one at least."""
  count, n = int(sum(rights)), len(rights)
  low, high = stats.binomtest(count, n).proportion_ci(_CONFIDENCE, method="wilson")
  return Share(count / n, float(low), float(high), n)


def percent(share: Share) -> str:
  """Returns a share with its interval, as '50 % (38-62)'."""
  return f"{share.value:.0%} ({100 * share.low:.0f}-{100 * share.high:.0f})"
