"""A contact sheet: one image that shows what is in many videos."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from sora_jax.data.video import writer


def write(
  path,
  videos: Sequence[np.ndarray],
  captions: Sequence[str] | None = None,
  *,
  columns: int = 6,
  scale: int = 2,
) -> None:
  """Writes an image of one row a video: evenly spaced frames, the caption under them.

  Args:
    path: image file to write.
    videos: list of uint8 [T, H, W, 3]; lengths and sizes may differ.
    captions: one text a video, or None.
    columns: frames shown of each video.
    scale: enlargement of the frames, an integer.

  Raises:
    ValueError: no videos, or another number of captions than of videos.
  """
  if not len(videos):
    raise ValueError(f"{path}: no videos for a contact sheet")
  if captions is not None and len(captions) != len(videos):
    raise ValueError(f"{path}: {len(captions)} captions for {len(videos)} videos")
  gap, font = 4, PIL.ImageFont.load_default(size=12)
  line = 0 if captions is None else 18
  cells = [video.shape[2] * scale + gap for video in videos]
  width = max(columns * max(cells) + gap, 240)
  height = gap + sum(video.shape[1] * scale + gap + line for video in videos)
  sheet = PIL.Image.new("RGB", (width, height), "white")
  draw = PIL.ImageDraw.Draw(sheet)
  top = gap
  for row, (video, cell) in enumerate(zip(videos, cells, strict=True)):
    count = min(columns, len(video))
    for column, t in enumerate(np.linspace(0, len(video) - 1, count).round()):
      frame = PIL.Image.fromarray(np.asarray(video[int(t)]))
      frame = frame.resize((frame.width * scale, frame.height * scale), 0)
      sheet.paste(frame, (gap + column * cell, top))
    top += video.shape[1] * scale + gap
    if captions is not None:
      text = _shortened(captions[row], width - 2 * gap, draw, font)
      draw.text((gap, top - gap + 2), text, fill="black", font=font)
      top += line
  writer.write(path, np.asarray(sheet)[None], 1)


def _shortened(text, width, draw, font):
  """Cuts a text off, with an ellipsis, where it is longer than `width` pixels."""
  while text and draw.textlength(text, font=font) > width:
    text = text[:-2].rstrip("\N{HORIZONTAL ELLIPSIS}") + "\N{HORIZONTAL ELLIPSIS}"
  return text
