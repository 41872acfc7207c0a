"""Examples of prepared TFDS data sets, by random access and without TensorFlow.

TFDS itself needs TensorFlow for data sets that have a Video feature, or whose files are
TFRecords, its default. What lies on disk does not: shards of tf.train.Example, and two
JSON files that describe them. Those are read here, ArrayRecord and TFRecord alike.
"""

import functools
import json
import os
import pathlib
import struct
import threading
from typing import Any, NamedTuple

import numpy as np

from sora_jax.data.records import RecordError, open_shard

INFO = "dataset_info.json"
_FORMATS = ("array_record", "tfrecord")
_lock = threading.Lock()


class Split(NamedTuple):
  """Shards of a split, and the index of each one's first example."""

  paths: tuple[str, ...]
  starts: np.ndarray
  examples: int


class Prepared(NamedTuple):
  """A prepared data set.

  Attributes:
    folder: that holds dataset_info.json.
    features: name -> what features.json says of it; of nested ones "outer/inner".
  """

  folder: str
  file_format: str
  splits: dict[str, Split]
  features: dict[str, dict[str, Any]]


def find_folder(name: str) -> str:
  """Folder of a prepared data set: of a path, or of a name as TFDS has it.

  Args:
    name: a folder (of a version, or of several: the newest), or
      "name", "name/config", "name:version", looked for in TFDS_DATA_DIR and TFDS's
      own places.

  Raises:
    ValueError: there is none, or several configs; says where it looked.
  """
  if os.path.isdir(name):
    return str(_newest(pathlib.Path(name).absolute(), name))
  from tensorflow_datasets.core.utils import file_utils

  plain, _, version = name.partition(":")
  places = [pathlib.Path(place) / plain for place in file_utils.list_data_dirs()]
  found = [place for place in places if place.is_dir()]
  if not found:
    raise ValueError(
      f"tfds:{name} is no prepared data set: neither a folder, nor in "
      f"{', '.join(map(str, places))} (TFDS_DATA_DIR says where); prepare it with "
      f"`tfds build {plain} --file_format=array_record`"
    )
  if version:
    found = [found[0] / version]
  return str(_newest(found[0], name))


def _newest(folder, name):
  if (folder / INFO).is_file():
    return folder
  versions = [path.parent for path in folder.glob(f"*/{INFO}")]
  if versions:
    return max(versions, key=_version)
  configs = sorted({path.parent.parent.name for path in folder.glob(f"*/*/{INFO}")})
  if len(configs) == 1:
    return _newest(folder / configs[0], name)
  if configs:
    raise ValueError(f"tfds:{name}: choose one of its configs: {', '.join(configs)}")
  raise ValueError(f"tfds:{name}: {folder} holds no {INFO}, so it is not prepared")


def _version(path):
  return tuple(int(n) if n.isdigit() else -1 for n in path.name.split("."))


def read_info(folder: str | os.PathLike) -> Prepared:
  """Reads what a prepared data set is; again only if it has changed.

  Raises:
    ValueError: it is damaged, of a format that cannot be read, or a shard is missing.
  """
  path = os.path.join(os.fspath(folder), INFO)
  try:
    changed = os.stat(path).st_mtime_ns
  except OSError as e:
    raise ValueError(f"{path}: cannot be read ({e.strerror})") from e
  return _read_info(os.fspath(folder), changed)


@functools.lru_cache(maxsize=16)
def _read_info(folder, changed):
  del changed  # part of the key
  try:
    info = json.loads(pathlib.Path(folder, INFO).read_text())
    tree = json.loads(pathlib.Path(folder, "features.json").read_text())
    file_format = info.get("fileFormat", "tfrecord")
    splits = {
      split["name"]: _split(folder, info["name"], file_format, split)
      for split in info["splits"]
    }
    features = dict(_flat(tree, ""))
  except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
    raise ValueError(f"{folder}: not a prepared TFDS data set ({e!r})") from e
  if file_format not in _FORMATS:
    raise ValueError(
      f"{folder}: files of format {file_format!r} cannot be read, only "
      f"{' and '.join(_FORMATS)}"
    )
  return Prepared(folder, file_format, splits, features)


def _split(folder, name, file_format, split):
  lengths = [int(length) for length in split.get("shardLengths", ())]
  template = split.get(
    "filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
  )
  paths = []
  for number in range(len(lengths)):
    of = f"{number:05d}-of-{len(lengths):05d}"
    values = {
      "DATASET": name, "SPLIT": split["name"], "FILEFORMAT": file_format,
      "SHARD_X_OF_Y": of, "SHARD_INDEX": of[:5], "NUM_SHARDS": of[-5:],
    }  # fmt: skip
    paths.append(os.path.join(folder, template.format(**values)))
  for path in paths:
    if not os.path.isfile(path):
      raise ValueError(f"{path}: the shard is missing")
  return Split(tuple(paths), np.cumsum([0, *lengths])[:-1], sum(lengths))


def _flat(feature, name):
  """(name, description) of all features that hold values."""
  inner = feature.get("featuresDict", {}).get("features")
  sequence = feature.get("sequence", {}).get("feature")
  if inner is None and sequence:
    inner = sequence.get("featuresDict", {}).get("features")
  if inner is None:
    yield name, feature
    return
  for key, value in inner.items():
    yield from _flat(value, f"{name}/{key}" if name else key)


def read_example(prepared: Prepared, split: str, index: int) -> dict[str, list]:
  """Values of each feature of an example: bytes, ints or floats.

  Raises:
    RecordError: there is no such example, or it is damaged; names the shard.
  """
  from tensorflow_datasets.proto import tf_example_pb2

  if split not in prepared.splits or not 0 <= index < prepared.splits[split].examples:
    raise RecordError(f"{prepared.folder}: no example {index} of a split {split!r}")
  chosen = prepared.splits[split]
  shard = int(np.searchsorted(chosen.starts, index, side="right")) - 1
  path, at = chosen.paths[shard], index - int(chosen.starts[shard])
  try:
    with _lock:  # one thread at a time reads a file
      content = _READERS[prepared.file_format](path, at)
    example = tf_example_pb2.Example.FromString(content)
  # A damaged chunk is a RuntimeError, a damaged message one of protobuf's own.
  except (RuntimeError, OSError, ValueError, IndexError, struct.error) as e:
    raise RecordError(f"{path}: example {at}: {e}") from e
  except Exception as e:
    if type(e).__name__ != "DecodeError":
      raise
    raise RecordError(f"{path}: example {at}: {e}") from e
  return {
    name: list(getattr(value, value.WhichOneof("kind")).value)
    for name, value in example.features.feature.items()
    if value.WhichOneof("kind")
  }


_open_array_record = functools.lru_cache(maxsize=64)(open_shard)


def _from_array_record(path, index):
  return _open_array_record(path).read([index])[0]


def _from_tfrecord(path, index):
  begin, end = _tfrecord_bounds(path, os.stat(path).st_mtime_ns)[index]
  with open(path, "rb") as file:
    file.seek(begin)
    return file.read(end - begin)


@functools.lru_cache(maxsize=1024)
def _tfrecord_bounds(path, changed):
  """Where the records of a TFRecord file are; read from their lengths alone."""
  del changed  # part of the key
  # A record is its length (8 bytes), 4 bytes of checksum, the content, 4 of checksum.
  bounds, at, size = [], 0, os.path.getsize(path)
  with open(path, "rb") as file:
    while at < size:
      file.seek(at)
      (length,) = struct.unpack("<Q", file.read(8))
      bounds.append((at + 12, at + 12 + length))
      at += 16 + length
  if at != size:
    raise ValueError(f"cut off: {size} bytes, its records take {at}")
  return bounds


_READERS = {"array_record": _from_array_record, "tfrecord": _from_tfrecord}
