"""Measures one media file by decoding all of it once, whatever is asked of it later.

Nothing here depends on a config: what a clip of the file is like follows from these
figures for any lengths, thresholds and cuts, so that changing those decodes nothing.
"""

import dataclasses
import hashlib
import math
import os
from typing import Any, NamedTuple

import av
import cv2
import numpy as np

from sora_jax.data.intake.cuts import CutFinder
from sora_jax.data.video import frames, media, probe, reader

EVERY = 0.5  # seconds between the frames that are looked at closely
_CUT_EDGE, _FLOW_EDGE, _SHARP_EDGE = 192, 128, 512  # pixels of the longer side
_BLACK = 24  # of 255: bars are not quite black after a lossy codec
_LEAST_BAR = 0.02  # of the height or width; thinner ones are the rounding of codecs
_BAR_FRAMES = 5
_LEAST_CONTRAST = 3.0  # standard deviation, of 255; less is no picture to compare


class Look(NamedTuple):
  """What is measured of one frame in every half second.

  Attributes:
    time: seconds from the first frame.
    motion: mean length of the optical flow to the next frame, in percent of the width
      for a second.
    sharpness: variance of the Laplacian of the grey picture, 512 pixels wide or high.
    brightness, contrast: mean and standard deviation of the grey picture, of 255.
    hash: see `perceptual_hash`.
  """

  time: float
  motion: float
  sharpness: float
  brightness: float
  contrast: float
  hash: str


def digest(path) -> str:
  """Hash of a file's size and of its first, middle and last MiB.

  Copies have the same. Reading all of a large file would take as long as decoding it.
  """
  source, block = media.opened(path), 1 << 20
  with open(source, "rb") if isinstance(source, str) else source as file:
    size = file.seek(0, os.SEEK_END)
    found = hashlib.sha256(str(size).encode())
    for start in dict.fromkeys((0, max(0, size // 2), max(0, size - block))):
      file.seek(start)
      found.update(file.read(block))
  return found.hexdigest()[:24]


def probe_file(path) -> dict[str, Any]:
  """The part of `measure_file` that decodes one frame only: "info" and "digest".

  Raises:
    ClipError: as `probe.probe`.
  """
  return {"info": dataclasses.asdict(probe.probe(path)), "digest": digest(path)}


def measure_file(path) -> dict[str, Any]:
  """Measures a file.

  Memory is that of a few frames, however long the video is.

  Returns:
    What JSON can hold: "info" (a `probe.Info`), "digest", "looks" (a list of `Look`),
    "cuts" (`CutFinder.cuts`) and "borders" (black shares of the height at the top, of
    the width at the left, of the height at the bottom, of the width at the right).

  Raises:
    ClipError: the file cannot be decoded from the first to the last frame.
  """
  record = probe_file(path)
  info = probe.Info(**record["info"])
  if info.is_image:
    frame_HWC = np.ascontiguousarray(reader.read(path)[0][..., ::-1])
    small, sharp = (_shrunk(frame_HWC, edge) for edge in (_CUT_EDGE, _SHARP_EDGE))
    looks = [_look(0.0, 0.0, small, sharp)]
    cuts: list[list[float]] = []
  else:
    looks, cuts = _watch(path, info)
  borders = [0.0] * 4
  if any(look.brightness > _BLACK for look in looks):
    borders = _borders(path, info, looks)
  return {
    **record, "looks": [[*look] for look in looks], "cuts": cuts, "borders": borders,
  }  # fmt: skip


def _watch(path, info) -> tuple[list[Look], list[list[float]]]:
  """Decodes a video once: looks, and candidates for cuts."""
  finder, looks, time, lasts, size = CutFinder(), _Looks(), 0.0, 0.0, None
  with media.open_video(path) as container:
    try:
      for frame, time, lasts in frames.decode(container, path):  # noqa: B007
        # Frames of a video may change their size; what is compared must not.
        size = size or _reduced_size(frame, _CUT_EDGE)
        small = _reduced(frame, size)
        finder.add(time, small)
        looks.add(time, small, frame)
    except media.VIDEO_ERRORS as e:
      reason = f"damaged after {time:.2f} s ({media.short_message(e)})"
      raise media.ClipError(path, reason) from e
  if not looks.looks:
    raise media.ClipError(path, "no frame can be decoded")
  if media.is_cut_off(time + (lasts or 1 / info.fps), info.duration, info.fps):
    raise media.ClipError(
      path, f"damaged: {time:.2f} s can be decoded of {info.duration:.2f} s"
    )
  return looks.finish(), finder.finish()


class _Looks:
  """Looks at the first frame of every half second, and at the motion after it."""

  def __init__(self):
    self.looks: list[Look] = []
    self._last: tuple[float, np.ndarray] | None = None
    self._motions: list[float] = []

  def add(self, time: float, small: np.ndarray, frame: av.VideoFrame) -> None:
    """Takes the next frame, also as a small picture."""
    if self._last and len(self._motions) < 2:
      before, picture = self._last
      self._motions.append(_motion(picture, small, time - before))
      # Of two pairs of frames at most one is at a cut, where there is no motion.
      motion = round(min(self._motions), 3)
      self.looks[-1] = self.looks[-1]._replace(motion=motion)
    elif time >= EVERY * len(self.looks) - 1e-3:
      sharp = _reduced(frame, _reduced_size(frame, _SHARP_EDGE))
      self.looks.append(_look(time, 0.0, small, sharp))
      self._motions = []
    self._last = (time, small)

  def finish(self) -> list[Look]:
    """The looks after the last frame, whose own motion is that of the look before."""
    if not self._motions and len(self.looks) > 1:
      motion = self.looks[-2].motion
      self.looks[-1] = self.looks[-1]._replace(motion=motion)
    return self.looks


def _reduced_size(frame, edge) -> tuple[int, int]:
  """(height, width) of which the longer one is `edge`, or that of the frame."""
  scale = min(1.0, edge / max(frame.width, frame.height))
  return max(8, round(frame.height * scale)), max(8, round(frame.width * scale))


def _reduced(frame, size) -> np.ndarray:
  """A decoded frame, made small before it becomes RGB: uint8 BGR [H, W, 3]."""
  return frame.reformat(
    height=size[0],
    width=size[1],
    format="bgr24",
    interpolation=av.video.reformatter.Interpolation.AREA,
    threads=1,
  ).to_ndarray()


def _shrunk(frame_HWC, edge) -> np.ndarray:
  height, width = frame_HWC.shape[:2]
  scale = min(1.0, edge / max(height, width))
  size = max(8, round(width * scale)), max(8, round(height * scale))
  return cv2.resize(frame_HWC, size, interpolation=cv2.INTER_AREA)


def _look(time, motion, small, sharp) -> Look:
  gray = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)
  laplacian = cv2.Laplacian(cv2.cvtColor(sharp, cv2.COLOR_BGR2GRAY), cv2.CV_64F)
  return Look(
    time=round(time, 3),
    motion=round(motion, 3),
    sharpness=round(float(laplacian.var()), 2),
    brightness=round(float(gray.mean()), 1),
    contrast=round(float(gray.std()), 1),
    hash=_hash(gray),
  )


def _motion(before, after, seconds) -> float:
  """Mean length of the optical flow, in percent of the width for a second."""
  if seconds <= 0:
    return 0.0
  one_HW, other_HW = (
    cv2.cvtColor(_shrunk(frame, _FLOW_EDGE), cv2.COLOR_BGR2GRAY)
    for frame in (before, after)
  )
  if np.array_equal(one_HW, other_HW):
    return 0.0
  nothing = np.zeros((*one_HW.shape, 2), np.float32)
  flow_HW2 = cv2.calcOpticalFlowFarneback(
    one_HW, other_HW, nothing, 0.5, 3, 15, 3, 5, 1.2, 0
  )
  length = float(np.hypot(flow_HW2[..., 0], flow_HW2[..., 1]).mean())
  return 100 * length / one_HW.shape[1] / seconds


def _borders(path, info, looks) -> list[float]:
  """Black at each side in all of a few frames, see `measure_file`.

  The frames come from the reader: it turns them upright and cuts them out later, so
  rows and columns are those that a clip has.
  """
  lit = [look for look in looks if look.brightness > _BLACK]
  chosen = [lit[i * len(lit) // _BAR_FRAMES] for i in range(_BAR_FRAMES)]
  levels = [np.zeros((2, 1)), np.zeros((2, 1))]
  for time in dict.fromkeys(look.time for look in chosen):
    frame_HW = reader.read(path, start=time, frames=1, fps=info.fps)[0].max(-1)
    for axis in (0, 1):  # rows, then columns: nearly all of it, and half
      found = np.percentile(frame_HW, (99, 50), axis=1 - axis)
      levels[axis] = np.maximum(levels[axis], found)
    if min(level[0, end] for level in levels for end in (0, -1)) > _BLACK:
      return [0.0] * 4  # no side is black, and decoding is what takes time
  rows, columns = levels
  return [_bar(x) for x in (rows, columns, rows[:, ::-1], columns[:, ::-1])]


def _bar(levels) -> float:
  """Share of the lines, from the first one on, that are black; 0.0 for very few.

  levels: [2, lines] brightness that 99 %, and half, of a line's pixels are below.
  """
  black = int(np.argmax(levels[0] > _BLACK))
  if black < _LEAST_BAR * levels.shape[1]:
    return 0.0
  # Codecs blur the edge of a bar: lines there are black but for some pixels.
  edge = levels[1, black : black + math.ceil(0.01 * levels.shape[1])]
  black += int(np.argmax(np.append(edge, 255) > _BLACK))
  return round(black / levels.shape[1], 5)


def _hash(gray_HW) -> str:
  """Hash of a grey frame, 16 hexadecimal digits; "" where there is nothing to see."""
  if gray_HW.std() < _LEAST_CONTRAST:
    return ""
  small = cv2.resize(gray_HW, (9, 8), interpolation=cv2.INTER_AREA)
  return np.packbits(small[:, :-1] > small[:, 1:]).tobytes().hex()
