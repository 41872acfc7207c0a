"""Clips at training size, kept on disk, so that training does not wait for decoding.

Each visit of a clip would decode the file again, at its full size. A cache is written
once, by all cores, before training: ArrayRecord shards whose records are blocks of
`BLOCK` frames, raw ("raw") or as a short group of H.264 pictures ("h264"), so that a
window of a clip reads the blocks it touches. "raw" gives the very pixels that decoding
gives; "h264" takes a tenth of the space and is nearly without loss.

The name of a shard is a fingerprint of what it is made from: the clips, size and time
of change of their files, and the code that decodes. So what is there fits, what is
missing is made, what is stale is never read, and a cache that was interrupted goes on.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from importlib import metadata

import msgpack
import numpy as np
from absl import logging
from array_record.python import array_record_module

from sora_jax.data import stored
from sora_jax.data.clip_reader import read_clip
from sora_jax.data.clips import Clip
from sora_jax.data.records import RecordError, open_shard
from sora_jax.data.video import media, short_gop
from sora_jax.runtime import files

CODECS = ("raw", "h264")
BLOCK = 8  # frames of a record
SHARD_BYTES = 64 << 20  # of raw frames in a shard: a few seconds of work for a core
_SUFFIX = ".array_record"
# Fields of a clip that its pixels do not depend on; the file is told by its stamp.
_NO_PIXELS = (
  "path", "captions", "synthetic", "split", "truth", "measured", "source",
)  # fmt: skip
_OPEN_SHARDS = 64  # of a process; a limit of 1024 open files is common
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of the cache and the clips in it, by their indices in the manifest."""

  path: str
  codec: str
  indices: tuple[int, ...]
  clips: tuple[Clip, ...]


def raw_bytes(clip: Clip) -> int:
  """Size of a clip's frames at training size."""
  return 3 * clip.frames * clip.height * clip.width


def plan(
  clips: Sequence[Clip],
  indices: Iterable[int],
  folder: str | os.PathLike,
  codec: str = "raw",
) -> list[Shard]:
  """Divides clips into shards, the same on every machine.

  Args:
    clips: the manifest.
    indices: of the clips to keep.
    folder: of the cache.
    codec: "raw" or "h264".

  Raises:
    ValueError: there is no such codec.
  """
  if codec not in CODECS:
    raise ValueError(f"a cache of clips is one of {CODECS}, not {codec!r}")
  groups: list[list[int]] = []
  room = 0
  for index in map(int, indices):
    size = raw_bytes(clips[index])
    if not groups or size > room:
      groups.append([])
      room = SHARD_BYTES
    groups[-1].append(index)
    room -= size
  stamps: dict[str, list] = {}
  made_by = [BLOCK, codec, _code()]
  shards = []
  for group in groups:
    mine = tuple(clips[index] for index in group)
    described = json.dumps([made_by, [_describe(clip, stamps) for clip in mine]])
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    path = os.path.join(os.fspath(folder), f"{codec}-{digest}{_SUFFIX}")
    shards.append(Shard(path, codec, tuple(group), mine))
  return shards


def _describe(clip, stamps):
  """What the pixels of a clip depend on; a folder may be moved."""
  if clip.path not in stamps:  # a long video is many clips
    stamps[clip.path] = _stamp(clip.path)
  row = dataclasses.asdict(clip)
  return [{k: v for k, v in row.items() if k not in _NO_PIXELS}, stamps[clip.path]]


def _stamp(path):
  """Name, size and time of change of a file, or why there are none."""
  try:
    return [os.path.basename(path), *stored.stamp(path)[:2]]
  except OSError as e:
    return [os.path.basename(path), e.strerror]


def _code() -> list[str]:
  """Identifies what decodes: our modules, and the libraries that they use."""
  modules = sorted(pathlib.Path(media.__file__).parent.glob("*.py"))
  digest = hashlib.sha256(b"".join(path.read_bytes() for path in modules))
  versions = [metadata.version(name) for name in ("av", "pillow")]
  return [digest.hexdigest()[:16], *versions]


def name_of(shards: Sequence[Shard]) -> str:
  """Identifies a whole cache, wherever its folder is."""
  names = [os.path.basename(shard.path) for shard in shards]
  return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def is_complete(shard: Shard) -> bool:
  """Whether a shard is there, and whole."""
  return os.path.exists(shard.path) and _contents(shard) is not None


def fits(shards: Sequence[Shard], folder: str | os.PathLike, share: float) -> bool:
  """Whether raw shards that are missing take at most a share of the free disk space."""
  missing = [shard for shard in shards if not os.path.exists(shard.path)]
  needed = sum(raw_bytes(clip) for shard in missing for clip in shard.clips)
  return needed <= share * free_space(folder)


def free_space(folder: str | os.PathLike) -> int:
  """Free bytes of the disk of a folder that may not exist yet."""
  return shutil.disk_usage(_existing(folder)).free


def can_be_written(shards: Sequence[Shard], folder: str | os.PathLike) -> bool:
  """Whether shards that are missing can be put into a folder that may not exist yet."""
  there = all(os.path.exists(shard.path) for shard in shards)
  return there or os.access(_existing(folder), os.W_OK)


def _existing(folder):
  place = pathlib.Path(folder).absolute()
  while not place.exists():
    place = place.parent
  return place


def check_space(shards: Sequence[Shard], folder: str | os.PathLike) -> None:
  """Raises ValueError if raw shards cannot fit onto the disk; says both sizes."""
  if shards and shards[0].codec == "raw" and not fits(shards, folder, 0.98):
    needed = sum(raw_bytes(clip) for shard in shards for clip in shard.clips)
    raise ValueError(
      f"{folder}: a cache of raw frames takes {needed / 1e9:.1f} GB, but "
      f"{free_space(folder) / 1e9:.1f} GB of the disk are free; config.data.cache "
      '"h264" takes about a tenth, "none" nothing'
    )


def remove_stale(shards: Sequence[Shard], folder: str | os.PathLike) -> int:
  """Removes shards of the same codec that are none of these; returns how many."""
  kept = {os.path.basename(shard.path) for shard in shards}
  stale = [
    path
    for codec in {shard.codec for shard in shards}
    for path in pathlib.Path(folder).glob(f"{codec}-*{_SUFFIX}")
    if path.name not in kept
  ]
  for path in stale:
    path.unlink(missing_ok=True)
  if stale:
    logging.info(
      "%s: removed %d stale shards, made from other clips or code", folder, len(stale)
    )
  return len(stale)


def note_path(path: str | os.PathLike) -> pathlib.Path:
  """File that names the clip which the writer of a shard is decoding."""
  path = pathlib.Path(path)
  return path.with_name(f".{path.name}.reading")


def write_shard(shard: Shard, left_out: dict[str, str] | None = None) -> None:
  """Writes a shard: all of it, or nothing.

  Clips that cannot be decoded are in it with the reason.

  Args:
    shard: what to write.
    left_out: id -> reason of clips that are not tried.
  """
  note = note_path(shard.path)
  note.parent.mkdir(parents=True, exist_ok=True)
  rows: list[dict] = []
  with files.replacing(shard.path) as partial:
    writer = array_record_module.ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
    try:
      for clip in shard.clips:
        # A file that kills its decoder, and this process with it, is found by this.
        note.write_text(clip.id, encoding="utf-8")
        reason = (left_out or {}).get(clip.id)
        count = 0
        if reason is None:
          count, reason = _write_clip(writer, clip, shard.codec)
        rows.append({"id": clip.id, "records": count, "reason": reason})
      writer.write(msgpack.packb(rows))
    finally:
      writer.close()
    _check_written(partial, shard.path, sum(row["records"] for row in rows) + 1)
  note.unlink(missing_ok=True)


def _write_clip(writer, clip, codec):
  """Number of records written, and why there are none."""
  try:
    video_THWC = read_clip(clip)
  # A file can break in more ways than the decoder names; none of them ends a run.
  except (ValueError, RuntimeError, OSError) as e:
    return 0, getattr(e, "reason", str(e))
  blocks = range(0, clip.frames, BLOCK)
  for first in blocks:
    block_THWC = np.ascontiguousarray(video_THWC[first : first + BLOCK])
    raw = codec == "raw"
    writer.write(block_THWC.tobytes() if raw else short_gop.encode(block_THWC))
  return len(blocks), None


def _check_written(partial, path, records):
  """Raises OSError where a disk that is full has cut the file: the writer does not."""
  try:
    opened = open_shard(partial)
    found = opened.num_records()
    opened.close()
  except RecordError as e:
    raise OSError(f"{path}: could not be written whole; is the disk full? ({e})") from e
  if found != records:
    raise OSError(f"{path}: {found} of {records} records written; is the disk full?")


def _contents(shard) -> list[dict] | None:
  """What the last record says of a shard's clips; None, and a message, if damaged."""
  try:
    opened = open_shard(shard.path)
  except RecordError as e:
    logging.warning("%s: is made again", e)
    return None
  try:
    rows = msgpack.unpackb(opened.read([opened.num_records() - 1])[0])
    ids = [row["id"] for row in rows]
    if ids == [clip.id for clip in shard.clips]:
      if sum(row["records"] for row in rows) == opened.num_records() - 1:
        return rows
    logging.warning("%s: does not hold what its name says: is made again", shard.path)
  except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as e:
    logging.warning("%s: damaged (%s): is made again", shard.path, e)
  finally:
    opened.close()
  return None


class PixelCache:
  """Reads windows of cached clips by random access.

  Opens a shard when it is first needed, in the process that needs it, so a cache can
  be pickled. Not for more than one thread at a time.
  """

  def __init__(self, shards: Sequence[Shard]):
    """Raises RecordError if a shard is missing or damaged."""
    self.codec = shards[0].codec if shards else "raw"
    self._paths = [shard.path for shard in shards]
    size = 1 + max((i for shard in shards for i in shard.indices), default=-1)
    self._shard_N = np.full(size, -1, np.int32)
    self._record_N = np.zeros(size, np.int64)
    self.reasons: dict[int, str] = {}
    self._open: OrderedDict[int, array_record_module.ArrayRecordReader] = OrderedDict()
    for number, shard in enumerate(shards):
      rows = _contents(shard) if os.path.exists(shard.path) else None
      if rows is None:
        raise RecordError(f"{shard.path}: not in the cache; begin the stage again")
      record = 0
      for index, row in zip(shard.indices, rows, strict=True):
        self._shard_N[index], self._record_N[index] = number, record
        record += row["records"]
        if row["reason"] is not None:
          self.reasons[index] = row["reason"]

  def read(self, index: int, clip: Clip, first: int, frames: int) -> np.ndarray:
    """Frames [T, H, W, 3] of a clip, which is the manifest's at `index`.

    Raises:
      ClipError: the clip could not be decoded when the cache was made.
      RecordError: the cache is damaged; names shard and record.
    """
    if index >= len(self._shard_N) or self._shard_N[index] < 0:
      raise RecordError(f"clip {clip.id} is not in the cache")
    if index in self.reasons:
      raise media.ClipError(clip.path, self.reasons[index])
    begin, end = first // BLOCK, (first + frames - 1) // BLOCK + 1
    at = int(self._record_N[index])
    path = self._paths[self._shard_N[index]]
    try:
      opened = self._opened(int(self._shard_N[index]))
      blocks = [
        self._block(content, clip, number)
        for number, content in enumerate(
          opened.read(list(range(at + begin, at + end))), begin
        )
      ]
    # A damaged chunk is a RuntimeError.
    except (RuntimeError, ValueError, IndexError) as e:
      raise RecordError(f"{path}: records {at + begin} to {at + end - 1}: {e}") from e
    video_THWC = np.concatenate(blocks)
    return video_THWC[first - begin * BLOCK :][:frames]

  def _block(self, content, clip, number):
    frames = min(BLOCK, clip.frames - number * BLOCK)
    if self.codec == "h264":
      return short_gop.decode(content, frames)
    shape = (frames, clip.height, clip.width, 3)
    return np.frombuffer(content, np.uint8).reshape(shape)

  def _opened(self, number):
    if number in self._open:
      self._open.move_to_end(number)
    else:
      self._open[number] = open_shard(self._paths[number])
      if len(self._open) > _OPEN_SHARDS:
        self._open.popitem(last=False)[1].close()
    return self._open[number]

  def __getstate__(self):
    return {**self.__dict__, "_open": OrderedDict()}
