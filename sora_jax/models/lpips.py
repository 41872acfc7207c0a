"""LPIPS, the learned perceptual distance of two images (arXiv:1801.03924), on VGG16."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

# VGG16 (arXiv:1409.1556, configuration D) up to relu5_3: convolutions of each slice.
WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = (2, 2, 3, 3, 3)
MIN_SIZE = 2 ** (len(WIDTHS) - 1)
# ImageNet's mean and deviation in the range [-1, 1], rounded as the authors have them.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10


class LPIPS(nn.Module):
  """Distance of images in [-1, 1], version 0.1 of the authors' code with its heads.

  Features after relu1_2, 2_2, 3_3, 4_3 and 5_3 are brought to length 1 at each pixel;
  their squared differences are weighted per channel, averaged over the pixels and
  summed over the slices.

  Attributes:
    widths: channels of the slices; published: WIDTHS.
    dtype: of the convolutions; the distance is float32.
  """

  widths: tuple[int, ...] = WIDTHS
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x_BHWC: Array, y_BHWC: Array, mask_BHW=None) -> Array:
    """Returns the distances [B] of two batches of images.

    mask_BHW: 1 where a padded image has pixels. A feature counts where the first pixel
      of its cell does, and should find the same around it in both: an image without
      any pixel has distance 0.

    Raises:
      ValueError: if a side is less than MIN_SIZE.
    """
    if min(x_BHWC.shape[1:3]) < MIN_SIZE:
      raise ValueError(
        f"LPIPS needs images of at least {MIN_SIZE}x{MIN_SIZE}, not "
        f"{x_BHWC.shape[2]}x{x_BHWC.shape[1]}"
      )
    vgg = VGG16(self.widths, self.dtype, name="vgg")
    distance_B = jnp.zeros(len(x_BHWC))
    for i, (x, y) in enumerate(zip(vgg(x_BHWC), vgg(y_BHWC), strict=True)):
      weight_C = self.param(f"head_{i}", nn.initializers.ones, x.shape[-1:])
      difference_BHW = jnp.sum(weight_C * (_unit(x) - _unit(y)) ** 2, axis=-1)
      if mask_BHW is None:
        distance_B += jnp.mean(difference_BHW, (1, 2))
        continue
      H, W = difference_BHW.shape[1:]
      # Of each slice the first pixel of a cell stands for it: pooling rounds down.
      cells_BHW = mask_BHW[:, :: 2**i, :: 2**i][:, :H, :W]
      count_B = jnp.maximum(jnp.sum(cells_BHW, (1, 2)), 1.0)
      distance_B += jnp.sum(difference_BHW * cells_BHW, (1, 2)) / count_B
    return distance_B


class VGG16(nn.Module):
  """Image in [-1, 1] -> features of the five slices, the finest first."""

  widths: tuple[int, ...] = WIDTHS
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x_BHWC: Array) -> list[Array]:
    x = (x_BHWC - jnp.array(_SHIFT)) / jnp.array(_SCALE)
    features = []
    for i, (width, depth) in enumerate(zip(self.widths, DEPTHS, strict=True)):
      if i:
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
      for j in range(depth):
        x = nn.Conv(width, (3, 3), dtype=self.dtype, name=f"conv_{i}_{j}")(x)
        x = nn.relu(x)
      features.append(x)
    return features


def _unit(x_BHWC):
  """Divides features by their length at each pixel; 0, also its gradient, for zeros.

  The inner `where` keeps the root away from 0, where its gradient is infinite and would
  be NaN even behind the outer one.
  """
  x = x_BHWC.astype(jnp.float32)
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
  return x / (length + _EPSILON)
