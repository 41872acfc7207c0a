"""Attention over packed rows on GPU: blocks of other clips are never visited.

FlashAttention-2 (arXiv:2307.08691) as Pallas kernels for Triton. Which blocks of keys a
block of queries has to visit is computed from the segment ids at run time, forwards and
backwards, so a row of n equal clips costs n times less than one clip of the row's
length. Segments need not be contiguous: ids decide what is seen, the range of blocks
only what is skipped.

tokamax's kernels for GPUs (0.0.12) are not used: forwards they skip blocks, backwards
none of them does. jax deprecates Pallas for Triton from 0.11 on; without it attention
is that of blockwise.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from sora_jax.models import partition
from sora_jax.models.attention import custom_vjp

# Tokens that a program keeps, and those that it visits at a time. Not tuned: they are
# what fits registers and shared memory of the GPUs below, without spilling.
KEPT, VISITED, STAGES, WARPS = 128, 64, 3, 8
GPUS = ("A100", "H100", "H200", "B200")
# Score of what is not seen. The peak starts above it, so that such a score has weight
# 0 even for a query that sees nothing: its output is 0.
MASKED, _START = -1e30, -5e29
_LOG2_E = math.log2(math.e)  # powers of two are cheaper than those of e
_MOST_CHANNELS = 128
_LEAST = 16  # of any side of a matmul


def unsupported_reason(width: int, dtype) -> str | None:
  """Returns why the kernels are not for heads of that width, or None where they are.

  Args:
    width: channels of a head.
    dtype: of queries, keys and values; the GPU is the one that the program is for.
  """
  if width > _MOST_CHANNELS:
    return f"heads of {width} channels do not fit the registers"
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"{jnp.dtype(dtype)} does not fit the shared memory"
  try:
    _triton()
  except ImportError as error:
    return f"this jax has no Pallas for Triton: {error}"
  kind = partition.device_kind()
  if not any(name in kind for name in GPUS):
    return f"{kind} is none of {', '.join(GPUS)}"
  return None


def flash_attention(
  q_BLNK: Array,
  k_BSNK: Array,
  v_BSNK: Array,
  segments_q_BL: Array,
  segments_k_BS: Array,
  interpret=False,
) -> Array:
  """`attention` for GPUs; 0 for padding, and for queries without keys.

  Args:
    q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS: as for `attention`.
    interpret: run without a GPU, for tests.
  """
  attend = custom_vjp.differentiable(
    functools.partial(forward, interpret=interpret),
    functools.partial(backward, interpret=interpret),
  )
  return attend(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS)


def forward(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS, *, interpret=False):
  """Returns what `blockwise.forward` does: (output, log-sum-exp)."""
  L = q_BLNK.shape[1]
  (q_BLNK,), ids_q = _fill(segments_q_BL, -1, q_BLNK)
  keys, ids_k = _fill(segments_k_BS, -2, k_BSNK, v_BSNK)
  B, filled, N, _ = q_BLNK.shape
  out_BLNK, lse_BNL = _call(
    _forward_kernel,
    "packed_attention",
    kept=(q_BLNK, ids_q, *ranges(ids_q, ids_k)),
    visited=(*keys, ids_k),
    out=(q_BLNK, jax.ShapeDtypeStruct((B, N, filled), jnp.float32)),
    interpret=interpret,
  )
  return out_BLNK[:, :L], lse_BNL.swapaxes(1, 2)[:, :L]


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
  """Returns what `blockwise.backward` does: (dq, dk, dv)."""
  L, S = q_BLNK.shape[1], k_BSNK.shape[1]
  dout_BLNK = dout_BLNK.astype(q_BLNK.dtype)
  delta_BLN = jnp.einsum(
    "blnk,blnk->bln", out_BLNK, dout_BLNK, preferred_element_type=jnp.float32
  )
  queries = (q_BLNK, dout_BLNK, lse_BLN, delta_BLN)
  (q, dout, lse, delta), ids_q = _fill(segments_q_BL, -1, *queries)
  queries = (q, dout, lse.swapaxes(1, 2), delta.swapaxes(1, 2), ids_q)
  keys, ids_k = _fill(segments_k_BS, -2, k_BSNK, v_BSNK)
  (dq_BLNK,) = _call(
    _queries_kernel,
    "packed_attention_dq",
    kept=(*queries, *ranges(ids_q, ids_k)),
    visited=(*keys, ids_k),
    out=(q,),
    interpret=interpret,
  )
  dk_BSNK, dv_BSNK = _call(
    _keys_kernel,
    "packed_attention_dkv",
    kept=(*keys, ids_k, *ranges(ids_k, ids_q)),
    visited=queries,
    out=keys,
    interpret=interpret,
  )
  return dq_BLNK[:, :L], dk_BSNK[:, :S], dv_BSNK[:, :S]


def ranges(ids_kept_BL: Array, ids_visited_BS: Array) -> tuple[Array, Array]:
  """Returns (first, last + 1) block that each block of KEPT tokens visits.

  Both are int32 [B, blocks].

  Negative ids are padding, which no block is visited for. Lengths are whole blocks.
  """
  low, high = _range(ids_kept_BL, KEPT)
  other_low, other_high = _range(ids_visited_BS, VISITED)
  # Fused with the reductions: this array is never in memory.
  meet = (low[:, :, None] <= other_high[:, None]) & (
    other_low[:, None] <= high[:, :, None]
  )
  index = jnp.arange(other_low.shape[1], dtype=jnp.int32)
  first = jnp.min(jnp.where(meet, index, index.size), axis=2)
  return first, jnp.max(jnp.where(meet, index + 1, 0), axis=2)


def _range(ids_BL, block):
  """Returns the lowest and highest id of each block.

  A block that is all padding gets a range beyond all ids, so that it meets nothing.
  """
  blocks = ids_BL.reshape(len(ids_BL), -1, block)
  low = jnp.where(blocks < 0, jnp.iinfo(jnp.int32).max, blocks).min(axis=2)
  return low, blocks.max(axis=2)


def _fill(segments_BL, padding, *arrays):
  """Fills arrays [B, L, ...] up to whole blocks.

  Returns them, and the segment ids with `padding` in the place of segment 0: queries
  and keys get different ones, so that padding does not see padding.
  """
  missing = -segments_BL.shape[1] % max(KEPT, VISITED)

  def fill(x):
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))

  ids_BL = fill(segments_BL.astype(jnp.int32))
  return tuple(map(fill, arrays)), jnp.where(ids_BL == 0, padding, ids_BL)


@functools.cache
def _triton():
  # Later versions of jax may be without it.
  from jax.experimental.pallas import triton

  return triton


def _call(kernel, name, *, kept, visited, out, interpret):
  """Runs a kernel, a program for each block of KEPT tokens, head and row.

  kept: what a program gets its block of; visited: what it gets all tokens of. Arrays
  are [B, L, N, K], [B, N, L], [B, L] and [B, blocks].
  """
  B, L, N, K = kept[0].shape
  start, size, _ = _parts(K)[-1]

  def spec(x, block):
    at = (lambda i: i) if block else (lambda i: 0)
    if x.ndim == 4:
      shape = (None, block or x.shape[1], None, start + size)
      return pl.BlockSpec(shape, lambda i, n, b: (b, at(i), n, 0))
    if x.ndim == 3:
      shape = (None, None, block or x.shape[2])
      return pl.BlockSpec(shape, lambda i, n, b: (b, n, at(i)))
    if block and x.shape[1] == L // KEPT:
      return pl.BlockSpec((None, None), lambda i, n, b: (b, i))
    return pl.BlockSpec((None, block or x.shape[1]), lambda i, n, b: (b, at(i)))

  return pl.pallas_call(
    functools.partial(kernel, width=K),
    grid=(L // KEPT, N, B),
    in_specs=[spec(x, KEPT) for x in kept] + [spec(x, 0) for x in visited],
    out_specs=[spec(x, KEPT) for x in out],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out],
    compiler_params=_triton().CompilerParams(num_warps=WARPS, num_stages=STAGES),
    interpret=interpret,
    name=name,
  )(*kept, *visited)


def _parts(width: int) -> list[tuple[int, int, int]]:
  """Cuts a head's channels into matrices whose width is a power of two.

  Returns (start, width, channels that are real) of each: Triton has no others, and
  72 channels are 64 and 8, which fill half of 16: 11 % for nothing, 128 would be 78 %.
  """
  parts, start = [], 0
  while left := width - start:
    size = max(_LEAST, 1 << (left.bit_length() - 1))
    parts.append((start, size, min(size, left)))
    start += min(size, left)
  return parts


def _load(ref, width, rows=slice(None)):
  """Loads tokens as a list of matrices, see `_parts`."""
  loaded = []
  for start, size, real in _parts(width):
    at = ref.at[rows, pl.ds(start, size)]
    mask = None if real == size else (jnp.arange(size) < real)[None]
    loaded.append(_triton().load(at, mask=mask, other=None if mask is None else 0.0))
  return loaded


def _store(ref, width, parts):
  """Stores matrices where `_load` would read them."""
  for (start, size, real), x in zip(_parts(width), parts, strict=True):
    mask = None if real == size else (jnp.arange(size) < real)[None]
    _triton().store(ref.at[:, pl.ds(start, size)], x.astype(ref.dtype), mask=mask)


def _zeros(rows, width):
  return [jnp.zeros((rows, size), jnp.float32) for _, size, _ in _parts(width)]


def _products(a, b):
  """Returns a b^T, summed over the parts of the channels."""
  return functools.reduce(
    jnp.add, (_triton().dot(x, y.T) for x, y in zip(a, b, strict=True))
  )


def _add(total, weight, values):
  """Returns total + weight values, part by part."""
  return [
    t + _triton().dot(weight.astype(v.dtype), v)
    for t, v in zip(total, values, strict=True)
  ]


def _forward_kernel(
  q_ref, ids_q_ref, first_ref, last_ref, k_ref, v_ref, ids_k_ref, out_ref, lse_ref,
  *, width,
):  # fmt: skip
  """Output and log-sum-exp of a block of queries, over the blocks of keys they meet."""
  q, ids_q = _load(q_ref, width), ids_q_ref[...]
  scale = width**-0.5 * _LOG2_E

  def visit(j, state):
    # Online softmax: sums so far are brought to the new peak before more is added.
    out, total, peak = state
    here = pl.ds(j * VISITED, VISITED)
    seen = ids_q[:, None] == ids_k_ref[here][None]
    score = jnp.where(seen, _products(q, _load(k_ref, width, here)) * scale, MASKED)
    higher = jnp.maximum(peak, score.max(axis=1))
    weight, less = jnp.exp2(score - higher[:, None]), jnp.exp2(peak - higher)
    out = _add([x * less[:, None] for x in out], weight, _load(v_ref, width, here))
    return out, total * less + weight.sum(axis=1), higher

  rows = len(ids_q)
  state = (
    _zeros(rows, width),
    jnp.zeros(rows, jnp.float32),
    jnp.full(rows, _START, jnp.float32),
  )
  out, total, peak = jax.lax.fori_loop(first_ref[...], last_ref[...], visit, state)
  total = jnp.where(total > 0, total, 1.0)
  _store(out_ref, width, [x / total[:, None] for x in out])
  # Others take it to the base e.
  lse_ref[...] = (peak + jnp.log2(total)) / _LOG2_E


def _queries_kernel(
  q_ref, dout_ref, lse_ref, delta_ref, ids_q_ref, first_ref, last_ref,
  k_ref, v_ref, ids_k_ref, dq_ref,
  *, width,
):  # fmt: skip
  """dq of a block of queries, over the blocks of keys they meet."""
  q, dout, ids_q = _load(q_ref, width), _load(dout_ref, width), ids_q_ref[...]
  lse, delta, scale = lse_ref[...] * _LOG2_E, delta_ref[...], width**-0.5

  def visit(j, dq):
    here = pl.ds(j * VISITED, VISITED)
    k = _load(k_ref, width, here)
    seen = ids_q[:, None] == ids_k_ref[here][None]
    score = jnp.where(seen, _products(q, k) * (scale * _LOG2_E), MASKED)
    # The weights again, from the log-sum-exp: cheaper than to have kept them.
    weight = jnp.exp2(score - lse[:, None])
    dweight = _products(dout, _load(v_ref, width, here))
    return _add(dq, weight * (dweight - delta[:, None]), k)

  dq = _zeros(len(ids_q), width)
  dq = jax.lax.fori_loop(first_ref[...], last_ref[...], visit, dq)
  _store(dq_ref, width, [x * scale for x in dq])


def _keys_kernel(
  k_ref, v_ref, ids_k_ref, first_ref, last_ref,
  q_ref, dout_ref, lse_ref, delta_ref, ids_q_ref, dk_ref, dv_ref,
  *, width,
):  # fmt: skip
  """dk and dv of a block of keys, over the blocks of queries that meet it."""
  k, v, ids_k = _load(k_ref, width), _load(v_ref, width), ids_k_ref[...]
  scale = width**-0.5

  def visit(i, state):
    dk, dv = state
    here = pl.ds(i * VISITED, VISITED)
    q, dout = _load(q_ref, width, here), _load(dout_ref, width, here)
    seen = ids_k[:, None] == ids_q_ref[here][None]
    score = jnp.where(seen, _products(k, q) * (scale * _LOG2_E), MASKED)
    weight = jnp.exp2(score - (lse_ref[here] * _LOG2_E)[None])
    dweight = _products(v, dout)
    dscore = weight * (dweight - delta_ref[here][None])
    return _add(dk, dscore, q), _add(dv, weight, dout)

  zeros = _zeros(len(ids_k), width)
  dk, dv = jax.lax.fori_loop(first_ref[...], last_ref[...], visit, (zeros, zeros))
  _store(dk_ref, width, [x * scale for x in dk])
  _store(dv_ref, width, dv)
