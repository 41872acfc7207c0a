"""The vision tower of CLIP (arXiv:2103.00020), frozen here: images to features."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from sora_jax.models.clip_text import ACTIVATIONS, CLIPBlock


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """Sizes of a vision tower.

  Attributes:
    image_size: pixels a side of what it sees. patch_size: of a token.
    width, depth, heads, mlp_width: of the transformer.
    activation: of its MLPs, one of clip_text.ACTIVATIONS.
    mean, std: of the RGB values, in [0, 1], that are taken away.
  """

  image_size: int = 224
  patch_size: int = 14
  width: int = 1280
  depth: int = 32
  heads: int = 16
  mlp_width: int = 5120
  activation: str = "gelu"
  mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
  std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

  def __post_init__(self):
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"activation {self.activation!r} is none of {ACTIVATIONS}")
    if self.width % self.heads or self.image_size % self.patch_size:
      raise ValueError(
        f"width {self.width} must divide by {self.heads} heads, and image_size "
        f"{self.image_size} by patch_size {self.patch_size}"
      )
    if self.depth < 2:
      raise ValueError(f"depth {self.depth}: features are those before the last block")

  @property
  def tokens(self) -> int:
    """Tokens of an image: one of all of it, and one of each patch."""
    return 1 + (self.image_size // self.patch_size) ** 2


# The vision tower of Wan 2.1's image-to-video models.
PRESETS = {"clip-vit-h": CLIPVisionConfig()}


class CLIPVisionEncoder(nn.Module):
  """Features of images, those that enter the last block.

  Published params have that block and a norm behind it, which are not computed: see
  `without_last`.

  Args of call:
    image_BHWC: float32, square, of `image_size`, without mean and over std.

  Returns:
    [B, tokens, width] float32.
  """

  config: CLIPVisionConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image_BHWC: Array) -> Array:
    c, B = self.config, len(image_BHWC)
    side, patch = c.image_size // c.patch_size, c.patch_size
    x = image_BHWC.reshape(B, side, patch, side, patch, 3).swapaxes(2, 3)
    x = x.reshape(B, side * side, patch * patch * 3)
    x = nn.Dense(c.width, use_bias=False, dtype=self.dtype, name="patch_embed")(x)
    whole_D = self.param("class_embed", nn.initializers.zeros, (c.width,), jnp.float32)
    whole_B1D = jnp.broadcast_to(whole_D, (B, 1, c.width))
    x_BSD = jnp.concatenate([whole_B1D, x.astype(jnp.float32)], axis=1)
    x_BSD += nn.Embed(c.tokens, c.width, name="position_embed")(jnp.arange(c.tokens))
    x_BSD = nn.LayerNorm(1e-5, name="first_norm")(x_BSD)
    blocks = nn.scan(
      CLIPBlock,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=c.depth - 1,
    )(c, self.dtype, name="blocks")
    sees_BSS = jnp.ones((B, c.tokens, c.tokens), bool)
    return blocks(x_BSD, sees_BSS)[0]


def without_last(params: dict) -> dict:
  """The params of the encoder, of those that are published."""
  blocks = jax.tree.map(lambda leaf: leaf[:-1], params["blocks"])
  return {k: v for k, v in params.items() if k != "final_norm"} | {"blocks": blocks}
