"""Pixel clips of one static size, for the VAE."""

from collections.abc import Sequence

import numpy as np

from sora_jax.data import draws
from sora_jax.data.bad_clips import BadClips
from sora_jax.data.clip_reader import read_clip
from sora_jax.data.clips import Clip
from sora_jax.data.endless import EndlessDataset, split_indices
from sora_jax.data.pixel_cache import PixelCache
from sora_jax.packing import time_grid


class ClipDataset(EndlessDataset):
  """Pixel clips of one static size, for the VAE. Element i is one visit of a clip.

  An element has `video_THWC` uint8, a random window in time and space of the clip,
  smaller clips padded at the end of each axis by repeating the edge; `valid_3` int32,
  its valid (t, h, w), all 0 for a clip that cannot be read; `clip` int32, its index
  in `clips`.
  """

  def __init__(
    self,
    clips: Sequence[Clip],
    crop: tuple[int, int, int],
    seed: int,
    *,
    split: str = "train",
    bad_clips_folder: str | None = None,
    cache: PixelCache | None = None,
  ):
    """Raises ValueError if the split is empty or the crop is not (1 + 4k, H, W).

    cache: of the clips of this split; without one, files are decoded at each visit.
    """
    if not time_grid.is_on_grid(crop[0]):
      raise ValueError(f"a crop has 1 + 4k frames, got {crop[0]}")
    self._clips = list(clips)
    self._indices = split_indices(clips, split)
    self._crop = tuple(crop)
    self._seed = seed
    self._bad_clips = BadClips(bad_clips_folder)
    self._cache = cache
    ids = [self._clips[i].id for i in self._indices]
    # Raw frames are what decoding gives, so that a run may begin with or without them.
    lossy = [cache.codec] if cache and cache.codec != "raw" else []
    super().__init__(["clips", ids, self._crop, seed, *lossy])

  def _plan(self, epoch):
    rng = np.random.default_rng((self._seed, epoch, draws.ORDER))
    return rng.permutation(self._indices)

  def _load(self, epoch, index):
    index = int(index)
    clip = self._clips[index]
    T, H, W = self._crop
    t, h, w = min(T, clip.frames), min(H, clip.height), min(W, clip.width)
    rng = np.random.default_rng((self._seed, epoch, draws.CROP, index))
    first, top, left = (
      int(rng.integers(n + 1))
      for n in (clip.frames - t, clip.height - h, clip.width - w)
    )
    try:
      if self._cache is None:
        video_THWC = read_clip(clip, first, t)
      else:
        video_THWC = self._cache.read(index, clip, first, t)
    # A file can break in more ways than the decoder names; none of them ends a run.
    except (ValueError, RuntimeError, OSError) as e:
      self._bad_clips.add(clip.id, getattr(e, "reason", str(e)))
      video_THWC = np.zeros((T, H, W, 3), np.uint8)
      t = h = w = 0
    else:
      video_THWC = video_THWC[:, top : top + h, left : left + w]
      video_THWC = np.pad(
        video_THWC, ((0, T - t), (0, H - h), (0, W - w), (0, 0)), mode="edge"
      )
    return {
      "video_THWC": video_THWC,
      "valid_3": np.array([t, h, w], np.int32),
      "clip": np.array(index, np.int32),
    }
