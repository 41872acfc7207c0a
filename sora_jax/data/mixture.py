"""Several sources in fixed shares: `data.source = "mixture"` with

  data.mixture = (("/data/films", 0.7), ("/data/photos", 0.1), ("tfds:ucf101", 0.2))

A share is one of visits: of every ten clips that training sees, seven are films here,
however many there are of each. Shares need not add up to 1.

Visits come in rounds of one length. Each source has the same number of them in every
round, goes through its clips in an order that is new each time, and begins anew when
all were visited: each clip is visited once an epoch of its own source. So which clips
a round visits follows from (seed, round) alone, without a state.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from absl import logging

from sora_jax.data import draws
from sora_jax.data.visits import EachOnce, Visits

_KINDS = ("videos", "images")  # by whether a clip is an image
NO_SHARES: Mapping[str, float] = {}
LEAST_ROUND = 1024  # visits, so that shares are exact to a thousandth


class Mixture:
  """Which clips the rounds of a mixture visit."""

  def __init__(self, sources: Sequence[str], shares: Mapping[str, float], seed: int):
    """Args: sources: of each clip. shares: of each source; its clips may be none.

    Raises:
      ValueError: a clip is of none of the sources.
    """
    self.shares = dict(shares)
    unknown = sorted(set(sources) - shares.keys())
    if unknown:
      raise ValueError(
        f"clips are of a source {unknown[0]!r}, but config.data.mixture has only "
        f"{', '.join(shares)}"
      )
    order = {source: i for i, source in enumerate(shares)}
    number_N = np.array([order[source] for source in sources])
    self._members = [np.flatnonzero(number_N == i) for i in range(len(shares))]
    present = [bool(len(members)) for members in self._members]
    missing = [source for source, here in zip(shares, present, strict=True) if not here]
    if missing:
      logging.warning("no clips are left of the sources %s", ", ".join(missing))
    weights = np.array(list(shares.values())) * present
    self._counts = apportion(weights, max(len(sources), LEAST_ROUND))
    self._seed = seed

  @property
  def counts(self) -> dict[str, int]:
    """Visits of each source in a round."""
    return dict(zip(self.shares, map(int, self._counts), strict=True))

  @property
  def fingerprint(self) -> list:
    """The shares, by names of sources."""
    return ["mixture", *map(list, self.shares.items())]

  def of_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips that a round visits, in the order of their sources, and epochs of these.

    Args:
      number: of the round, from 0.

    Returns:
      clip_V, epoch_V: indices of the clips, which may be there more than once, each
        time in another epoch of its source.
    """
    clips, epochs = [], []
    for source, (members, count) in enumerate(
      zip(self._members, self._counts, strict=True)
    ):
      if not count:
        continue
      visit_V = number * int(count) + np.arange(count)
      epoch_V = visit_V // len(members)
      for epoch in range(int(epoch_V[0]), int(epoch_V[-1]) + 1):
        rng = np.random.default_rng((self._seed, epoch, draws.MIXTURE, source))
        order = rng.permutation(members)
        clips.append(order[visit_V[epoch_V == epoch] % len(members)])
      epochs.append(epoch_V)
    return np.concatenate(clips), np.concatenate(epochs)

  def log(self) -> None:
    """Says how often clips of each source are visited."""
    total = int(self._counts.sum())
    said = ", ".join(
      f"{source} {100 * count / total:.1f} % ({count} visits of {len(members)} clips)"
      for source, count, members in zip(
        self.shares, self._counts, self._members, strict=True
      )
    )
    logging.info("mixture: a round is %d visits: %s", total, said)


def apportion(weights: np.ndarray, total: int) -> np.ndarray:
  """Divides a total by weights in whole numbers, by largest remainders.

  Each has 1 at least, but those of weight 0 have none.
  """
  share_N = total * weights / weights.sum()
  count_N = np.maximum(np.floor(share_N).astype(np.int64), weights > 0)
  missing = int(total - count_N.sum())
  if missing < 0:  # many small ones were raised to 1
    count_N[count_N.argmax()] += missing
  # Stable, so that equal remainders go to the first.
  for i in np.argsort(count_N - share_N, kind="stable")[: max(0, missing)]:
    count_N[i] += 1
  return count_N


def names(sources: Sequence[str]) -> list[str]:
  """Short, different names of sources: the last part of each that has letters."""
  made: list[str] = []
  for source in sources:
    plain = _name(source)
    name, number = plain, 2
    while name in made:
      name, number = f"{plain}-{number}", number + 1
    made.append(name)
  return made


def _name(source) -> str:
  """films of /data/films/, ucf101 of tfds:ucf101?video=x, toy of tfds:/a/toy/1.0.0."""
  path = source.removeprefix("tfds:").partition("?")[0].partition("://")
  for part in reversed((path[2] or path[0]).split("/")):
    stem = re.sub(r"\.(tar|jsonl|parquet)$", "", part.partition(":")[0])
    name = re.sub(r"\{.*|[^\w.-]+", "", stem).strip("-._")
    if re.search(r"[^\W\d_]", name):
      return name
  return "source"


def check(mixture: Sequence[tuple[str, float]]) -> None:
  """Raises ValueError for a source that is there twice, or a share that is none."""
  seen = set()
  for source, share in mixture:
    if source in seen:
      raise ValueError(f"{source} is there twice")
    seen.add(source)
    if not 0 < share < float("inf"):
      raise ValueError(f"the share of {source} must be more than 0, not {share:g}")
    if source in ("", "shapes", "mixture"):
      raise ValueError(f"{source!r} cannot be a part of a mixture")


def shares(mixture: Sequence[tuple[str, float]]) -> dict[str, float]:
  """Shares of a mixture's sources by their names."""
  short = names([source for source, _ in mixture])
  return {name: share for name, (_, share) in zip(short, mixture, strict=True)}


class OfSource(Protocol):
  """What a clip has to say: its source, and frames."""

  @property
  def source(self) -> str:
    """Name in the mixture; "" without one."""

  @property
  def frames(self) -> int:
    """1 of an image."""


def of_clips(
  clips: Sequence[OfSource],
  shares: Mapping[str, float],
  image_share: float | None,
  seed: int,
) -> Visits:
  """Visits of clips by shares of their sources, and of images among them.

  Args:
    clips: that are visited.
    shares: of sources; empty if there is no mixture.
    image_share: of all visits, 0 to 1; None leaves it to the sources. Within images and
      within videos, sources have the shares that they have to each other.
    seed: of the run.

  Raises:
    ValueError: there are no images, or no videos, to have their share.
  """
  if not shares and image_share is None:
    return EachOnce(len(clips))
  sources = [clip.source if shares else "" for clip in clips]
  if image_share is None:
    made = Mixture(sources, shares, seed)
    made.log()
    return made
  shares = shares or {"": 1.0}
  kinds = [f"{source} {_KINDS[clip.frames == 1]}".strip()
           for source, clip in zip(sources, clips, strict=True)]  # fmt: skip
  there, split = set(kinds), {}
  for kind, part in zip(_KINDS, (1 - image_share, image_share), strict=True):
    of_kind = {source: share for source, share in shares.items()
               if f"{source} {kind}".strip() in there}  # fmt: skip
    if part and not of_kind:
      raise ValueError(
        f"the share of images is to be {image_share:g}, but there are no {kind}"
      )
    for source, share in of_kind.items():
      split[f"{source} {kind}".strip()] = part * share / sum(of_kind.values())
  made = Mixture(kinds, split, seed)
  made.log()
  return made
