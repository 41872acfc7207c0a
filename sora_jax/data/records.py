"""Latent records: ArrayRecord shards of encoded clips, and the manifest of them.

One record is one clip: its latent and the image latents kept with it, float16, the
features of its captions where a frozen text encoder made some, bfloat16, beside what
the manifest says about it, so a manifest can be rebuilt from shards alone.
A shard appears under its name only when it is complete, which makes an encoding run
resumable by shard: `if os.path.exists(path): clips += read_shard_clips(path)`.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from typing import NamedTuple

import ml_dtypes
import msgpack
import numpy as np
from array_record.python import array_record_module

from sora_jax.data.clips import read_rows, write_lines
from sora_jax.runtime import files

# Latents are close to noise: compressing them saves 7 % and costs 3/4 of the speed.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0"


class RecordError(ValueError):
  """A record or shard that cannot be read: "<shard>: record <index>: <reason>"."""


@dataclasses.dataclass(frozen=True)
class LatentClip:
  """Where one encoded clip is, and everything known about it without reading it."""

  id: str
  shard: str  # file name
  index: int  # in the shard
  shape: tuple[int, int, int]  # latent grid (t, h, w)
  fps: float  # pixel frames per second
  captions: tuple[str, ...]
  split: str
  extras: tuple[float, ...]  # times of the kept image latents, in latent frames
  frames: int  # pixels
  height: int
  width: int
  truth: dict | None = None
  text_lengths: tuple[int, ...] = ()  # of each caption's features; () = none are kept
  source: str = ""  # in a mixture, see data/mixture.py
  budget: int = 0  # index of the size that it is encoded at, see data/schedule.py
  synthetic: int = 0  # how many of the captions, the last ones, a model has written


def write_shard(path: str, records: Iterable[dict], vae: str = "") -> list[LatentClip]:
  """Writes a shard: all of it, or nothing.

  Args:
    path: of the shard; its folder is created.
    records: dicts of `latent_THWC` and `extras_NHWC` (arrays), `extras` (their times),
      `texts` (features [S, E] of each caption; optional), `synthetic` (optional, too)
      and the fields of `LatentClip` but `shard`, `index`, `shape` and `text_lengths`.
    vae: fingerprint of the arrays that made the latents; each record says it.

  Returns:
    The manifest rows of the clips written, in order.

  Raises:
    ValueError: if a latent is not finite in float16, or extras and times differ in
      number; names the clip.
  """
  clips = []
  with files.replacing(path) as partial:
    writer = array_record_module.ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
    try:
      for index, record in enumerate(records):
        clip = _latent_clip(record, os.path.basename(path), index)
        writer.write(_pack_record(record, clip, vae))
        clips.append(clip)
    finally:
      writer.close()
  return clips


class OtherVAEError(ValueError):
  """Latents of another VAE than the one of the run: no damage, but no latents of it."""


def read_shard_clips(path: str, vae: str = "") -> list[LatentClip]:
  """Rebuilds the manifest rows of a complete shard from its records.

  vae: fingerprint of the VAE that must have made them; "" takes any.

  Raises:
    RecordError: if the shard or one of its records cannot be read.
    OtherVAEError: another VAE made them.
  """
  reader = open_shard(path)
  try:
    return [_read_clip(reader, path, i, vae) for i in range(reader.num_records())]
  finally:
    reader.close()


def _read_clip(reader, path, index, vae):
  record = _unpack_record(reader, path, index)
  _check_vae(record, vae, path)
  try:
    return _clip_from_row(record["clip"])
  except (KeyError, TypeError, ValueError) as e:
    raise RecordError(f"{path}: record {index}: not a latent ({e!r})") from e


def check_shard_vae(path: str, vae: str) -> None:
  """Raises OtherVAEError for a shard, which may have no records, of another VAE."""
  reader = open_shard(path)
  try:
    if reader.num_records():
      _check_vae(_unpack_record(reader, path, 0), vae, path)
  finally:
    reader.close()


def _check_vae(record, vae, path):
  # Shards of before there were fingerprints say none.
  made_by = record.get("vae", "")
  if vae and made_by and made_by != vae:
    raise OtherVAEError(
      f"{path}: latents of another VAE ({made_by}) than this run's ({vae}); delete "
      f"{os.path.dirname(path)} and encode again"
    )


class LatentReader:
  """Reads the records of a folder of shards by random access.

  Opens a shard when it is first needed, in the process that needs it, so a reader can
  be pickled. Not for more than one thread at a time.
  """

  def __init__(self, folder: str, vae: str = ""):
    """vae: fingerprint of the VAE that must have made the latents; "" takes any."""
    self._folder, self._vae = os.fspath(folder), vae
    self._readers: dict = {}

  def read(self, clip: LatentClip) -> dict[str, np.ndarray]:
    """Returns `latent_THWC` and `extras_NHWC`, float32, and the list `texts`, bfloat16.

    Also `condition_THWC` and `image_JV`, float32, where the record has them.

    Raises:
      RecordError: if the shard or the record is missing or damaged, or does not hold
        what the manifest says; names shard and index.
      OtherVAEError: another VAE made it.
    """
    path = os.path.join(self._folder, clip.shard)
    reader = self._readers.get(path)
    if reader is None:
      try:
        reader = open_shard(path)
      except RecordError as e:
        raise RecordError(f"{path}: record {clip.index}: {e}") from e
      self._readers[path] = reader
    record = _unpack_record(reader, path, clip.index)
    _check_vae(record, self._vae, path)
    try:
      latent_THWC, extras_NHWC = _array(record["latent"]), _array(record["extras"])
      texts = [_features(packed) for packed in record.get("texts", ())]
      beside = {name: _array(record[name]) for name in _BESIDE if name in record}
      found = record["clip"]["id"]
    # Fields that are missing or of another type, and sizes that do not fit the bytes.
    except (KeyError, TypeError, ValueError, AttributeError) as e:
      raise RecordError(f"{path}: record {clip.index}: not a latent ({e!r})") from e
    if found != clip.id or latent_THWC.shape[:3] != tuple(clip.shape):
      raise RecordError(
        f"{path}: record {clip.index}: holds {found!r} of {latent_THWC.shape[:3]}, the "
        f"manifest says {clip.id!r} of {clip.shape}"
      )
    made = {"latent_THWC": latent_THWC, "extras_NHWC": extras_NHWC, "texts": texts}
    return made | beside

  def close(self):
    for reader in self._readers.values():
      reader.close()
    self._readers: dict = {}

  def __getstate__(self):
    return {**self.__dict__, "_readers": {}}


def write_latents_manifest(path: str, clips: Iterable[LatentClip]) -> None:
  """Writes one JSON object a line; the file is replaced only when complete."""
  rows = (json.dumps(_row(clip), ensure_ascii=False) for clip in clips)
  write_lines(path, rows)


def read_latents_manifest(path: str) -> list[LatentClip]:
  """Reads what `write_latents_manifest` wrote.

  Raises:
    ValueError: no such file, or a line is no latent clip; names file and line.
  """
  clips = []
  for number, row in read_rows(path):
    try:
      clips.append(_clip_from_row(row))
    except (TypeError, KeyError, ValueError) as e:
      raise ValueError(f"{path}:{number}: not a latent clip ({e})") from e
  return clips


# Of given frames, for models that read them beside the noise; other records have none.
_BESIDE = ("condition_THWC", "image_JV")


class EmptyText(NamedTuple):
  """Features of the empty caption [S, E], bfloat16, and the encoder that made all."""

  features_SE: np.ndarray
  encoder: str


def write_empty_text(path: str, empty: EmptyText) -> None:
  """Writes what is kept once for all shards of a folder; replaced when complete."""
  packed = _packed_features(empty.features_SE, path)
  stored = msgpack.packb({"encoder": empty.encoder, "features": packed})
  files.write_bytes(path, stored)


def read_empty_text(path: str) -> EmptyText:
  """Reads what `write_empty_text` wrote. ValueError if there is no such, whole file."""
  try:
    with open(path, "rb") as f:
      stored = msgpack.unpackb(f.read())
    return EmptyText(_features(stored["features"]), stored["encoder"])
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"{path}: no features of the empty caption ({e})") from e


def _latent_clip(record, shard, index):
  shape = np.shape(record["latent_THWC"])
  clip = LatentClip(
    id=record["id"],
    shard=shard,
    index=index,
    shape=tuple(int(n) for n in shape[:3]),
    fps=float(record["fps"]),
    captions=tuple(record["captions"]),
    split=record["split"],
    extras=tuple(float(t) for t in record["extras"]),
    frames=int(record["frames"]),
    height=int(record["height"]),
    width=int(record["width"]),
    truth=record.get("truth"),
    text_lengths=tuple(len(features_SE) for features_SE in record.get("texts", ())),
    source=record.get("source", ""),
    budget=int(record.get("budget", 0)),
    synthetic=int(record.get("synthetic", 0)),
  )
  if len(shape) != 4:
    raise ValueError(f"{clip.id}: a latent has 4 axes (THWC), got shape {shape}")
  if len(record["extras_NHWC"]) != len(clip.extras):
    raise ValueError(
      f"{clip.id}: {len(record['extras_NHWC'])} extra latents but {len(clip.extras)} "
      "times"
    )
  return clip


def _row(clip):
  """A clip for JSON and msgpack; without what only clips of `recaption` have."""
  row = dataclasses.asdict(clip)
  if not clip.synthetic:
    del row["synthetic"]
  return row


def _clip_from_row(row):
  """LatentClip of a row. KeyError, TypeError or ValueError if it is none."""
  row = {
    **row,
    "shape": tuple(row["shape"]),
    "captions": tuple(row["captions"]),
    "extras": tuple(row["extras"]),
    "text_lengths": tuple(row.get("text_lengths", ())),
  }
  if os.path.basename(row["shard"]) != row["shard"]:
    raise ValueError(f"shard {row['shard']!r} is outside of the manifest's folder")
  if len(row["shape"]) != 3 or not all(type(n) is int and n > 0 for n in row["shape"]):
    raise ValueError(f"shape {row['shape']} is no (t, h, w)")
  return LatentClip(**row)


def _pack_record(record, clip, vae):
  return msgpack.packb(
    {
      "latent": _packed_array(record["latent_THWC"], clip.id),
      "extras": _packed_array(record["extras_NHWC"], clip.id),
      "clip": _row(clip),
      "vae": vae,
      "texts": [_packed_features(text, clip.id) for text in record.get("texts", ())],
      **{
        name: _packed_array(record[name], clip.id) for name in _BESIDE if name in record
      },
    }
  )


def _packed_array(array, name):
  half = np.asarray(array, np.float32)
  limit = float(np.finfo(np.float16).max)
  # The comparison is written so that a NaN fails it.
  if half.size and not np.abs(half).max() <= limit:
    raise ValueError(
      f"{name}: a latent must be finite and at most {limit:.0f}, got "
      f"{np.abs(half).max()}"
    )
  half = half.astype(np.float16)
  return {"shape": list(half.shape), "data": half.tobytes()}


def _array(packed):
  half = np.frombuffer(packed["data"], np.float16)
  return half.reshape(packed["shape"]).astype(np.float32)


def _packed_features(features_SE, name):
  array = np.asarray(features_SE, ml_dtypes.bfloat16)
  if not math.isfinite(np.abs(array.astype(np.float32)).max()):
    raise ValueError(f"{name}: the features of a caption are not finite")
  return {"shape": list(array.shape), "data": array.tobytes()}


def _features(packed):
  array = np.frombuffer(packed["data"], ml_dtypes.bfloat16)
  return array.reshape(packed["shape"])


def open_shard(path: str | os.PathLike) -> array_record_module.ArrayRecordReader:
  """Opens a shard for random access.

  Raises:
    RecordError: there is no such shard, or it is cut off or damaged.
  """
  path = os.fspath(path)
  reader = array_record_module.ArrayRecordReader(
    path, options=_READER_OPTIONS, file_reader_buffer_size=32768
  )
  # A missing or truncated file opens without an exception, as one of 0 records.
  if not reader.ok():
    if os.path.exists(path):
      reason = f"truncated or damaged shard of {os.path.getsize(path)} bytes"
    else:
      reason = "no such shard"
    raise RecordError(f"{path}: {reason}")
  return reader


def _unpack_record(reader, path, index):
  try:
    if not 0 <= index < reader.num_records():
      raise RecordError(f"the shard has {reader.num_records()} records")
    record = msgpack.unpackb(reader.read([index])[0])
    if not isinstance(record, dict):
      raise RecordError("not a latent")
    return record
  # A damaged chunk is a RuntimeError; damaged msgpack one of many ValueErrors, or a
  # TypeError for keys that cannot be any.
  except (RuntimeError, ValueError, IndexError, TypeError) as e:
    raise RecordError(f"{path}: record {index}: {e}") from e


EMPTY_TEXT = "empty_text.msgpack"
