"""Checksums: the same on the host, on devices and in blocks; any change is found."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sora_jax.runtime import checksums

RNG = np.random.default_rng(0)
ARRAYS = {
  "float32": RNG.standard_normal((16, 8, 3)).astype(np.float32),
  "bfloat16": RNG.standard_normal((40, 24)).astype(ml_dtypes.bfloat16),
  "float16": RNG.standard_normal(1000).astype(np.float16),
  "int32": RNG.integers(-(2**31), 2**31, (8, 8)).astype(np.int32),
  "uint32": RNG.integers(0, 2**32, 7).astype(np.uint32),
  "uint8": RNG.integers(0, 256, (3, 5)).astype(np.uint8),
  "bool": RNG.integers(0, 2, (8, 9)).astype(bool),
  "scalar": np.int32(7),
  "none": np.zeros((0, 4), np.float32),
  "large": RNG.standard_normal((3, checksums._BLOCK + 5)).astype(np.float32),
}


def by_the_definition(array):
  """The sums in Python's integers, element by element."""
  flat = np.ascontiguousarray(array).reshape(-1)
  bits = flat.view(f"u{flat.dtype.itemsize}")
  first = second = 0
  for place, value in enumerate(map(int, bits)):
    mixed = value ^ (place * 0x9E3779B1) % 2**32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      mixed = (mixed ^ mixed >> shift) * factor % 2**32
    mixed ^= mixed >> 16
    first, second = first + mixed, second + mixed * (2 * place + 1)
  return first % 2**32, second % 2**32


def test_sums_are_those_of_the_definition_wherever_an_array_is():
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  on_host = checksums.of_tree(ARRAYS)
  on_devices = jax.device_get(checksums._on_devices(ARRAYS))
  for name, array in ARRAYS.items():
    if name == "large":
      expected = on_host[name][2:]  # below: in blocks
    else:
      expected = by_the_definition(array)
    kind = name if name in ("scalar", "none", "large") else None
    dtype = str(array.dtype) if kind else name
    assert on_host[name] == [list(array.shape), dtype, *expected]
    assert tuple(map(int, on_devices[name])) == tuple(expected)
    running = checksums.Running()
    for begin in range(0, len(array) if array.ndim else 0, 2):
      running.add(array[begin : begin + 2])
    assert not array.ndim or running.sums() == tuple(expected)
  placed = {
    name: jax.device_put(array, spread)
    for name, array in ARRAYS.items()
    if array.ndim and len(array) and not len(array) % 4
  }
  assert len(placed) > 3
  assert checksums.of_tree(placed) == {name: on_host[name] for name in placed}


def test_arrays_may_be_donated_before_they_are_added_up():
  """As a training goes on while its checkpoint is written."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  whole = np.arange(8 * 1024, dtype=np.float32).reshape(8, 1024)
  step = jax.jit(lambda array: 2 * array + 1, donate_argnums=0)
  for place in (jax.devices()[0], spread):
    array = jax.device_put(whole, place)
    rows = checksums.start_tree({"a": array})
    for _ in range(3):
      array = step(array)
    jax.block_until_ready(array)
    assert rows() == checksums.of_tree({"a": whole})
    assert not np.array_equal(whole, array)


def test_any_flipped_bit_of_any_dtype_is_found():
  saved = checksums.of_tree(ARRAYS)
  for name, array in ARRAYS.items():
    bits = np.frombuffer(array.tobytes(), np.uint8)
    for where in RNG.integers(0, 8 * len(bits), 20) if len(bits) else ():
      flipped = bits.copy()
      # A byte of a bool holds no other bits.
      flipped[where // 8] ^= 1 << (where % 8 if name != "bool" else 0)
      other = flipped.view(array.dtype).reshape(array.shape)
      found = checksums.of_tree({**ARRAYS, name: other})
      assert checksums.difference(saved, found) == (
        f"the values of {name} are not those that were saved"
      )


def test_differences_are_named():
  rows = checksums.of_tree({"a": np.zeros(3), "b": {"c": jnp.ones(2)}})
  assert list(rows) == ["a", "b/c"] and checksums.difference(rows, rows) is None
  assert checksums.difference(rows, {"a": rows["a"]}) == "b/c is missing"
  assert "was not saved" in checksums.difference({"a": rows["a"]}, rows)
  moved = checksums.of_tree({"a": np.zeros(3), "b": {"c": jnp.ones(2, jnp.bfloat16)}})
  assert "values of b/c" in checksums.difference(rows, moved)


@pytest.mark.parametrize(
  "change",
  [
    lambda sealed: sealed.update(step=8),
    lambda sealed: sealed["host"].update(position=4),
    lambda sealed: sealed.pop("host"),
    lambda sealed: sealed.update(more=1),
    lambda sealed: sealed.pop("checksum"),
  ],
)
def test_a_sealed_object_is_whole_until_it_is_changed(change):
  sealed = checksums.seal({"step": 7, "host": {"position": 3, "rate": 0.1}})
  assert checksums.is_whole(sealed)
  change(sealed)
  assert not checksums.is_whole(sealed)


def test_an_error_of_pages_is_one_line():
  error = ValueError("no chunk\n  at x\n [source locations='" + "y" * 9999)
  assert checksums.one_line(error) == "ValueError: no chunk at x"
  assert len(checksums.one_line(ValueError("z" * 999))) == 160
  assert checksums.one_line(KeyError()) == "KeyError"
