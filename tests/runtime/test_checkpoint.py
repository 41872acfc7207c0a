"""Models: exact, checked, replaced at once, and clear about what does not fit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sealed
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.runtime import checkpoint, checksums, lazy_arrays, sharding


def params_of(width=4):
  return {
    "block": {
      "kernel": jnp.arange(3.0 * width).reshape(3, width),
      "bias": jnp.full(width, jnp.pi),
    },
    "head": {"kernel": jnp.ones((width, 2))},
  }


def assert_equal(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_model_round_trip_and_overwrite(tmp_path):
  folder = tmp_path / "model"
  for width in (4, 6):
    checkpoint.save_model(folder, params_of(width), {"stage": "dit", "width": width})
    params, meta = checkpoint.load_model(folder)
    assert_equal(params_of(width), params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert meta == checkpoint.load_meta(folder) == {"stage": "dit", "width": width}
  assert sorted(p.name for p in folder.iterdir()) == ["model.json", "params-1"]
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  rules = ((".*", PartitionSpec("fsdp")),)
  params, _ = checkpoint.load_model(
    folder, lambda shapes: sharding.param_shardings(shapes, rules, mesh)
  )
  assert_equal(params_of(6), params)
  place = NamedSharding(mesh, PartitionSpec("fsdp"))
  assert all(leaf.sharding == place for leaf in jax.tree.leaves(params))


def test_failed_overwrite_leaves_the_model(tmp_path, monkeypatch):
  checkpoint.save_model(tmp_path, params_of(), {"n": 0})
  monkeypatch.setattr(checkpoint.json, "dumps", lambda *_, **__: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    checkpoint.save_model(tmp_path, params_of(6), {"n": 1})
  monkeypatch.undo()
  params, meta = checkpoint.load_model(tmp_path)
  assert_equal(params_of(), params)
  assert meta == {"n": 0}
  checkpoint.save_model(tmp_path, params_of(6), {"n": 1})
  assert checkpoint.load_model(tmp_path)[1] == {"n": 1}


def test_incomplete_models_are_named(tmp_path):
  def message(folder, text):
    return rf"{folder}.*{text}"

  with pytest.raises(ValueError, match=message("nowhere", "no complete model")):
    checkpoint.load_model(tmp_path / "nowhere")
  for text in ("{", "[]", json.dumps({"meta": {}})):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ValueError, match=message(tmp_path, "no complete model")):
      checkpoint.load_model(tmp_path)
  checkpoint.save_model(tmp_path / "m", params_of(), {})
  with pytest.raises(ValueError, match=message("m", "does not fit")):
    checkpoint.load_model(tmp_path / "m", {"other": None})
  shutil.rmtree(tmp_path / "m" / "params-0" / "d")
  with pytest.raises(ValueError, match=message("m", "params-0 is damaged")):
    checkpoint.load_model(tmp_path / "m")


def test_a_fingerprint_is_of_the_values_alone():
  """One bit changes it, and so does an exchange; the mesh does not."""
  rng = np.random.default_rng(0)
  params = {
    "a": rng.standard_normal((16, 8)).astype(np.float32),
    "b": {"c": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "d": np.float32(3)},
    "e": jnp.asarray(rng.standard_normal(8), jnp.bfloat16),
  }
  expected = checkpoint.fingerprint(params)
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
  placed = {**params, "a": jax.device_put(params["a"], spread)}
  assert checkpoint.fingerprint(placed) == expected
  flipped = params["a"].copy()
  flipped.view(np.uint32)[5, 3] ^= 1
  swapped = params["a"][::-1]
  renamed = {**params, "f": params["a"]}
  del renamed["a"]
  others = [{**params, "a": flipped}, {**params, "a": swapped}, renamed]
  others.append({**params, "b": {**params["b"], "d": np.float32(-3)}})
  found = {checkpoint.fingerprint(other) for other in others}
  assert len(found) == 4 and expected not in found


def damage(path, how):
  content = bytearray(path.read_bytes())
  if how == "bit":
    content[len(content) // 2] ^= 4
  path.write_bytes(
    {"bit": content, "empty": b"", "cut": content[: len(content) // 2]}[how]
  )


def large_params():
  rng = np.random.default_rng(0)
  return {
    "a": rng.standard_normal((64, 64)).astype(np.float32),
    "b": {"c": jnp.asarray(rng.standard_normal(999), jnp.bfloat16)},
  }


@pytest.mark.parametrize("how", ["bit", "empty", "cut"])
def test_a_damaged_model_is_an_error(tmp_path, how):
  checkpoint.save_model(tmp_path, large_params(), {"n": 1})
  params, _ = checkpoint.load_model(tmp_path)
  assert_equal(large_params(), params)
  checkpoint.check_model(tmp_path)
  (data,) = tmp_path.glob("params-0/d/*")
  damage(data, how)
  for read in (checkpoint.load_model, checkpoint.check_model):
    with pytest.raises(ValueError, match=f"{tmp_path}: .*params-0 is damaged") as error:
      read(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_params_of_another_model_are_an_error(tmp_path):
  checkpoint.save_model(tmp_path / "a", large_params(), {})
  other = {**large_params(), "a": large_params()["a"] + 1}
  checkpoint.save_model(tmp_path / "b", other, {})
  shutil.rmtree(tmp_path / "a" / "params-0")
  shutil.copytree(tmp_path / "b" / "params-0", tmp_path / "a" / "params-0")
  for read in (checkpoint.load_model, checkpoint.check_model):
    with pytest.raises(
      ValueError, match="the values of a are not those that were saved"
    ):
      read(tmp_path / "a")


def test_checked_whatever_dtype_is_asked_for(tmp_path):
  checkpoint.save_model(tmp_path, large_params(), {})
  mesh = sharding.make_mesh(devices=jax.devices()[:2])

  def place(shapes):
    return sharding.param_shardings(shapes, ((".*", PartitionSpec("fsdp")),), mesh)

  rows = {"a": large_params()["a"], "b": {"c": np.zeros(998, np.float32)}}
  checkpoint.save_model(tmp_path, rows, {})
  for dtype in (jnp.bfloat16, {"a": jnp.float32, "b": {"c": jnp.bfloat16}}):
    params, _ = checkpoint.load_model(tmp_path, place, dtype)
    wanted = dtype if isinstance(dtype, dict) else {"a": dtype, "b": {"c": dtype}}
    jax.tree.map(
      lambda x, y, d: np.testing.assert_array_equal(x, np.asarray(y).astype(d)),
      params,
      rows,
      wanted,
    )
    for leaf in jax.tree.leaves(params):
      assert leaf.sharding == NamedSharding(mesh, PartitionSpec("fsdp"))


def test_model_json_has_a_checksum_and_old_ones_are_read(tmp_path, caplog):
  checkpoint.save_model(tmp_path, large_params(), {"latent_std": [0.5]})
  path = tmp_path / "model.json"
  text = path.read_text()
  for changed in (text.replace("0.5", "0.7"), text.replace("checksum", "chocksum")):
    path.write_text(changed)
    with pytest.raises(
      ValueError, match="model.json is damaged, or was changed by hand"
    ):
      checkpoint.load_meta(tmp_path)
  old = json.loads(text)
  path.write_text(json.dumps({"params": old["params"], "meta": old["meta"]}))
  with caplog.at_level("INFO", logger="absl"):
    params, meta = checkpoint.load_model(tmp_path)
  assert_equal(large_params(), params)
  assert meta == {"latent_std": [0.5]} and "version without checksums" in caplog.text
  assert not checkpoint.has_checksums(tmp_path)
  checkpoint.save_meta(tmp_path, {"n": 2})  # has a checksum of its own then
  path.write_text(path.read_text().replace('"n": 2', '"n": 3'))
  with pytest.raises(ValueError, match="changed by hand"):
    checkpoint.load_meta(tmp_path)


def test_streamed_models_are_checked(tmp_path):
  whole = {"a": np.arange(700, dtype=np.float32).reshape(7, 100)}

  def blocks():
    for row in range(0, 7, 2):
      yield whole["a"][row : row + 2]

  streamed = lazy_arrays.Streamed((7, 100), np.dtype(np.float32), 2, blocks)
  checkpoint.save_model(tmp_path / "s", {"a": streamed}, {})
  checkpoint.save_model(tmp_path / "w", whole, {})
  rows = [json.loads((tmp_path / n / "model.json").read_text()) for n in "sw"]
  assert rows[0]["arrays"] == rows[1]["arrays"] == checksums.of_tree(whole)
  for name in "sw":
    params, _ = checkpoint.stream_model(tmp_path / name)
    np.testing.assert_array_equal(params["a"].whole(), whole["a"])
    model = json.loads((tmp_path / name / "model.json").read_text())
    model["arrays"]["a"][2] ^= 1
    sealed.rewrite(tmp_path / name / "model.json", arrays=model["arrays"])
    params, _ = checkpoint.stream_model(tmp_path / name)
    with pytest.raises(
      ValueError, match=f"{tmp_path / name}: .*the values of a are not"
    ):
      params["a"].whole()
