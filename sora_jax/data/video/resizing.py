"""Frames at other sizes, never distorted."""

import numpy as np
import PIL.Image


def resize(
  video_THWC: np.ndarray, size: tuple[int, int], fit: str = "crop"
) -> np.ndarray:
  """Resizes uint8 [T, H, W, 3] to (height, width), see `fit_frame`."""
  return np.stack([fit_frame(frame_HWC, size, fit) for frame_HWC in video_THWC])


def fit_frame(
  frame_HWC: np.ndarray, size: tuple[int, int] | None, fit: str = "crop"
) -> np.ndarray:
  """Resizes uint8 [H, W, 3] to a size without distortion.

  Args:
    frame_HWC: the frame.
    size: (height, width); None leaves the frame as it is.
    fit: "crop" fills the size and cuts off what is over at the sides, "pad" keeps all
      and adds black there.
  """
  height, width = frame_HWC.shape[:2]
  if size is None or tuple(size) == (height, width):
    return np.ascontiguousarray(frame_HWC)
  if fit == "pad":
    scale = min(size[0] / height, size[1] / width)
    inner = tuple(max(1, round(n * scale)) for n in (height, width))
    top, left = ((n - m) // 2 for n, m in zip(size, inner, strict=True))
    padded = np.zeros((*size, 3), np.uint8)
    padded[top : top + inner[0], left : left + inner[1]] = fit_frame(frame_HWC, inner)
    return padded
  scale = max(size[0] / height, size[1] / width)
  top, left = (height - size[0] / scale) / 2, (width - size[1] / scale) / 2
  box = (left, top, width - left, height - top)
  image = PIL.Image.fromarray(np.ascontiguousarray(frame_HWC))
  # Pillow widens the filter when it shrinks, so this does not alias.
  return np.asarray(image.resize((size[1], size[0]), PIL.Image.Resampling.BICUBIC, box))
