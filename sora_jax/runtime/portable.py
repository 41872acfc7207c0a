"""Params as one safetensors file in bfloat16: half as large, and any program reads it.

A tensor's name is the path of its param, such as dit/head/kernel. The format has no
checksums, so who keeps the name of a file keeps the SHA-256 of its bytes beside it.
"""

import hashlib
import pathlib

import jax
import numpy as np

from sora_jax.runtime import safetensors_io, sharding
from sora_jax.runtime.lazy_arrays import Streamed

NAME = "params.safetensors"
_DTYPE = safetensors_io.PARAM_DTYPES["bfloat16"]


def rounded(params):
  """The params as they are after `write` and `read`: float32 on the host."""
  return jax.tree.map(
    lambda leaf: np.asarray(jax.device_get(leaf)).astype(_DTYPE).astype(np.float32),
    params,
  )


def write(file, params) -> str:
  """Writes a nested dict of arrays, atomically; the SHA-256 of the file."""
  leaves = {
    sharding.path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  planned = [safetensors_io.Plan(n, leaf.shape, _DTYPE) for n, leaf in leaves.items()]
  values = (np.asarray(jax.device_get(x)).astype(_DTYPE) for x in leaves.values())
  safetensors_io.write_file(file, planned, values)
  return _digest(file)


def read(file, digest: str) -> dict:
  """The nested dict of a file that `write` made, as float32 on the host.

  Raises:
    ValueError: if the file is missing or damaged, or is not the one of this SHA-256;
      names the file.
  """
  tensors = _open(file, digest)
  return _nest({
    name: safetensors_io.read(tensor).astype(np.float32)
    for name, tensor in tensors.items()
  })  # fmt: skip


def stream(file, digest: str) -> dict:
  """As `read`, but leaves are `Streamed`, of the dtype that they have in the file."""
  return _nest({name: _streamed(x) for name, x in _open(file, digest).items()})


def _streamed(tensor):
  def blocks():
    yield safetensors_io.read(tensor)

  return Streamed(tensor.shape, tensor.dtype, max(1, *tensor.shape[:1]), blocks)


def _open(file, digest):
  file = pathlib.Path(file)
  if not file.is_file():
    raise ValueError(f"{file} is missing: copy or install the checkpoint again")
  tensors = safetensors_io.read_header(file)
  if _digest(file) != digest:
    raise ValueError(
      f"{file} is damaged, or not the one that model.json is of (another SHA-256): "
      "copy or install the checkpoint again"
    )
  return tensors


def _digest(file) -> str:
  with open(file, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def _nest(flat: dict) -> dict:
  params: dict = {}
  for name, value in flat.items():
    *path, last = name.split("/")
    place = params
    for key in path:
      place = place.setdefault(key, {})
    place[last] = value
  return params
