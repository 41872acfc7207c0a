"""The text tower of CLIP (arXiv:2103.00020), frozen here: captions to features."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

_MASKED = -1e30
ACTIVATIONS = ("quick_gelu", "gelu")


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """Sizes of a text tower.

  Attributes:
    vocab_size: rows of the embedding. positions: longest text, its two ends included.
    width, depth, heads, mlp_width: of the transformer.
    activation: of its MLPs, one of ACTIVATIONS; OpenAI's is "quick_gelu".
  """

  vocab_size: int = 49408
  positions: int = 77
  width: int = 512
  depth: int = 12
  heads: int = 8
  mlp_width: int = 2048
  activation: str = "quick_gelu"

  def __post_init__(self):
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"activation {self.activation!r} is none of {ACTIVATIONS}")
    if self.width % self.heads:
      raise ValueError(f"width {self.width} does not divide by {self.heads} heads")


PRESETS = {
  "clip-b": CLIPTextConfig(),
  "clip-l": CLIPTextConfig(width=768, heads=12, mlp_width=3072),
}


class CLIPTextEncoder(nn.Module):
  """Features of captions: each token sees those before it.

  Args of call:
    text_BS: token ids, at most `positions` of them.
    mask_BS: True for tokens, False for padding, which comes last.

  Returns:
    [B, S, width] float32; those of padding are meaningless. The feature of the last
    token is what CLIP projects and compares with images.
  """

  config: CLIPTextConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, text_BS: Array, mask_BS: Array) -> Array:
    c, S = self.config, text_BS.shape[1]
    assert S <= c.positions, (S, c.positions)
    x_BSD = nn.Embed(c.vocab_size, c.width, name="token_embed")(text_BS)
    place_SD = nn.Embed(c.positions, c.width, name="position_embed")(jnp.arange(S))
    x_BSD = (x_BSD + place_SD).astype(jnp.float32)
    sees_BSS = jnp.tril(jnp.ones((S, S), bool)) & mask_BS[:, None]
    blocks = nn.scan(
      CLIPBlock,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=c.depth,
    )(c, self.dtype, name="blocks")
    x_BSD, _ = blocks(x_BSD, sees_BSS)
    return nn.LayerNorm(1e-5, name="final_norm")(x_BSD)


class CLIPBlock(nn.Module):
  """Pre-norm attention and an MLP; the stream of residuals is float32.

  config: of either tower.
  """

  config: Any
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BSD, sees_BSS):
    c, head_dim = self.config, self.config.width // self.config.heads

    def dense(features, name):
      return nn.Dense(features, dtype=self.dtype, name=name)

    def heads(x):
      return x.reshape(*x.shape[:-1], c.heads, head_dim)

    h_BSD = nn.LayerNorm(1e-5, name="attention_norm")(x_BSD)
    q, k, v = (heads(dense(c.width, name)(h_BSD)) for name in ("query", "key", "value"))
    score_BNSS = jnp.einsum(
      "bqnk,bsnk->bnqs", q * head_dim**-0.5, k, preferred_element_type=jnp.float32
    )
    score_BNSS = jnp.where(sees_BSS[:, None], score_BNSS, _MASKED)
    weight_BNSS = jax.nn.softmax(score_BNSS, axis=-1).astype(v.dtype)
    h_BSNK = jnp.einsum("bnqs,bsnk->bqnk", weight_BNSS, v)
    x_BSD += dense(c.width, "attention_out")(h_BSNK.reshape(h_BSD.shape))

    h_BSD = nn.LayerNorm(1e-5, name="mlp_norm")(x_BSD)
    h_BSF = dense(c.mlp_width, "mlp_up")(h_BSD)
    if c.activation == "quick_gelu":
      h_BSF = h_BSF * jax.nn.sigmoid(1.702 * h_BSF)
    else:
      h_BSF = nn.gelu(h_BSF, approximate=False)
    return x_BSD + dense(c.width, "mlp_down")(h_BSF), None
