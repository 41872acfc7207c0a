"""Finished models: params, what is to be known of them, and checksums of both."""

import dataclasses
import hashlib
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from sora_jax.runtime import checksums, files, hosts, lazy_arrays, portable
from sora_jax.runtime.lazy_arrays import Streamed


def save_model(folder, params, meta: dict) -> None:
  """Writes params and JSON-able meta to folder/params-<n> and folder/model.json.

  Atomic: model.json, which names the params and has a checksum of each array, is
  replaced last; a model that was there stays loadable until then. All processes must
  call it.

  params: a tree of arrays, or of `lazy_arrays.Streamed` that one process saves.
  """
  folder = epath.Path(folder).absolute()
  number = 0
  if (folder / "model.json").exists():
    number = 1 + int(_read_model(folder)["params"].split("-")[1])
  name = f"params-{number}"
  leaves = jax.tree.leaves(params)
  rows: dict[str, checksums.Row] = {}
  if any(isinstance(leaf, Streamed) for leaf in leaves):
    params = _each_leaf(lambda path, x: _while_read(x, _noting(rows, path, x)), params)
    with lazy_arrays.checkpointer() as saver:
      saver.save(folder / name, params, force=True)
  else:
    rows = checksums.of_tree(params)
    with ocp.PyTreeCheckpointer() as saver:
      saver.save(folder / name, params, force=True)
  if jax.process_index() == 0:
    _write_model(folder, {"params": name, "meta": meta, "arrays": rows})
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
  _write_model(folder, {"params": portable.NAME, "sha256": digest, "meta": meta})


def load_meta(folder) -> dict:
  """Meta of a model. ValueError if there is no complete model in the folder."""
  return _read_model(epath.Path(folder).absolute())["meta"]


def save_meta(folder, meta: dict) -> None:
  """Replaces the meta of a model. ValueError if there is no complete model."""
  folder = epath.Path(folder).absolute()
  _write_model(folder, {**_read_model(folder), "meta": meta})


def load_model(folder, shardings=None, dtype=None) -> tuple[dict, dict]:
  """(params, meta) of a model that save_model or save_portable wrote.

  shardings: tree of shardings like the params, or a function of the params' shapes
  that returns it; without it the params come whole to the default device.
  dtype: of the params, or a tree of dtypes like them; if None as they were saved, and
  float32 for portable ones.
  ValueError naming the folder if there is no complete model in it, or an array is not
  the one that was saved. Models of older versions have no checksums; that is logged.
  """
  folder = epath.Path(folder).absolute()
  model = _read_model(folder)
  if _is_portable(model):
    return _load_portable(folder, model, shardings, dtype), model["meta"]
  try:
    params = _restore(folder / model["params"], shardings)
  except Exception as error:  # noqa: BLE001 (Orbax raises whatever its backends raise)
    raise _damaged(folder, model, checksums.one_line(error), " or does not fit") from (
      error
    )
  _check(folder, model, params)
  if dtype is not None:
    dtypes = dtype
    if not isinstance(dtype, dict):
      dtypes = jax.tree.map(lambda _: dtype, params)
    params = _cast(params, dtypes)
  if shardings is None:
    params = jax.tree.map(jnp.asarray, params)
  return params, model["meta"]


def stream_model(folder) -> tuple[dict, dict]:
  """(params, meta); each leaf is a `lazy_arrays.Streamed` and is read block by block.

  ValueError naming the folder if there is no complete model in it, and when the last
  block of a leaf was read, if it is not the one that was saved.
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
      params = checkpointer.restore(path, restore_args=args)
  except Exception as error:  # noqa: BLE001
    raise _damaged(folder, model, checksums.one_line(error)) from error
  if rows := _rows(folder, model):
    found = checksums.described(params)
    saved = {name: row[:2] for name, row in rows.items()}
    if fault := checksums.difference(saved, found):
      raise _damaged(folder, model, fault)

    def checked(name, leaf):
      def compare(sums):
        found = {name: checksums.row(leaf, sums)}
        if fault := checksums.difference({name: rows[name]}, found):
          raise _damaged(folder, model, fault)

      return _while_read(leaf, compare)

    params = _each_leaf(checked, params)
  return params, model["meta"]


def check_model(folder) -> None:
  """Reads all of a model, block by block, on process 0; all processes must call it.

  ValueError as of `stream_model`, on all of them.
  """
  fault = None
  try:
    # Orbax waits for all processes when it opens a model, so that all of them do.
    leaves = jax.tree.leaves(stream_model(folder)[0])
    for leaf in leaves if jax.process_index() == 0 else ():
      for _ in leaf.blocks():
        pass
  except ValueError as error:
    fault = str(error)
  if fault := next((f for f in hosts.gather(fault) if f), None):
    raise ValueError(fault)


def has_checksums(folder) -> bool:
  """Whether the params of a model can be checked. Raises as `load_meta`."""
  model = _read_model(epath.Path(folder).absolute())
  return "arrays" in model or _is_portable(model)


def digest(value) -> str:
  """Short hash of what is JSON-able."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(params) -> str:
  """Short hash of the values of arrays, whichever way they lie on devices."""
  rows = checksums.of_tree(params)
  with_paths = jax.tree_util.tree_leaves_with_path(params)
  return digest(
    [
      [jax.tree_util.keystr(path), *rows[checksums.path_of(path)]]
      for path, _ in with_paths
    ]
  )


def _restore(path, shardings) -> dict:
  """Params as they were saved; numpy arrays without shardings."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    saved = checkpointer.metadata(path).item_metadata.tree
    shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved
    )
    if shardings is None:
      args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    else:
      tree = shardings(shapes) if callable(shardings) else shardings
      args = jax.tree.map(
        lambda s, leaf: ocp.ArrayRestoreArgs(sharding=s, dtype=leaf.dtype), tree, shapes
      )
    return checkpointer.restore(path, restore_args=args)


def _check(folder, model, params) -> None:
  """Raises ValueError if params are not those that model.json is of."""
  if rows := _rows(folder, model):
    if fault := checksums.difference(rows, checksums.of_tree(params)):
      raise _damaged(folder, model, fault)


def _rows(folder, model) -> dict | None:
  if "arrays" not in model:
    logging.info("%s is of a version without checksums: not checked", folder)
  return model.get("arrays")


def _cast(params, dtypes):
  """The params in these dtypes, array after array: none is there twice for long."""
  leaves, tree = jax.tree.flatten(params)
  dtypes = tree.flatten_up_to(dtypes)
  del params
  cast = []
  for i, dtype in enumerate(dtypes):
    leaf, leaves[i] = leaves[i], None
    if leaf.dtype != dtype:
      place = getattr(leaf, "sharding", None)
      leaf = leaf.astype(dtype)
      if place is not None:
        leaf = jax.device_put(leaf, place)
    cast.append(leaf)
  return tree.unflatten(cast)


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


# --- blocks of leaves on their way


def _each_leaf(change: Callable, params):
  """A tree with change(path, leaf) in place of each leaf."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: change(checksums.path_of(path), leaf), params
  )


def _while_read(leaf: Streamed, at_end: Callable) -> Streamed:
  """The same leaf, which gives its checksum to a function once all of it was read."""

  def blocks():
    running = checksums.Running()
    for block in leaf.blocks():
      running.add(block)
      yield block
    at_end(running.sums())

  return dataclasses.replace(leaf, blocks=blocks)


def _noting(rows: dict, name: str, leaf: Streamed) -> Callable:
  """A function of a leaf's checksum that puts its row in a dict."""

  def note(sums):
    rows[name] = checksums.row(leaf, sums)

  return note


# --- model.json


def _read_model(folder) -> dict:
  try:
    model = json.loads((folder / "model.json").read_text())
    names = {"params", "meta"} | ({"sha256"} if _is_portable(model) else set())
    if missing := names - model.keys():
      raise KeyError(*missing)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{folder}: no complete model here (model.json: {type(error).__name__}); "
      "train it to the end, or name the folder of a finished model"
    ) from error
  # Those of older versions have no checksum, and nothing else.
  if model.keys() != names and not checksums.is_whole(model):
    raise ValueError(
      f"{folder}/model.json is damaged, or was changed by hand (its checksum is of "
      "something else): put a copy back, or make the model again"
    )
  return checksums.unsealed(model)


def _write_model(folder, model: dict) -> None:
  files.write_json(folder / "model.json", checksums.seal(model))


def _is_portable(model) -> bool:
  return str(model["params"]).endswith(".safetensors")


def _damaged(folder, model, reason: str, more: str = "") -> ValueError:
  return ValueError(
    f"{folder}: the model's {model['params']} is damaged{more} ({reason}); put a "
    "copy back, or make the model again"
  )
