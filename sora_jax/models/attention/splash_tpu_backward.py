"""The backward pass of splash_tpu.py, around tokamax's kernel for it.

A block of dq adds up over the blocks of keys, in one of three buffers, since the next
visit reads before the last one has written. tokamax fills them with zeros and sums
bfloat16, which XLA does slowly. Here the first visit of a block does not use what is in
memory, what was never visited is left out of the sum, and that is one in float32.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MASKED = -0.7 * float(np.finfo(np.float32).max)
_BUFFERS = 3
# What a visit is, in the kernel's list: none, a pair of blocks, and the first one of a
# block of dq. The kernel asks for none only.
NONE, PAIR, FIRST = 0, 2, 3
LANES, _SUBLANES = 128, 8


def first_visits(active) -> Array:
  """Returns which pairs of blocks are the first in their buffer of dq.

  active: bool [blocks of keys, blocks of queries], visited row by row.
  """
  rows = len(active)
  parts = jnp.pad(active, ((0, -rows % _BUFFERS), (0, 0)))
  parts = parts.reshape(-1, _BUFFERS, active.shape[1])
  return (parts & (jnp.cumsum(parts, axis=0) == 1)).reshape(-1, active.shape[1])[:rows]


class _Block:
  """Reads as the kernel's block of dq so far: zeros at its first visit."""

  def __init__(self, ref, first):
    self._ref, self._first = ref, first

  def __getitem__(self, index):
    return jnp.where(self._first, jnp.zeros_like(self._ref[index]), self._ref[index])


def gradients(
  q_NLK: Array,
  k_NSK: Array,
  v_NSK: Array,
  segments_L: Array,
  segments_S: Array,
  lse_NL: Array,
  dout_NLK: Array,
  delta_NL: Array,
  active: Array,
  visits,
  config,
  kernel,
) -> tuple[Array, Array, Array]:
  """Returns (dq, dk, dv) of one row.

  Args:
    q_NLK, k_NSK, v_NSK, segments_L, segments_S: whole blocks; queries scaled.
    lse_NL: log-sum-exp of the scores to the base 2.
    dout_NLK, delta_NL: gradient of the output, and its product with the output.
    active: as for `first_visits`.
    visits: the list of these pairs, a MaskInfo.
    config: the kernel's sizes.
    kernel: tokamax's module.
  """
  (N, L, K), S = q_NLK.shape, k_NSK.shape[1]
  block_q, block_k = config.block_q_dkv, config.block_kv_dkv
  steps = S // block_k
  buffers = min(_BUFFERS, steps)

  def spec(shape, index):
    """Blocks of an array at index(head, block of queries, block of keys)."""
    return pl.BlockSpec(shape, lambda h, n, rows, cols, *_: index(h, cols[n], rows[n]))

  q_spec = spec((None, block_q, K), lambda h, i, j: (h, i, 0))
  k_spec = spec((None, block_k, K), lambda h, i, j: (h, j, 0))
  number_spec = spec((None, _SUBLANES, block_q), lambda h, i, j: (h, 0, i))
  dq_spec = spec((None, None, block_q, K), lambda h, i, j: (j % buffers, h, i, 0))
  in_specs = [
    *(q_spec, k_spec, k_spec),
    spec((_SUBLANES, block_q), lambda h, i, j: (0, i)),
    spec((block_k, LANES), lambda h, i, j: (j, 0)),
    *(number_spec, q_spec, number_spec),
  ]
  lse_N8L, delta_N8L = (
    jnp.broadcast_to(x[:, None], (N, _SUBLANES, L)) for x in (lse_NL, delta_NL)
  )
  rows = visits.active_rows
  # Whether a visit is the first, and the last, one of its block of keys.
  starts, ends = (rows != jnp.roll(rows, shift) for shift in (1, -1))
  starts, ends = starts.at[0].set(True), ends.at[-1].set(True)
  prefetched = (
    *(rows, visits.active_cols),
    *(x.astype(jnp.int32) for x in (starts, ends)),
    visits.block_mask,
  )
  inputs = [
    *(q_NLK, k_NSK, v_NSK),
    jnp.broadcast_to(segments_L[None], (_SUBLANES, L)),
    jnp.broadcast_to(segments_S[:, None], (S, LANES)),
    *(lse_N8L, dout_NLK, delta_N8L),
  ]
  shape = jax.ShapeDtypeStruct((buffers, N, L, K), q_NLK.dtype)
  aliases = {}
  if steps > buffers:  # otherwise each visit has a block of dq to itself
    aliases = {len(prefetched) + len(inputs): 0}
    in_specs.append(dq_spec)
    inputs.append(jax.lax.empty(shape.shape, shape.dtype))

  def visit(rows, cols, starts, ends, kinds, *refs):
    *refs, dq, dk, dv, dk_sum, dv_sum = refs
    before = None
    if aliases:
      *refs, before = refs
      before = _Block(before, kinds[pl.program_id(1)].astype(jnp.int32) == FIRST)
    kernel._flash_attention_dkv_kernel(
      *(rows, cols, None, starts, ends, kinds, *refs, None, None),
      *(before, None, None, dq, dk, dv, None, dk_sum, dv_sum),
      mask_value=MASKED,
      q_steps=L // block_q,
      bq=block_q,
      bkv_compute=block_k,
      bkv=block_k,
      mask_function=None,
      q_heads_per_kv_head=1,
      config=config,
    )

  pairs = N * L * S
  name = "splash_mha_dkv_segmented_no_residuals"
  with jax.named_scope(name):
    dq, dk, dv = pl.pallas_call(
      visit,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(prefetched),
        in_specs=in_specs,
        out_specs=[dq_spec, k_spec, k_spec],
        grid=(N, visits.num_active_blocks[0]),
        scratch_shapes=[pltpu.VMEM((block_k, K), jnp.float32)] * 2,
      ),
      out_shape=[
        shape,
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_NSK, v_NSK)),
      ],
      input_output_aliases=aliases,
      compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 2),
      name=name,
      cost_estimate=pl.CostEstimate(
        flops=10 * pairs * K,
        transcendentals=pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *inputs[:3])),
      ),
      interpret=config.interpret,
    )(*prefetched, *inputs)
  visited = jnp.pad(active, ((0, -steps % buffers), (0, 0)))
  visited = visited.reshape(-1, buffers, active.shape[1]).any(axis=0)
  # Added one by one: XLA is slow at a sum over so few.
  parts = (
    jnp.where(met[None, :, None, None], part.astype(jnp.float32), 0.0)
    for met, part in zip(visited, dq.reshape(buffers, N, -1, block_q, K), strict=True)
  )
  total = functools.reduce(operator.add, parts)
  return total.reshape(N, L, K).astype(q_NLK.dtype), dk, dv
