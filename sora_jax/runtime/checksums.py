"""Checksums of arrays and of JSON objects, for what is read back from a disk.

The bits of an array, mixed with their places, are added up in 32-bit integers. Such a
sum is exact in any order, so that it is the same however the array lies on devices, and
can be made block by block. One changed element changes it for certain, since the
mixing of a place is a bijection of what stands there; several ones but for a chance of
1 in 2^64.
"""

import concurrent.futures
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = 0x9E3779B1  # 2^32 / golden ratio: spreads places over all bits
_ROUNDS = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))  # the finalizer of MurmurHash3
_BLOCK = 1 << 15  # elements that stay in a core's cache through all passes
_PART = 1 << 22  # elements that a thread takes at a time

# Shape, dtype and two sums of an array, as JSON has them.
Row = list


def of_tree(tree: Any) -> dict[str, Row]:
  """A row for each array of a tree, by path; the same on all processes.

  On accelerators, and where arrays are spread over processes, one program adds up all
  on the devices, at the speed of their memory; all processes must call it then. Arrays
  in the memory of this host are added up there, which needs no compilation.
  """
  return start_tree(tree)()


def start_tree(tree: Any) -> Callable[[], dict[str, Row]]:
  """`of_tree` in two parts: arrays of JAX may be donated after the first.

  The second one, what is returned, may be called in any thread. The first waits for
  nothing but arrays that are still computed. An array in the memory of this host is
  seen through a view, and not copied: what donates it computes into other memory as
  long as there is one, as there is of each array that Orbax still writes.
  """
  leaves = {path_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
  away = {name: x for name, x in leaves.items() if not _is_here(x)}
  here = {name: np.asarray(x) for name, x in leaves.items() if name not in away}
  started = _on_devices(away) if away else {}
  descriptions = described(tree)

  def rows():
    sums = _on_host(here)
    found = jax.device_get(started)
    sums |= {name: (int(a), int(b)) for name, (a, b) in found.items()}
    return {name: [*row, *sums[name]] for name, row in descriptions.items()}

  return rows


def described(tree: Any) -> dict[str, Row]:
  """Rows without sums of a tree's arrays, or of descriptions of them, by path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_of(path): row(leaf, ()) for path, leaf in leaves}


def row(array, sums: tuple[int, ...]) -> Row:
  """The row of an array, or of a description of one, whose sums are known."""
  return [list(np.shape(array)), str(np.dtype(array.dtype)), *sums]


def path_of(path) -> str:
  """Name of a leaf, the same for a named tuple and the dict that it is saved as."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def difference(saved: dict[str, Row], found: dict[str, Row]) -> str | None:
  """What is wrong with arrays, naming the first one; None if all are as saved."""
  for name in sorted(saved | found):
    if name not in found:
      return f"{name} is missing"
    if name not in saved:
      return f"{name} is there and was not saved"
    if saved[name] != found[name]:
      return f"the values of {name} are not those that were saved"
  return None


class Running:
  """Sums of an array that comes in blocks, in order."""

  def __init__(self) -> None:
    self._first, self._second, self._place = 0, 0, 0

  def add(self, block: np.ndarray) -> None:
    """Takes the elements that follow those so far."""
    first, second = _sums(block, self._place)
    self._first = (self._first + first) % 2**32
    self._second = (self._second + second) % 2**32
    self._place += block.size

  def sums(self) -> tuple[int, int]:
    """Of all blocks so far."""
    return self._first, self._second


def seal(values: dict) -> dict:
  """The values, JSON-able, and a checksum of them under the key "checksum"."""
  return {**values, "checksum": _digest(values)}


def is_whole(values: dict) -> bool:
  """Whether an object that `seal` returned is still what it was, through JSON."""
  return values.get("checksum") == _digest(unsealed(values))


def unsealed(values: dict) -> dict:
  """The values that `seal` was given."""
  return {key: value for key, value in values.items() if key != "checksum"}


def of_file(path) -> str:
  """SHA-256 of a file's bytes."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def one_line(error: BaseException, most: int = 160) -> str:
  """An error without its middle: libraries add pages of where it came from.

  Of a chain of causes the last one, at the end, is what a user can mend.
  """
  text = re.split(r"\.? (?:See full|\[source loc)", " ".join(str(error).split()))[0]
  text = f"{type(error).__name__}: {text}" if text else type(error).__name__
  half = most // 2
  return text if len(text) <= most else f"{text[: half - 3]}...{text[-half:]}"


def _digest(values) -> str:
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _is_here(array) -> bool:
  """Whether all of an array is in the memory of this process's host."""
  if not isinstance(array, jax.Array):
    return True
  devices: set[Any] = array.sharding.device_set
  on_cpu = all(device.platform == "cpu" for device in devices)
  return on_cpu and array.is_fully_addressable


def _on_host(arrays: dict) -> dict[str, tuple[int, int]]:
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    # The threads really work at once: numpy holds no lock in its loops.
    return {name: _sums(x, 0, pool.map) for name, x in arrays.items()}


def _sums(array: np.ndarray, place: int, map_parts=map) -> tuple[int, int]:
  """Sums of the elements, the first of which has this place in the whole."""
  flat = _unsigned(np.ascontiguousarray(array).reshape(-1))
  parts = list(
    map_parts(
      lambda begin: _part_sums(flat[begin : begin + _PART], place + begin),
      range(0, len(flat), _PART),
    )
  )
  return sum(a for a, _ in parts) % 2**32, sum(b for _, b in parts) % 2**32


def _unsigned(flat: np.ndarray) -> np.ndarray:
  """The bits as unsigned integers of at most 32 bits."""
  size = flat.dtype.itemsize
  return flat.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size])


def _part_sums(bits: np.ndarray, place: int) -> tuple[int, int]:
  first = second = 0
  for mixed, places in _mixed(bits, place):
    first += int(mixed.sum(dtype=np.uint64))
    places *= np.uint32(2)
    places += np.uint32(1)
    mixed *= places
    second += int(mixed.sum(dtype=np.uint64))
  return first % 2**32, second % 2**32


def _mixed(bits, place) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (mixed bits, places) of block after block; both may be overwritten."""
  steps = np.arange(_BLOCK, dtype=np.uint32)
  for begin in range(0, len(bits), _BLOCK):
    block = bits[begin : begin + _BLOCK]
    if block.dtype == np.uint64:
      block = (block ^ (block >> np.uint64(32)) * np.uint64(_GOLDEN)) & 0xFFFFFFFF
    places = steps[: len(block)] + np.uint32((place + begin) % 2**32)
    mixed = block.astype(np.uint32)
    mixed ^= places * np.uint32(_GOLDEN)
    for shift, factor in _ROUNDS:
      mixed ^= mixed >> np.uint32(shift)
      mixed *= np.uint32(factor)
    mixed ^= mixed >> np.uint32(16)
    yield mixed, places


@jax.jit
def _on_devices(arrays):
  return {name: _device_sums(array) for name, array in arrays.items()}


def _device_sums(array):
  array = jnp.asarray(array)
  if array.dtype == bool:
    array = array.astype(jnp.uint8)
  kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(array, kind).astype(jnp.uint32)
  place, stride = jnp.zeros(array.shape, jnp.uint32), 1
  for dim in reversed(range(array.ndim)):
    along = jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim)
    place += along * np.uint32(stride % 2**32)
    stride *= array.shape[dim]
  mixed = bits ^ (place * np.uint32(_GOLDEN))
  for shift, factor in _ROUNDS:
    mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
  mixed ^= mixed >> 16
  return jnp.sum(mixed), jnp.sum(mixed * (2 * place + 1))
