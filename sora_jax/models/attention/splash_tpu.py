"""Attention over packed rows on TPU: blocks of other clips are never visited.

The kernel is tokamax's splash attention (Pallas). Its segment ids only mask; here the
list of (query block, key block) pairs to visit is computed from the ids at run time, so
a row of n equal clips costs n times less than one clip of the row's length.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from sora_jax.models.attention import custom_vjp, splash_tpu_backward
from sora_jax.models.attention.splash_tpu_backward import LANES, MASKED

# Queries, and keys, that the kernel takes at once: few waste little where a block holds
# the end of a clip and the start of the next. The list of pairs of blocks has to fit
# the scalar memory (1 MB, 17 bytes each), so that longer rows take twice as many. Still
# more do not fit the vector memory.
BLOCK = 512
_MOST_BLOCKS = 200


def splash_attention(
  q_BLNK: Array,
  k_BSNK: Array,
  v_BSNK: Array,
  segments_q_BL: Array,
  segments_k_BS: Array,
  interpret=False,
) -> Array:
  """`attention` for TPUs; quick where the segments of a row are contiguous.

  Args:
    q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS: as for `attention`, but the
      queries are scaled already: where they come from, that costs no pass of its own.
    interpret: run without a TPU (`pltpu.InterpretParams()`), for tests.

  Raises:
    ValueError: for rows that are too long for one chip.
  """
  attend = custom_vjp.differentiable(
    functools.partial(forward, interpret=interpret),
    functools.partial(backward, interpret=interpret),
    functools.partial(_forward, interpret=interpret, keep=False),
  )
  return attend(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS)


def forward(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS, *, interpret=False):
  """Returns what `blockwise.forward` does, from scaled queries."""
  inputs = (q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS)
  return _forward(*inputs, interpret, keep=True)


def _forward(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS, interpret, keep):
  """Returns (output,), and with keep the log-sum-exp beside it."""
  kernel = _kernel()

  def one_row(q_NLK, k_NSK, v_NSK, segments_L, segments_S):
    config = _sizes(segments_L, segments_S, interpret)
    active = active_blocks(segments_L, segments_S, config.block_q, config.block_kv)
    result = kernel._splash_attention_forward(
      _visits(active),
      q_NLK,
      k_NSK,
      v_NSK,
      kernel.SegmentIds(segments_L, segments_S),
      None,
      mask_value=MASKED,
      is_mqa=False,
      config=config,
      save_residuals=keep,
      mask_function=None,
      fwd_mask_sparsity=1.0,
    )
    if not keep:
      return (result,)
    out_NLK, kept = result
    return out_NLK, kept["logsumexp"] * math.log(2.0)  # it works with powers of two

  rows = _heads_first(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS)
  results = _by_row(one_row, rows)
  return tuple(x.swapaxes(1, 2)[:, : q_BLNK.shape[1]] for x in results)


def backward(
  q_BLNK,
  k_BSNK,
  v_BSNK,
  segments_q_BL,
  segments_k_BS,
  out_BLNK,
  lse_BLN,
  dout_BLNK,
  *,
  interpret=False,
):
  """Returns what `blockwise.backward` does, from scaled queries: dq is theirs."""

  def one_row(q_NLK, k_NSK, v_NSK, segments_L, segments_S, out_NLK, lse_NL, dout_NLK):
    config = _sizes(segments_L, segments_S, interpret)
    active = active_blocks(segments_S, segments_L, config.block_kv, config.block_q)
    return splash_tpu_backward.gradients(
      *(q_NLK, k_NSK, v_NSK, segments_L, segments_S, lse_NL / math.log(2.0), dout_NLK),
      delta_NL=jnp.einsum("nlk,nlk->nl", out_NLK.astype(jnp.float32), dout_NLK),
      active=active,
      visits=_visits(active, splash_tpu_backward.first_visits(active)),
      config=config,
      kernel=_kernel(),
    )

  rows = _heads_first(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS)
  kept = (_whole_blocks(x).swapaxes(1, 2) for x in (out_BLNK, lse_BLN, dout_BLNK))
  dq, dk, dv = (x.swapaxes(1, 2) for x in _by_row(one_row, (*rows, *kept)))
  L, S = q_BLNK.shape[1], k_BSNK.shape[1]
  return dq[:, :L], dk[:, :S], dv[:, :S]


def whole_blocks(length: int) -> tuple[int, int]:
  """Returns the length that a row is filled up to, and the tokens of its blocks."""
  block = BLOCK if length <= _MOST_BLOCKS * BLOCK else 2 * BLOCK
  # For short rows, filling up to blocks of full size is too much.
  length += -length % (block if length >= 8 * BLOCK else LANES)
  return length, next(n for n in range(block, 0, -LANES) if length % n == 0)


def active_blocks(segments_L, segments_S, block_q: int, block_k: int) -> Array:
  """Returns which blocks of queries meet which of keys: [L / block_q, S / block_k].

  A block of queries without keys of its own segments gets the first one, or its softmax
  would have no terms at all. Padding meets nothing: nobody reads its output.
  """
  low_q, high_q = _range(segments_L, block_q)
  low_k, high_k = _range(segments_S, block_k)
  active = (low_q[:, None] <= high_k[None]) & (low_k[None] <= high_q[:, None])
  empty = ~active.any(axis=1)
  return active | (empty[:, None] & (jnp.arange(len(low_k)) == 0)[None])


def _range(segments_L, block):
  """Returns the lowest and highest id of each block.

  A block that is all padding gets a range beyond all ids, so that it meets nothing.
  """
  blocks = segments_L.reshape(-1, block)
  low = jnp.where(blocks == 0, jnp.iinfo(jnp.int32).max, blocks).min(axis=1)
  return low, blocks.max(axis=1)


def _heads_first(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS):
  """Returns the kernel's arguments, rows leading: lengths padded to whole blocks."""
  values = (_whole_blocks(x).swapaxes(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
  return (*values, _whole_blocks(segments_q_BL), _whole_blocks(segments_k_BS))


def _whole_blocks(x):
  missing = whole_blocks(x.shape[1])[0] - x.shape[1]
  return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))


def _by_row(one_row, rows):
  """Runs the kernel for each row: the blocks to visit, and its grid, depend on it."""
  if len(rows[0]) == 1:
    return jax.tree.map(lambda x: x[None], one_row(*(x[0] for x in rows)))
  return jax.lax.map(lambda row: one_row(*row), rows)


def _sizes(segments_L, segments_S, interpret):
  """Returns the kernel's sizes of blocks.

  Raises:
    ValueError: if the list of pairs of blocks does not fit the scalar memory.
  """
  block_q, block_k = (whole_blocks(len(x))[1] for x in (segments_L, segments_S))
  if len(segments_L) * len(segments_S) > block_q * block_k * _MOST_BLOCKS**2:
    raise ValueError(
      f"attention of {len(segments_L)} to {len(segments_S)} tokens on one chip is more "
      f"than the kernel's {_MOST_BLOCKS}^2 blocks: config.mesh.context must be larger"
    )
  return _kernel().SplashConfig(
    block_q=block_q,
    block_kv=block_k,
    block_q_dkv=block_q,
    block_kv_dkv=block_k,
    interpret=interpret,
  )


@functools.cache
def _kernel():
  # Only a TPU, or a plan for one, needs the package.
  from tokamax._src.ops.experimental.tpu.splash_attention import (
    splash_attention_kernel,
  )

  return splash_attention_kernel


def _visits(active, first=False):
  """Returns the kernel's list of blocks to visit, row by row; its first n count.

  The list has one length for all rows of clips, since shapes are static; how many of it
  are visited is an argument of the kernel.

  first: what `splash_tpu_backward.first_visits` returns.
  """
  from tokamax._src.ops.experimental.tpu.splash_attention import (
    splash_attention_mask_info as mask_info,
  )

  count = active.sum().reshape(1).astype(jnp.int32)
  visits = jnp.argwhere(active, size=active.size, fill_value=-1).astype(jnp.int32)
  real = jnp.arange(active.size) < count
  first = jnp.broadcast_to(first, active.shape)[tuple(visits.T)]
  kind = jnp.where(first, splash_tpu_backward.FIRST, splash_tpu_backward.PAIR)
  return mask_info.MaskInfo(
    mask_next=None,
    active_rows=visits[:, 0],
    active_cols=visits[:, 1],
    block_mask=jnp.where(real, kind, splash_tpu_backward.NONE).astype(jnp.int8),
    num_active_blocks=count,
    partial_mask_blocks=None,
    q_sequence=None,
  )
