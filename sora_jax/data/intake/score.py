"""Scores of clips by a function of the user: aesthetics, text and video, anything."""

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from sora_jax.data.video import reader

FRAMES = 8  # of a clip that a function sees


@functools.cache
def load(name: str) -> Callable:
  """The function of config.data.score_fn, "module:function".

  It is called as score(video_THWC, captions), with at most `FRAMES` frames (uint8 RGB,
  at the clip's training size, evenly over its length) and a tuple of texts; one that
  has a parameter `fps` also gets the rate of these frames. It returns a number, or a
  dict of numbers by name. "module:maker:argument" is what maker(argument) returns, once
  in each process, for what has to be loaded first, such as a model of a folder.

  Raises:
    ValueError: for another form of name, or one that cannot be imported.
  """
  module, _, function = name.partition(":")
  function, _, argument = function.partition(":")
  if not module or not function:
    raise ValueError(
      f'config.data.score_fn {name!r} must be "module:function" or '
      '"module:maker:argument"'
    )
  try:
    found = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError) as e:
    raise ValueError(f"config.data.score_fn {name!r} cannot be imported: {e}") from e
  return found(argument) if argument else found


def score(name: str, clip: Mapping[str, Any]) -> dict[str, float]:
  """Scores of a clip, given as the fields of `clips.Clip` that say which frames.

  Raises:
    ClipError: the clip cannot be read.
    ValueError: the function cannot be loaded, or returns something else than numbers.
  """
  function = load(name)
  count = min(FRAMES, clip["frames"])
  fps = clip["fps"] * count / clip["frames"]
  video_THWC = reader.read(
    clip["path"],
    start=clip["start"],
    frames=count,
    fps=fps,
    size=(clip["height"], clip["width"]),
    crop=clip["crop"],
  )
  more = {"fps": fps} if _takes_fps(function) else {}
  found = function(video_THWC, tuple(clip["captions"]), **more)
  if not isinstance(found, Mapping):
    found = {name.split(":")[1]: found}
  scores = {str(key): float(value) for key, value in found.items()}
  if not all(map(math.isfinite, scores.values())):
    raise ValueError(f"config.data.score_fn {name!r} gives {scores}, not numbers")
  return scores


def _takes_fps(function: Callable) -> bool:
  try:
    return "fps" in inspect.signature(function).parameters
  except (TypeError, ValueError):  # some functions of C have none
    return False
