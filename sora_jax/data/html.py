"""Videos as HTML, held in the page itself: what the notebooks show."""

import base64
import html
import pathlib
import tempfile
from collections.abc import Mapping

import numpy as np

from sora_jax.data.video import writer


def videos_html(
  videos: Mapping[str, np.ndarray], fps: float = 12.0, height: int = 128
) -> str:
  """HTML that plays videos side by side, again and again, captions below.

  Videos are H.264, so that odd heights and widths are shown one pixel larger; those of
  one frame are PNG.

  Args:
    videos: uint8 [T, H, W, 3] by caption.
    fps: frames per second.
    height: of each on the page, in pixels; small ones are enlarged without blurring.

  Raises:
    ValueError: no uint8 [T, H, W, 3], or fps is not positive.
  """
  figures = [
    f'<figure style="display: inline-block; margin: 4px; max-width: {2 * height}px">'
    f"{_medium(video_THWC, fps, height)}"
    f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    for caption, video_THWC in videos.items()
  ]
  return f"<div>{''.join(figures)}</div>"


def _medium(video_THWC, fps, height):
  is_image = len(video_THWC) == 1
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / ("x.png" if is_image else "x.mp4")
    writer.write(path, video_THWC, fps)
    data = base64.b64encode(path.read_bytes()).decode()
  look = f'height="{height}" style="image-rendering: pixelated"'
  if is_image:
    return f'<img {look} src="data:image/png;base64,{data}">'
  play = "autoplay loop muted playsinline controls"
  return f'<video {look} {play} src="data:video/mp4;base64,{data}"></video>'
