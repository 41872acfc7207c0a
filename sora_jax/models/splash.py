"""Attention over packed rows on TPU: blocks of other clips are never visited.

The kernel is tokamax's splash attention (Pallas). Its segment ids only mask; here the
list of (query block, key block) pairs to visit is computed from the ids at run time, so
a row of n equal clips costs n times less than one clip of the row's length.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Name of the output and its log-sum-exp, for remat policies.
SAVED = "attention"
# More rows or columns do not fit the scalar memory, fewer leave the MXU waiting.
BLOCK = 1024


def splash_attention(
  q_BLNK: Array,
  k_BSNK: Array,
  v_BSNK: Array,
  segments_q_BL: Array,
  segments_k_BS: Array,
  *,
  block: int = BLOCK,
  interpret=False,
) -> Array:
  """`attention` for TPUs; the segments of a row must be contiguous, padding last.

  Args:
    q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS: as for `attention`.
    block: largest number of queries, and of keys, that the kernel takes at once.
    interpret: run without a TPU (`pltpu.InterpretParams()`), for tests.

  Raises:
    ValueError: if a length has no block size that divides it.
  """
  block_q = _block(q_BLNK.shape[1], block)
  block_k = _block(k_BSNK.shape[1], block)
  one_row = functools.partial(
    _one_row, block_q=block_q, block_k=block_k, interpret=interpret
  )
  scale = q_BLNK.shape[-1] ** -0.5
  heads_first = (x.swapaxes(1, 2) for x in (q_BLNK * scale, k_BSNK, v_BSNK))
  rows = (*heads_first, segments_q_BL, segments_k_BS)
  if len(q_BLNK) == 1:
    out_BNLK = one_row(*(x[0] for x in rows))[None]
  else:  # the grid depends on the row
    out_BNLK = jax.lax.map(lambda row: one_row(*row), rows)
  return out_BNLK.swapaxes(1, 2)


def active_blocks(segments_L, segments_S, block_q: int, block_k: int) -> Array:
  """Whether a block of queries meets one of keys: bool [L / block_q, S / block_k].

  A block of queries without keys of its own segments gets the first one, or its softmax
  would have no terms at all.
  """
  low_q, high_q = _range(segments_L, block_q)
  low_k, high_k = _range(segments_S, block_k)
  active = (low_q[:, None] <= high_k[None]) & (low_k[None] <= high_q[:, None])
  empty = ~active.any(axis=1)
  return active | (empty[:, None] & (jnp.arange(len(low_k)) == 0)[None])


def _range(segments_L, block):
  # Padding comes last, so it counts as the last segment.
  ids = jnp.where(segments_L == 0, jnp.iinfo(jnp.int32).max, segments_L)
  blocks = ids.reshape(-1, block)
  return blocks.min(axis=1), blocks.max(axis=1)


def _block(length: int, largest: int) -> int:
  """The largest multiple of 128 up to `largest` that divides the length."""
  for block in range(largest, 0, -128):
    if length % block == 0:
      return block
  raise ValueError(
    f"a packed row of {length} tokens is not a multiple of 128, as the TPU's attention "
    "kernel needs"
  )


def _one_row(
  q_NLK, k_NSK, v_NSK, segments_L, segments_S, *, block_q, block_k, interpret
):
  # Only a TPU, or a plan for one, needs the package.
  from tokamax._src.ops.experimental.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )

  config = kernel.SplashConfig(
    block_q=block_q,
    block_kv=block_k,
    block_q_dkv=block_q,
    block_kv_dkv=block_k,
    # dq adds up in 3 buffers, from zero; otherwise each block of keys has its own, and
    # those of pairs that are not visited stay unwritten.
    dq_reduction_steps=3,
    residual_checkpoint_name=SAVED,
    interpret=interpret,
  )
  attend = kernel.SplashAttentionKernel(
    _visits(active_blocks(segments_L, segments_S, block_q, block_k)),
    _visits(active_blocks(segments_S, segments_L, block_k, block_q)),
    config=config,
    is_mqa=False,
    save_residuals=False,
    mask_value=-0.7 * float(np.finfo(np.float32).max),
    mask_function=None,
    fwd_mask_sparsity=1.0,
    dkv_mask_sparsity=1.0,
  )
  return attend(q_NLK, k_NSK, v_NSK, kernel.SegmentIds(segments_L, segments_S))


def _visits(active):
  """The kernel's list of blocks to visit, row by row; only its first n count."""
  from tokamax._src.ops.experimental.tpu.splash_attention import (
    splash_attention_mask_info as mask_info,
  )

  count = active.sum().reshape(1).astype(jnp.int32)
  visits = jnp.argwhere(active, size=active.size, fill_value=-1).astype(jnp.int32)
  real = jnp.arange(active.size) < count
  return mask_info.MaskInfo(
    mask_next=None,
    active_rows=visits[:, 0],
    active_cols=visits[:, 1],
    # 2: some pairs inside the block may be masked.
    block_mask=jnp.where(real, 2, 0).astype(jnp.int8),
    num_active_blocks=count,
    partial_mask_blocks=None,
    q_sequence=None,
  )
