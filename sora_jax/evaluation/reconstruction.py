"""How much of a clip survives the VAE, and whether its latents are healthy.

PSNR and SSIM of what it decodes, images and videos apart and moving pixels by
themselves, the measures of evaluation/vae_health.py, and for clips of known content the
attributes that can still be read: no sample can be expected to have more.
"""

import collections
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from sora_jax.data.buckets import frame_bucket
from sora_jax.data.clip_reader import read_clip
from sora_jax.data.clips import Clip
from sora_jax.evaluation import shape_attributes, vae_health
from sora_jax.evaluation.quality import psnr, ssim
from sora_jax.packing import time_grid
from sora_jax.run import recipe as recipes
from sora_jax.runtime import hosts
from sora_jax.runtime.progress import Progress


class _Batch(NamedTuple):
  """Clips of one size that are encoded together.

  frames: to which the shorter ones are filled up.
  """

  frames: int
  clips: list[Clip]


class Reconstruction(NamedTuple):
  """What is known of a VAE.

  figures: as `reconstruction` says.
  scores: of each clip of known content, the attributes that are right in what was
    decoded: {"color": bool, ...}, see `shape_attributes.score`.
  """

  figures: dict
  scores: list[dict[str, bool]]


def reconstruction(
  clips: list[Clip], autoencoder, encode: recipes.Encode
) -> Reconstruction:
  """Measures clips that went through the VAE against themselves.

  Clips that cannot be read are left out. Each process takes its share of the clips, and
  the result is of all of them, on all processes.

  Args:
    clips: held-out ones.
    autoencoder: an `encoders.autoencoder.Autoencoder`.
    encode: the lengths and the batch size that the stage "encode" has.

  Returns:
    The scores, and as figures:
    psnr: mean over the clips of the PSNR of a clip's mean squared error, dB.
    ssim: mean over the clips.
    psnr_moving: as psnr, of the pixels that move in the real clip; None without any.
    images, videos: {psnr, ssim, clips} of these alone; None where there are none.
    borders: how visible the grid of blocks is; 1 is as in the real clips.
    latents: {channels, effective_rank, channels_in_use, eigenvalues} of the correlation
      of the normalised latents.
    clips, unread: numbers of clips.

  Raises:
    ValueError: if none can be read.
  """
  mine = clips[jax.process_index() :: jax.process_count()]
  size = autoencoder.batch_size(encode.batch_size)
  block = autoencoder.config.space_factor
  measures, moments, unread = [], 0.0, 0
  with Progress("reconstructed", len(mine), "clips", jax.process_index()) as progress:
    for batch in _batches(mine, encode, size):
      read = _read(batch.clips)
      unread += len(batch.clips) - len(read)
      decoded = _decoded(read, batch.frames, size, autoencoder)
      for clip, real_THWC, decoded_THWC, latent_THWC in decoded:
        measures.append(_measure(clip, real_THWC, decoded_THWC, block))
        moments = moments + vae_health.latent_moments(latent_THWC)
      progress.advance(len(batch.clips))
  shares = hosts.gather([measures, np.asarray(moments).tolist(), unread])
  measures = [measure for share in shares for measure in share[0]]
  if not measures:
    raise ValueError(f"none of {len(clips)} held-out clips could be read")
  total = np.sum([np.asarray(share[1]) for share in shares if share[0]], axis=0)
  figures = {
    **_figures(measures),
    "latents": _latent_figures(total),
    "unread": sum(share[2] for share in shares),
  }
  return Reconstruction(figures, [m["score"] for m in measures if m["score"]])


def log_figures(figures: dict) -> None:
  """Logs what `reconstruction` has found, with a warning where channels are dead."""
  logging.info(
    "VAE on %(clips)d held-out clips: PSNR %(psnr).2f dB, SSIM %(ssim).4f", figures
  )
  apart = [
    f"{group} {figures[group]['psnr']:.2f} dB"
    for group in ("images", "videos")
    if figures[group]
  ]
  if figures["psnr_moving"] is not None:
    apart.append(f"moving pixels {figures['psnr_moving']:.2f} dB")
  logging.info("  %s; borders of blocks %.3f", ", ".join(apart), figures["borders"])
  latents = figures["latents"]
  logging.info(
    "  latents: effective rank %(effective_rank).1f of %(channels)d channels", latents
  )
  if latents["channels_in_use"] < latents["channels"]:
    logging.warning(
      "VAE: only %(channels_in_use)d of %(channels)d channels say something of their "
      "own; the others repeat it, and the DiT has to carry them as noise",
      latents,
    )


def _measure(clip: Clip, real_THWC, decoded_THWC, block: int) -> dict:
  """Returns the measures of one clip, which JSON can hold."""
  moving_THW = vae_health.moving_pixels(real_THWC)
  score = None
  if clip.truth:
    analysis = shape_attributes.analyse_video(decoded_THWC)
    score = {
      k: bool(v) for k, v in shape_attributes.score(analysis, clip.truth).items()
    }
  return {
    "frames": len(real_THWC),
    "psnr": psnr(real_THWC, decoded_THWC),
    "ssim": ssim(real_THWC, decoded_THWC),
    "psnr_moving": psnr(real_THWC[moving_THW], decoded_THWC[moving_THW])
    if moving_THW.any()
    else None,
    "borders": vae_health.border_differences(decoded_THWC, block),
    "real_borders": vae_health.border_differences(real_THWC, block),
    "score": score,
  }


def _figures(measures: list[dict]) -> dict:
  """Returns the means over clips, images and videos also apart."""

  def mean(name, group=measures):
    values = [measure[name] for measure in group if measure[name] is not None]
    return float(np.mean(values)) if values else None

  def of_group(group):
    if not group:
      return None
    return {"psnr": mean("psnr", group), "ssim": mean("ssim", group),
            "clips": len(group)}  # fmt: skip

  borders, real_borders = (
    np.mean([measure[name] for measure in measures], axis=0)
    for name in ("borders", "real_borders")
  )
  return {
    **of_group(measures),
    "psnr_moving": mean("psnr_moving"),
    "images": of_group([m for m in measures if m["frames"] == 1]),
    "videos": of_group([m for m in measures if m["frames"] > 1]),
    "borders": vae_health.border_ratio(borders, real_borders),
  }


def _latent_figures(moments: np.ndarray) -> dict:
  eigenvalues = vae_health.correlation_eigenvalues(moments)
  return {
    "channels": len(eigenvalues),
    "effective_rank": vae_health.effective_rank(eigenvalues),
    "channels_in_use": vae_health.channels_in_use(eigenvalues),
    "eigenvalues": [round(float(value), 4) for value in eigenvalues],
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


def _read(clips: list[Clip]) -> list[tuple[Clip, np.ndarray]]:
  """Returns the clips that can be read with their pixels; says which could not."""
  read = []
  for clip in clips:
    try:
      read.append((clip, read_clip(clip)))
    # A file can break in more ways than the decoder names; none ends a run.
    except (ValueError, RuntimeError, OSError) as error:
      logging.warning("left out %s: %s", clip.id, error)
  return read


def _decoded(read, frames: int, size: int, autoencoder):
  """Yields (clip, its video, what the VAE makes of it, its latent).

  Both videos have the same length, and the latent has the frames that it fills.
  """
  if not read:
    return
  # The VAE is causal: frames behind a clip's end change nothing before it.
  padded = [
    np.pad(v, ((0, frames - len(v)), (0, 0), (0, 0), (0, 0)), mode="edge")
    for _, v in read
  ]
  padded += padded[:1] * (size - len(padded))
  latent_BTHWC = autoencoder.encode(np.stack(padded))
  decoded_BTHWC = autoencoder.decode(latent_BTHWC)
  for (clip, real_THWC), decoded_THWC, latent_THWC in zip(
    read, decoded_BTHWC, latent_BTHWC, strict=False
  ):
    filled = time_grid.whole_latent_frames(len(real_THWC))
    yield clip, real_THWC, decoded_THWC[: len(real_THWC)], latent_THWC[:filled]
