"""Pixel clips of one static size, for the VAE."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from sora_jax.data import draws, mixture
from sora_jax.data.bad_clips import BadClips
from sora_jax.data.clip_reader import read_clip
from sora_jax.data.clips import Clip
from sora_jax.data.endless import EndlessDataset, split_indices
from sora_jax.data.mixture import NO_SHARES
from sora_jax.data.pixel_cache import PixelCache
from sora_jax.packing import time_grid


class ClipDataset(EndlessDataset):
  """Pixel clips of one static size, for the VAE. Element i is one visit of a clip.

  An element has `video_THWC` uint8, a random window in time and space of the clip,
  smaller clips padded at the end of each axis by repeating the edge; `valid_3` int32,
  its valid (t, h, w), all 0 for a clip without pixels; `clip` int32, its index in
  `clips`, or -1 if it has none: it is left out, or cannot be read and its index is in
  `clip_unreadable` (else -1). All others are what they are without it.
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
    leave_out: Collection[str] = (),
    shares: Mapping[str, float] = NO_SHARES,
  ):
    """Raises ValueError if the split is empty or the crop is not (1 + 4k, H, W).

    leave_out: ids of clips that are not read.
    cache: of the clips of this split; without one, files are decoded at each visit.
    shares: of visits, by source, of a mixture; an epoch is then a round of it.
    """
    if not time_grid.is_on_grid(crop[0]):
      raise ValueError(f"a crop has 1 + 4k frames, got {crop[0]}")
    self._clips = list(clips)
    self._indices = split_indices(clips, split)
    self._crop = tuple(crop)
    self._seed = seed
    self._bad_clips = BadClips(bad_clips_folder)
    self._cache = cache
    self._leave_out = frozenset(leave_out)
    chosen = [self._clips[i] for i in self._indices]
    ids = [clip.id for clip in chosen]
    # Raw frames are what decoding gives, so that a run may begin with or without them.
    lossy = [cache.codec] if cache and cache.codec != "raw" else []
    self._visits = mixture.of_clips(chosen, shares, None, seed)
    parts = ["clips", ids, self._crop, seed, *lossy, *self._visits.fingerprint]
    super().__init__(parts)

  def _plan(self, epoch):
    rng = np.random.default_rng((self._seed, epoch, draws.ORDER))
    clip_V, epoch_V = self._visits.of_round(epoch)
    order = rng.permutation(len(clip_V))
    return np.stack([self._indices[clip_V], epoch_V], axis=1)[order]

  def _load(self, epoch, entry):
    index, epoch = map(int, entry)  # in a mixture, the epoch of the clip's source
    clip = self._clips[index]
    T, H, W = self._crop
    t, h, w = min(T, clip.frames), min(H, clip.height), min(W, clip.width)
    rng = np.random.default_rng((self._seed, epoch, draws.CROP, index))
    first, top, left = (
      int(rng.integers(n + 1))
      for n in (clip.frames - t, clip.height - h, clip.width - w)
    )
    if clip.id in self._leave_out:
      return self._element()
    try:
      if self._cache is None:
        video_THWC = read_clip(clip, first, t)
      else:
        video_THWC = self._cache.read(index, clip, first, t)
    # A file can break in more ways than the decoder names; none of them ends a run.
    except (ValueError, RuntimeError, OSError) as e:
      self._bad_clips.add(clip.id, getattr(e, "reason", str(e)))
      return self._element(unreadable=index)
    video_THWC = video_THWC[:, top : top + h, left : left + w]
    video_THWC = np.pad(
      video_THWC, ((0, T - t), (0, H - h), (0, W - w), (0, 0)), mode="edge"
    )
    return self._element(video_THWC, (t, h, w), index)

  def _element(self, video_THWC=None, valid=(0, 0, 0), clip=-1, unreadable=-1):
    if video_THWC is None:
      video_THWC = np.zeros((*self._crop, 3), np.uint8)
    return {
      "video_THWC": video_THWC,
      "valid_3": np.array(valid, np.int32),
      "clip": np.array(clip, np.int32),
      "clip_unreadable": np.array(unreadable, np.int32),
    }
