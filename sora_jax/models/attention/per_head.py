"""Attention head by head: the backend for CPUs, where a head's scores fit the cache.

As FlashAttention-2 (arXiv:2307.08691) it keeps the output and the log-sum-exp for the
backward pass, which makes the scores again: cheaper there than writing all heads' to
memory.
"""

import jax
import jax.numpy as jnp
from jax import Array

from sora_jax.models.attention import custom_vjp
from sora_jax.models.attention.blockwise import MASKED


def attention_by_head(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS) -> Array:
  """Computes `attention` one head at a time.

  Shapes are those of `attention`. Scores are [B, L, S], so that long rows are for the
  other backends.
  """
  attend = custom_vjp.differentiable(_forward, _backward)
  return attend(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS)


def _forward(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS):
  """Returns (output [B, L, N, K] like v, log-sum-exp [N, B, L] float32)."""
  bias_BLS = _bias(segments_q_BL, segments_k_BS)
  scale = q_BLNK.shape[-1] ** -0.5

  def one_head(qkv):
    q_BLK, k_BSK, v_BSK = qkv
    score_BLS = _score(q_BLK * scale, k_BSK) + bias_BLS
    peak_BL1 = score_BLS.max(axis=-1, keepdims=True)
    weight_BLS = jnp.exp(score_BLS - peak_BL1)
    total_BL1 = weight_BLS.sum(axis=-1, keepdims=True)
    out_BLK = jnp.einsum("bls,bsk->blk", weight_BLS.astype(v_BSK.dtype), v_BSK)
    # Dividing after the matmul saves a pass over the scores.
    out_BLK = (out_BLK / total_BL1).astype(v_BSK.dtype)
    return out_BLK, (peak_BL1 + jnp.log(total_BL1))[..., 0]

  qkv = tuple(map(_heads_first, (q_BLNK, k_BSNK, v_BSNK)))
  out_NBLK, lse_NBL = jax.lax.map(one_head, qkv)
  return _heads_last(out_NBLK), lse_NBL


def _backward(
  q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS, out_BLNK, lse_NBL, dout_BLNK
):
  """Returns (dq, dk, dv) in the dtypes of q, k and v."""
  bias_BLS = _bias(segments_q_BL, segments_k_BS)
  scale = q_BLNK.shape[-1] ** -0.5

  def one_head(inputs):
    q_BLK, k_BSK, v_BSK, out_BLK, lse_BL, dout_BLK = inputs
    q_BLK = q_BLK * scale
    # The softmax's own gradient: sum over keys of weight x its gradient, which is the
    # product of the output and the output's gradient (FlashAttention-2, algorithm 2).
    delta_BL1 = jnp.sum(
      out_BLK.astype(jnp.float32) * dout_BLK.astype(jnp.float32), -1, keepdims=True
    )
    weight_BLS = jnp.exp(_score(q_BLK, k_BSK) + bias_BLS - lse_BL[..., None])
    dweight_BLS = _score(dout_BLK, v_BSK)
    dscore_BLS = (weight_BLS * (dweight_BLS - delta_BL1)).astype(q_BLK.dtype)
    dv_BSK = jnp.einsum("bls,blk->bsk", weight_BLS.astype(v_BSK.dtype), dout_BLK)
    dq_BLK = scale * jnp.einsum("bls,bsk->blk", dscore_BLS, k_BSK)
    dk_BSK = jnp.einsum("bls,blk->bsk", dscore_BLS, q_BLK)
    return dq_BLK, dk_BSK, dv_BSK

  q, k, v, out, dout = map(_heads_first, (q_BLNK, k_BSNK, v_BSNK, out_BLNK, dout_BLNK))
  return map(_heads_last, jax.lax.map(one_head, (q, k, v, out, lse_NBL, dout)))


def _bias(segments_q_BL, segments_k_BS):
  """Returns what is added to all heads' scores: 0 within a segment, MASKED across."""
  mask_BLS = segments_q_BL[:, :, None] == segments_k_BS[:, None, :]
  return jnp.where(mask_BLS, 0.0, MASKED)


def _score(q_BLK, k_BSK):
  return jnp.einsum("blk,bsk->bls", q_BLK, k_BSK, preferred_element_type=jnp.float32)


def _heads_first(x_BLNK):
  return x_BLNK.transpose(2, 0, 1, 3)


def _heads_last(x_NBLK):
  return x_NBLK.transpose(1, 2, 0, 3)
