"""Mesh, sharding rules, and equality of many devices and processes with one."""

import dataclasses
import signal
import socket
import sys
import types

import jax
import numpy as np
import pytest
from absl import logging
from jax.sharding import AbstractMesh, PartitionSpec
from training import test_loop as toy

from sora_jax.runtime import sharding
from sora_jax.training import loop, optim

MESH = AbstractMesh((1, 4, 1, 2), sharding.AXES)


def shapes(**leaves):
  return {
    "block": {
      name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in leaves.items()
    }
  }


@pytest.mark.parametrize(
  "sizes, message",
  [
    ({"fsdp": 4}, "data=1, fsdp=4, context=1, tensor=1 does not fit 6 devices"),
    ({"tensor": 4}, "does not fit 6 devices"),
    ({"data": -1}, "at most one is -1"),
    ({"data": 0}, "mesh sizes are positive"),
  ],
)
def test_mesh_sizes_that_do_not_fit(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(**sizes, devices=[None] * 6)


def test_first_rule_wins_and_matches_the_whole_path():
  rules = (
    (r".*/out", PartitionSpec("tensor", "fsdp")),
    (r"block/.*", PartitionSpec(("fsdp", "tensor"))),
  )
  placed = sharding.param_shardings(shapes(out=(8, 8), outer=(8, 3)), rules, MESH)
  assert placed["block"]["out"].spec == PartitionSpec("tensor", "fsdp")
  assert placed["block"]["outer"].spec == PartitionSpec(("fsdp", "tensor"))


@pytest.mark.parametrize(
  "rules, message",
  [
    ((("block/ker", PartitionSpec()),), r"matches the param block/kernel \(8, 6\)"),
    (((".*", PartitionSpec()), ("head.*", PartitionSpec())), r"uses: \['head.*'\]"),
    (((".*", PartitionSpec(None, None, "fsdp")),), r"block/kernel has shape \(8, 6\)"),
    (((".*", PartitionSpec("model")),), r"names \['model'\]"),
  ],
)
def test_wrong_rules(rules, message):
  with pytest.raises(ValueError, match=message):
    sharding.param_shardings(shapes(kernel=(8, 6)), rules, MESH)


def test_dim_that_does_not_divide_is_replicated_and_logged(caplog):
  rules = ((".*", PartitionSpec("fsdp", "tensor")),)
  with caplog.at_level("WARNING", logger="absl"):
    placed = sharding.param_shardings(shapes(kernel=(6, 6)), rules, MESH)
  assert placed["block"]["kernel"].spec == PartitionSpec(None, "tensor")
  assert "fsdp (4) does not divide 6" in caplog.text


def test_optimizer_state_and_ema_are_placed_like_their_params():
  rules = ((".*", PartitionSpec("fsdp")),)
  params = {"a": shapes(kernel=(8, 2)), "b": shapes(kernel=(4, 2))}
  config = loop.TrainConfig(steps=2, learning_rates=(("b/.*", 1.0),))
  state = jax.eval_shape(optim.make(config, params)[0].init, params)
  placed = sharding.param_shardings(params, rules, MESH)
  placed = sharding.state_shardings(state, params, placed, MESH)
  specs = [s.spec for s in jax.tree.leaves(placed)]
  large = [leaf.size > 1 for leaf in jax.tree.leaves(state)]
  assert sum(large) == 4  # two moments of two params
  for is_large, spec in zip(large, specs, strict=True):
    assert spec == (PartitionSpec("fsdp") if is_large else PartitionSpec())


def test_batches_that_do_not_fit():
  mesh = AbstractMesh((2, 4, 1, 1), sharding.AXES)
  with pytest.raises(ValueError, match="6 rows does not divide by 8 devices"):
    sharding.shard_batch({"x": np.zeros((6, 2))}, mesh)
  with pytest.raises(ValueError, match="different numbers of rows: {'x': 8, 'y': 4}"):
    sharding.shard_batch({"x": np.zeros(8), "y": np.zeros(4), "z": 1.0}, mesh)


class SliceDevice:
  """A device of a slice, as far as a mesh asks."""

  platform = device_kind = "simulated"

  def __init__(self, index, slice_index):
    self.id, self.slice_index, self.process_index = index, slice_index, slice_index


def slice_devices(slices, each):
  # Not in the order of slices: jax.devices() need not be, either.
  return [SliceDevice(i, i % slices) for i in range(slices * each)]


def test_only_data_crosses_slices():
  sizes = {"data": 4, "fsdp": -1, "context": 2, "tensor": 2}
  mesh = sharding.make_mesh(**sizes, devices=slice_devices(2, 8))
  assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "context": 2, "tensor": 2}
  for row, devices in enumerate(mesh.devices):
    # Rows of one slice lie side by side.
    assert {device.slice_index for device in devices.flat} == {row // 2}
  assert len({device.id for device in mesh.devices.flat}) == 16


@pytest.mark.parametrize(
  "sizes, message",
  [
    ({}, "data=1 is not a multiple of the 2 slices; set config.mesh.data"),
    ({"data": 3, "fsdp": 1}, "data=3, .* does not fit 8 devices"),
    ({"data": 2, "fsdp": 8}, "does not fit 8 devices"),
  ],
)
def test_slices_that_do_not_fit(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(**sizes, devices=slice_devices(2, 4))


def test_slices_of_different_sizes():
  devices = [*slice_devices(2, 3), SliceDevice(6, 0), SliceDevice(7, 0)]
  with pytest.raises(ValueError, match="slices have 5 and 3 devices"):
    sharding.make_mesh(data=2, devices=devices)


def test_a_batch_that_all_processes_hold_is_placed_once():
  mesh = sharding.make_mesh()
  x = np.arange(16.0).reshape(8, 2)
  placed = sharding.shard_alike({"x": x, "scale": 2.0}, mesh)
  assert placed["x"].sharding.spec == PartitionSpec(("data", "fsdp"))
  assert placed["x"].addressable_shards[3].data.tolist() == [[6.0, 7.0]]
  assert placed["scale"].shape == () and placed["scale"].is_fully_replicated
  with pytest.raises(ValueError, match="6 rows does not divide by 8 devices"):
    sharding.shard_alike({"x": x[:6]}, mesh)


def fake_mesh(processes, shape):
  devices = np.array([types.SimpleNamespace(process_index=p) for p in processes])
  return types.SimpleNamespace(devices=devices.reshape(shape), axis_names=sharding.AXES)


def test_hosts_that_differ_along_context_feed_the_same_rows(monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 2)
  assert sharding.host_shard(fake_mesh([0, 0, 1, 1, 2, 2, 3, 3], (1, 8, 1, 1))) == (
    2,
    4,
  )
  assert sharding.host_shard(fake_mesh([0, 0, 1, 1, 2, 2, 3, 3], (1, 2, 4, 1))) == (
    1,
    2,
  )
  assert sharding.host_shard(fake_mesh([0, 0, 1, 1, 2, 2, 3, 3], (1, 1, 8, 1))) == (
    0,
    1,
  )
  with pytest.raises(ValueError, match="some but not all"):
    sharding.host_shard(fake_mesh([0, 1, 0, 2, 2, 2], (1, 3, 2, 1)))


CONFIG = dataclasses.replace(
  toy.CONFIG, steps=10, schedule="constant", save_every=0, log_every=1
)


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
  toy.finish(toy.start_process("devices", tmp_path, script=__file__, devices=8))


def compare_devices(folder):
  """In a process with 8 devices: meshes of 8 against a mesh of the first alone."""
  toy.cache_compilations(f"{folder}/cache")
  meshes = {
    "one": sharding.make_mesh(devices=jax.devices()[:1]),
    "fsdp": sharding.make_mesh(),
    "mixed": sharding.make_mesh(data=2, fsdp=2, tensor=2),
  }
  # Output kernels split the other way round: (fsdp, tensor) for both kernels made
  # jaxlib 0.10.2 compile wrong gradients here, unless activations were constrained.
  tensor_rules = (
    ("hidden/kernel", PartitionSpec("fsdp", "tensor")),
    ("output/kernel", PartitionSpec("tensor", "fsdp")),
    (".*/bias", PartitionSpec()),
  )
  rules = {"one": toy.RULES, "fsdp": toy.RULES, "mixed": tensor_rules}
  evaluation = {"eval_batches": [next(toy.Batches())]}
  states = {
    name: toy.run(
      f"{folder}/{name}", CONFIG, mesh=mesh, rules=rules[name], **evaluation
    )
    for name, mesh in meshes.items()
  }
  kernel = states["mixed"].opt_state[1].mu["hidden"]["kernel"]
  assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor"), kernel.sharding
  assert kernel.addressable_shards[0].data.shape == (3, 8)
  for name in ("fsdp", "mixed"):
    for a, b in zip(
      jax.tree.leaves(states["one"]), jax.tree.leaves(states[name]), strict=True
    ):
      np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    one, many = toy.rows_of(f"{folder}/one"), toy.rows_of(f"{folder}/{name}")
    for a, b in zip(one, many, strict=True):
      key = "loss" if "loss" in a else "eval/error"
      np.testing.assert_allclose(a[key], b[key], rtol=1e-5)
  # A checkpoint of one mesh goes on on another.
  config = dataclasses.replace(CONFIG, steps=14)
  more = {
    name: toy.run(f"{folder}/{run}", config, mesh=meshes[name], rules=rules[name])
    for run, name in (("one", "one"), ("fsdp", "mixed"))
  }
  for a, b in zip(*map(jax.tree.leaves, more.values()), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
  logged = [row["step"] for row in toy.rows_of(f"{folder}/fsdp") if "loss" in row]
  assert logged == list(range(1, 15))


class HostBatches(toy.Batches):
  """The rows of toy.Batches that belong to this host."""

  def __init__(self, mesh, **options):
    super().__init__(**options)
    self.shard = sharding.host_shard(mesh)

  def __next__(self):
    index, count = self.shard
    batch = super().__next__()
    return {k: v[index::count] if v.ndim else v for k, v in batch.items()}


def run_host(folder, index, port, delay):
  """One of two processes of a run."""
  jax.distributed.initialize(f"localhost:{port}", 2, int(index))
  logging.set_verbosity(logging.INFO)
  toy.cache_compilations(f"{folder}/cache")
  mesh = sharding.make_mesh(context=2)
  config = dataclasses.replace(CONFIG, steps=30, save_every=20)
  toy.run(folder, config, batches=HostBatches(mesh, delay=float(delay)), mesh=mesh)


def run_two_hosts(folder, delay):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  return [
    toy.start_process("host", folder, index, port, delay, script=__file__, devices=2)
    for index in (0, 1)
  ]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_stop_together_and_go_on(tmp_path):
  processes = run_two_hosts(tmp_path, 0.1)
  toy.wait_for_step(tmp_path, 3)
  processes[1].send_signal(signal.SIGTERM)  # one host alone gets the signal
  logs = toy.finish(*processes)
  steps = {log.split("signal; step ")[1].split()[0] for log in logs}
  assert len(steps) == 1
  logs = toy.finish(*run_two_hosts(tmp_path, 0))
  assert f"from step {steps.pop()} to 30" in logs[0]
  assert [row["step"] for row in toy.rows_of(tmp_path)] == list(range(1, 31))


@pytest.mark.parametrize(
  "rows, devices, fsdp, context",
  [(1, 8, 1, 8), (3, 8, 2, 4), (9, 8, 8, 1), (4, 6, 3, 2), (0, 1, 1, 1)],
)
def test_devices_that_rows_leave_idle_share_tokens(rows, devices, fsdp, context):
  mesh = sharding.sampling_mesh(rows, jax.devices()[:devices])
  assert (mesh.shape["fsdp"], mesh.shape["context"]) == (fsdp, context)


@pytest.mark.parametrize("rows, whole", [(0, 0), (1, 4), (4, 4), (5, 8)])
def test_rows_are_rounded_up_to_the_batch_shards(rows, whole):
  mesh = AbstractMesh((2, 2, 1, 2), sharding.AXES)
  assert sharding.batch_shards(mesh) == 4
  assert sharding.whole_batch(rows, mesh) == whole


if __name__ == "__main__":
  {"devices": compare_devices, "host": run_host}[sys.argv[1]](*sys.argv[2:])
