"""Pixels of clips that are padded to one size: their range, and which of them are real.

Masks are 1 where there is something of a clip and 0 in its padding, so that every term
of a loss is a mean over what belongs to clips.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sora_jax.models.vae_config import VAEConfig

# The data pipeline fills a clip's padding with black.
_BLACK = -1.0


def to_float(video_u8: Array) -> Array:
  """Returns uint8 pixels as float32 in [-1, 1]; floats are that already."""
  if jnp.issubdtype(video_u8.dtype, jnp.floating):
    return video_u8.astype(jnp.float32)
  return video_u8.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: Array) -> Array:
  """Returns pixels in [-1, 1] as uint8, clipped and rounded; it inverts `to_float`."""
  return jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def valid_mask(batch) -> Array:
  """Returns 1 where a padded clip has pixels: float32 [B, T, H, W, 1].

  batch: with `video_THWC` [B, T, H, W, 3] and `valid_3`, the (T, H, W) that each clip
    fills from its first corner on.
  """
  T, H, W = batch["video_THWC"].shape[1:4]
  valid_B3 = batch["valid_3"]
  t = jnp.arange(T)[None, :] < valid_B3[:, :1]
  h = jnp.arange(H)[None, :] < valid_B3[:, 1:2]
  w = jnp.arange(W)[None, :] < valid_B3[:, 2:]
  mask = t[:, :, None, None] & h[:, None, :, None] & w[:, None, None, :]
  return mask[..., None].astype(jnp.float32)


def latent_mask(model: VAEConfig, batch) -> Array:
  """Returns 1 where a latent's pixels are all valid: float32 [B, t, h, w, 1]."""
  shape = model.latent_shape(*batch["video_THWC"].shape[1:4])
  valid_B3 = batch["valid_3"]
  # A clip without frames has no latent either.
  frames = jnp.where(
    valid_B3[:, 0] > 0, 1 + (valid_B3[:, 0] - 1) // model.time_factor, 0
  )
  counts = (
    frames,
    valid_B3[:, 1] // model.space_factor,
    valid_B3[:, 2] // model.space_factor,
  )
  t, h, w = (jnp.arange(n) < c[:, None] for n, c in zip(shape, counts, strict=True))
  mask = t[:, :, None, None] & h[:, None, :, None] & w[:, None, None, :]
  return mask[..., None].astype(jnp.float32)


def masked_mean(value_BTHWC, mask_BTHWC):
  """Returns the mean of the values whose mask, of one channel, is 1; 0 without any."""
  weight = jnp.sum(mask_BTHWC) * value_BTHWC.shape[-1]
  return jnp.sum(value_BTHWC * mask_BTHWC) / jnp.maximum(weight, 1.0)


class Clips(NamedTuple):
  """Real clips [B, T, H, W, 3] in [-1, 1], and 1 where they have pixels [.., 1]."""

  video_BTHWC: Array
  mask_BTHWC: Array

  def on_black(self, video_BTHWC: Array) -> Array:
    """Returns a video that is black where the clips are padded.

    Networks that judge thus see the same there, whatever was decoded.
    """
    return jnp.where(self.mask_BTHWC > 0, video_BTHWC, _BLACK)


def choose_frames(clips, key: Array, count: int):
  """Takes `count` random frames of each clip, alike from all arrays; 0 takes all.

  clips: arrays [B, T, H, W, ...], the last of them their mask. Where a clip is padded
  in time, its own frames come first: a shorter one gives all it has.
  """
  if not 0 < count < clips[-1].shape[1]:
    return clips
  padding_BT = 1.0 - clips[-1][:, :, 0, 0, 0]
  # A random order in which frames of the padding, at 1 and more, come last.
  order_BT = jax.random.uniform(key, padding_BT.shape) + padding_BT
  index_BT = jnp.argsort(order_BT, axis=1)[:, :count]
  index = index_BT[:, :, None, None, None]
  return [jnp.take_along_axis(clip, index, axis=1) for clip in clips]
