"""Params as safetensors in bfloat16: written, read anywhere, and damage noticed."""

import json
import pathlib
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors import safe_open

from sora_jax.runtime import checkpoint, portable, sharding, shipped

META = {"version": 1, "network": "toy"}


def params_of(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "dit": {"head": {"kernel": jnp.asarray(rng.standard_normal((8, 6), np.float32))}},
    "bias": rng.standard_normal(8).astype(np.float32),
  }


@pytest.fixture
def model(tmp_path):
  checkpoint.save_portable(tmp_path / "model", params_of(), META)
  return tmp_path / "model"


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip(model):
  expected = portable.rounded(params_of())
  params, meta = checkpoint.load_model(model)
  assert meta == checkpoint.load_meta(model) == META
  assert_equal(expected, params)
  leaves = jax.tree.leaves(params)
  assert all(isinstance(x, jax.Array) and x.dtype == jnp.float32 for x in leaves)
  # Rounding again changes nothing, and the first time it does.
  assert_equal(expected, portable.rounded(expected))
  assert not np.array_equal(expected["bias"], params_of()["bias"])
  assert sorted(path.name for path in model.iterdir()) == ["model.json", portable.NAME]


def test_it_loads_like_any_model_onto_a_mesh(model):
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  rules = (("dit/.*", PartitionSpec("fsdp")), ("bias", PartitionSpec()))
  params, _ = checkpoint.load_model(
    model, lambda shapes: sharding.param_shardings(shapes, rules, mesh), jnp.bfloat16
  )
  kernel = params["dit"]["head"]["kernel"]
  assert kernel.dtype == jnp.bfloat16 and len(kernel.sharding.device_set) == 2
  expected = portable.rounded(params_of())
  assert_equal(expected, jax.tree.map(lambda x: np.asarray(x, np.float32), params))
  with pytest.raises(ValueError, match="model: the model's params.safetensors does no"):
    checkpoint.load_model(model, {"other": None})
  with pytest.raises(ValueError, match="does not fit .no sharding rule matches"):
    checkpoint.load_model(
      model, lambda shapes: sharding.param_shardings(shapes, rules[:1], mesh)
    )


def test_leaf_by_leaf(model):
  params, meta = checkpoint.stream_model(model)
  expected = portable.rounded(params_of())
  assert meta == META and params["bias"].dtype == ml_dtypes.bfloat16
  assert_equal(
    expected, jax.tree.map(lambda leaf: leaf.whole().astype(np.float32), params)
  )
  rows = list(params["dit"]["head"]["kernel"].slices())
  assert_equal(expected["dit"]["head"]["kernel"], np.stack(rows).astype(np.float32))


def test_other_programs_read_it(model):
  """By the official library, and by the bytes that the format's definition says."""
  file = model / portable.NAME
  expected = portable.rounded(params_of())
  with safe_open(file, "numpy") as opened:
    assert set(opened.keys()) == {"dit/head/kernel", "bias"}
    bias = opened.get_tensor("bias")
  assert bias.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(bias.astype(np.float32), expected["bias"])
  content = file.read_bytes()
  (length,) = struct.unpack("<Q", content[:8])
  entry = json.loads(content[8 : 8 + length])["bias"]
  assert entry["dtype"] == "BF16" and entry["shape"] == [8]
  begin, end = (8 + length + place for place in entry["data_offsets"])
  # bfloat16 is the upper half of a float32.
  halves = np.frombuffer(content[begin:end], np.uint16).astype(np.uint32) << 16
  np.testing.assert_array_equal(halves.view(np.float32), expected["bias"])


@pytest.mark.parametrize("load", [checkpoint.load_model, checkpoint.stream_model])
def test_damage_is_named(model, load):
  file = model / portable.NAME
  whole = file.read_bytes()

  def fails(message, content):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"params.safetensors.*{message}"):
      load(model)

  flipped = bytearray(whole)
  flipped[-3] ^= 1
  fails("is damaged.*SHA-256.*install", bytes(flipped))
  fails("truncated", whole[:-2])
  fails("truncated inside its header", whole[:20])
  fails("not a safetensors file", b"x" * 100)
  file.unlink()
  with pytest.raises(ValueError, match="params.safetensors is missing: copy or"):
    load(model)
  described = json.loads((model / "model.json").read_text())
  del described["sha256"]
  (model / "model.json").write_text(json.dumps(described))
  with pytest.raises(ValueError, match="no complete model here.*KeyError"):
    load(model)


# --- names of what comes with the package


@pytest.fixture
def places(tmp_path, monkeypatch):
  """A folder of shipped checkpoints, and a user's own with folders in it."""
  for name in ("here/runs/mine", "here/both", "package/both/dit/model",
               "package/toy/dit/model", "package/_other/dit/model",
               "package/empty"):  # fmt: skip
    (tmp_path / name).mkdir(parents=True)
  monkeypatch.setattr(shipped, "folder", lambda: tmp_path / "package")
  monkeypatch.chdir(tmp_path / "here")
  return tmp_path


def test_names_are_looked_up_in_the_package(places):
  assert shipped.names() == ["both", "toy"]
  assert shipped.find("toy") == places / "package" / "toy"
  assert shipped.find(pathlib.Path("toy")) == places / "package" / "toy"
  # What the user has comes first, and a path is a path.
  assert shipped.find("both") == pathlib.Path("both")
  assert shipped.find("runs/mine") == pathlib.Path("runs/mine")
  assert shipped.find("runs/none") == pathlib.Path("runs/none")
  assert shipped.find(places / "none") == places / "none"
  with pytest.raises(ValueError, match="tox: no such folder, .* sora_jax .*both, toy"):
    shipped.find("tox")


def test_without_any(places, monkeypatch):
  monkeypatch.setattr(shipped, "folder", lambda: places / "nowhere")
  with pytest.raises(ValueError, match="toy: no such folder, .*there is none of those"):
    shipped.find("toy")
