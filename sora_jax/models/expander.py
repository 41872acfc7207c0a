"""A small decoder-only language model that writes a long caption behind a short one."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from sora_jax.models import decoding, layers

_MASKED = -1e30
# Keys and values of all blocks: two arrays [blocks, B, S, N, K].
Cache = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class ExpanderConfig:
  """Sizes.

  Attributes:
    vocab_size: rows of the embedding; the tokenizer has at most as many pieces.
    width, depth, heads: of the transformer.
  """

  vocab_size: int = 1024
  width: int = 256
  depth: int = 4
  heads: int = 4

  def __post_init__(self):
    if self.width % self.heads or (self.width // self.heads) % 2:
      raise ValueError(
        f"expander width {self.width} over {self.heads} heads must be an even whole "
        "number"
      )


PRESETS = {
  # For captions that are alike, such as those of shapes.
  "tiny": ExpanderConfig(width=128, depth=3, heads=4),
}


class ExpanderLM(nn.Module):
  """Causal pre-norm transformer with rotary positions and a tied output.

  Args of call:
    ids_BS: tokens. start: place of the first of them in the whole text.
    cache: of `empty_cache`, with what is in front of them; None: nothing is.

  Returns:
    Logits [B, S, vocab_size] of the tokens that follow, and the cache with these.
  """

  config: ExpanderConfig

  @nn.compact
  def __call__(self, ids_BS: Array, start=0, cache: Cache | None = None):
    c = self.config
    embed = nn.Embed(
      c.vocab_size,
      c.width,
      embedding_init=nn.initializers.normal(c.width**-0.5),
      name="token_embed",
    )
    x_BSD = embed(ids_BS) * c.width**0.5
    place_BS = jnp.broadcast_to(start + jnp.arange(ids_BS.shape[1]), ids_BS.shape)
    rope = layers.rope_angles(place_BS[..., None], (c.width // c.heads,))
    blocks = nn.scan(
      _Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast, 0 if cache is not None else nn.broadcast),
      length=c.depth,
    )(c, name="blocks")
    x_BSD, cache = blocks(x_BSD, place_BS, rope, cache)
    x_BSD = layers.RMSNorm(name="final_norm")(x_BSD)
    return embed.attend(x_BSD), cache


class _Block(nn.Module):
  """Causal attention and an MLP."""

  config: ExpanderConfig

  @nn.compact
  def __call__(self, x_BSD, place_BS, rope, cache):
    c = self.config

    def dense(features, name):
      return layers.Dense(features, use_bias=False, name=name)

    h = layers.RMSNorm(name="attention_norm")(x_BSD)
    shape = (*h.shape[:-1], c.heads, c.width // c.heads)
    q, k, v = (dense(c.width, n)(h).reshape(shape) for n in ("query", "key", "value"))
    q, k = layers.apply_rope(q, *rope), layers.apply_rope(k, *rope)
    if cache is not None:
      first = (0, place_BS[0, 0], 0, 0)
      k, v = (
        jax.lax.dynamic_update_slice(whole, part, first)
        for whole, part in zip(cache, (k, v), strict=True)
      )
    sees_BSS = place_BS[:, :, None] >= jnp.arange(k.shape[1])
    score_BNSS = jnp.einsum("bqnk,bsnk->bnqs", q * q.shape[-1] ** -0.5, k)
    weight_BNSS = jax.nn.softmax(jnp.where(sees_BSS[:, None], score_BNSS, _MASKED))
    h = jnp.einsum("bnqs,bsnk->bqnk", weight_BNSS, v).reshape(h.shape)
    x_BSD = x_BSD + dense(c.width, "attention_out")(h)
    h = layers.RMSNorm(name="mlp_norm")(x_BSD)
    h = nn.gelu(dense(4 * c.width, "mlp_up")(h))
    return x_BSD + dense(c.width, "mlp_down")(h), (k, v)


def empty_cache(config: ExpanderConfig, rows: int, tokens: int) -> Cache:
  """The cache of texts of so many tokens before the first one."""
  head_dim = config.width // config.heads
  zeros = jnp.zeros((config.depth, rows, tokens, config.heads, head_dim))
  return zeros, zeros


def generate(
  config: ExpanderConfig,
  params,
  ids_BS: Array,
  given_B: Array,
  keys_B: Array,
  top_p: float,
  pieces: int | None = None,
) -> Array:
  """Goes on behind given tokens, a token at a time: [B, S] with the given ones.

  Args:
    config, params: of the model.
    ids_BS: texts, of which the first given_B tokens are there; S is the longest.
    given_B: at least 1.
    keys_B: random keys, so that a text does not depend on those beside it.
    top_p: the likeliest tokens that have this much of the probability are drawn from
      (arXiv:1904.09751); 0 takes the likeliest one.
    pieces: only ids below are said: a tokenizer may have fewer than the embedding.
  """
  B, S = ids_BS.shape
  model, choose = ExpanderLM(config), decoding.nucleus(keys_B[:, None], top_p)

  def step(carry, place):
    token_B, cache = carry
    logits_BSV, cache = model.apply({"params": params}, token_B[:, None], place, cache)
    logits_BSV = decoding.below(pieces or config.vocab_size, logits_BSV)
    drawn_B = choose(logits_BSV, place)[:, 0].astype(jnp.int32)
    next_B = jnp.where(place + 1 < given_B, ids_BS[:, place + 1], drawn_B)
    return (next_B, cache), next_B

  first = (ids_BS[:, 0], empty_cache(config, B, S))
  _, rest_SB = jax.lax.scan(step, first, jnp.arange(S - 1))
  return jnp.concatenate([ids_BS[:, :1], rest_SB.T], axis=1)
