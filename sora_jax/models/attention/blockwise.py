"""Attention in chunks of plain JAX: linear memory, blocks of other clips are skipped.

FlashAttention-2 (arXiv:2307.08691) as loops over blocks: the backend for GPUs that
flash_gpu.py is not for, and for a ring on CPU, which needs the two passes apart.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from sora_jax.models.attention import custom_vjp

BLOCK = 512
# The score of what is not seen is finite, so that a row whose keys are all masked gives
# a mean, not NaN.
MASKED = -1e30


def chunked_attention(
  q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS, block: int = BLOCK
) -> Array:
  """Computes `attention` from at most block x block scores at a time.

  Shapes are those of `attention`; block: tokens of a block of queries, and of keys.
  """
  attend = custom_vjp.differentiable(
    functools.partial(forward, block=block), functools.partial(backward, block=block)
  )
  return attend(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS)


def forward(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS, block=BLOCK):
  """Returns (output [B, L, N, K] like v, log-sum-exp [B, L, N] float32).

  A query without keys of its segment gets about -1e30 for the latter.
  """
  # Masks must not look as if they could be computed before the layers: JAX would do it,
  # for all blocks at once, and keep them.
  q_BLNK, segments_q_BL, segments_k_BS = jax.lax.optimization_barrier(
    (q_BLNK, segments_q_BL, segments_k_BS)
  )
  queries = _cut((q_BLNK, segments_q_BL), block, -1)
  keys = _cut((k_BSNK, v_BSNK, segments_k_BS), block, -2)

  def of_queries(query):
    q, segments_q = query

    def visit(state, key):
      k, v, segments_k = key
      # Online softmax: sums so far are brought to the new peak before more is added.
      out, total, peak = state
      score, _ = _score(q, k, segments_q, segments_k)
      higher = jnp.maximum(peak, score.max(axis=-1))
      weight = jnp.exp(score - higher[..., None])
      scale = jnp.exp(peak - higher)
      values = jnp.einsum(
        "bnls,bsnk->bnlk",
        weight.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
      )
      out = out * scale[..., None] + values
      return out, total * scale + weight.sum(axis=-1), higher

    def step(state, key):
      meets = _meet(segments_q, key[2])
      return jax.lax.cond(meets, visit, lambda state, _: state, state, key), None

    B, L, N, K = q.shape
    state = (
      jnp.zeros((B, N, L, K), jnp.float32),
      jnp.zeros((B, N, L), jnp.float32),
      jnp.full((B, N, L), MASKED, jnp.float32),
    )
    (out, total, peak), _ = jax.lax.scan(step, state, keys)
    # Blocks of which a query meets no key were skipped: it has no sum to divide by.
    total = jnp.where(total > 0, total, 1.0)
    out = (out / total[..., None]).astype(v_BSNK.dtype)
    return out.swapaxes(1, 2), (peak + jnp.log(total)).swapaxes(1, 2)

  out, lse = jax.lax.map(of_queries, queries)
  return _join(out, q_BLNK.shape[1]), _join(lse, q_BLNK.shape[1])


def backward(
  q_BLNK,
  k_BSNK,
  v_BSNK,
  segments_q_BL,
  segments_k_BS,
  out_BLNK,
  lse_BLN,
  dout_BLNK,
  block=BLOCK,
):
  """Returns (dq, dk, dv) in the dtypes of q, k and v, from what `forward` returned.

  The outer loop is over keys, whose gradients are complete after one turn; the queries'
  are carried along, since each block of keys adds to all of them.
  """
  scale = q_BLNK.shape[-1] ** -0.5
  delta_BLN = jnp.sum(
    out_BLNK.astype(jnp.float32) * dout_BLNK.astype(jnp.float32), axis=-1
  )
  queries = _cut((q_BLNK, dout_BLNK, lse_BLN, delta_BLN, segments_q_BL), block, -1)
  keys = _cut((k_BSNK, v_BSNK, segments_k_BS), block, -2)

  def of_keys(dq, key):
    k, v, segments_k = key

    def visit(dk, dv, dq, query):
      q, dout, lse, delta, segments_q = query
      score, mask = _score(q, k, segments_q, segments_k)
      weight = jnp.exp(score - lse.swapaxes(1, 2)[..., None])
      weight = jnp.where(mask, weight, 0.0)
      einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
      dv += einsum("bnls,blnk->bsnk", weight.astype(dout.dtype), dout)
      dweight = einsum("blnk,bsnk->bnls", dout, v)
      dscore = weight * (dweight - delta.swapaxes(1, 2)[..., None]) * scale
      dscore = dscore.astype(q.dtype)
      dk += einsum("bnls,blnk->bsnk", dscore, q)
      return dk, dv, dq + einsum("bnls,bsnk->blnk", dscore, k)

    def step(state, query):
      query, dq = query
      meets = _meet(query[4], segments_k)
      *state, dq = jax.lax.cond(
        meets, visit, lambda dk, dv, dq, _: (dk, dv, dq), *state, dq, query
      )
      return tuple(state), dq

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(step, zeros, (queries, dq))
    return dq, (dk, dv)

  dq = jnp.zeros(queries[0].shape, jnp.float32)
  dq, (dk, dv) = jax.lax.scan(of_keys, dq, keys)
  pairs = ((dq, q_BLNK), (dk, k_BSNK), (dv, v_BSNK))
  return tuple(_join(x, like.shape[1]).astype(like.dtype) for x, like in pairs)


def _score(q, k, segments_q, segments_k):
  """Returns the scores [B, N, L, S] of two blocks, scaled and masked, and the mask."""
  mask = (segments_q[:, :, None] == segments_k[:, None, :])[:, None]
  score = jnp.einsum("blnk,bsnk->bnls", q, k, preferred_element_type=jnp.float32)
  return jnp.where(mask, score * q.shape[-1] ** -0.5, MASKED), mask


def _meet(segments_q, segments_k):
  """Returns whether the ranges of ids overlap in any row.

  Segments need not be contiguous: ranges that overlap without a common id cost time,
  and the mask keeps them apart.
  """
  low_q, high_q = segments_q.min(axis=1), segments_q.max(axis=1)
  low_k, high_k = segments_k.min(axis=1), segments_k.max(axis=1)
  return jnp.any((low_q <= high_k) & (low_k <= high_q))


def _cut(arrays, block, fill):
  """Cuts arrays [B, L, ...] into [blocks, B, block, ...], filled up to whole blocks.

  The last array holds ids and is filled with `fill`, the others with 0.
  """
  length = arrays[0].shape[1]
  block = min(block, length)
  missing = -length % block

  def cut(x, value):
    x = jnp.pad(
      x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), constant_values=value
    )
    return x.reshape(x.shape[0], -1, block, *x.shape[2:]).swapaxes(0, 1)

  *values, ids = arrays
  return (*(cut(x, 0) for x in values), cut(ids, fill))


def _join(x, length):
  """Joins what `_cut` has cut, without what it has added."""
  x = x.swapaxes(0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
