"""What a DiT reads of whole images beside the text: features to keys and values.

Wan 2.1's image-to-video models attend to what CLIP sees in the first frame, and in the
last one (arXiv:2503.20314, section 5.1).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from sora_jax.models import layers

# Keys are padded to a multiple of it. The last ones are always padding, of segment 0,
# so that the queries of padding see something as well.
_MULTIPLE = 128


class ImageEmbed(nn.Module):
  """Embeds the features of images [B, N, J, V] of N slots: [B, K, width].

  Attributes:
    width: of the DiT.
    positions: whether each of the J tokens has a learned position, where they are of
      two images.
    dtype: of the computation.
  """

  width: int
  positions: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image_BNJV: Array) -> Array:
    J, V = image_BNJV.shape[2:]
    image_BNJV = image_BNJV.astype(jnp.float32)
    if self.positions:
      image_BNJV += self.param("positions", nn.initializers.zeros, (J, V), jnp.float32)
    x = nn.LayerNorm(epsilon=1e-5, name="norm_in")(image_BNJV)
    x = layers.Dense(V, dtype=self.dtype, name="up")(x.astype(self.dtype))
    x = layers.Dense(self.width, dtype=self.dtype, name="down")(
      nn.gelu(x, approximate=False)
    )
    x = nn.LayerNorm(epsilon=1e-5, name="norm_out")(x.astype(jnp.float32))
    x_BKD = x.reshape(len(x), -1, self.width).astype(self.dtype)
    return jnp.pad(x_BKD, ((0, 0), (0, _padding(x_BKD.shape[1])), (0, 0)))


def segments(image_BNJV: Array) -> Array:
  """The slot of each embedded token plus 1, 0 for padding: int32 [B, K]."""
  B, N, J, _ = image_BNJV.shape
  slot_K = jnp.repeat(1 + jnp.arange(N, dtype=jnp.int32), J)
  slot_K = jnp.pad(slot_K, (0, _padding(N * J)))
  return jnp.broadcast_to(slot_K, (B, len(slot_K)))


def _padding(tokens: int) -> int:
  return _MULTIPLE - tokens % _MULTIPLE
