"""When clips that cannot be read are no exception any more."""

import math

LEAST = 8  # fewer clips than these end nothing


class UnreadableError(ValueError):
  """Too many clips cannot be read: what would be made is not what was asked for."""


def too_many(
  unreadable: int, total: float, most: float, asked: float | None = None
) -> bool:
  """Whether more than a share of clips cannot be read, and not by chance.

  Args:
    unreadable: different clips that could not be read; fewer than LEAST are never too
      many, so that one bad file of a small set ends nothing.
    total: different clips that were asked for.
    most: share that is allowed.
    asked: visits so far. As long as they are not more than `total`, which then is no
      whole set, three standard deviations of chance are allowed beyond the share.
  """
  allowed = most * total
  if asked is not None and asked <= total:
    allowed += 3 * math.sqrt(allowed)
  return unreadable >= LEAST and unreadable > allowed
