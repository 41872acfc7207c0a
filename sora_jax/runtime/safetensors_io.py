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
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
  **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
  "BOOL": np.dtype(bool),
}
# What the commands write params as.
PARAM_DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": DTYPES["BF16"],
}
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
# What else people download in place of a file, by its first bytes.
_OTHER_FILES = {
  b"version ": "a pointer of Git LFS, whose file was not downloaded (git lfs pull)",
  b"GGUF": "a GGUF file of quantized weights, which are not read",
  b"<!DOCTYP": "a web page; download the file itself",
  b"<!doctyp": "a web page; download the file itself",
  b"<html": "a web page; download the file itself",
}
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
      for first, what in _OTHER_FILES.items():
        if start.startswith(first):
          raise ValueError(f"{file} is no safetensors file but {what}")
      raise ValueError(f"{file}: not a safetensors file (its header is {length} bytes)")
    if size < 8 + length:
      raise ValueError(
        f"{file}: truncated inside its header: {size} bytes of at least {8 + length}; "
        "download it again"
      )
    header = f.read(length)
  try:
    header = json.loads(header)
    if (metadata := header.pop("__metadata__", None)) is not None:
      _check_metadata(metadata)
    types = {name: entry["dtype"] for name, entry in header.items()}
    strange = [f"{name} of type {t}" for name, t in types.items() if t not in DTYPES]
    found, spans = {}, []
    for name, entry in {} if strange else header.items():
      found[name], span = _tensor(file, 8 + length, name, entry)
      spans.append(span)
  # Deep brackets are a RecursionError.
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(f"{file}: damaged header ({error})") from error
  if strange:
    raise ValueError(
      f"{file}: tensors of types that cannot be read: {listed(strange, 5)}; known are "
      f"{', '.join(DTYPES)}"
    )
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


def _tensor(file, start, name, entry) -> tuple[Tensor, tuple[int, int]]:
  """A tensor of a header, and the span of its bytes behind it."""
  begin, end = entry["data_offsets"]
  dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
  if wrong := [n for n in (begin, end, *shape) if type(n) is not int or n < 0]:
    raise ValueError(f"{name} has {wrong[0]!r} as a size")
  tensor = Tensor(file, start + begin, shape, dtype)
  if end - begin != tensor.nbytes:
    raise ValueError(f"{name} has {end - begin} bytes for shape {shape}")
  return tensor, (begin, end)


def _check_metadata(texts) -> None:
  if not all(isinstance(text, str) for text in texts.values()):
    raise ValueError("__metadata__ is not all text")


def read_metadata(file) -> dict[str, str]:
  """Texts that a file, which `read_header` has accepted, keeps beside its tensors."""
  with open(file, "rb") as f:
    (length,) = struct.unpack("<Q", f.read(8))
    return json.loads(f.read(length)).get("__metadata__") or {}


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
