"""Which pieces of a measured file are clips, and what each of them is like."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from sora_jax.data.intake import perceptual_hash
from sora_jax.data.video import media, probe
from sora_jax.packing import time_grid

# A cut changes the mean of hue, saturation and lightness by this much, of 255; it is
# PySceneDetect's default, and less is noise in a scene where nothing moves.
CONTENT = 15.0
Crop = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Windows:
  """How files are cut into clips; the fields are those of config.data.

  min_frames: a scene, or the rest of one, with fewer frames is left out.
  """

  max_frames: int
  fps: float | None = None
  min_frames: int = 5
  cut_threshold: float = 3.0
  crop_borders: bool = False

  def __post_init__(self):
    if self.max_frames < 1:
      raise ValueError(f"at least 1 frame is needed, not {self.max_frames}")

  def rate(self, info: probe.Info) -> float:
    """Frames a second that a file is sampled at: its own, or fewer; 1 of an image."""
    return 1.0 if info.frames == 1 else min(info.fps, self.fps or info.fps)


class Piece(NamedTuple):
  """A clip of a file: seconds, frames, and the number of the scene that it is from."""

  start: float
  frames: int
  scene: int


def scenes(
  record: Mapping[str, Any], duration: float, threshold: float
) -> list[tuple[float, float]]:
  """[(begin, end)] of a file's scenes, in seconds; a threshold of 0 cuts nowhere."""
  times = [0.0]
  if threshold:
    times += [
      time
      for time, ratio, content in record.get("cuts", ())
      if ratio >= threshold and content >= CONTENT and 0 < time < duration
    ]
  return list(zip(times, [*times[1:], duration], strict=True))


def pieces(path, record: Mapping[str, Any], windows: Windows) -> list[Piece]:
  """Consecutive clips of each scene; the rest of a scene may be left out.

  Raises:
    ClipError: no scene is long enough.
  """
  info = probe.Info(**record["info"])
  if info.frames == 1:
    return [Piece(0.0, 1, 0)]
  rate = windows.rate(info)
  longest = time_grid.round_down(windows.max_frames)
  least = min(windows.min_frames, longest)
  found, most = [], 0
  spans = scenes(record, info.duration, windows.cut_threshold)
  for scene, (begin, end) in enumerate(spans):
    # Frame k is on screen from k / rate; rounded headers must not add one.
    total = math.ceil((end - begin) * rate - 0.3)
    most = max(most, total)
    for first in range(0, total, longest):
      left = min(total - first, longest)
      if left >= least:
        start = begin + first / rate
        found.append(Piece(start, time_grid.round_down(left), scene))
  if not found:
    what = "too short:" if len(spans) == 1 else f"{len(spans)} scenes, all too short:"
    raise media.ClipError(path, f"{what} {most} frames at {rate:g} fps, {least} needed")
  return found


def crop(record: Mapping[str, Any], windows: Windows) -> Crop | None:
  """(top, left, bottom, right) shares to cut off; None for nothing."""
  borders = record.get("borders")
  if not windows.crop_borders or not borders or not any(borders):
    return None
  return tuple(borders)


def measured(
  record: Mapping[str, Any], piece: Piece, rate: float, cropped: bool
) -> dict[str, Any]:
  """Figures of a clip from those of its file, as the manifest keeps them.

  The names are those of `filters.Filter`, and hash (see `perceptual_hash`), digest (of
  the file) and scene (its number in the file). If only the file's header was read,
  there are no others than the last two.
  """
  known = {"digest": record["digest"], "scene": piece.scene}
  if "looks" not in record:
    return known
  end = piece.start + piece.frames / rate - 1e-3
  inside = [look for look in record["looks"] if piece.start - 1e-3 <= look[0] < end]
  # A clip between two looks is like the one before it.
  before = [look for look in record["looks"] if look[0] < end]
  looks = inside or before[-1:] or record["looks"][:1]
  columns = list(zip(*looks, strict=True))
  top, left, bottom, right = record["borders"]
  cuts = [ratio for time, ratio, content in record["cuts"]
          if piece.start + 1e-3 < time < end and content >= CONTENT]  # fmt: skip
  return {
    "motion": round(statistics.median(columns[1]), 3),
    "sharpness": round(statistics.median(columns[2]), 2),
    "brightness": round(statistics.fmean(columns[3]), 1),
    "contrast": round(statistics.fmean(columns[4]), 1),
    "borders": 0.0
    if cropped
    else round(1 - (1 - top - bottom) * (1 - left - right), 4),
    "cut": max(cuts, default=0.0),
    "hash": perceptual_hash.clip_hash(list(columns[5])),
    **known,
  }
