"""Segment-masked attention: the one function that every network here calls.

A query sees the keys of its own segment and nothing else, which is what lets one
packed row hold many clips. Padding is segment 0 and only ever sees padding, so it
cannot leak; its output is finite and meant to be ignored.
"""

import jax
import jax.numpy as jnp
from jax import Array

# Finite, so that a row whose keys are all masked gives a mean instead of NaN.
_MASKED = -1e30


def attention(
  q_BLNK: Array,
  k_BSNK: Array,
  v_BSNK: Array,
  segments_q_BL: Array,
  segments_k_BS: Array,
) -> Array:
  """Softmax attention within segments, scaled by K ** -0.5, softmax in float32.

  Args:
    q_BLNK: queries. k_BSNK, v_BSNK: keys and values, same N and K.
    segments_q_BL, segments_k_BS: int32 segment ids; 0 is padding.

  Returns:
    [B, L, N, K] in the dtype of the queries.
  """
  if jax.default_backend() == "cpu":
    return _attention_by_head(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS)
  return reference_attention(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS)


def reference_attention(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS):
  """The plain form, with the whole B*N*L*S score matrix; others must equal it."""
  scale = q_BLNK.shape[-1] ** -0.5
  mask_BLS = segments_q_BL[:, :, None] == segments_k_BS[:, None, :]
  score = jnp.einsum(
    "blnk,bsnk->bnls", q_BLNK * scale, k_BSNK, preferred_element_type=jnp.float32
  )
  score = jnp.where(mask_BLS[:, None], score, _MASKED)
  weight = jax.nn.softmax(score, axis=-1).astype(v_BSNK.dtype)
  return jnp.einsum("bnls,bsnk->blnk", weight, v_BSNK)


def _attention_by_head(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS):
  # One head's scores fit the cache of a CPU core, and dividing by the softmax's sum
  # after the second matmul saves a pass over them, forwards and backwards.
  mask_BLS = segments_q_BL[:, :, None] == segments_k_BS[:, None, :]
  bias_BLS = jnp.where(mask_BLS, 0.0, _MASKED)
  scale = q_BLNK.shape[-1] ** -0.5

  def one_head(qkv):
    q_BLK, k_BSK, v_BSK = qkv
    score_BLS = jnp.einsum(
      "blk,bsk->bls", q_BLK * scale, k_BSK, preferred_element_type=jnp.float32
    )
    score_BLS = score_BLS + bias_BLS
    peak_BL1 = jax.lax.stop_gradient(score_BLS.max(axis=-1, keepdims=True))
    weight_BLS = jnp.exp(score_BLS - peak_BL1)
    total_BL1 = weight_BLS.sum(axis=-1, keepdims=True)
    out_BLK = jnp.einsum("bls,bsk->blk", weight_BLS.astype(v_BSK.dtype), v_BSK)
    return (out_BLK / total_BL1).astype(v_BSK.dtype)

  heads_first = tuple(x.transpose(2, 0, 1, 3) for x in (q_BLNK, k_BSNK, v_BSNK))
  return jax.lax.map(one_head, heads_first).transpose(1, 2, 0, 3)
