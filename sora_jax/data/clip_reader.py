"""The pixels of a manifest's clip, as training sees them: one way for all that read."""

from collections.abc import Iterator

import numpy as np

from sora_jax.data.clips import Clip
from sora_jax.data.video import reader


def read_clip(clip: Clip, first: int = 0, frames: int | None = None) -> np.ndarray:
  """Decodes frames of a clip from its file: uint8 [T, H, W, 3].

  Args:
    clip: a row of the manifest.
    first: of the clip's frames.
    frames: how many; all from the first on if None.

  Raises:
    ClipError: the file cannot be read.
  """
  return reader.read(
    clip.path,
    start=clip.start + first / clip.fps,
    frames=clip.frames - first if frames is None else frames,
    fps=clip.fps,
    size=(clip.height, clip.width),
    crop=clip.crop,
  )


def stream_clip(clip: Clip) -> Iterator[np.ndarray]:
  """Yields the frames of `read_clip`, uint8 [H, W, 3], for clips of any length."""
  return reader.stream(
    clip.path,
    start=clip.start,
    frames=clip.frames,
    fps=clip.fps,
    size=(clip.height, clip.width),
    crop=clip.crop,
  )
