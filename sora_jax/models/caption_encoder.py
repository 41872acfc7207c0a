"""A small text encoder, trained jointly with the DiT, over packed captions."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from sora_jax.models import layers
from sora_jax.models.attention import attention


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
  """Sizes of the text encoder; the tokenizer has at most `vocab_size` pieces."""

  vocab_size: int = 1024
  width: int = 256
  depth: int = 2
  heads: int = 4

  def __post_init__(self):
    if self.width % self.heads or (self.width // self.heads) % 2:
      raise ValueError(
        f"text width {self.width} over {self.heads} heads must be an even whole number"
      )


class TextEncoder(nn.Module):
  """Bidirectional pre-norm transformer with rotary positions.

  Args of call:
    text_BS: token ids. text_segment_BS: caption of each token, 0 = padding.
    text_position_BS: index of each token inside its caption.

  Returns:
    [B, S, width] features; those of padding are meaningless.
  """

  config: TextEncoderConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, text_BS, text_segment_BS, text_position_BS) -> Array:
    c = self.config
    x_BSE = nn.Embed(
      c.vocab_size,
      c.width,
      embedding_init=nn.initializers.normal(1.0),
      dtype=self.dtype,
      name="token_embed",
    )(text_BS)
    rope = layers.rope_angles(text_position_BS[..., None], (c.width // c.heads,))
    block = nn.scan(
      _TextBlock,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=c.depth,
    )(c, name="blocks")
    x_BSE, _ = block(x_BSE, text_segment_BS, rope)
    return layers.RMSNorm(name="final_norm")(x_BSE)


class _TextBlock(nn.Module):
  """Pre-norm attention inside of each caption, and an MLP."""

  config: TextEncoderConfig

  @nn.compact
  def __call__(self, x_BSE, segment_BS, rope):
    c = self.config

    def dense(features, name):
      # Only what is rotated has its channels in the order that `apply_rope` wants.
      head_dim = c.width // c.heads if name in ("query", "key") else 0
      return layers.Dense(
        features, use_bias=False, dtype=x_BSE.dtype, rope_half_split=head_dim, name=name
      )

    h = layers.RMSNorm(name="attention_norm")(x_BSE)
    heads = (c.heads, c.width // c.heads)
    q, k, v = (
      dense(c.width, name)(h).reshape(*h.shape[:-1], *heads)
      for name in ("query", "key", "value")
    )
    q, k = layers.apply_rope(q, *rope), layers.apply_rope(k, *rope)
    h = attention(q, k, v, segment_BS, segment_BS).reshape(h.shape)
    x_BSE = x_BSE + dense(c.width, "attention_out")(h)
    h = layers.RMSNorm(name="mlp_norm")(x_BSE)
    h = nn.gelu(dense(4 * c.width, "mlp_up")(h))
    return x_BSE + dense(c.width, "mlp_down")(h), None
