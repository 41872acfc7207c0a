"""Causal 3D VAE: video_BTHWC -> latent_BTHWC and back.

The network is Wan 2.1's (arXiv:2503.20314, section 4.1): residual blocks of causal 3D
convolutions between down- or upsampling steps, one spatial attention in the middle; by
configuration it is Wan 2.2's, with shortcuts around the stages. Its first frame stands
alone, so 1 + 4k frames give 1 + k latents and an image is a video of one frame. No
output depends on a later frame.

So a video can also pass in chunks, see models/vae_stream.py: `first` says that a chunk
(or the whole) begins the video. Where the collection "cache" is mutable, each causal
convolution leaves there the frames that the next chunk's needs of it.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from sora_jax.models import layers
from sora_jax.models.attention import attention
from sora_jax.models.vae_config import LATENT_STATS as LATENT_STATS
from sora_jax.models.vae_config import PRESETS as PRESETS
from sora_jax.models.vae_config import SMALL as SMALL
from sora_jax.models.vae_config import VAEConfig
from sora_jax.packing import patches


class VAE(nn.Module):
  """Encoder and decoder; use through `apply(..., method=VAE.encode)`."""

  config: VAEConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.encoder = Encoder(self.config, self.dtype, name="encoder")
    self.decoder = Decoder(self.config, self.dtype, name="decoder")

  def encode(self, video_BTHWC: Array, first=True) -> tuple[Array, Array]:
    """Video in [-1, 1] -> mean and log-variance of the posterior, float32.

    Raises:
      ValueError: if the video's size is off the grid, see `VAEConfig.latent_shape`.
    """
    frames, *size = video_BTHWC.shape[1:4]
    self.config.latent_shape(frames if first else 1 + frames, *size)
    moments = self.encoder(video_BTHWC, first).astype(jnp.float32)
    mean_BTHWC, logvar_BTHWC = jnp.split(moments, 2, axis=-1)
    return mean_BTHWC, jnp.clip(logvar_BTHWC, -30.0, 20.0)

  def decode(self, latent_BTHWC: Array, first=True) -> Array:
    """Latent (not normalised) -> video, float32, about [-1, 1] and not clipped.

    The published models clip their output to [-1, 1].
    """
    return self.decoder(latent_BTHWC, first).astype(jnp.float32)

  def __call__(self, video_BTHWC: Array) -> Array:
    return self.decode(self.encode(video_BTHWC)[0])


def _keeps(module) -> bool:
  """Returns whether what the next chunk needs goes to the cache."""
  return module.is_mutable_collection("cache") and not module.is_initializing()


class CausalConv(nn.Module):
  """3D convolution that sees kernel - 1 frames of the past (zeros before the first)."""

  features: int
  kernel: tuple[int, int, int] = (3, 3, 3)
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x_BTHWC: Array, first=True) -> Array:
    t, h, w = self.kernel
    before = t - 1 if first else 0
    if t > 1 and not first:
      x_BTHWC = jnp.concatenate([self.get_variable("cache", "past"), x_BTHWC], axis=1)
    if t > 1 and _keeps(self):
      # A chunk may be shorter than the past that the next one needs.
      past = x_BTHWC[:, -(t - 1) :]
      missing = ((0, 0), (t - 1 - past.shape[1], 0), (0, 0), (0, 0), (0, 0))
      self.put_variable("cache", "past", jnp.pad(past, missing))
    padding = ((before, 0), (h // 2, h // 2), (w // 2, w // 2))
    return nn.Conv(
      self.features,
      self.kernel,
      padding=padding,
      dtype=self.dtype,
      conv_general_dilated=layers.conv_general_dilated,
      name="conv",
    )(x_BTHWC)


class ResidualBlock(nn.Module):
  """norm, SiLU, conv, norm, SiLU, conv, plus a 1x1x1 shortcut where widths differ."""

  features: int
  config: VAEConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BTHWC: Array, first=True) -> Array:
    kernel = self.config.kernel
    inner, last = self.config.bottleneck or self.features, kernel
    if self.config.bottleneck:
      last = (1, 1, 1)
    h = nn.silu(layers.RMSNorm(epsilon=1e-12, name="norm_1")(x_BTHWC))
    h = CausalConv(inner, kernel, self.dtype, name="conv_1")(h, first)
    h = nn.silu(layers.RMSNorm(epsilon=1e-12, name="norm_2")(h))
    h = CausalConv(self.features, last, self.dtype, name="conv_2")(h, first)
    if x_BTHWC.shape[-1] != self.features:
      x_BTHWC = CausalConv(self.features, (1, 1, 1), dtype=self.dtype, name="shortcut")(
        x_BTHWC
      )
    return x_BTHWC + h


class FrameAttention(nn.Module):
  """Single-head attention inside each frame."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BTHWC: Array) -> Array:
    B, T, H, W, C = x_BTHWC.shape
    h_BLC = layers.RMSNorm(epsilon=1e-12, name="norm")(x_BTHWC).reshape(B * T, -1, C)
    qkv = nn.Dense(3 * C, dtype=self.dtype, name="qkv")(h_BLC)
    q, k, v = (x[:, :, None] for x in jnp.split(qkv, 3, axis=-1))
    segment_BL = jnp.ones(h_BLC.shape[:2], jnp.int32)
    h_BLC = attention(q, k, v, segment_BL, segment_BL)[:, :, 0]
    h_BLC = nn.Dense(C, dtype=self.dtype, name="out")(h_BLC)
    return x_BTHWC + h_BLC.reshape(x_BTHWC.shape)


class Middle(nn.Module):
  """Residual block, attention, residual block at the coarsest grid."""

  config: VAEConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BTHWC: Array, first=True) -> Array:
    C = x_BTHWC.shape[-1]
    x_BTHWC = ResidualBlock(C, self.config, self.dtype, name="block_1")(x_BTHWC, first)
    x_BTHWC = FrameAttention(self.dtype, name="attention")(x_BTHWC)
    return ResidualBlock(C, self.config, self.dtype, name="block_2")(x_BTHWC, first)


class Downsample(nn.Module):
  """Halves space by a strided convolution, then time; the first frame is kept."""

  kind: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BTHWC: Array, first=True) -> Array:
    C = x_BTHWC.shape[-1]
    if "s" in self.kind:
      x_BTHWC = nn.Conv(
        C,
        (1, 3, 3),
        strides=(1, 2, 2),
        padding=((0, 0), (0, 1), (0, 1)),
        dtype=self.dtype,
        conv_general_dilated=layers.conv_general_dilated,
        name="space",
      )(x_BTHWC)
    if "t" in self.kind:
      # Frame k of the result ends at frame 2k of the input, so nothing looks ahead.
      time = nn.Conv(
        C, (3, 1, 1), (2, 1, 1), padding="VALID", dtype=self.dtype, name="time"
      )
      if not first:
        x_BTHWC = jnp.concatenate([self.get_variable("cache", "last"), x_BTHWC], axis=1)
      if _keeps(self):
        self.put_variable("cache", "last", x_BTHWC[:, -1:])
      if x_BTHWC.shape[1] > 1:
        later = time(x_BTHWC)
        x_BTHWC = jnp.concatenate([x_BTHWC[:, :1], later], axis=1) if first else later
      elif self.is_initializing():  # an image needs no params of time, a video will
        time(jnp.repeat(x_BTHWC, 3, axis=1))
    return x_BTHWC


class Upsample(nn.Module):
  """Doubles time (all frames but the first), then space, to `features` there."""

  kind: str
  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BTHWC: Array, first=True) -> Array:
    B, T, H, W, C = x_BTHWC.shape
    if "t" in self.kind:
      time = CausalConv(2 * C, (3, 1, 1), dtype=self.dtype, name="time")
      later = x_BTHWC[:, 1:] if first else x_BTHWC
      n = later.shape[1]
      # Of a lone first frame nothing is doubled, but the next chunk needs its cache.
      if n or _keeps(self):
        later = time(later, first).reshape(B, n, H, W, 2, C)
        later = later.transpose(0, 1, 4, 2, 3, 5).reshape(B, 2 * n, H, W, C)
        x_BTHWC = jnp.concatenate([x_BTHWC[:, :1], later], axis=1) if first else later
      elif self.is_initializing():
        time(x_BTHWC)
    if "s" in self.kind:
      x_BTHWC = x_BTHWC.repeat(2, axis=2).repeat(2, axis=3)
      x_BTHWC = CausalConv(self.features, (1, 3, 3), dtype=self.dtype, name="space")(
        x_BTHWC
      )
    return x_BTHWC


class Blend(nn.Module):
  """Makes each frame `times` frames, on an even way to it from the one before.

  The first frame of a video stays one.
  """

  times: int

  @nn.compact
  def __call__(self, x_BTHWC: Array, first=True) -> Array:
    B, T, H, W, C = x_BTHWC.shape
    last = x_BTHWC[:, :1] if first else self.get_variable("cache", "last")
    if _keeps(self):
      self.put_variable("cache", "last", x_BTHWC[:, -1:])
    before = jnp.concatenate([last, x_BTHWC[:, :-1]], axis=1)[:, :, None]
    share = jnp.arange(1, self.times + 1, dtype=x_BTHWC.dtype) / self.times
    x = before + share[:, None, None, None] * (x_BTHWC[:, :, None] - before)
    x_BTHWC = x.reshape(B, T * self.times, H, W, C)
    return x_BTHWC[:, self.times - 1 :] if first else x_BTHWC


class Encoder(nn.Module):
  """Video -> mean and log-variance, side by side in the channels."""

  config: VAEConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, video_BTHWC: Array, first=True) -> Array:
    c, dtype = self.config, self.dtype
    widths = c.encoder_widths
    conv = functools.partial(CausalConv, kernel=c.end_kernel, dtype=dtype)
    block = functools.partial(ResidualBlock, config=c, dtype=dtype)
    x_BTHWC = conv(widths[0], name="conv_in")(
      _fold(video_BTHWC, c.patch_size, first), first
    )
    for i, width in enumerate(widths):
      before_BTHWC = x_BTHWC
      for j in range(c.blocks):
        x_BTHWC = block(width, name=f"stage_{i}_block_{j}")(x_BTHWC, first)
      if i < len(c.downsample):
        x_BTHWC = Downsample(c.downsample[i], dtype, name=f"down_{i}")(x_BTHWC, first)
      if c.stage_shortcut:
        x_BTHWC += _average(before_BTHWC, width, c.stage_factors(i), first)
    if c.middle:
      x_BTHWC = Middle(c, dtype, name="middle")(x_BTHWC, first)
    x_BTHWC = nn.silu(layers.RMSNorm(epsilon=1e-12, name="norm_out")(x_BTHWC))
    x_BTHWC = conv(2 * c.latent_channels, name="conv_out")(x_BTHWC, first)
    return CausalConv(2 * c.latent_channels, (1, 1, 1), dtype=dtype, name="to_moments")(
      x_BTHWC
    )


class Decoder(nn.Module):
  """Latent -> video."""

  config: VAEConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, latent_BTHWC: Array, first=True) -> Array:
    c, dtype = self.config, self.dtype
    widths = c.decoder_widths
    conv = functools.partial(CausalConv, kernel=c.end_kernel, dtype=dtype)
    block = functools.partial(ResidualBlock, config=c, dtype=dtype)
    x_BTHWC = CausalConv(c.latent_channels, (1, 1, 1), dtype=dtype, name="from_latent")(
      latent_BTHWC
    )
    x_BTHWC = conv(widths[0], name="conv_in")(x_BTHWC, first)
    if c.middle:
      x_BTHWC = Middle(c, dtype, name="middle")(x_BTHWC, first)
    for i, width in enumerate(widths):
      before_BTHWC = x_BTHWC
      for j in range(c.blocks + 1):
        x_BTHWC = block(width, name=f"stage_{i}_block_{j}")(x_BTHWC, first)
      if i < len(c.downsample):
        mirrored = len(c.downsample) - 1 - i
        features = width if c.stage_shortcut else width // 2
        up = Upsample(c.downsample[mirrored], features, dtype, name=f"up_{i}")
        x_BTHWC = up(x_BTHWC, first)
        if c.stage_shortcut:
          x_BTHWC += _spread(before_BTHWC, width, c.stage_factors(mirrored), first)
    x_BTHWC = nn.silu(layers.RMSNorm(epsilon=1e-12, name="norm_out")(x_BTHWC))
    patch_size = c.patch_size
    if c.blend:
      x_BTHWC = Blend(patch_size[0], name="blend")(x_BTHWC, first)
      patch_size = (1, *patch_size[1:])
    if c.frame_head:
      head = CausalConv(
        patch_size[0] * c.head_width, (2, 1, 1), dtype=dtype, name="conv_head"
      )
      x_BTHWC = _frames(nn.silu(head(x_BTHWC, first)), patch_size[0], first)
      patch_size = (1, *patch_size[1:])
    elif c.head_width:
      x_BTHWC = nn.silu(conv(c.head_width, name="conv_head")(x_BTHWC, first))
    window = patch_size[0], *(n + 2 * c.overlap for n in patch_size[1:])
    x_BTHWC = conv(3 * math.prod(window), name="conv_out")(x_BTHWC, first)
    if c.overlap:
      x_BTHWC = _add_overlap(x_BTHWC, patch_size, c.overlap)
    return _unfold(x_BTHWC, patch_size, first)


def _fold(video_BTHWC, patch_size, first):
  """Moves the pixels of each patch to channels; the first frame has its own patch."""
  if first:
    repeats = jnp.repeat(video_BTHWC[:, :1], patch_size[0] - 1, axis=1)
    video_BTHWC = jnp.concatenate([repeats, video_BTHWC], axis=1)
  B, *shape, _ = video_BTHWC.shape
  grid = patches.grid_shape(shape, patch_size)
  return patches.patchify(video_BTHWC, patch_size).reshape(B, *grid, -1)


def _unfold(x_BTHWC, patch_size, first):
  """Inverts `_fold`; of the first patch only the last frame is kept."""
  B, *grid, P = x_BTHWC.shape
  x_BLP = x_BTHWC.reshape(B, math.prod(grid), P)
  video_BTHWC = patches.unpatchify(x_BLP, grid, patch_size)
  return video_BTHWC[:, patch_size[0] - 1 :] if first else video_BTHWC


def _frames(x_BTHWC, times, first):
  """Makes `times` frames of each, of as many parts of its channels.

  Of the first one only the last part is kept, as by `_unfold`.
  """
  B, T, H, W, C = x_BTHWC.shape
  x = x_BTHWC.reshape(B, T, H, W, times, C // times).transpose(0, 1, 4, 2, 3, 5)
  x_BTHWC = x.reshape(B, T * times, H, W, C // times)
  return x_BTHWC[:, times - 1 :] if first else x_BTHWC


def _add_overlap(x_BTHWC, patch_size, overlap):
  """Adds to each patch what its eight neighbours draw of it.

  x_BTHWC: of each cell the pixels of a window, its patch with `overlap` more on every
    side, in the order of `_fold`. Returns those of the patches. What reaches over the
    frame's edge is cut off.
  """
  B, T, H, W, _ = x_BTHWC.shape
  t, p, o = patch_size[0], patch_size[1], overlap
  window = x_BTHWC.reshape(B, T, H, W, t, p + 2 * o, p + 2 * o, 3)
  for axis, cells in ((5, 2), (6, 3)):
    n = window.shape[cells]
    inner = jax.lax.slice_in_dim(window, o, o + p, axis=axis)
    # The cell before reaches into the first pixels, the one after into the last.
    before = jax.lax.slice_in_dim(window, o + p, o + p + o, axis=axis)
    after = jax.lax.slice_in_dim(window, 0, o, axis=axis)
    before = _pad(jax.lax.slice_in_dim(before, 0, n - 1, axis=cells), cells, 1, 0)
    after = _pad(jax.lax.slice_in_dim(after, 1, n, axis=cells), cells, 0, 1)
    window = inner + _pad(before, axis, 0, p - o) + _pad(after, axis, p - o, 0)
  return window.reshape(B, T, H, W, t * p * p * 3)


def _pad(x, axis, low, high):
  """Pads one axis with zeros."""
  return jnp.pad(x, [(low, high) if i == axis else (0, 0) for i in range(x.ndim)])


def _average(x_BTHWC, features, factors, first):
  """Folds cells of (t, h, w) factors into one, averaged in groups to `features`.

  This is the shortcut around a stage that goes down (Wan 2.2). A group takes neighbours
  in the order (channel, t, h, w). Zeros fill the cell of the first frame.
  """
  ft, fh, fw = factors
  if first:
    x_BTHWC = jnp.pad(x_BTHWC, ((0, 0), (ft - 1, 0), (0, 0), (0, 0), (0, 0)))
  B, T, H, W, C = x_BTHWC.shape
  x = x_BTHWC.reshape(B, T // ft, ft, H // fh, fh, W // fw, fw, C)
  x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
  return x.reshape(*x.shape[:4], features, -1).mean(-1)


def _spread(x_BTHWC, features, factors, first):
  """Fills a group of values with each channel: the transpose of `_average`, unscaled.

  This is the shortcut around a stage that goes up (Wan 2.2).
  """
  ft, fh, fw = factors
  B, T, H, W, C = x_BTHWC.shape
  x = jnp.repeat(x_BTHWC, features * math.prod(factors) // C, axis=-1)
  x = x.reshape(B, T, H, W, features, ft, fh, fw).transpose(0, 1, 5, 2, 6, 3, 7, 4)
  x_BTHWC = x.reshape(B, T * ft, H * fh, W * fw, features)
  return x_BTHWC[:, ft - 1 :] if first else x_BTHWC
