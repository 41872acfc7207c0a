"""Params too large for memory: leaves of a checkpoint, block by block.

Orbax saves and restores trees of whole arrays. A published model can be larger than the
memory of the host that converts it, so here a leaf is a function that makes its blocks,
and one block after the other is in memory.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

# Of the chunks on disk, which a device that needs a part of a layer reads whole.
_CHUNK_BYTES = 64 << 20
# Of the blocks that are written at a time.
_TOGETHER_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Streamed:
  """An array as blocks along its first axis.

  Attributes:
    shape, dtype: of the whole array.
    rows: of each block; the last may have fewer.
    blocks: makes them anew, in order, on each call.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  rows: int
  blocks: Callable[[], Iterator[np.ndarray]]

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

  def slices(self) -> Iterator[np.ndarray]:
    """The array at each index of its first axis."""
    for block in self.blocks():
      yield from block

  def whole(self) -> np.ndarray:
    """All of it, in memory."""
    blocks = list(self.blocks())
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def checkpointer() -> ocp.Checkpointer:
  """Saves trees of `Streamed`, and restores them with `restore_args`; one process.

  On disk they are Orbax's numpy arrays, which any other checkpointer restores.
  """
  handlers = ocp.type_handlers
  registry = handlers.create_type_handler_registry(
    # Those of other checkpoints, whose metadata must be read.
    (np.ndarray, handlers.NumpyHandler()),
    (jax.Array, handlers.ArrayHandler()),
    (Streamed, _Handler()),
  )
  return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))


def restore_args() -> ocp.RestoreArgs:
  """Returns what restores a leaf as a `Streamed`, whatever it was saved from."""
  return ocp.RestoreArgs(restore_type=Streamed)


class _Handler(ocp.type_handlers.NumpyHandler):
  """Holds a few blocks of leaves, where its parent holds all values at once."""

  async def serialize(self, values, infos, args=None):
    assert jax.process_count() == 1, "each process would write all blocks"
    together, size = [], 0
    for value, info in zip(values, infos, strict=True):
      block = value.nbytes * value.rows // value.shape[0]
      if size + block > _TOGETHER_BYTES:
        await asyncio.gather(*together)
        together, size = [], 0
      together.append(self._write(value, info))
      size += block
    await asyncio.gather(*together)
    return []

  async def _write(self, value, info):
    await info.await_path_creation()
    spec = ocp.type_handlers.get_json_tspec_write(
      info,
      use_ocdbt=info.is_ocdbt_checkpoint,
      global_shape=value.shape,
      # A block is chunks of its own, so that none is written twice.
      local_shape=(value.rows, *value.shape[1:]),
      dtype=np.dtype(value.dtype),
      process_index=0 if info.is_ocdbt_checkpoint else None,
      arg=ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES),
    )
    store = await ts.open(
      ts.Spec(spec), create=True, open=True, context=info.ts_context
    )
    row = 0
    for block in value.blocks():
      await store[row : row + len(block)].write(block)
      row += len(block)
    assert row == value.shape[0], (info.name, row, value.shape)

  async def deserialize(self, infos, args=None):
    leaves = []
    for info in infos:
      spec = ocp.type_handlers.get_json_tspec_read(
        info, use_ocdbt=info.is_ocdbt_checkpoint
      )
      store = await ts.open(ts.Spec(spec), open=True, context=info.ts_context)
      leaves.append(_of_store(store))
    return leaves


def _of_store(store) -> Streamed:
  if not store.shape:
    return Streamed((), store.dtype.numpy_dtype, 1, lambda: iter([_scalar(store)]))
  rows = store.chunk_layout.read_chunk.shape[0]

  def blocks():
    for row in range(0, store.shape[0], rows):
      yield store[row : min(row + rows, store.shape[0])].read().result()

  return Streamed(tuple(store.shape), store.dtype.numpy_dtype, rows, blocks)


def _scalar(store) -> np.ndarray:
  return np.asarray(store.read().result())
