"""A video and its latents in parts, one after the other."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sora_jax.sampling.conditioning import Timeline


def cut(videos_BTHWC: Iterable, timeline: Timeline, skip: int) -> Iterator[np.ndarray]:
  """uint8 [T, H, W, 3] of a timeline's frames, after the first `skip` ones."""
  left, (height, width) = timeline.frames, timeline.crop_hw or (None, None)
  for video_BTHWC in videos_BTHWC:
    video_THWC = np.asarray(video_BTHWC)[0]
    shown_THWC = video_THWC[skip:][:left, :height, :width]
    skip, left = max(0, skip - len(video_THWC)), left - len(shown_THWC)
    if len(shown_THWC):
      yield shown_THWC
    if not left:
      return


def from_end(videos_BTHWC: Sequence, back: int) -> np.ndarray:
  """The frame [H, W, 3] so many before the last of some consecutive parts."""
  for video_BTHWC in reversed(videos_BTHWC):
    if back < video_BTHWC.shape[1]:
      return np.asarray(video_BTHWC)[0, -1 - back]
    back -= video_BTHWC.shape[1]
  raise ValueError(f"no frame is {back} frames before what is left")


def pieces(latent_THWC: np.ndarray, sizes: Sequence[int]) -> Iterator[np.ndarray]:
  """Pieces of latent frames, each of the first of `sizes` that fits."""
  while len(latent_THWC):
    size = next(n for n in sizes if n <= len(latent_THWC))
    yield latent_THWC[:size]
    latent_THWC = latent_THWC[size:]
