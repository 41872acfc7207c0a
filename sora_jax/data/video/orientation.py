"""Which way up a decoded frame is shown: the eight orientations of a camera."""

import struct
from typing import NamedTuple

import av
import numpy as np


class Orientation(NamedTuple):
  """How a frame is turned: transposed first, then flipped."""

  transpose: bool = False
  flip_x: bool = False  # left becomes right
  flip_y: bool = False  # top becomes bottom

  def apply(self, frame_HWC: np.ndarray) -> np.ndarray:
    """The frame [H, W, C] as it is shown."""
    if self.transpose:
      frame_HWC = frame_HWC.swapaxes(0, 1)
    if self.flip_x:
      frame_HWC = frame_HWC[:, ::-1]
    if self.flip_y:
      frame_HWC = frame_HWC[::-1]
    return np.ascontiguousarray(frame_HWC)

  def turned(self, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) after the turn of what has this size before it, or back."""
    return (size[1], size[0]) if self.transpose else (size[0], size[1])


def of(frame: av.VideoFrame) -> Orientation:
  """The orientation that the container or the stream asks for.

  `VideoFrame.rotation` is the angle alone and takes mirrors for turns, so this reads
  the display matrix itself: (x, y) is shown at (a x + c y, b x + d y).

  Raises:
    ValueError: the frame would be turned by something else than quarters.
  """
  matrix = _display_matrix(frame)
  if matrix is None:
    return Orientation()
  a, b, _, c, d = struct.unpack("=9i", matrix)[:5]
  straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
  # A matrix of zeros says nothing, and players show such a file as it is.
  if not straight and not crossed:
    return Orientation()
  # 1 % is half a degree: rounding of whoever wrote it.
  if crossed <= 0.01 * straight:
    return Orientation(False, a < 0, d < 0)
  if straight <= 0.01 * crossed:
    return Orientation(True, c < 0, b < 0)
  raise ValueError(
    f"the display matrix ({a}, {b}, {c}, {d}) turns it by {frame.rotation} degrees; "
    "only quarter turns and mirrors are possible"
  )


def _display_matrix(frame):
  """The 36 bytes of the matrix, or None."""
  data = frame.side_data.get("DISPLAYMATRIX")
  return data and bytes(data)[:36]
