"""Clips of the manifest as packed rows want their records: pixels in place of latents.

A network that reads pixels gets them on the grid of the VAE's latents in time, four
frames side by side in the channels, so that rows, plans and positions are the same.
"""

from collections.abc import Sequence

import numpy as np

from sora_jax.data.clip_reader import read_clip
from sora_jax.data.clips import Clip
from sora_jax.data.pixel_cache import PixelCache
from sora_jax.data.records import LatentClip, RecordError
from sora_jax.packing import patches, time_grid
from sora_jax.packing.time_grid import TIME_FACTOR

CHANNELS = 3 * TIME_FACTOR


def fold(video_THWC: np.ndarray) -> np.ndarray:
  """uint8 [1 + 4k, H, W, 3] -> float32 [1 + k, H, W, 12] in [-1, 1]."""
  return patches.fold_time(video_THWC, TIME_FACTOR).astype(np.float32) / 127.5 - 1.0


def pixel_clips(clips: Sequence[Clip]) -> list[LatentClip]:
  """The rows of a manifest of records whose latents are pixels; index: of the clip."""
  return [
    LatentClip(
      id=clip.id,
      shard="",
      index=index,
      shape=(time_grid.latent_frames(clip.frames), clip.height, clip.width),
      fps=clip.fps,
      captions=clip.captions,
      split=clip.split,
      extras=(),
      frames=clip.frames,
      height=clip.height,
      width=clip.width,
      truth=clip.truth,
    )
    for index, clip in enumerate(clips)
  ]


class PixelReader:
  """Reads what `pixel_clips` lists, from files or from a cache of their pixels.

  Can be pickled. Not for more than one thread at a time.
  """

  def __init__(self, clips: Sequence[Clip], cache: PixelCache | None = None):
    self._clips, self._cache = list(clips), cache

  def read(self, row: LatentClip) -> dict:
    """`latent_THWC`: the folded pixels, and `extras_NHWC`, which holds none.

    Raises:
      RecordError: if the clip cannot be read; says why.
    """
    clip = self._clips[row.index]
    try:
      if self._cache is None:
        video_THWC = read_clip(clip)
      else:
        video_THWC = self._cache.read(row.index, clip, 0, clip.frames)
    # A file can break in more ways than the decoder names; none of them ends a run.
    except (ValueError, RuntimeError, OSError) as e:
      raise RecordError(getattr(e, "reason", str(e))) from e
    latent_THWC = fold(video_THWC)
    extras_NHWC = np.zeros((0, *latent_THWC.shape[1:]), np.float32)
    return {"latent_THWC": latent_THWC, "extras_NHWC": extras_NHWC, "texts": []}
