"""The encoders of T5 v1.1 (arXiv:1910.10683) and UMT5 (arXiv:2304.09151), frozen here.

Wan reads its captions with UMT5-XXL. Training from nothing uses the small encoder of
caption_encoder.py instead.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from sora_jax.models import layers

_MASKED = -1e30  # finite, so that an empty caption has no NaN


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes of an encoder.

  Attributes:
    vocab_size: rows of the embedding, more than the tokenizer's pieces.
    width, depth, heads, head_dim, mlp_width: of the transformer.
    buckets, max_distance: of the relative position bias.
    bias_per_layer: UMT5 has one in each layer, T5 shares that of the first.
  """

  vocab_size: int = 32128
  width: int = 512
  depth: int = 8
  heads: int = 6
  head_dim: int = 64
  mlp_width: int = 1024
  buckets: int = 32
  max_distance: int = 128
  bias_per_layer: bool = False


def _sizes(name, **kwargs):
  sizes = {
    "small": (512, 8, 6, 1024),
    "base": (768, 12, 12, 2048),
    "large": (1024, 24, 16, 2816),
    "xl": (2048, 24, 32, 5120),
    "xxl": (4096, 24, 64, 10240),
  }
  width, depth, heads, mlp_width = sizes[name]
  return T5Config(width=width, depth=depth, heads=heads, mlp_width=mlp_width, **kwargs)


PRESETS = {
  **{f"t5-v1.1-{n}": _sizes(n) for n in ("small", "base", "large", "xl", "xxl")},
  **{
    f"umt5-{n}": _sizes(n, vocab_size=256384, bias_per_layer=True)
    for n in ("small", "base", "xxl")
  },
}


class T5Encoder(nn.Module):
  """Features of captions.

  Args of call:
    text_BS: token ids.
    mask_BS: True for tokens, False for padding.

  Returns:
    [B, S, width] float32; those of padding are meaningless.
  """

  config: T5Config
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, text_BS: Array, mask_BS: Array) -> Array:
    c = self.config
    # The stream of residuals stays float32: T5's grows far beyond its layers' outputs.
    x_BSD = nn.Embed(c.vocab_size, c.width, name="token_embed")(text_BS)
    x_BSD = x_BSD.astype(jnp.float32)
    bucket_SS = position_buckets(text_BS.shape[1], c.buckets, c.max_distance)
    bias_NSS = None
    if not c.bias_per_layer:
      bias_NSS = _bias(c, bucket_SS)
    blocks = nn.scan(
      _Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=c.depth,
    )(c, self.dtype, name="blocks")
    x_BSD, _ = blocks(x_BSD, (mask_BS, bucket_SS, bias_NSS))
    return layers.RMSNorm(name="final_norm")(x_BSD)


class _Block(nn.Module):
  """Pre-norm attention with a position bias, and a gated MLP."""

  config: T5Config
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BSD, context):
    mask_BS, bucket_SS, bias_NSS = context
    c = self.config

    def dense(features, name):
      return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

    def heads(x):
      return x.reshape(*x.shape[:-1], c.heads, c.head_dim)

    if c.bias_per_layer:
      bias_NSS = _bias(c, bucket_SS)
    h_BSD = layers.RMSNorm(name="attention_norm")(x_BSD)
    inner = c.heads * c.head_dim
    q, k, v = (heads(dense(inner, name)(h_BSD)) for name in ("query", "key", "value"))
    # T5 does not divide by the root of the head's width: its init has it.
    score_BNSS = jnp.einsum("bqnk,bsnk->bnqs", q, k, preferred_element_type=jnp.float32)
    score_BNSS += jnp.where(mask_BS[:, None, None], bias_NSS, _MASKED)
    weight_BNSS = jax.nn.softmax(score_BNSS, axis=-1).astype(v.dtype)
    h_BSNK = jnp.einsum("bnqs,bsnk->bqnk", weight_BNSS, v)
    x_BSD += dense(c.width, "attention_out")(h_BSNK.reshape(*h_BSD.shape[:-1], inner))

    h_BSD = layers.RMSNorm(name="mlp_norm")(x_BSD)
    gate_BSF = nn.gelu(dense(c.mlp_width, "mlp_gate")(h_BSD))
    h_BSF = gate_BSF * dense(c.mlp_width, "mlp_up")(h_BSD)
    return x_BSD + dense(c.width, "mlp_down")(h_BSF), None


def _bias(c, bucket_SS):
  """Returns what attention scores get added for the distance: float32 [N, S, S]."""
  embed = nn.Embed(c.buckets, c.heads, name="position_bias")
  return embed(bucket_SS).astype(jnp.float32).transpose(2, 0, 1)


def position_buckets(length: int, buckets: int, max_distance: int) -> Array:
  """Returns the bucket of each (query, key) pair: int32 [length, length].

  Half of the buckets are for keys behind the query; of each half, the first half
  counts single tokens and the rest grows with the logarithm up to max_distance.
  """
  position_S = jnp.arange(length)
  offset_SS = position_S[None] - position_S[:, None]
  half = buckets // 2
  exact = half // 2
  distance_SS = jnp.abs(offset_SS)
  log_SS = jnp.log(jnp.maximum(distance_SS, 1) / exact)
  far_SS = exact + (log_SS / math.log(max_distance / exact) * (half - exact)).astype(
    jnp.int32
  )
  near = distance_SS < exact
  bucket_SS = jnp.where(near, distance_SS, jnp.minimum(far_SS, half - 1))
  return bucket_SS + half * (offset_SS > 0)
