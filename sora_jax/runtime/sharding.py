"""Device mesh, and the placement of params, optimizer state and batches on it."""

import collections
import itertools
import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
Rules = Sequence[tuple[str, PartitionSpec]]
_SYNC_HOURS = 48
_syncs = itertools.count()  # a barrier can be used once


def make_mesh(data=1, fsdp=-1, context=1, tensor=1, devices=None) -> Mesh:
  """Mesh with the axes data, fsdp, context, tensor; one size may be -1, the rest.

  `data` crosses slices, so with several TPU slices it is a multiple of their number.
  ValueError if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = axis_sizes(len(devices), data, fsdp, context, tensor)
  # Explicit axes, the default of jax.make_mesh, make Linen's sharded matmuls raise.
  types = (AxisType.Auto,) * len(AXES)
  counts = collections.Counter(getattr(d, "slice_index", 0) for d in devices)
  slices = len(counts)
  # An axis of a slice may be shared by two of the mesh: fsdp=64, context=4 on 16x16.
  split = {"allow_split_physical_axes": True}
  if slices == 1:
    grid = mesh_utils.create_device_mesh(sizes, devices, **split)
    return Mesh(grid, AXES, axis_types=types)
  if sizes[0] % slices:
    raise ValueError(
      f"data={sizes[0]} is not a multiple of the {slices} slices; set "
      "config.mesh.data, the axis that crosses them"
    )
  if len(set(counts.values())) > 1:
    shown = " and ".join(str(counts[index]) for index in sorted(counts))
    raise ValueError(f"slices have {shown} devices; all need the same number")
  grid = mesh_utils.create_hybrid_device_mesh(
    (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1), devices, **split
  )
  return Mesh(grid, AXES, axis_types=types)


def sampling_mesh(rows: int, devices=None) -> Mesh:
  """A host's devices, or others, for so many rows at once.

  Devices that rows would leave idle share the tokens of each row.
  """
  devices = jax.local_devices() if devices is None else devices
  count = len(devices)
  fsdp = max(n for n in range(1, count + 1) if n <= max(rows, 1) and count % n == 0)
  return make_mesh(fsdp=fsdp, context=count // fsdp, devices=devices)


def axis_sizes(devices: int, data=1, fsdp=-1, context=1, tensor=1) -> list[int]:
  """Sizes of the mesh's axes for that many devices; see `make_mesh`."""
  sizes = [data, fsdp, context, tensor]
  shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f"mesh sizes are positive, at most one is -1: {shown}")
  known = math.prod(size for size in sizes if size != -1)
  if devices % known or (-1 not in sizes and known != devices):
    raise ValueError(f"mesh {shown} does not fit {devices} devices")
  return [devices // known if size == -1 else size for size in sizes]


def path_name(path) -> str:
  """Path of a leaf as 'blocks/attention/kernel': its last run of dict keys.

  Optimizer state holds trees like the params inside tuples and named tuples, so that
  its leaves get the name of the param they belong to; any other leaf gets ''.
  """
  names = []
  for key in reversed(path):
    if not isinstance(key, jax.tree_util.DictKey):
      break
    names.append(str(key.key))
  return "/".join(reversed(names))


def param_shardings(shapes, rules: Rules, mesh: Mesh):
  """Tree of NamedSharding for a tree of params or of their shapes.

  rules: ordered (regex, PartitionSpec); the first whose regex matches the whole path
  'a/b/kernel' wins. Of a dim's mesh axes the last are left out, which is logged, until
  the rest divides it.
  ValueError for a param without a rule, a rule that no param uses, and a spec that
  names an unknown axis or more dims than the param has.
  """
  used = [False] * len(rules)

  def place(path, leaf):
    name = path_name(path)
    for i, (regex, spec) in enumerate(rules):
      if re.fullmatch(regex, name):
        used[i] = True
        return NamedSharding(mesh, _fit(name, leaf.shape, spec, mesh))
    raise ValueError(f"no sharding rule matches the param {name} {leaf.shape}")

  shardings = jax.tree_util.tree_map_with_path(place, shapes)
  unused = [regex for (regex, _), ok in zip(rules, used, strict=True) if not ok]
  if unused:
    raise ValueError(f"sharding rules that no param uses: {unused}")
  return shardings


def _fit(name, shape, spec, mesh) -> PartitionSpec:
  """Spec without the axes that do not divide their dim."""
  if len(spec) > len(shape):
    raise ValueError(f"{name} has shape {shape}, its sharding rule says {spec}")
  fitted = []
  for size, axes in zip(shape, spec, strict=False):
    names = (axes,) if isinstance(axes, str) else axes or ()
    unknown = set(names) - set(mesh.shape)
    if unknown:
      raise ValueError(f"{name}: {spec} names {sorted(unknown)}, not in {mesh.shape}")
    left_out = ()
    while size % math.prod(mesh.shape[axis] for axis in names):
      names, left_out = names[:-1], (*names[-1:], *left_out)
    if left_out:
      parts = math.prod(mesh.shape[axis] for axis in left_out)
      logging.warning("%s %s: %s (%d) does not divide %d: replicated along it", name,
                      shape, " and ".join(left_out), parts, size)  # fmt: skip
    fitted.append(names if len(names) > 1 else names[0] if names else None)
  return PartitionSpec(*fitted)


def state_shardings(state_shapes, params_shapes, shardings, mesh: Mesh):
  """Shardings for any tree that holds trees like params: train or optimizer state.

  A leaf with the name and shape of a param gets its sharding, all else is replicated.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params_shapes)
  placed = {
    (path_name(path), leaf.shape): sharding
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
  }
  replicated = NamedSharding(mesh, PartitionSpec())
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: placed.get((path_name(path), leaf.shape), replicated),
    state_shapes,
  )


def host_shard(mesh: Mesh) -> tuple[int, int]:
  """(index, count) of this process among the groups that feed different rows.

  Processes that only differ along context or tensor must feed the same rows, so the
  data is to be split by this and not by jax.process_index().
  """
  columns = np.moveaxis(mesh.devices, [mesh.axis_names.index(a) for a in BATCH_AXES],
                        [0, 1])  # fmt: skip
  shards: dict[int, set[int]] = {}
  for row, devices in enumerate(columns.reshape(-1, *columns.shape[2:])):
    for device in devices.flat:
      shards.setdefault(device.process_index, set()).add(row)
  groups = sorted({tuple(sorted(rows)) for rows in shards.values()})
  if len({row for rows in groups for row in rows}) != sum(map(len, groups)):
    raise ValueError(
      "processes share some but not all of their rows: context x tensor must divide "
      f"the devices of a process, or be a multiple of them: mesh {mesh}"
    )
  if len(set(map(len, groups))) > 1:
    raise ValueError(f"processes feed different numbers of rows: mesh {mesh}")
  return groups.index(tuple(sorted(shards[jax.process_index()]))), len(groups)


def batch_shards(mesh: Mesh) -> int:
  """Returns into how many parts the rows of a batch are cut: data x fsdp."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def whole_batch(rows: int, mesh: Mesh) -> int:
  """The number of rows rounded up, so that each of the batch shards has as many."""
  shards = batch_shards(mesh)
  return -(-rows // shards) * shards


def batch_shardings(batch, mesh: Mesh, hosts: int = 1) -> dict[str, NamedSharding]:
  """Where `shard_batch` puts the arrays of a batch, or of their shapes.

  hosts: how many feed that many rows each. ValueError as for `shard_batch`.
  """
  sizes = {name: value.shape[0] for name, value in batch.items() if value.ndim}
  if len(set(sizes.values())) > 1:
    raise ValueError(f"arrays of a batch have different numbers of rows: {sizes}")
  size = hosts * next(iter(sizes.values()), 0)
  shards = batch_shards(mesh)
  if size % shards or (sizes and not size):
    raise ValueError(
      f"a batch of {size} rows does not divide by {shards} devices "
      f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']})"
    )
  rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  replicated = NamedSharding(mesh, PartitionSpec())
  return {name: rows if value.ndim else replicated for name, value in batch.items()}


def shard_batch(batch, mesh: Mesh):
  """Global arrays of this host's rows, over the mesh axes (data, fsdp).

  batch: dict of numpy arrays, each [this host's rows, ...]; scalars are replicated.
  ValueError if the rows differ between arrays or do not divide by the mesh.
  """
  batch = {name: np.asarray(value) for name, value in batch.items()}
  hosts = host_shard(mesh)[1] if jax.process_count() > 1 else 1
  shardings = batch_shardings(batch, mesh, hosts)
  size = hosts * next((len(value) for value in batch.values() if value.ndim), 0)
  if jax.process_count() == 1:
    return jax.device_put(batch, shardings)  # one call: half the time of one each
  return {
    name: jax.make_array_from_process_local_data(
      shardings[name], value, (size, *value.shape[1:]) if value.ndim else ()
    )
    for name, value in batch.items()
  }


def shard_alike(batch, mesh: Mesh):
  """Global arrays over (data, fsdp) of a batch that all processes hold whole.

  batch: dict of numpy arrays [rows, ...], equal on all processes of the mesh; scalars
  are replicated. ValueError if the rows do not divide by the mesh.
  """
  shards = batch_shards(mesh)
  placed = {}
  for name, value in batch.items():
    value = np.asarray(value)
    if value.ndim and len(value) % shards:
      raise ValueError(
        f"a batch of {len(value)} rows does not divide by {shards} devices "
        f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']})"
      )
    spec = PartitionSpec(BATCH_AXES) if value.ndim else PartitionSpec()
    place = NamedSharding(mesh, spec)
    placed[name] = jax.make_array_from_callback(value.shape, place, value.__getitem__)
  return placed


def sync(name: str) -> None:
  """Waits until all processes are here, be it hours; fails when one of them is gone."""
  if jax.process_count() > 1:
    # Not a collective of devices: those of the CPU give up after 30 seconds.
    wait = multihost.get_barrier_sync_fn()
    wait(key=f"{name} {next(_syncs)}", timeout_ms=_SYNC_HOURS * 3_600_000)
