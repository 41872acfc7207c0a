"""Frames at other sizes, never distorted by more than a pixel."""

from typing import NamedTuple

import numpy as np
import PIL.Image


class Placement(NamedTuple):
  """How a whole frame comes to its size: it is resized, then cut or padded around.

  Attributes:
    scaled: (height, width) that the whole frame is resized to. It is whole pixels, and
      as far from `size` at both sides, so that all ways of resizing can follow it.
    size: (height, width) of the result, centred on the resized frame.
  """

  scaled: tuple[int, int]
  size: tuple[int, int]


def place(
  shape: tuple[int, int],
  size: tuple[int, int] | None,
  fit: str = "crop",
  pixel_aspect: float = 1.0,
) -> Placement:
  """The placement of a frame with shape (height, width) at a size.

  Args:
    shape: (height, width) of the frame.
    size, fit: see `fit_frame`; without a size, pixels become square and no more.
    pixel_aspect: width of a pixel divided by its height.
  """
  height, width = shape[0], shape[1] * pixel_aspect
  if size is None:
    square = (shape[0], max(1, round(width)))
    return Placement(square, square)
  size = (int(size[0]), int(size[1]))
  scales = size[0] / height, size[1] / width
  if fit == "pad":
    inner = (max(1, round(n * min(scales))) for n in (height, width))
    return Placement((next(inner), next(inner)), size)
  # What is over is even, for the middle to stay in the middle.
  over = (
    max(0, round((n * max(scales) - m) / 2))
    for n, m in zip((height, width), size, strict=True)
  )
  return Placement((size[0] + 2 * next(over), size[1] + 2 * next(over)), size)


def resize(
  video_THWC: np.ndarray, size: tuple[int, int], fit: str = "crop"
) -> np.ndarray:
  """Resizes uint8 [T, H, W, 3] to (height, width), see `fit_frame`."""
  return np.stack([fit_frame(frame_HWC, size, fit) for frame_HWC in video_THWC])


def crop_frame(
  frame_HWC: np.ndarray, crop: tuple[float, float, float, float] | None
) -> np.ndarray:
  """Cuts (top, left, bottom, right) shares of height and width off; None keeps all."""
  if crop is None:
    return frame_HWC
  height, width = frame_HWC.shape[:2]
  top, left, bottom, right = crop
  return frame_HWC[
    round(top * height) : height - round(bottom * height),
    round(left * width) : width - round(right * width),
  ]


def fit_frame(
  frame_HWC: np.ndarray,
  size: tuple[int, int] | None,
  fit: str = "crop",
  pixel_aspect: float = 1.0,
) -> np.ndarray:
  """Resizes uint8 [H, W, 3] to a size without distortion.

  Args:
    frame_HWC: the frame.
    size: (height, width); None leaves the frame as it is, but for its pixels' shape.
    fit: "crop" fills the size and cuts off what is over at the sides, "pad" keeps all
      and adds black there.
    pixel_aspect: width of a pixel of the frame divided by its height.
  """
  height, width = frame_HWC.shape[:2]
  placement = place((height, width), size, fit, pixel_aspect)
  scaled, size = placement
  inner = tuple(min(n, m) for n, m in zip(scaled, size, strict=True))
  if inner == scaled == (height, width):
    return pad(np.ascontiguousarray(frame_HWC), size)
  # The part of the frame that stays; exact zeros and ends where nothing is cut off.
  top, left = (
    (n - m) / 2 * whole / n
    for n, m, whole in zip(scaled, inner, (height, width), strict=True)
  )
  box = (left, top, width - left, height - top)
  image = PIL.Image.fromarray(np.ascontiguousarray(frame_HWC))
  # Pillow widens the filter when it shrinks, so this does not alias.
  small = image.resize((inner[1], inner[0]), PIL.Image.Resampling.BICUBIC, box)
  return pad(np.asarray(small), size)


def pad(frame_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """The frame [H, W, 3] in the middle of a black one of (height, width)."""
  height, width = frame_HWC.shape[:2]
  if (height, width) == tuple(size):
    return frame_HWC
  top, left = (size[0] - height) // 2, (size[1] - width) // 2
  padded_HWC = np.zeros((*size, 3), np.uint8)
  padded_HWC[top : top + height, left : left + width] = frame_HWC
  return padded_HWC
