"""Checkpoints and models: exact, kept, and clear about what does not fit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from sora_jax.runtime import checkpoint, sharding
from sora_jax.training import loop, optim


def params_of(width=4):
  return {
    "block": {
      "kernel": jnp.arange(3.0 * width).reshape(3, width),
      "bias": jnp.full(width, jnp.pi),
    },
    "head": {"kernel": jnp.ones((width, 2))},
  }


def state_of(params):
  config = loop.TrainConfig(steps=9, learning_rates=(("head/.*", 1.0),))
  optimizer, _ = optim.make(config, params)
  ema = jax.tree.map(lambda leaf: leaf / 3, params)
  return loop.TrainState(jnp.int32(7), params, ema, optimizer.init(params))


def abstract(state):
  place = SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state
  )


def assert_equal(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@pytest.fixture
def saved(tmp_path):
  """A folder with the checkpoints 3, 4 of five saved ones."""
  state = state_of(params_of())
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=2)
  for step in range(5):
    checkpoints.save(step, state, {"data": {"global_next_index": step}, "sum": 0.1})
  checkpoints.close()
  return tmp_path / "c", state


def test_restores_the_state_and_the_newest_are_kept(saved):
  folder, state = saved
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  assert checkpoints.steps() == [3, 4]
  restored, host = checkpoints.restore(3, abstract(state))
  checkpoints.close()
  assert_equal(state, restored)
  assert host == {"data": {"global_next_index": 3}, "sum": 0.1}


def other_optimizer(state):
  return state._replace(opt_state=state.opt_state.inner_states["rest"])


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda state: state_of(params_of(width=5)),
      r"c/4: params/block/bias has shape \(4,\) in the checkpoint, \(5,\) by the",
    ),
    (
      lambda state: state._replace(params={"block": state.params["block"]}),
      r"params/head/kernel has shape \(4, 2\) in the checkpoint, none",
    ),
    (
      lambda state: state._replace(params={**state.params, "new": jnp.ones(3)}),
      r"params/new has shape none \(missing\) in the checkpoint, \(3,\) by the config",
    ),
    (other_optimizer, "opt_state/.* has shape"),
  ],
)
def test_checkpoint_of_another_config(saved, change, message):
  folder, state = saved
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  with pytest.raises(ValueError, match=message):
    checkpoints.restore(4, abstract(change(state)))
  checkpoints.close()


@pytest.mark.parametrize("lost", ["state", "state/_METADATA", "state/d", "host"])
def test_damaged_checkpoint_is_named(saved, lost):
  folder, state = saved
  path = folder / "4" / lost
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  with pytest.raises(ValueError, match=r"c/4: the checkpoint is damaged .*delete"):
    checkpoints.restore(4, abstract(state))
  checkpoints.close()


def test_half_written_checkpoint_is_no_checkpoint(saved):
  folder, _ = saved
  shutil.copytree(folder / "4", folder / "5.orbax-checkpoint-tmp")
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  assert checkpoints.steps() == [3, 4]
  checkpoints.close()


def test_save_returns_when_the_state_may_be_donated(tmp_path):
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  value = {"x": jnp.zeros(1_000_000)}
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=10)
  for step in range(4):
    checkpoints.save(step, value, {})
    for _ in range(5):
      value = {"x": add(value["x"])}
  for step in range(4):
    restored, _ = checkpoints.restore(step, abstract(value))
    np.testing.assert_array_equal(restored["x"], np.full(1_000_000, 5.0 * step))
  checkpoints.close()


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
