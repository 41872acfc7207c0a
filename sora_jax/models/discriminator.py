"""3D PatchGAN discriminator for the VAE's adversarial loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from sora_jax.models import layers, partition


class Discriminator(nn.Module):
  """Video in [-1, 1] -> a logit per cell of 2**depth frames and pixels, float32.

  PatchGAN (arXiv:1611.07004) with kernels of 4x4x4, as TATS (arXiv:2204.03638) has it
  for video: `depth` layers that halve time and space, one more that does not, each
  twice as wide up to 8 times `width`, leaky ReLU of 0.2, then one logit. Padding keeps
  the grid: [B, T, H, W, 3] gives [B, ceil(T / 2**depth), ...].

  The norm is RMS over the channels of each cell in place of batch norm, so that a logit
  depends on its own patch alone: not on other clips, which differ between devices, nor,
  as with group norm, on how much of the batch is padding.

  Attributes:
    width: channels of the first layer; published: 64.
    depth: layers with stride 2; published: 3.
  """

  width: int = 64
  depth: int = 3
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, video_BTHWC: Array) -> Array:
    x = video_BTHWC.astype(self.dtype)
    for i in range(self.depth + 1):
      strides = (2, 2, 2) if i < self.depth else (1, 1, 1)
      width = self.width * min(2**i, 8)
      x = nn.Conv(
        width,
        (4, 4, 4),
        strides,
        dtype=self.dtype,
        conv_general_dilated=_conv,
        name=f"conv_{i}",
      )(x)
      if i:
        # Flat patches have features near 0; a small epsilon would blow them up.
        x = layers.RMSNorm(epsilon=1e-3, name=f"norm_{i}")(x)
      x = nn.leaky_relu(x, 0.2)
    x = nn.Conv(1, (4, 4, 4), dtype=self.dtype, name="head")(x)
    return x.astype(jnp.float32)[..., 0]


def _conv(lhs, rhs, window_strides, padding, dimension_numbers, **kwargs):
  """Computes `lax.conv_general_dilated`; strided ones on CPU by folding blocks of 2.

  The gradients of XLA's strided 3D convolutions there are twenty times slower than
  those of a kernel of 2x2x2 over channels of eight cells, which gives the same.
  """
  if partition.platform() != "cpu" or set(window_strides) == {1}:
    return jax.lax.conv_general_dilated(
      lhs,
      rhs,
      window_strides,
      padding,
      dimension_numbers=dimension_numbers,
      **kwargs,
    )
  # "SAME" padding of a kernel of 4 with stride 2, and one more where the size is odd.
  lhs = jnp.pad(lhs, ((0, 0), *((1, 1 + n % 2) for n in lhs.shape[1:4]), (0, 0)))
  B, T, H, W, C = lhs.shape
  lhs = lhs.reshape(B, T // 2, 2, H // 2, 2, W // 2, 2, C)
  lhs = lhs.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(
    *lhs.shape[:2], H // 2, W // 2, -1
  )
  rhs = rhs.reshape(2, 2, 2, 2, 2, 2, C, -1).transpose(0, 2, 4, 1, 3, 5, 6, 7)
  return layers.conv_general_dilated(
    lhs,
    rhs.reshape(2, 2, 2, 8 * C, -1),
    (1, 1, 1),
    ((0, 0),) * 3,
    dimension_numbers=dimension_numbers,
    **kwargs,
  )
