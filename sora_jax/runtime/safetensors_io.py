"""Safetensors files, one tensor at a time, and the sharded sets of them.

A file is 8 bytes with the length of a JSON header, the header with each tensor's dtype,
shape and place, and the tensors. Files are read at the tensors' places and not mapped:
the pages of a mapped file count as this process's memory until something else wants it.
"""

import json
import math
import pathlib
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from sora_jax.runtime import files

DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What the commands write params as.
PARAM_DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": DTYPES["BF16"],
}
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_LARGEST_HEADER = 100 << 20  # as in the format's own reader


class Tensor(NamedTuple):
  """A tensor of a file; `place` is the offset of its first byte."""

  file: pathlib.Path
  place: int
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def read(tensor: Tensor) -> np.ndarray:
  """The tensor's value."""
  data = np.fromfile(tensor.file, np.uint8, tensor.nbytes, offset=tensor.place)
  return data.view(tensor.dtype).reshape(tensor.shape)


def read_header(file) -> dict[str, Tensor]:
  """The tensors of a file by name, without their values.

  Raises:
    ValueError: if the file is a pickle, truncated or otherwise no safetensors file, and
      for tensors of other types than DTYPES; names the file.
  """
  file = pathlib.Path(file)
  size = file.stat().st_size
  with open(file, "rb") as f:
    start = f.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= _LARGEST_HEADER:
      # What torch.save writes: a zip archive, before that bare pickles.
      if start.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(pickle_message(file))
      raise ValueError(f"{file}: not a safetensors file (its header is {length} bytes)")
    if size < 8 + length:
      raise ValueError(
        f"{file}: truncated inside its header: {size} bytes of at least {8 + length}; "
        "download it again"
      )
    header = f.read(length)
  try:
    header = json.loads(header)
    header.pop("__metadata__", None)
    found, spans = {}, []
    for name, entry in header.items():
      begin, end = entry["data_offsets"]
      dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
      if dtype is None:
        raise ValueError(
          f"{name} is of type {entry['dtype']}, only {', '.join(DTYPES)} can be read"
        )
      found[name] = Tensor(file, 8 + length + begin, shape, dtype)
      if end - begin != found[name].nbytes:
        raise ValueError(f"{name} has {end - begin} bytes for shape {shape}")
      spans.append((begin, end))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{file}: damaged header ({error})") from error
  spans.sort()
  ends = [0, *(end for _, end in spans)]
  if [begin for begin, _ in spans] != ends[:-1]:
    raise ValueError(f"{file}: damaged header (tensors overlap or leave gaps)")
  wanted = 8 + length + ends[-1]
  if size != wanted:
    what = "truncated" if size < wanted else "damaged"
    raise ValueError(
      f"{file}: {what}: {size} bytes, but its header says {wanted}; download it again"
    )
  return found


def read_metadata(file) -> dict[str, str]:
  """Texts that a file, which `read_header` has accepted, keeps beside its tensors."""
  with open(file, "rb") as f:
    (length,) = struct.unpack("<Q", f.read(8))
    return json.loads(f.read(length)).get("__metadata__", {})


def read_headers(folder, stem: str) -> dict[str, Tensor]:
  """The tensors of folder/stem.safetensors, or of the shards that its index names.

  Raises:
    ValueError: as `read_header`; without such files; if only a pickle is there; if a
      shard is missing, or does not have the tensors that the index says.
  """
  folder = pathlib.Path(folder)
  index = folder / f"{stem}.safetensors.index.json"
  if index.exists():
    return _read_shards(index)
  single = folder / f"{stem}.safetensors"
  if single.exists():
    return read_header(single)
  shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
  if shards:
    raise ValueError(f"{index} is missing, which says what is in {shards[0].name} ...")
  for file in sorted(folder.glob(f"{stem}*")):
    if file.suffix in PICKLES:
      raise ValueError(pickle_message(file))
  raise ValueError(f"{folder}: no {single.name} and no {index.name}")


def _read_shards(index):
  try:
    names = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(names.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{index}: damaged ({type(error).__name__}: {error})") from error
  if outside := [name for name in shards if pathlib.Path(name).name != name]:
    raise ValueError(f"{index}: shards outside of its folder: {listed(outside)}")
  if missing := [name for name in shards if not (index.parent / name).exists()]:
    raise ValueError(
      f"{index} names files that are not there: {listed(missing)}; download them"
    )
  found = {}
  for shard in shards:
    tensors = read_header(index.parent / shard)
    wanted = {name for name, other in names.items() if other == shard}
    wrong = [f"{name} is missing" for name in sorted(wanted - set(tensors))]
    wrong += [f"{name} is not in the index" for name in sorted(set(tensors) - wanted)]
    if wrong:
      raise ValueError(f"{index.parent / shard}: {listed(wrong)}")
    found |= tensors
  return found


def pickle_message(file) -> str:
  """What to do with a file that is no safetensors file."""
  target = pathlib.Path(file).with_suffix(".safetensors")
  return (
    f"{file} is a pickle, which can run any program when it is opened, so it is not "
    "read. Convert it once, where torch is installed: import torch, safetensors.torch; "
    f"x = torch.load({str(file)!r}, map_location='cpu', weights_only=True); "
    "safetensors.torch.save_file({k: v.contiguous().clone() for k, v in x.items()}, "
    f"{str(target)!r})"
  )


def listed(lines, most: int = 20) -> str:
  """Up to `most` of the lines in one, and how many there are more."""
  lines = list(lines)
  more = f" (and {len(lines) - most} more)" if len(lines) > most else ""
  return "; ".join(lines[:most]) + more


class Plan(NamedTuple):
  """What `write` is to write: a tensor without its value."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write(
  folder,
  stem: str,
  planned: Iterable[Plan],
  values: Iterator[np.ndarray],
  shard_bytes: int = 5 * 10**9,
) -> list[pathlib.Path]:
  """Writes tensors, one in memory at a time; the files, with the index if there is one.

  Args:
    folder, stem: stem.safetensors, or stem-00001-of-00003.safetensors ... and
      stem.safetensors.index.json, as diffusers and transformers read them.
    planned: all tensors.
    values: of the planned tensors, in their order.
    shard_bytes: of the tensors in a file, but where a single one is larger.
  """
  folder, size = pathlib.Path(folder), 0
  shards: list[list] = [[]]
  for tensor in planned:
    if shards[-1] and size + tensor.nbytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.nbytes
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  names: dict[str, str] = {}
  for number, shard in enumerate(shards, start=1):
    suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
    paths.append(folder / f"{stem}{suffix}.safetensors")
    write_file(paths[-1], shard, values)
    names |= {tensor.name: paths[-1].name for tensor in shard}
  assert next(values, None) is None
  if len(shards) > 1:
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    paths.append(folder / f"{stem}.safetensors.index.json")
    files.write_json(paths[-1], index, sort_keys=True)
  return paths


def write_file(file, planned, values, metadata=None) -> None:
  """Writes one file, atomically; metadata: texts by name. See `write` for the rest."""
  codes = {dtype: code for code, dtype in DTYPES.items()}
  # What torch's libraries want to know of a file before they open it.
  header, place = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
  for tensor in planned:
    header[tensor.name] = {
      "dtype": codes[np.dtype(tensor.dtype)],
      "shape": list(tensor.shape),
      "data_offsets": [place, place + tensor.nbytes],
    }
    place += tensor.nbytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # so that the tensors are aligned
  with files.replacing(file) as partial, open(partial, "wb") as f:
    f.write(struct.pack("<Q", len(text)) + text)
    for tensor in planned:
      value = next(values)
      assert value.shape == tensor.shape and value.dtype == tensor.dtype, tensor
      np.ascontiguousarray(value).view(np.uint8).tofile(f)
