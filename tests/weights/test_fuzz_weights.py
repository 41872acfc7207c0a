"""Odd headers and tensors in safetensors and LoRA files: only documented errors."""

import json
import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sora_jax.models.dit import DiTConfig
from sora_jax.runtime import safetensors_io
from sora_jax.weights import lora

pytestmark = pytest.mark.fuzz

SIZES = st.integers(-2, 16) | st.integers() | st.floats() | st.none() | st.text()
ENTRY = st.fixed_dictionaries(
  {},
  optional={
    "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "F4"]) | SIZES,
    "shape": st.lists(SIZES, max_size=3) | SIZES,
    "data_offsets": st.lists(SIZES, max_size=3) | SIZES,
  },
)
GOOD = st.integers(0, 3).map(
  lambda n: {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}
)
HEADERS = st.dictionaries(
  st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=3),
  ENTRY | GOOD | SIZES,
  max_size=3,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


def file_of(text: bytes, tail: bytes, length=None) -> bytes:
  return struct.pack("<Q", len(text) if length is None else length) + text + tail


@given(
  st.binary(max_size=64)
  | st.builds(
    file_of,
    HEADERS.map(lambda header: json.dumps(header).encode()) | st.binary(max_size=32),
    st.integers(0, 16).map(bytes),
    st.none() | st.integers(0, 2**64 - 1),
  )
)
@example(file_of(b"[" * 100_000, b""))
@example(
  file_of(b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}', bytes(4))
)
@example(file_of(b'{"__metadata__":{"a":1}}', b""))
@example(file_of(b'{"__metadata__":[]}', b""))
@example(struct.pack("<Q", 2**63))
def test_headers(path, content):
  path.write_bytes(content)
  try:
    tensors = safetensors_io.read_header(path)
  except ValueError as error:
    assert str(path) in str(error)
    return
  for tensor in tensors.values():
    # Never more than is in the file.
    assert tensor.place + tensor.nbytes <= len(content)
    assert safetensors_io.read(tensor).shape == tensor.shape
  assert all(isinstance(x, str) for x in safetensors_io.read_metadata(path).values())


CONFIG = DiTConfig(
  channels=4, width=8, depth=2, heads=2, mlp_width=16, text_width=8, frequency_width=8
)
PREFIX = "transformer.blocks.0.attn1.to_q"
VALUES = st.sampled_from([0.0, 1.0, np.nan, np.inf])
TENSORS = st.dictionaries(
  st.sampled_from([
    f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight", f"{PREFIX}.alpha",
    f"{PREFIX}.diff_b", f"{PREFIX}.lokr_w1", f"{PREFIX}.lokr_w2_a",
    f"{PREFIX}.lora_B.bias",
    "transformer.blocks.9.attn1.to_q.lora_A.weight", "blocks.0.ffn.0.lora_down.weight",
  ]) | st.text("abc.", max_size=5),
  st.tuples(st.lists(st.integers(0, 8), max_size=3), VALUES),
  max_size=3,
)  # fmt: skip
PAIR = st.tuples(st.integers(0, 3), VALUES).map(
  lambda x: {
    f"{PREFIX}.lora_A.weight": ([x[0], 8], x[1]),
    f"{PREFIX}.lora_B.weight": ([8, x[0]], 1.0),
  }
)
SETTINGS = st.none() | st.text(max_size=8) | st.builds(
  lambda key, value: json.dumps({key: value}),
  st.sampled_from(["transformer.lora_alpha", "lora_alpha", "use_dora"]),
  st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.none()),
)  # fmt: skip


@given(TENSORS | st.tuples(PAIR, TENSORS).map(lambda x: {**x[1], **x[0]}), SETTINGS)
@example({f"{PREFIX}.lora_A.weight": ([2, 8], np.nan),
          f"{PREFIX}.lora_B.weight": ([8, 2], 1.0)}, None)  # fmt: skip
@example({f"{PREFIX}.lora_A.weight": ([0, 8], 1.0),
          f"{PREFIX}.lora_B.weight": ([8, 0], 1.0)}, None)  # fmt: skip
def test_adapters(path, tensors, settings):
  arrays = {k: np.full(shape, v, np.float32) for k, (shape, v) in tensors.items()}
  planned = [safetensors_io.Plan(k, x.shape, x.dtype) for k, x in arrays.items()]
  metadata = None if settings is None else {"lora_adapter_metadata": settings}
  safetensors_io.write_file(path, planned, iter(arrays.values()), metadata)
  try:
    found = lora.read(path, CONFIG)
  except ValueError as error:
    assert str(path) in str(error)
    return
  for pair in found.pairs.values():
    assert all(np.isfinite(x).all() and x.dtype == np.float32 for x in pair)
