"""Pictures that are held in the page itself: film strips, and figures of matplotlib."""

import base64
import io

import numpy as np
import PIL.Image
from matplotlib.figure import Figure

from sora_jax.data.video import media, reader

_GAP = 3  # pixels between the frames of a strip
# A decoder that broke once may end this process, too.
_NEVER_READ = ("crashed the process", "not a file but")
# What a file can be broken by: more than a decoder names, and none of it ends a page.
READ_ERRORS = (ValueError, RuntimeError, OSError, SyntaxError, MemoryError)


def inline(image_HWC: np.ndarray, kind: str = "jpeg") -> str:
  """An <img> of uint8 [H, W, 3]; "png" for drawings, which JPEG would blur."""
  file = io.BytesIO()
  options = {"quality": 88, "subsampling": 0} if kind == "jpeg" else {}
  PIL.Image.fromarray(np.ascontiguousarray(image_HWC)).save(file, kind, **options)
  data = base64.b64encode(file.getvalue()).decode()
  return f'<img alt="" src="data:image/{kind};base64,{data}">'


def inline_figure(figure: Figure) -> str:
  """An <img> of a drawing by matplotlib."""
  file = io.BytesIO()
  figure.savefig(file, format="png")
  data = base64.b64encode(file.getvalue()).decode()
  return f'<img alt="" src="data:image/png;base64,{data}">'


def resized(frame_HWC: np.ndarray, height: int) -> np.ndarray:
  """A frame at another height; small ones are enlarged without blurring."""
  width = max(1, round(frame_HWC.shape[1] * height / frame_HWC.shape[0]))
  way = (
    PIL.Image.Resampling.NEAREST
    if height >= frame_HWC.shape[0]
    else PIL.Image.Resampling.LANCZOS
  )
  image = PIL.Image.fromarray(np.ascontiguousarray(frame_HWC))
  return np.asarray(image.resize((min(width, 8 * height), height), way))


def strip(frames: list[np.ndarray], height: int) -> np.ndarray:
  """Frames [H, W, 3] beside each other, on white."""
  gap = np.full((height, _GAP, 3), 255, np.uint8)
  parts = [part for frame in frames for part in (gap, resized(frame, height))]
  return np.concatenate(parts[1:], axis=1)


def spread(video_THWC: np.ndarray, count: int) -> list[np.ndarray]:
  """At most `count` frames of a video, the first and the last among them."""
  count = min(count, len(video_THWC))
  chosen = np.linspace(0, len(video_THWC) - 1, count).round().astype(int)
  return [video_THWC[t] for t in chosen]


def first_frame(path: str, reason: str) -> np.ndarray | None:
  """The first frame of a file that was left out, if it can be read after all."""
  # Of other suffixes FFmpeg knows lists, too, which lead to further files and hosts.
  known = path.lower().endswith(media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES)
  if not known or any(words in reason for words in _NEVER_READ):
    return None
  try:
    return reader.read(path, frames=1)[0]
  except READ_ERRORS:
    return None
