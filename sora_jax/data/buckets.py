"""Few frame sizes and lengths, so that few programs are compiled; shards of clips."""

import dataclasses
import math

import numpy as np
from absl import logging

from sora_jax.data import sources
from sora_jax.data.clips import Clip
from sora_jax.packing import time_grid


def at_budget(
  clips: list[Clip], max_pixels: int, max_frames: int, multiple: int, seed: int
) -> list[Clip]:
  """The clips as they are encoded within a budget: smaller, and parts of longer ones.

  Args:
    clips: of the manifest.
    max_pixels, max_frames: of a clip. multiple: of heights and widths.
    seed: draws, with its id, which part of a longer clip is taken.
  """
  longest = time_grid.round_down(max_frames)

  def fitted(clip):
    height, width = sources.legal_size(clip.height, clip.width, max_pixels, multiple)
    frames, first = min(clip.frames, longest), 0
    if frames < clip.frames:
      rng = np.random.default_rng([seed, frames, *clip.id.encode()])
      first = int(rng.integers(clip.frames - frames + 1))
    return dataclasses.replace(
      clip,
      start=clip.start + first / clip.fps,
      frames=frames,
      height=height,
      width=width,
    )

  return [fitted(clip) for clip in clips]


def limit_sizes(clips: list[Clip], max_sizes: int) -> list[Clip]:
  """Gives clips of rare frame sizes the nearest of the `max_sizes` commonest ones."""
  counts: dict[tuple[int, int], int] = {}
  for clip in clips:
    size = (clip.height, clip.width)
    counts[size] = counts.get(size, 0) + 1
  kept = sorted(counts, key=lambda size: (-counts[size], size))[:max_sizes]
  moved = sum(counts[size] for size in counts if size not in kept)
  if not moved:
    return clips
  logging.info(
    "%d of %d clips have one of %d rare frame sizes and are fitted to the %d commonest",
    moved,
    len(clips),
    len(counts) - len(kept),
    max_sizes,
  )

  def nearest(clip):
    def distance(size):
      shape = math.log(size[0] * clip.width / (size[1] * clip.height))
      area = math.log(size[0] * size[1] / clip.height / clip.width)
      # Another shape cuts off a part of the picture, another area none.
      return abs(shape) + 0.5 * abs(area)

    height, width = min(kept, key=distance)
    return dataclasses.replace(clip, height=height, width=width)

  return [c if (c.height, c.width) in kept else nearest(c) for c in clips]


def plan_shards(clips: list[Clip], clips_per_shard: int) -> list[list[Clip]]:
  """Splits clips, those of one frame size and length side by side, into shards."""
  ordered = sorted(clips, key=lambda c: (c.height, c.width, c.frames, c.id))
  return [
    ordered[i : i + clips_per_shard] for i in range(0, len(ordered), clips_per_shard)
  ]


def frame_bucket(frames: int, buckets: tuple[int, ...] = ()) -> int:
  """Number of frames that a clip is padded to, so that few lengths are compiled.

  That is the next of the buckets, else the frames of 1 + a power of two latent frames.
  """
  fitting = [bucket for bucket in buckets if bucket >= frames]
  if fitting:
    return min(fitting)
  if frames == 1:
    return 1
  later = time_grid.latent_frames(frames) - 1
  return time_grid.video_frames(1 + 2 ** (later - 1).bit_length())
