"""Decoding: searches the texts of a network that says one token after the other.

A network is a function step(ids_BM, time, cache) -> (logits [B, M, V] of the next
token, cache): it reads token number `time` of the M texts of each row. The searches are
one program each, a loop that ends when all texts have; they know nothing else of the
network. A cache is a tree of arrays [depth, B, M, ...] of what was read of each text.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Step = Callable[[Array, Array, Any], tuple[Array, Any]]
_NEVER = -1e30  # a log-probability


class Found(NamedTuple):
  """Texts: tokens with their end, then padding [B, M, T]; their log-probabilities."""

  ids_BMT: Array
  score_BM: Array


def generate(
  step: Step,
  cache: Any,
  first_BM: Array,
  wanted_BM: Array,
  choose: Callable[[Array, Array], Array],
  *,
  end: int,
  tokens: int,
  pad: int = 0,
) -> Found:
  """One text each, token by token.

  Args:
    step: the network. cache: its, of texts without a token.
    first_BM: the token that each text begins with; it is not in the result.
    wanted_BM: which texts are wanted; the others stay empty and nobody waits for them.
    choose: (logits [B, M, V], time) -> ids [B, M], such as `greedy` or `nucleus`.
    end: id that ends a text. tokens: T, most of a text, its end included.
    pad: id behind the end, which is never said.

  Returns:
    The texts, and the sums of their tokens' log-probabilities.
  """
  shape = first_BM.shape

  def unfinished(carry):
    time, _, done_BM, *_ = carry
    return (time < tokens) & ~jnp.all(done_BM)

  def say(carry):
    time, ids_BM, done_BM, ids_BMT, score_BM, cache = carry
    logits_BMV, cache = step(ids_BM, time, cache)
    log_BMV = _without(pad, logits_BMV)
    ids_BM = jnp.where(done_BM, pad, choose(log_BMV, time)).astype(jnp.int32)
    said_BM = jnp.take_along_axis(log_BMV, ids_BM[..., None], axis=-1)[..., 0]
    score_BM += jnp.where(done_BM, 0.0, said_BM)
    ids_BMT = jax.lax.dynamic_update_index_in_dim(ids_BMT, ids_BM, time, axis=2)
    return time + 1, ids_BM, done_BM | (ids_BM == end), ids_BMT, score_BM, cache

  ids_BMT = jnp.full((*shape, tokens), pad, jnp.int32)
  begin = (0, first_BM.astype(jnp.int32), ~wanted_BM, ids_BMT, jnp.zeros(shape), cache)
  _, _, _, ids_BMT, score_BM, _ = jax.lax.while_loop(unfinished, say, begin)
  return Found(ids_BMT, score_BM)


def greedy(logits_BMV: Array, time: Array) -> Array:
  """The likeliest token of each text."""
  del time
  return jnp.argmax(logits_BMV, axis=-1)


def nucleus(
  keys_BM: Array, top_p: float, temperature: float = 1.0
) -> Callable[[Array, Array], Array]:
  """Draws from the likeliest tokens that together have a probability of top_p.

  arXiv:1904.09751. The likeliest is always among them.

  Args:
    keys_BM: a key of each text, so that it is the same in any company.
    top_p: in (0, 1]. temperature: that logits are divided by, before.
  """

  def draw(key, logits_V):
    order_V = jnp.argsort(-logits_V)
    sorted_V = logits_V[order_V] / temperature
    probability_V = jax.nn.softmax(sorted_V)
    before_V = jnp.cumsum(probability_V) - probability_V
    kept_V = jnp.where((before_V < top_p).at[0].set(True), sorted_V, _NEVER)
    return order_V[jax.random.categorical(key, kept_V)]

  def choose(logits_BMV, time):
    each = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, time)))
    return jax.vmap(jax.vmap(draw))(each(keys_BM), logits_BMV)

  return choose


def beam(
  step: Step,
  cache: Any,
  first_BN: Array,
  wanted_BN: Array,
  *,
  beams: int,
  end: int,
  tokens: int,
  length_power: float = 1.0,
  pad: int = 0,
) -> Found:
  """Keeps the `beams` best beginnings of each text, and returns the best text.

  Beginnings are compared by their log-probability / length ** length_power, so that
  short ones are not preferred (arXiv:1609.08144); those that have ended stay among
  them as they are. A text that never ends is cut at `tokens`.

  Args:
    step: the network. cache: its, of N * beams texts a row, those of a text together.
    first_BN, wanted_BN, end, tokens, pad: as of `generate`.
    beams: W, beginnings of each text.
    length_power: 0 compares log-probabilities alone.
  """
  B, N = first_BN.shape
  W = beams

  def unfinished(carry):
    time, _, done_BNW, *_ = carry
    return (time < tokens) & ~jnp.all(done_BNW)

  def extend(carry):
    time, ids_BNW, done_BNW, ids_BNWT, sum_BNW, length_BNW, cache = carry
    logits_BMV, cache = step(ids_BNW.reshape(B, N * W), time, cache)
    log_BNWV = _without(pad, logits_BMV).reshape(B, N, W, -1)
    V = log_BNWV.shape[-1]
    # What has ended goes on with padding, at no cost, and with nothing else.
    padding_V = jnp.where(jnp.arange(V) == pad, 0.0, _NEVER)
    log_BNWV = jnp.where(done_BNW[..., None], padding_V, log_BNWV)
    sum_BNWV = sum_BNW[..., None] + log_BNWV
    length_BNW = length_BNW + ~done_BNW
    value_BNWV = sum_BNWV / _divisor(length_BNW, length_power)[..., None]
    _, best_BNW = jax.lax.top_k(value_BNWV.reshape(B, N, W * V), W)
    parent_BNW, ids_BNW = best_BNW // V, (best_BNW % V).astype(jnp.int32)

    def of_parent(x_BNW):
      index = parent_BNW.reshape(*parent_BNW.shape, *[1] * (x_BNW.ndim - 3))
      return jnp.take_along_axis(x_BNW, index, axis=2)

    def cache_of_parent(x):
      x_DBNW = x.reshape(*x.shape[:2], N, W, *x.shape[3:])
      return jax.vmap(of_parent)(x_DBNW).reshape(x.shape)

    sum_BNW = jnp.take_along_axis(sum_BNWV.reshape(B, N, W * V), best_BNW, axis=2)
    done_BNW, length_BNW, ids_BNWT = map(of_parent, (done_BNW, length_BNW, ids_BNWT))
    ids_BNWT = jax.lax.dynamic_update_index_in_dim(ids_BNWT, ids_BNW, time, axis=3)
    done_BNW |= ids_BNW == end
    cache = jax.tree.map(cache_of_parent, cache)
    return time + 1, ids_BNW, done_BNW, ids_BNWT, sum_BNW, length_BNW, cache

  # All beams of a text begin alike: but for the first, they must not be chosen.
  sum_BNW = jnp.where(jnp.arange(W) == 0, 0.0, _NEVER) * jnp.ones((B, N, 1))
  ids_BNW = jnp.repeat(first_BN[..., None].astype(jnp.int32), W, axis=2)
  done_BNW = jnp.repeat(~wanted_BN[..., None], W, axis=2)
  ids_BNWT = jnp.full((B, N, W, tokens), pad, jnp.int32)
  lengths = jnp.zeros((B, N, W), jnp.int32)
  begin = (0, ids_BNW, done_BNW, ids_BNWT, sum_BNW, lengths, cache)
  _, _, _, ids_BNWT, sum_BNW, lengths, _ = jax.lax.while_loop(unfinished, extend, begin)
  value_BNW = sum_BNW / _divisor(lengths, length_power)
  best_BN1 = jnp.argmax(value_BNW, axis=-1)[..., None]
  ids_BNT = jnp.take_along_axis(ids_BNWT, best_BN1[..., None], axis=2)[:, :, 0]
  return Found(ids_BNT, jnp.take_along_axis(sum_BNW, best_BN1, axis=2)[..., 0])


def below(pieces: int, logits_BMV: Array) -> Array:
  """Logits of which only those of ids below `pieces` can be said."""
  return jnp.where(jnp.arange(logits_BMV.shape[-1]) < pieces, logits_BMV, _NEVER)


def _divisor(lengths: Array, power: float) -> Array:
  """What makes log-probabilities of texts of these lengths comparable."""
  return jnp.maximum(lengths, 1).astype(jnp.float32) ** power


def _without(pad: int, logits_BMV: Array) -> Array:
  """Log-probabilities of what can be said."""
  can_V = jnp.arange(logits_BMV.shape[-1]) != pad
  return jax.nn.log_softmax(jnp.where(can_V, logits_BMV, _NEVER))
