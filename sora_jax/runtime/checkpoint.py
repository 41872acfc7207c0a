"""Checkpoints of a run (Orbax, asynchronous) and finished models (params + meta)."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from sora_jax.runtime import files, lazy_arrays, portable


class Checkpoints:
  """Numbered checkpoints in a folder: a sharded state and a JSON-able dict each.

  Saving is asynchronous and atomic: a run that is killed while it saves leaves the
  checkpoints before intact. All processes must call each method.
  """

  def __init__(self, folder, keep: int, always: int | None = None):
    """Opens the folder, or makes it.

    Args:
      keep: number of newest checkpoints that stay.
      always: step whose checkpoint stays as well.
    """
    policies = [ocp.checkpoint_managers.LatestN(keep)]
    if always is not None:
      policies.append(ocp.checkpoint_managers.CustomSteps([always]))
    self.folder = epath.Path(folder).absolute()
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "host": ocp.JsonCheckpointHandler(),
      },
    )

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state, host: dict) -> None:
    """Starts to save; returns once the state may be donated. Raises earlier failures.

    host: JSON-able and the same in all processes.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)
      ),
      force=True,
    )

  def restore(self, step: int, abstract_state) -> tuple:
    """(state, host) of a step, placed as the ShapeDtypeStructs of abstract_state say.

    ValueError naming the folder if it is damaged, or holds other params than these:
    then also the first param that differs, with both shapes.
    """
    folder = self.folder / str(step)
    try:
      saved = _shapes(self._manager.item_metadata(step).state)
      if not saved:
        raise FileNotFoundError("no metadata of the state")
    except Exception as error:  # noqa: BLE001 (Orbax raises whatever its backends raise)
      raise ValueError(_damaged(folder, error)) from error
    _compare(folder, saved, _shapes(abstract_state))
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract_state), host=ocp.args.JsonRestore()
        ),
      )
    except Exception as error:  # noqa: BLE001
      raise ValueError(_damaged(folder, error)) from error
    return restored.state, restored.host

  def host(self, step: int) -> dict:
    """The JSON-able dict of a step; ValueError naming the folder if it is damaged."""
    try:
      return self._manager.restore(
        step, args=ocp.args.Composite(host=ocp.args.JsonRestore())
      ).host
    except Exception as error:  # noqa: BLE001
      raise ValueError(_damaged(self.folder / str(step), error)) from error

  def delete_after(self, step: int) -> None:
    """Deletes the checkpoints of later steps, if there are any."""
    for later in self.steps():
      if later > step:
        self._manager.delete(later)

  def wait(self) -> None:
    """Waits for saves under way; raises if one failed."""
    self._manager.wait_until_finished()
    self._manager.check_for_errors()

  def close(self) -> None:
    """Waits for saves under way, then frees the threads."""
    self._manager.close()


def steps_in(folder) -> list[int]:
  """Steps of the complete checkpoints in a folder, ascending; it need not exist.

  Unlike `Checkpoints` this changes nothing there, and one process may ask alone.
  """
  return sorted(ocp.utils.checkpoint_steps(epath.Path(folder).absolute()))


def _damaged(folder, error) -> str:
  return (
    f"{folder}: the checkpoint is damaged ({type(error).__name__}: {error}); "
    "delete this folder to go on from the checkpoint before"
  )


def _shapes(tree) -> dict[str, tuple]:
  """Shapes by path, the same for a named tuple and the dict that it is saved as."""
  leaves = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=lambda leaf: hasattr(leaf, "shape")
  )
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in leaves
    if hasattr(leaf, "shape")
  }


def _compare(folder, saved, wanted) -> None:
  # Params first: a difference in the optimizer state mostly follows from theirs.
  names = sorted(saved | wanted, key=lambda name: (not name.startswith("params"), name))
  for name in names:
    if saved.get(name) != wanted.get(name):
      raise ValueError(
        f"{folder}: {name} has shape {saved.get(name, 'none (missing)')} in the "
        f"checkpoint, {wanted.get(name, 'none (missing)')} by the config; "
        "use the config of the checkpoint or another workdir"
      )


def save_model(folder, params, meta: dict) -> None:
  """Writes params and JSON-able meta to folder/params-<n> and folder/model.json.

  Atomic: model.json, which names the params, is replaced last; a model that was there
  stays loadable until then. All processes must call it.

  params: a tree of arrays, or of `lazy_arrays.Streamed` that one process saves.
  """
  folder = epath.Path(folder).absolute()
  number = 0
  if (folder / "model.json").exists():
    number = 1 + int(_read_model(folder)["params"].split("-")[1])
  name = f"params-{number}"
  leaves = jax.tree.leaves(params)
  in_blocks = any(isinstance(leaf, lazy_arrays.Streamed) for leaf in leaves)
  with lazy_arrays.checkpointer() if in_blocks else ocp.PyTreeCheckpointer() as saver:
    saver.save(folder / name, params, force=True)
  if jax.process_index() == 0:
    files.write_json(folder / "model.json", {"params": name, "meta": meta})
    for other in folder.glob("params-*"):
      if other.name != name:
        other.rmtree()
  multihost_utils.sync_global_devices("save_model")


def save_portable(folder, params, meta: dict) -> None:
  """Writes a model as `save_model` does, but its params as `portable` ones.

  `load_model` and all else here read either; one process must call it.
  """
  folder = epath.Path(folder).absolute()
  digest = portable.write(folder / portable.NAME, params)
  model = {"params": portable.NAME, "sha256": digest, "meta": meta}
  files.write_json(folder / "model.json", model)


def load_meta(folder) -> dict:
  """Meta of a model. ValueError if there is no complete model in the folder."""
  return _read_model(epath.Path(folder).absolute())["meta"]


def digest(value) -> str:
  """Short hash of what is JSON-able."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(params) -> str:
  """Short hash of the values of arrays, whichever way they lie on devices.

  Each array's bits, mixed with their places, are added up in 32-bit integers on its
  devices: an exact sum, so that neither the mesh nor the number of hosts changes it.
  """
  with_paths = jax.tree_util.tree_leaves_with_path(params)
  sums = jax.device_get([_mixed_sums(leaf) for _, leaf in with_paths])
  return digest(
    [
      [jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype), *map(int, pair)]
      for (path, leaf), pair in zip(with_paths, sums, strict=True)
    ]
  )


@jax.jit
def _mixed_sums(leaf):
  leaf = jnp.asarray(leaf)
  kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
  place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
  for dim in reversed(range(leaf.ndim)):
    along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim)
    place += along * np.uint32(stride % 2**32)
    stride *= leaf.shape[dim]
  # The finalizer of MurmurHash3: each bit of value and place reaches all of the sum.
  mixed = bits ^ (place * np.uint32(0x9E3779B1))
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
  mixed ^= mixed >> 16
  return jnp.sum(mixed), jnp.sum(mixed * (2 * place + 1))


def save_meta(folder, meta: dict) -> None:
  """Replaces the meta of a model. ValueError if there is no complete model."""
  folder = epath.Path(folder).absolute()
  files.write_json(folder / "model.json", {**_read_model(folder), "meta": meta})


def load_model(folder, shardings=None, dtype=None) -> tuple[dict, dict]:
  """(params, meta) of a model that save_model or save_portable wrote.

  shardings: tree of shardings like the params, or a function of the params' shapes
  that returns it; without it the params come whole to the default device.
  dtype: of the params, or a tree of dtypes like them; if None as they were saved, and
  float32 for portable ones.
  ValueError naming the folder if there is no complete model in it.
  """
  folder = epath.Path(folder).absolute()
  model = _read_model(folder)
  if _is_portable(model):
    return _load_portable(folder, model, shardings, dtype), model["meta"]
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      saved = checkpointer.metadata(folder / model["params"]).item_metadata.tree
      shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved
      )
      if shardings is None:
        args = jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype), shapes
        )
      else:
        tree = shardings(shapes) if callable(shardings) else shardings
        dtypes = dtype
        if not isinstance(dtype, dict):
          dtypes = jax.tree.map(lambda leaf: dtype or leaf.dtype, shapes)
        args = jax.tree.map(
          lambda s, dtype: ocp.ArrayRestoreArgs(sharding=s, dtype=dtype), tree, dtypes
        )
      params = checkpointer.restore(folder / model["params"], restore_args=args)
  except Exception as error:  # noqa: BLE001
    raise ValueError(
      f"{folder}: the model's {model['params']} is damaged or does not fit "
      f"({type(error).__name__}: {error}); save the model again"
    ) from error
  if shardings is None:
    params = jax.tree.map(jnp.asarray, params)
  return params, model["meta"]


def _load_portable(folder, model, shardings, dtype):
  """Params of a model that save_portable wrote; see `load_model`."""
  params = portable.read(folder / model["params"], model["sha256"])
  dtypes = dtype
  if not isinstance(dtype, dict):
    dtypes = jax.tree.map(lambda _: dtype or jnp.float32, params)
  try:
    params = jax.tree.map(lambda x, dtype: x.astype(dtype), params, dtypes)
    if shardings is None:
      return jax.tree.map(jnp.asarray, params)
    places = shardings(params) if callable(shardings) else shardings
    return jax.tree.map(
      lambda x, place: jax.make_array_from_callback(x.shape, place, x.__getitem__),
      params,
      places,
    )
  except ValueError as error:
    raise ValueError(
      f"{folder}: the model's {model['params']} does not fit ({error})"
    ) from error


def stream_model(folder) -> tuple[dict, dict]:
  """(params, meta); each leaf is a `lazy_arrays.Streamed` and is read block by block.

  ValueError naming the folder if there is no complete model in it.
  """
  folder = epath.Path(folder).absolute()
  model = _read_model(folder)
  path = folder / model["params"]
  if _is_portable(model):
    return portable.stream(path, model["sha256"]), model["meta"]
  try:
    with lazy_arrays.checkpointer() as checkpointer:
      saved = checkpointer.metadata(path).item_metadata.tree
      args = jax.tree.map(lambda _: lazy_arrays.restore_args(), saved)
      return checkpointer.restore(path, restore_args=args), model["meta"]
  except Exception as error:  # noqa: BLE001
    raise ValueError(
      f"{path}: damaged ({type(error).__name__}: {error}); save the model again"
    ) from error


def _read_model(folder) -> dict:
  try:
    model = json.loads((folder / "model.json").read_text())
    names = ("params", "meta", *(["sha256"] if _is_portable(model) else []))
    return {name: model[name] for name in names}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{folder}: no complete model here (model.json: {type(error).__name__}); "
      "train it to the end, or name the folder of a finished model"
    ) from error


def _is_portable(model) -> bool:
  return str(model["params"]).endswith(".safetensors")
