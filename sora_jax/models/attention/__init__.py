"""Segment-masked attention: the one function that every network here calls.

A query sees the keys of its own segment and nothing else, which is what lets one
packed row hold many clips. Padding is segment 0 and only ever sees padding, so it
cannot leak; its output is finite and meant to be ignored.

Each platform has a backend of its own (see `backend`), all of which equal
`reference_attention`: splash_tpu.py, flash_gpu.py, per_head.py on CPU, and blockwise.py
for everything else. This file adds what the mesh does around them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from sora_jax.models import partition
from sora_jax.models.attention import blockwise, flash_gpu, per_head, splash_tpu
from sora_jax.models.attention.ring import Ring, ring_attention

# Bytes of keys and values that a chip may gather. Gathering is one collective, and the
# backend then sees all keys at once; a ring takes turns, but holds one part at a time.
GATHERED = 2**30


def attention(
  q_BLNK: Array,
  k_BSNK: Array,
  v_BSNK: Array,
  segments_q_BL: Array,
  segments_k_BS: Array,
) -> Array:
  """Softmax attention within segments, scaled by K ** -0.5, softmax in float32.

  On a mesh each chip computes its rows and heads. Where `context` shares the tokens,
  heads are exchanged for them (Ulysses, arXiv:2309.14509) as far as the number of heads
  goes; beyond that, and for short keys, keys are gathered or travel around a ring.

  Args:
    q_BLNK: queries. k_BSNK, v_BSNK: keys and values, same N and K.
    segments_q_BL, segments_k_BS: int32 segment ids; 0 is padding.

  Returns:
    [B, L, N, K] in the dtype of the queries. Its name for remat policies, and that of
    what a kernel keeps beside it for the backward pass, is "attention".
  """
  if partition.platform() == "tpu":
    # The TPU's kernel takes queries scaled; here XLA fuses that with what makes them.
    q_BLNK = q_BLNK * q_BLNK.shape[-1] ** -0.5
  inputs = (q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS)
  mesh = partition.mesh()
  if mesh is None:
    return _local(*inputs)
  B, L, N, _ = q_BLNK.shape
  rows, queries, heads = partition.fit(
    mesh, (B, L, N), partition.ROWS, "context", "tensor"
  )
  keys = partition.fit(mesh, k_BSNK.shape, None, "context")[1]
  size = mesh.shape["context"]
  # Exchanging heads sends a chip's share of queries, outputs, keys and values, while
  # gathering sends all keys and values; that is less for captions.
  ulysses = 1
  if queries and keys and size * k_BSNK.shape[1] >= L + k_BSNK.shape[1]:
    ulysses = math.gcd(N // (mesh.shape["tensor"] if heads else 1), size)
  # The chips along `context` are a grid: `ulysses` neighbours share heads, and `others`
  # such groups still have different keys.
  sharded = functools.partial(
    _sharded, ulysses=ulysses, others=size // ulysses if keys else 1
  )
  query, key = (PartitionSpec(rows, dim, heads) for dim in (queries, keys))
  return jax.shard_map(
    sharded,
    in_specs=(
      *(query, key, key),
      *(PartitionSpec(rows, dim) for dim in (queries, keys)),
    ),
    out_specs=query,
    check_vma=False,  # Pallas calls do not say how their results vary over the mesh
  )(*inputs)


def _sharded(q, k, v, segments_q, segments_k, *, ulysses: int, others: int):
  """Attention of a chip's tokens to those of all chips of the context axis.

  Groups of `ulysses` neighbours exchange heads for tokens; `others` such groups have
  more keys. Runs inside `jax.shard_map`: all arrays are one chip's.
  """
  size = ulysses * others
  groups = [list(range(i, i + ulysses)) for i in range(0, size, ulysses)]
  rings = [list(range(i, size, ulysses)) for i in range(ulysses)]
  if ulysses > 1:
    exchange = functools.partial(
      _exchange, groups=groups if others > 1 else None, shards=ulysses
    )
    q, k, v = (exchange(x, to_heads=True) for x in (q, k, v))
    segments_q, segments_k = (
      _gather(x, groups, others > 1) for x in (segments_q, segments_k)
    )
  if others == 1:
    out = _local(q, k, v, segments_q, segments_k)
  elif others * 2 * k.size * k.dtype.itemsize <= GATHERED:
    # Gathered inside, so that the gradients of keys are scattered as they are summed.
    k, v, segments_k = (_gather(x, rings, ulysses > 1) for x in (k, v, segments_k))
    out = _local(q, k, v, segments_q, segments_k)
  else:
    # A ring needs a backend's two passes apart; on CPU those of blockwise.py do.
    parts = {"splash": splash_tpu, "flash": flash_gpu}.get(_backend_of(q), blockwise)
    ring = Ring("context", others, ulysses, parts.forward, parts.backward)
    out = ring_attention(q, k, v, segments_q, segments_k, ring)
  if ulysses > 1:
    out = exchange(out, to_heads=False)
  return out


def _exchange(x_BLNK, groups, shards: int, to_heads: bool):
  """Exchanges a chip's tokens of all heads for all tokens of its heads, or back.

  Parts travel heads first, as kernels have them: [B, heads, parts, tokens, K].
  """
  B, L, N, K = x_BLNK.shape

  def travel(x):
    return jax.lax.all_to_all(x, "context", 2, 2, axis_index_groups=groups, tiled=True)

  if to_heads:
    x = x_BLNK.reshape(B, L, shards, N // shards, K).transpose(0, 3, 2, 1, 4)
    return travel(x).reshape(B, N // shards, shards * L, K).swapaxes(1, 2)
  x = x_BLNK.swapaxes(1, 2).reshape(B, N, shards, L // shards, K)
  return travel(x).transpose(0, 3, 2, 1, 4).reshape(B, L // shards, shards * N, K)


def _gather(x, groups, some: bool):
  """Returns the tokens of all chips of a group, in its order.

  some: whether the groups are parts of the axis and not the whole of it.
  """
  return jax.lax.all_gather(
    x, "context", axis=1, tiled=True, axis_index_groups=groups if some else None
  )


def backend(width: int, dtype) -> tuple[str, str]:
  """Chooses the backend for the platform that the program is for.

  Args:
    width: channels of a head.
    dtype: of queries, keys and values.

  Returns:
    "splash", "flash", "by_head" or "chunked"; and, where a GPU has to do without its
    own, the reason.
  """
  platform = partition.platform()
  if platform != "gpu":
    return {"tpu": "splash", "cpu": "by_head"}.get(platform, "chunked"), ""
  reason = flash_gpu.unsupported_reason(width, dtype)
  return ("chunked", reason) if reason else ("flash", "")


def _local(*inputs):
  """Attention on one chip."""
  backends = {
    "splash": splash_tpu.splash_attention,
    "flash": flash_gpu.flash_attention,
    "by_head": per_head.attention_by_head,
    "chunked": blockwise.chunked_attention,
  }
  return backends[_backend_of(inputs[0])](*inputs)


def _backend_of(q_BLNK) -> str:
  return backend(q_BLNK.shape[-1], q_BLNK.dtype)[0]


def reference_attention(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS):
  """Attention with the whole B*N*L*S score matrix, which every backend must equal.

  It takes unscaled queries on every platform.
  """
  scale = q_BLNK.shape[-1] ** -0.5
  mask_BLS = segments_q_BL[:, :, None] == segments_k_BS[:, None, :]
  score = jnp.einsum(
    "blnk,bsnk->bnls", q_BLNK * scale, k_BSNK, preferred_element_type=jnp.float32
  )
  score = jnp.where(mask_BLS[:, None], score, blockwise.MASKED)
  weight = jax.nn.softmax(score, axis=-1).astype(v_BSNK.dtype)
  return jnp.einsum("bnls,bsnk->blnk", weight, v_BSNK)
