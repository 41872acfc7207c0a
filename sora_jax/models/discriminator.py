"""3D PatchGAN discriminator for the VAE's adversarial loss."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from sora_jax.models import layers


class Discriminator(nn.Module):
  """Video in [-1, 1] -> a logit per spacetime patch, float32.

  PatchGAN (arXiv:1611.07004) with 3D kernels, as VQGAN (arXiv:2012.09841) and its video
  successors use; RMS norms in place of batch norm, so examples do not see each other.
  """

  width: int = 32
  depth: int = 3
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, video_BTHWC: Array) -> Array:
    x = video_BTHWC.astype(self.dtype)
    for i in range(self.depth):
      # Time is halved once only: clips are short where frames are many.
      strides = (2 if i == self.depth - 1 else 1, 2, 2)
      width = self.width * min(2**i, 8)
      x = nn.Conv(width, (3, 4, 4), strides, dtype=self.dtype, name=f"conv_{i}")(x)
      if i:
        x = layers.RMSNorm(name=f"norm_{i}")(x)
      x = nn.leaky_relu(x, 0.2)
    x = nn.Conv(1, (3, 3, 3), dtype=self.dtype, name="head")(x)
    return x.astype(jnp.float32)[..., 0]
