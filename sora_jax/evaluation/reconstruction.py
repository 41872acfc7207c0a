"""How much of a clip survives the VAE: PSNR and SSIM of what it decodes."""

import collections
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from sora_jax.data.buckets import frame_bucket
from sora_jax.data.clips import Clip
from sora_jax.evaluation.heldout import read_clip
from sora_jax.evaluation.quality import psnr, ssim
from sora_jax.run import recipe as recipes
from sora_jax.runtime import hosts
from sora_jax.runtime.progress import Progress


class _Batch(NamedTuple):
  """Clips of one size that are encoded together.

  frames: to which the shorter ones are filled up.
  """

  frames: int
  clips: list[Clip]


def reconstruction(clips: list[Clip], autoencoder, encode: recipes.Encode) -> dict:
  """Measures clips that went through the VAE against themselves.

  Clips that cannot be read are left out. Each process takes its share of the clips, and
  the result is of all of them, on all processes.

  Args:
    clips: held-out ones.
    autoencoder: an `encoders.autoencoder.Autoencoder`.
    encode: the lengths and the batch size that the stage "encode" has.

  Returns:
    psnr: mean over the clips of the PSNR of a clip's mean squared error, dB.
    ssim: mean over the clips.
    clips, unread: numbers of clips.

  Raises:
    ValueError: if none can be read.
  """
  mine = clips[jax.process_index() :: jax.process_count()]
  size = autoencoder.batch_size(encode.batch_size)
  psnrs, ssims, unread = [], [], 0
  with Progress("reconstructed", len(mine), "clips", jax.process_index()) as progress:
    for batch in _batches(mine, encode, size):
      videos = _read(batch.clips)
      unread += len(batch.clips) - len(videos)
      for real_THWC, decoded_THWC in _decoded(videos, batch.frames, size, autoencoder):
        psnrs.append(psnr(real_THWC, decoded_THWC))
        ssims.append(ssim(real_THWC, decoded_THWC))
      progress.advance(len(batch.clips))
  shares = hosts.gather([psnrs, ssims, unread])
  psnrs, ssims = (sum((share[i] for share in shares), []) for i in (0, 1))
  if not psnrs:
    raise ValueError(f"none of {len(clips)} held-out clips could be read")
  return {
    "psnr": float(np.mean(psnrs)),
    "ssim": float(np.mean(ssims)),
    "clips": len(psnrs),
    "unread": sum(share[2] for share in shares),
  }


def _batches(clips: list[Clip], encode: recipes.Encode, size: int) -> Iterator[_Batch]:
  """Yields the clips in batches, each of one frame size and one bucket of lengths."""
  groups = collections.defaultdict(list)
  for clip in clips:
    frames = frame_bucket(clip.frames, encode.frame_buckets)
    groups[frames, clip.height, clip.width].append(clip)
  for (frames, _, _), group in groups.items():
    for start in range(0, len(group), size):
      yield _Batch(frames, group[start : start + size])


def _read(clips: list[Clip]) -> list[np.ndarray]:
  """Returns the videos that can be read, and says which could not."""
  videos = []
  for clip in clips:
    try:
      videos.append(read_clip(clip))
    # A file can break in more ways than the decoder names; none ends a run.
    except (ValueError, RuntimeError, OSError) as error:
      logging.warning("left out %s: %s", clip.id, error)
  return videos


def _decoded(videos, frames: int, size: int, autoencoder):
  """Yields each video and what the VAE makes of it, of the same length."""
  if not videos:
    return
  # The VAE is causal: frames behind a clip's end change nothing before it.
  padded = [
    np.pad(v, ((0, frames - len(v)), (0, 0), (0, 0), (0, 0)), mode="edge")
    for v in videos
  ]
  padded += padded[:1] * (size - len(padded))
  decoded_BTHWC = autoencoder.decode(autoencoder.encode(np.stack(padded)))
  for real_THWC, decoded_THWC in zip(videos, decoded_BTHWC, strict=False):
    yield real_THWC, decoded_THWC[: len(real_THWC)]
