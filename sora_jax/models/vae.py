"""Causal 3D VAE: video_BTHWC -> latent_BTHWC and back.

The network is Wan 2.1's (arXiv:2503.20314, section 4.1): residual blocks of causal 3D
convolutions between down- or upsampling steps, one spatial attention in the middle. Its
first frame stands alone, so 1 + 4k frames give 1 + k latents and an image is a video of
one frame. No output depends on a later frame.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from sora_jax import patches
from sora_jax.models import layers
from sora_jax.models.attention import attention


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Sizes of the VAE.

  Attributes:
    width, width_multipliers: channels of each stage, finest first.
    downsample: what halves between stages: "s" space, "t" time, "st" both. The
      defaults compress 4x8x8.
    blocks: residual blocks per stage (the decoder has one more, as in Wan).
    latent_channels: C of the latent.
    patch_size: (t, h, w) of pixels folded into channels before the first convolution;
      multiplies the compression. Cheap on small machines, at some cost in detail.
    kernel: of the convolutions in residual blocks. end_kernel: of those that read and
      write the (folded) pixels and the latent.
    bottleneck: channels between the two convolutions of a residual block, of which the
      second is then 1x1x1; 0 = as many as the block's, both with the kernel (Wan).
    middle: two more blocks with attention between them at the coarsest grid.
    head_width: of one more 1x1x1 layer before the decoder's last convolution; 0 = none
      (Wan). A folded patch has many pixels for that last, linear layer to draw.
  """

  width: int = 96
  width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
  downsample: tuple[str, ...] = ("s", "st", "st")
  blocks: int = 2
  latent_channels: int = 16
  patch_size: tuple[int, int, int] = (1, 1, 1)
  kernel: tuple[int, int, int] = (3, 3, 3)
  end_kernel: tuple[int, int, int] = (3, 3, 3)
  bottleneck: int = 0
  middle: bool = True
  head_width: int = 0

  def __post_init__(self):
    if len(self.downsample) != len(self.width_multipliers) - 1:
      raise ValueError(
        f"vae downsample {self.downsample} needs one entry fewer than "
        f"width_multipliers {self.width_multipliers}"
      )
    if unknown := set(self.downsample) - {"s", "t", "st"}:
      raise ValueError(f"vae downsample entries {sorted(unknown)} are not s, t or st")
    if self.patch_size[1] != self.patch_size[2]:
      raise ValueError(f"vae patch_size {self.patch_size} must be square in space")

  @property
  def space_factor(self) -> int:
    return self.patch_size[1] * 2 ** sum("s" in kind for kind in self.downsample)

  @property
  def time_factor(self) -> int:
    return self.patch_size[0] * 2 ** sum("t" in kind for kind in self.downsample)

  def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent (T, H, W) of a video.

    Raises:
      ValueError: if frames are not 1 + a multiple of the time factor, or the height
        or width are not multiples of the space factor.
    """
    if (
      (frames - 1) % self.time_factor
      or height % self.space_factor
      or (width % self.space_factor)
    ):
      raise ValueError(
        f"a video of {frames} frames of {width}x{height} is off the VAE's grid: "
        f"frames must be 1 + a multiple of {self.time_factor}, width and height "
        f"multiples of {self.space_factor}"
      )
    return (
      1 + (frames - 1) // self.time_factor,
      height // self.space_factor,
      width // self.space_factor,
    )


class VAE(nn.Module):
  """Encoder and decoder; use through `apply(..., method=VAE.encode)`."""

  config: VAEConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.encoder = Encoder(self.config, self.dtype, name="encoder")
    self.decoder = Decoder(self.config, self.dtype, name="decoder")

  def encode(self, video_BTHWC: Array) -> tuple[Array, Array]:
    """Video in [-1, 1] -> mean and log-variance of the posterior, float32.

    Raises:
      ValueError: if the video's size is off the grid, see `VAEConfig.latent_shape`.
    """
    self.config.latent_shape(*video_BTHWC.shape[1:4])
    moments = self.encoder(video_BTHWC).astype(jnp.float32)
    mean_BTHWC, logvar_BTHWC = jnp.split(moments, 2, axis=-1)
    return mean_BTHWC, jnp.clip(logvar_BTHWC, -30.0, 20.0)

  def decode(self, latent_BTHWC: Array) -> Array:
    """Latent (not normalised) -> video, float32, about [-1, 1] and not clipped."""
    return self.decoder(latent_BTHWC).astype(jnp.float32)

  def __call__(self, video_BTHWC: Array) -> Array:
    return self.decode(self.encode(video_BTHWC)[0])


class CausalConv(nn.Module):
  """3D convolution that sees kernel - 1 frames of the past (zeros before the first)."""

  features: int
  kernel: tuple[int, int, int] = (3, 3, 3)
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x_BTHWC: Array) -> Array:
    t, h, w = self.kernel
    padding = ((t - 1, 0), (h // 2, h // 2), (w // 2, w // 2))
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
  def __call__(self, x_BTHWC: Array) -> Array:
    kernel = self.config.kernel
    inner, last = self.config.bottleneck or self.features, kernel
    if self.config.bottleneck:
      last = (1, 1, 1)
    h = nn.silu(layers.RMSNorm(epsilon=1e-12, name="norm_1")(x_BTHWC))
    h = CausalConv(inner, kernel, self.dtype, name="conv_1")(h)
    h = nn.silu(layers.RMSNorm(epsilon=1e-12, name="norm_2")(h))
    h = CausalConv(self.features, last, self.dtype, name="conv_2")(h)
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
  def __call__(self, x_BTHWC: Array) -> Array:
    C = x_BTHWC.shape[-1]
    x_BTHWC = ResidualBlock(C, self.config, self.dtype, name="block_1")(x_BTHWC)
    x_BTHWC = FrameAttention(self.dtype, name="attention")(x_BTHWC)
    return ResidualBlock(C, self.config, self.dtype, name="block_2")(x_BTHWC)


class Downsample(nn.Module):
  """Halves space by a strided convolution, then time; the first frame is kept."""

  kind: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BTHWC: Array) -> Array:
    C = x_BTHWC.shape[-1]
    if "s" in self.kind:
      x_BTHWC = nn.Conv(
        C,
        (1, 3, 3),
        strides=(1, 2, 2),
        padding=((0, 0), (0, 1), (0, 1)),
        dtype=self.dtype,
        name="space",
      )(x_BTHWC)
    if "t" in self.kind and x_BTHWC.shape[1] > 1:
      later = self._time_conv(C)(x_BTHWC)
      x_BTHWC = jnp.concatenate([x_BTHWC[:, :1], later], axis=1)
    elif "t" in self.kind and self.is_initializing():
      self._time_conv(C)(jnp.repeat(x_BTHWC, 3, axis=1))
    return x_BTHWC

  def _time_conv(self, features):
    # Frame k of the result ends at frame 2k of the input, so nothing looks ahead.
    return nn.Conv(
      features,
      (3, 1, 1),
      strides=(2, 1, 1),
      padding="VALID",
      dtype=self.dtype,
      name="time",
    )


class Upsample(nn.Module):
  """Doubles time (all frames but the first), then space, halving the channels there."""

  kind: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BTHWC: Array) -> Array:
    B, T, H, W, C = x_BTHWC.shape
    if "t" in self.kind:
      time = CausalConv(2 * C, (3, 1, 1), dtype=self.dtype, name="time")
      if T > 1:
        later = time(x_BTHWC[:, 1:]).reshape(B, T - 1, H, W, 2, C)
        later = later.transpose(0, 1, 4, 2, 3, 5).reshape(B, 2 * (T - 1), H, W, C)
        x_BTHWC = jnp.concatenate([x_BTHWC[:, :1], later], axis=1)
      elif self.is_initializing():
        time(x_BTHWC)
    if "s" in self.kind:
      x_BTHWC = x_BTHWC.repeat(2, axis=2).repeat(2, axis=3)
      x_BTHWC = CausalConv(C // 2, (1, 3, 3), dtype=self.dtype, name="space")(x_BTHWC)
    return x_BTHWC


class Encoder(nn.Module):
  """Video -> mean and log-variance, side by side in the channels."""

  config: VAEConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, video_BTHWC: Array) -> Array:
    c, dtype = self.config, self.dtype
    widths = [c.width * m for m in c.width_multipliers]
    conv = functools.partial(CausalConv, kernel=c.end_kernel, dtype=dtype)
    block = functools.partial(ResidualBlock, config=c, dtype=dtype)
    x_BTHWC = conv(widths[0], name="conv_in")(_fold(video_BTHWC, c.patch_size))
    for i, width in enumerate(widths):
      for j in range(c.blocks):
        x_BTHWC = block(width, name=f"stage_{i}_block_{j}")(x_BTHWC)
      if i < len(c.downsample):
        x_BTHWC = Downsample(c.downsample[i], dtype, name=f"down_{i}")(x_BTHWC)
    if c.middle:
      x_BTHWC = Middle(c, dtype, name="middle")(x_BTHWC)
    x_BTHWC = nn.silu(layers.RMSNorm(epsilon=1e-12, name="norm_out")(x_BTHWC))
    x_BTHWC = conv(2 * c.latent_channels, name="conv_out")(x_BTHWC)
    return CausalConv(2 * c.latent_channels, (1, 1, 1), dtype=dtype, name="to_moments")(
      x_BTHWC
    )


class Decoder(nn.Module):
  """Latent -> video."""

  config: VAEConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, latent_BTHWC: Array) -> Array:
    c, dtype = self.config, self.dtype
    widths = [c.width * m for m in reversed(c.width_multipliers)]
    conv = functools.partial(CausalConv, kernel=c.end_kernel, dtype=dtype)
    block = functools.partial(ResidualBlock, config=c, dtype=dtype)
    x_BTHWC = CausalConv(c.latent_channels, (1, 1, 1), dtype=dtype, name="from_latent")(
      latent_BTHWC
    )
    x_BTHWC = conv(widths[0], name="conv_in")(x_BTHWC)
    if c.middle:
      x_BTHWC = Middle(c, dtype, name="middle")(x_BTHWC)
    for i, width in enumerate(widths):
      for j in range(c.blocks + 1):
        x_BTHWC = block(width, name=f"stage_{i}_block_{j}")(x_BTHWC)
      if i < len(c.downsample):
        kind = c.downsample[len(c.downsample) - 1 - i]
        x_BTHWC = Upsample(kind, dtype, name=f"up_{i}")(x_BTHWC)
    x_BTHWC = nn.silu(layers.RMSNorm(epsilon=1e-12, name="norm_out")(x_BTHWC))
    if c.head_width:
      x_BTHWC = nn.silu(conv(c.head_width, name="conv_head")(x_BTHWC))
    x_BTHWC = conv(3 * math.prod(c.patch_size), name="conv_out")(x_BTHWC)
    return _unfold(x_BTHWC, c.patch_size)


def _fold(video_BTHWC, patch_size):
  """Pixels of each patch to channels; the first frame fills a patch of its own."""
  first = jnp.repeat(video_BTHWC[:, :1], patch_size[0] - 1, axis=1)
  video_BTHWC = jnp.concatenate([first, video_BTHWC], axis=1)
  B, *shape, _ = video_BTHWC.shape
  grid = patches.grid_shape(shape, patch_size)
  return patches.patchify(video_BTHWC, patch_size).reshape(B, *grid, -1)


def _unfold(x_BTHWC, patch_size):
  B, *grid, P = x_BTHWC.shape
  x_BLP = x_BTHWC.reshape(B, math.prod(grid), P)
  return patches.unpatchify(x_BLP, grid, patch_size)[:, patch_size[0] - 1 :]
