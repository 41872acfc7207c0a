"""Checkpoints: exact, kept, checked, and clear about what does not fit."""

import concurrent.futures
import json
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from sora_jax.runtime import train_checkpoints
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
  checkpoints = train_checkpoints.Checkpoints(tmp_path / "c", keep=2)
  for step in range(5):
    checkpoints.save(step, state, {"data": {"global_next_index": step}, "sum": 0.1})
  checkpoints.close()
  return tmp_path / "c", state


def test_restores_the_state_and_the_newest_are_kept(saved):
  folder, state = saved
  checkpoints = train_checkpoints.Checkpoints(folder, keep=2)
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
  checkpoints = train_checkpoints.Checkpoints(folder, keep=2)
  with pytest.raises(ValueError, match=message):
    checkpoints.restore(4, abstract(change(state)))
  checkpoints.close()


@pytest.mark.parametrize("lost", ["state", "state/_METADATA", "state/d", "host"])
def test_damaged_checkpoint_is_named(saved, lost):
  folder, state = saved
  path = folder / "4" / lost
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  checkpoints = train_checkpoints.Checkpoints(folder, keep=2)
  with pytest.raises(ValueError, match=r"c/4: the checkpoint is damaged \("):
    checkpoints.restore(4, abstract(state))
  checkpoints.close()


def test_half_written_checkpoint_is_no_checkpoint(saved):
  folder, _ = saved
  shutil.copytree(folder / "4", folder / "5.orbax-checkpoint-tmp")
  checkpoints = train_checkpoints.Checkpoints(folder, keep=2)
  assert checkpoints.steps() == [3, 4]
  checkpoints.close()


def test_save_returns_when_the_state_may_be_donated(tmp_path):
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  value = {"x": jnp.zeros(1_000_000)}
  checkpoints = train_checkpoints.Checkpoints(tmp_path, keep=10)
  for step in range(4):
    checkpoints.save(step, value, {})
    for _ in range(5):
      value = {"x": add(value["x"])}
  for step in range(4):
    restored, _ = checkpoints.restore(step, abstract(value))
    np.testing.assert_array_equal(restored["x"], np.full(1_000_000, 5.0 * step))
  checkpoints.close()


def opened(folder, **options):
  return train_checkpoints.Checkpoints(folder, keep=2, **options)


def files_of(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, rng):
  content = bytearray(path.read_bytes())
  content[rng.integers(len(content))] ^= 1 << rng.integers(8)
  path.write_bytes(content)


@pytest.mark.slow
def test_flipped_bits_are_damage_or_no_change(saved):
  """Wherever they are: other values are never restored."""
  folder, state = saved
  rng = np.random.default_rng(0)
  files = files_of(folder / "4")
  contents = {path: path.read_bytes() for path in files}
  found = 0
  checkpoints = opened(folder)
  for path in files * 3:
    if not contents[path]:
      continue
    flip(path, rng)
    try:
      restored, host = checkpoints.restore(4, abstract(state))
    except train_checkpoints.DamagedError as error:
      assert error.step == 4 and "\n" not in str(error) and len(str(error)) < 400
      found += 1
    else:
      assert_equal(state, restored)
      assert host == {"data": {"global_next_index": 4}, "sum": 0.1}
    path.write_bytes(contents[path])
  checkpoints.close()
  assert found >= len(files) // 2


@pytest.mark.parametrize("part", ["host", "state", "."])
def test_parts_of_another_step(saved, part):
  folder, state = saved
  other = state._replace(params=jax.tree.map(lambda x: x + 1, state.params))
  checkpoints = opened(folder)
  checkpoints.save(5, other, {"data": {}})
  checkpoints.wait()
  shutil.rmtree(folder / "4" / part)
  shutil.copytree(folder / "5" / part, folder / "4" / part)
  reason = "the values of .* are not those" if part == "state" else "it is of step 5"
  with pytest.raises(train_checkpoints.DamagedError, match=f"c/4: .*{reason}"):
    checkpoints.restore(4, abstract(state))
  checkpoints.close()


def test_what_fails_to_be_read_is_no_damage(saved, monkeypatch):
  folder, state = saved
  checkpoints = opened(folder)
  for error in (MemoryError("large"), OSError(5, "Input/output error")):
    monkeypatch.setattr(
      checkpoints._states, "restore", lambda *_, error=error, **__: raise_(error)
    )
    with pytest.raises(ValueError, match="c/4: cannot be read now") as caught:
      checkpoints.restore(4, abstract(state))
    assert not isinstance(caught.value, train_checkpoints.DamagedError)
  checkpoints.close()


def raise_(error):
  raise error


def test_a_checkpoint_without_checksums_is_read_and_that_is_said(saved, caplog):
  folder, state = saved
  path = folder / "4" / "host" / "metadata"
  path.write_text(json.dumps(json.loads(path.read_text())["host"]))
  checkpoints = opened(folder)
  with caplog.at_level("INFO", logger="absl"):
    restored, host = checkpoints.restore(4, abstract(state))
  assert_equal(state, restored)
  assert host["sum"] == 0.1 and "4 is of a version without checksums" in caplog.text
  with pytest.raises(ValueError, match=r"bias has shape \(4,\) in the checkpoint"):
    checkpoints.restore(4, abstract(state_of(params_of(width=5))))
  checkpoints.close()


def test_another_dtype_is_another_config_and_no_damage(saved):
  folder, state = saved
  other = state._replace(ema=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.ema))
  checkpoints = opened(folder)
  message = "ema/block/bias has dtype float32 in the checkpoint, bfloat16 by the config"
  with pytest.raises(ValueError, match=message) as error:
    checkpoints.restore(4, abstract(other))
  assert not isinstance(error.value, train_checkpoints.DamagedError)
  checkpoints.close()


def test_what_stays(tmp_path):
  value = {"x": jnp.zeros(2)}
  scores = {1: 5.0, 2: 3.0, 3: None, 4: 4.0, 5: float("nan"), 6: 9.0, 7: 8.0}
  options = {"every": 4, "best": True, "always": 1}
  for steps in ([1, 2, 3, 4], [5, 6, 7]):  # the second part by another process
    checkpoints = opened(tmp_path, **options)
    for step in steps:
      checkpoints.save(step, value, {}, scores[step])
    checkpoints.close()
  checkpoints = opened(tmp_path, **options)
  assert checkpoints.steps() == [1, 2, 4, 6, 7]
  checkpoints.save(8, value, {}, 3.0)  # as good, and newer
  checkpoints.close()
  assert sorted(int(path.name) for path in tmp_path.iterdir()) == [1, 4, 7, 8]


class FullDisk:
  """Makes the writing of host/metadata fail, in Orbax's thread, while it is full."""

  def __init__(self, monkeypatch):
    self.full, self.failed = False, threading.Event()
    handler = train_checkpoints.ocp.JsonCheckpointHandler
    write = handler._save_fn

    async def save(handler, values, directory):
      if self.full:
        self.failed.set()
        raise OSError(28, "No space left on device")
      await write(handler, values, directory)

    monkeypatch.setattr(handler, "_save_fn", save)


def test_a_full_disk_is_waited_for(tmp_path, monkeypatch, caplog):
  disk, value = FullDisk(monkeypatch), {"x": jnp.arange(3.0)}
  checkpoints = opened(tmp_path, failures=3)
  checkpoints.save(1, value, {})
  checkpoints.wait()
  disk.full = True
  for step in (2, 3):
    checkpoints.save(step, value, {})
    checkpoints.wait()
  (first, second) = [m for m in caplog.messages if "save at step" in m]
  assert "at step 2 failed (OSError: [Errno 28] No space left on device)" in first
  assert "2 more failures in a row end it; the newest checkpoint is of step 1" in first
  assert "1 more failures" in second and "\n" not in first + second
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
  disk.full = False
  checkpoints.save(4, value, {})
  checkpoints.wait()
  assert checkpoints.steps() == [1, 4]
  assert_equal(value, checkpoints.restore(4, abstract(value))[0])
  disk.full = True  # counted anew
  monkeypatch.setattr(train_checkpoints.time, "sleep", lambda _: None)
  with pytest.raises(
    ValueError, match="3 saves in a row failed, the last at step 5"
  ) as e:
    checkpoints.save_and_wait(5, value, {})
  assert "newest checkpoint is of step 4" in str(e.value) and "\n" not in str(e.value)
  checkpoints.close()


def test_what_a_failed_save_still_writes_is_removed(tmp_path, monkeypatch):
  """Orbax gives up with the first write that fails, while others go on."""
  disk, value = FullDisk(monkeypatch), {"x": jnp.arange(3.0)}
  handler = train_checkpoints.ocp.StandardCheckpointHandler
  start = handler.async_save
  pool = concurrent.futures.ThreadPoolExecutor(1)

  def write_on(folder):
    assert disk.failed.wait(10)
    for number in range(30):  # as TensorStore does, with its parents
      time.sleep(0.01)
      folder.mkdir(parents=True, exist_ok=True)
      (folder / f"late{number}").write_text("x")

  async def async_save(self, directory, *args, **kwargs):
    futures = await start(self, directory, *args, **kwargs)
    return [*futures, pool.submit(write_on, directory)]

  monkeypatch.setattr(handler, "async_save", async_save)
  disk.full = True
  checkpoints = opened(tmp_path, failures=2)
  checkpoints.save(1, value, {})
  checkpoints.wait()
  pool.shutdown()
  assert not list(tmp_path.iterdir())
  checkpoints.close()


def test_the_last_save_tries_again(tmp_path, monkeypatch):
  disk, value = FullDisk(monkeypatch), {"x": jnp.arange(3.0)}
  disk.full = True
  monkeypatch.setattr(
    train_checkpoints.time, "sleep", lambda _: setattr(disk, "full", False)
  )
  checkpoints = opened(tmp_path, failures=2)
  checkpoints.save_and_wait(1, value, {})
  checkpoints.close()
  assert [path.name for path in tmp_path.iterdir()] == ["1"]
