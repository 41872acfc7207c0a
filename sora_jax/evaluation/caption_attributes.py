"""What a caption says of a clip of generated shapes, read from its words alone.

The counterpart of `shape_attributes`, which reads pixels. It knows the words that
`data/shapes.py` has, and no truth: what a caption does not say, or says in other words,
is missing.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sora_jax.data.shape_worlds import BACKGROUNDS
from sora_jax.data.shapes import COLORS, SHAPES

_VERBS = {
  "moves left": "left",
  "moves right": "right",
  "moves up": "up",
  "moves down": "down",
  "bounces": "bounce",
  "grows": "grow",
  "shrinks": "shrink",
  "turns": "turn",
  "stands still": "still",
}
_WAYS = {
  "from right to left": "left",
  "from left to right": "right",
  "from bottom to top": "up",
  "from top to bottom": "down",
}
_SPEEDS = re.compile(r"\b(?:slowly|quickly)\s+")
_SHAPE = re.compile(rf"(?:\b(\w+)\s+)?\b({'|'.join(SHAPES)})\b")
_GROUND = re.compile(r"\bover an? (?:(plain|smoothly shaded) )?([a-z ]+?) background\b")
_BAR = re.compile(r"\bbehind a (?:dark )?bar\b")


class Said(NamedTuple):
  """What a caption says of an object; None: it says nothing, or nothing known."""

  color: str | None
  shape: str
  motion: str | None


class Caption(NamedTuple):
  """What a caption says.

  Attributes:
    objects: in its order.
    occluder: whether something passes behind a bar.
    background: one of BACKGROUNDS; None: it says none, or none that is known.
  """

  objects: tuple[Said, ...]
  occluder: bool
  background: str | None


def read(caption: str) -> Caption:
  """Reads a caption of any text, short or descriptive."""
  text = " ".join(caption.lower().split())
  found = list(_SHAPE.finditer(text))
  ends = [*(match.start() for match in found[1:]), len(text)][: len(found)]
  objects = tuple(
    Said(
      match[1] if match[1] in COLORS else None,
      match[2],
      _motion(text[match.end() : end]),
    )
    for match, end in zip(found, ends, strict=True)
  )
  ground = _GROUND.search(text)
  background = ground[2] if ground and ground[2] in BACKGROUNDS else None
  return Caption(objects, bool(_BAR.search(text)), background)


def _motion(words: str) -> str | None:
  """The motion that the words behind an object say; None for none, and for several."""
  words = _SPEEDS.sub("", words)
  said = {motion for verb, motion in _VERBS.items() if verb in words}
  said |= {motion for way, motion in _WAYS.items() if f"moves {way}" in words}
  return said.pop() if len(said) == 1 else None


def score(caption: str, truth: Mapping[str, Any]) -> dict[str, bool]:
  """Whether each attribute that a descriptive caption should say is right in it.

  An attribute of two objects is right if it is of both, in either order. Motion counts
  for videos, and occluder and background for all clips; "all" is that all are right.

  Args:
    caption: to judge. truth: of the clip, as `shapes.generate` writes it.
  """
  said = read(caption)
  wanted = [
    Said(item["color"], item["shape"], item["motion"] if truth["frames"] > 1 else None)
    for item in truth["objects"]
  ]
  of_objects = max(
    (_matches(said.objects, order) for order in itertools.permutations(wanted)),
    key=lambda rights: sum(rights.values()),
  )
  still = True
  if truth["frames"] == 1:
    # An image shows no motion, and none is to be said.
    still = of_objects.pop("motion")
  scores = {
    **of_objects,
    "count": len(said.objects) == len(wanted),
    "occluder": said.occluder == truth["occluder"],
    "background": said.background == truth["background"],
  }
  return {**scores, "all": still and all(scores.values())}


def _matches(objects, wanted) -> dict[str, bool]:
  """Which attributes are right of objects that are compared in order."""
  same = len(objects) == len(wanted)
  return {
    name: same
    and all(
      getattr(a, name) == getattr(b, name) for a, b in zip(objects, wanted, strict=True)
    )
    for name in Said._fields
  }
