"""Whether what is sampled goes on from what was given, as read off the pixels.

  identity  Each object of the given part is in the sampled part, with its colour and
            shape.
  joined    Where the parts meet, each is at the place where it has to be: no further
            away than it moves in that time.
  moves on  It is joined, and moves as in the given part: a move has a direction within
            45 degrees and half the speed at least; what grows, shrinks or turns does so
            at half the rate at least, and stays where it is; what bounces goes up and
            down; what stands still stands still.

Which of these a motion is, the prompt says; how it is in the given part is measured. An
image has no motion: what follows it has to show that of the prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from sora_jax.evaluation import shape_attributes
from sora_jax.evaluation.shape_attributes import Seen

_WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_LEAST_COSINE = np.cos(np.radians(45))
_LEAST_RATE = 0.5  # of the given part's
# Of a bounce, whose speed is not constant: around its top it is slow.
_LEAST_BOUNCE = 0.25
_SHORT = 8  # frames, in fewer of which a bounce may be at its top all the time
_LEAST_SPOTS = 3  # of a track, to have a trend
_FARTHEST = 1.5  # times the longest step elsewhere, and
_SLACK = 0.05  # of the shorter side, for where a centre is measured
_LONGEST_ABSENCE = 4  # frames at a seam in which an object is not seen


class Trend(NamedTuple):
  """How an object changes from frame to frame.

  Attributes:
    velocity: pixels (x, y). growth: of the logarithm of its diameter.
    turn: radians, None where its shape shows none. rise: pixels up or down, unsigned.
  """

  velocity: np.ndarray
  growth: float
  turn: float | None
  rise: float


def judge(
  given_THWC: np.ndarray,
  new_THWC: np.ndarray,
  side: int = 1,
  motions: dict[str, str] | None = None,
) -> dict[str, bool]:
  """Judges how a sampled part goes on from a given one.

  Args:
    given_THWC: uint8, at the rate of the sampled part; an image has one frame.
    new_THWC: the sampled frames.
    side: 1 if these come after the given ones, -1 if before, 0 if in between them.
    motions: of the objects, by their colours; None where the motion need not go on.

  Returns:
    identity, joined (but for side 0), and with motions also moves_on.
  """
  given, new = map(shape_attributes.find_objects, (given_THWC, new_THWC))
  shorter = min(new_THWC.shape[1:3])
  pairs = _matched(given, new, shorter)
  there = len(pairs) == len(given) > 0
  right = {
    "identity": there
    and all((a.color, a.shape) == (b.color, b.shape) for a, b in pairs)
  }
  on = there
  if side:
    # Frames between the seam and the end of the part that is not at it.
    frames = len(given_THWC) if side > 0 else len(new_THWC)
    on = there and all(_is_joined(a, b, side, frames, shorter) for a, b in pairs)
    right["joined"] = on
  if motions is not None:
    right["moves_on"] = on and all(
      goes_on(motions.get(a.color, a.motion), a, b, len(new_THWC), shorter)
      for a, b in pairs
    )
  return right


def motions_of(truth: dict) -> dict[str, str]:
  """Returns the motions of a clip's objects by their colours, which differ."""
  return {item["color"]: item["motion"] for item in truth["objects"]}


def _matched(
  given: Sequence[Seen], new: Sequence[Seen], shorter: int
) -> list[tuple[Seen, Seen]]:
  """Pairs of given and sampled objects that are most alike, each in one at most."""

  def cost(a, b):
    distance = np.linalg.norm(_center(a) - _center(b)) / shorter
    return 2 * (a.color != b.color) + (a.shape != b.shape) + 0.1 * distance

  if not given or not new:
    return []
  costs = np.array([[cost(a, b) for b in new] for a in given])
  rows, columns = optimize.linear_sum_assignment(costs)
  return [(given[i], new[j]) for i, j in zip(rows, columns, strict=True)]


def _center(seen: Seen) -> np.ndarray:
  return np.mean([spot.center for spot in seen.spots], axis=0)


def _is_joined(given, new, side, frames, shorter) -> bool:
  """Returns whether an object is where it has to be on both sides of a seam."""
  first, second = (given, new) if side > 0 else (new, given)
  end, begin = first.spots[-1], second.spots[0]
  apart = frames - end.time + begin.time
  longest = max(_steps(given if len(given.spots) > 1 else new), default=0.0)
  distance = np.linalg.norm(end.center - begin.center)
  allowed = apart * _FARTHEST * longest + _SLACK * shorter
  return bool(apart <= _LONGEST_ABSENCE and distance <= allowed)


def _steps(seen: Seen) -> list[float]:
  """Pixels a frame between the places where an object is seen."""
  return [
    float(np.linalg.norm(b.center - a.center) / (b.time - a.time))
    for a, b in zip(seen.spots, seen.spots[1:], strict=False)
  ]


def trend_of(seen: Seen) -> Trend | None:
  """Returns how an object changes; None if it was seen too rarely to tell."""
  if len(seen.spots) < _LEAST_SPOTS:
    return None
  whole = [spot for spot in seen.spots if spot.whole]
  whole = whole if len(whole) >= _LEAST_SPOTS else seen.spots
  times, turn = [spot.time for spot in whole], None
  if order := shape_attributes.symmetry(seen.shape):
    phase = np.unwrap(np.angle([spot.harmonics[order] for spot in whole]))
    turn = _slope(phase / order, times)
  center_N2 = np.array([spot.center for spot in seen.spots])
  moments = np.array([spot.time for spot in seen.spots])
  return Trend(
    np.array([_slope(column, moments) for column in center_N2.T]),
    _slope(0.5 * np.log([spot.area for spot in whole]), times),
    turn,
    float(np.mean(np.abs(np.diff(center_N2[:, 1])) / np.diff(moments))),
  )


def _slope(values, times) -> float:
  """Theil-Sen slope: single wrong frames have no say."""
  return float(stats.theilslopes(values, times).slope)


def goes_on(motion: str, given: Seen, new: Seen, frames: int, shorter: int) -> bool:
  """Returns whether an object moves in `frames` new frames as it did in given ones."""
  known, now = trend_of(given), trend_of(new)
  if now is None:
    return False
  travel = shape_attributes.MIN_TRAVEL * shorter / frames
  if motion in _WAYS:
    way = np.array(_WAYS[motion], float) * 0.5 * travel
    if known:
      way = _LEAST_RATE * known.velocity
    speed, least = np.linalg.norm(now.velocity), np.linalg.norm(way)
    return bool(speed >= least and now.velocity @ way >= _LEAST_COSINE * speed * least)
  if motion == "bounce":
    least = _LEAST_BOUNCE * known.rise if known else 0.5 * travel
    high = frames < _SHORT or now.rise >= least
    return bool(high and abs(now.velocity[0]) < travel)
  if np.linalg.norm(now.velocity) >= travel:
    return False
  if motion == "turn":
    if now.turn is None:
      return False
    if known and known.turn is not None:
      return bool(now.turn * np.sign(known.turn) >= _LEAST_RATE * abs(known.turn))
    return bool(abs(now.turn) >= 0.5 * shape_attributes.MIN_TURN / frames)
  if motion in ("grow", "shrink"):
    sign = 1 if motion == "grow" else -1
    least = 0.5 * np.log(shape_attributes.MIN_GROWTH) / frames
    if known:
      least = _LEAST_RATE * sign * known.growth
    return bool(sign * now.growth >= max(least, 0.0))
  return new.motion == "still"
