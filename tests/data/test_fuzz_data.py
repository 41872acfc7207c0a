"""Odd bytes and rows in the files that data are read from: only documented errors."""

import json
import os
import pathlib
import struct
import zlib

import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import example, given
from hypothesis import strategies as st

from sora_jax.data import clips, records, text_file
from sora_jax.data.intake import captions
from sora_jax.data.video import media, probe, reader, writer

pytestmark = pytest.mark.fuzz

KEYS = st.sampled_from(
  ["id", "path", "start", "frames", "fps", "height", "width", "captions", "split",
   "truth", "crop", "measured", "shard", "index", "shape", "extras", "text_lengths",
   "caption"]
)  # fmt: skip
SCALARS = (
  st.none()
  | st.booleans()
  | st.integers(-(2**70), 2**70)
  | st.floats()
  | st.text(max_size=8)
  | st.sampled_from(["..", "/", "../x.mp4", "\0", "a.mp4", "NaN", "train"])
)
JSON = st.recursive(
  SCALARS,
  lambda inner: (
    st.lists(inner, max_size=4)
    | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=4)
  ),
  max_leaves=12,
)
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("fuzz")


CLIP = {
  "id": "a", "path": "a.mp4", "start": 0.0, "frames": 9, "fps": 8.0, "height": 32,
  "width": 32, "captions": ["a cat"], "split": "train",
}  # fmt: skip
LATENT = {
  "id": "a", "shard": "s", "index": 0, "shape": [1, 2, 2], "fps": 8.0, "captions": [],
  "split": "train", "extras": [], "frames": 1, "height": 16, "width": 16,
}  # fmt: skip


@st.composite
def changed(draw, row):
  """A row of which some fields are others, or gone."""
  row = {**row, **draw(st.dictionaries(st.sampled_from(sorted(row)) | KEYS, JSON))}
  for key in draw(st.lists(st.sampled_from(sorted(row)), max_size=1)):
    del row[key]
  return row


def lines_of(rows):
  return st.lists(rows, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)))


CONTENTS = st.binary(max_size=64) | lines_of(JSON).map(str.encode)


def readable(read, path):
  """What a reader gives; None if it raises a ValueError with the file's name."""
  try:
    return read(path)
  except ValueError as error:
    assert os.fspath(path) in str(error), error
    return None


@pytest.mark.slow
@given(CONTENTS | lines_of(changed(CLIP)).map(str.encode))
@example(DEEP.encode())
@example(b"\xff\xfe\x00")
def test_manifests(folder, content):
  path = folder / "manifest.jsonl"
  path.write_bytes(content)
  for clip in readable(clips.read_manifest, path) or ():
    assert clip.frames >= 1 and clip.fps > 0 and all(map(str, clip.captions))


@given(CONTENTS | lines_of(changed(LATENT)).map(str.encode))
def test_latents_manifests(folder, content):
  path = folder / "latents.jsonl"
  path.write_bytes(content)
  for clip in readable(records.read_latents_manifest, path) or ():
    assert len(clip.shape) == 3 and "/" not in clip.shard


@given(CONTENTS | lines_of(changed({"path": "a.mp4", "caption": "x"})).map(str.encode))
def test_manifests_of_users(folder, content):
  root = folder / "media"
  root.mkdir(exist_ok=True)
  (root / "a.mp4").touch()
  (root / "manifest.jsonl").write_bytes(content)
  locate = captions.local_file(root, False)
  manifest = root / "manifest.jsonl"
  found = readable(
    lambda path: captions.read_manifest(path, locate, str(root)), manifest
  )
  assert not found or set(found[0]) <= {"a.mp4"}  # nothing outside of the folder


@given(st.binary(max_size=64) | st.text(max_size=64).map(str.encode))
def test_captions_and_prompts(folder, content):
  path = folder / "captions.txt"
  path.write_bytes(content)
  for line in readable(text_file.read_lines, path) or ():
    assert line.strip() == line != "" and "\n" not in line


ARRAY = {"shape": [1, 2, 2, 1], "data": b"\0" * 8}
RECORD = {"latent": ARRAY, "extras": {"shape": [0, 2, 2, 1], "data": b""},
          "clip": LATENT, "texts": []}  # fmt: skip
PACKABLE = st.recursive(
  st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=8)
  | st.text(max_size=4),
  lambda inner: st.lists(inner, max_size=3)
  | st.dictionaries(st.sampled_from(["shape", "data", "id", "clip"]), inner),
  max_leaves=6,
)  # fmt: skip


@st.composite
def packed_records(draw):
  record = {**RECORD}
  for key in draw(st.lists(st.sampled_from(sorted(record)), max_size=2)):
    part = draw(PACKABLE)
    record[key] = {**record[key], **part} if isinstance(part, dict) and (
      isinstance(record[key], dict)
    ) else part  # fmt: skip
  packed = msgpack.packb(record)
  return packed[: draw(st.integers(0, len(packed)))] if draw(st.booleans()) else packed


@given(st.binary(max_size=64) | packed_records())
@example(b"\xdd\xff\xff\xff\xff")  # an array of four billion
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\x81\x90\x00")  # a key that is a list
@example(b"\x91" * 5000)
@example(msgpack.packb({**RECORD, "clip": {**LATENT, "shape": b""}}))
def test_records(folder, content):
  path = str(folder / "s")
  shard = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
  shard.write(content)
  shard.close()
  (clip,) = readable(records.read_shard_clips, path) or (None,)
  latents = records.LatentReader(str(folder))
  wanted = clip if clip and clip.shard == "s" else records._clip_from_row(LATENT)
  record = readable(lambda _: latents.read(wanted), path)
  latents.close()
  assert record is None or record["latent_THWC"].shape[:3] == tuple(wanted.shape)


@given(st.binary(max_size=64) | PACKABLE.map(msgpack.packb))
def test_features_of_the_empty_caption(folder, content):
  path = folder / "empty_text.msgpack"
  path.write_bytes(content)
  readable(lambda path: records.read_empty_text(str(path)), path)


@pytest.fixture(scope="module")
def whole(folder):
  """Suffix -> bytes of a whole file."""
  video_THWC = np.arange(5 * 32 * 48 * 3).reshape(5, 32, 48, 3).astype(np.uint8)
  found = {}
  for suffix in (".mp4", ".webm", ".gif", ".png", ".jpg"):
    path = folder / f"whole{suffix}"
    still = suffix in media.IMAGE_SUFFIXES
    writer.write(path, video_THWC[:1] if still else video_THWC, 8.0)
    found[suffix] = path.read_bytes()
  return found


@given(
  st.sampled_from([".mp4", ".webm", ".gif", ".png", ".jpg"]),
  st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=12),
  st.floats(0.0, 1.0),
)
def test_media(folder, whole, suffix, changes, share):
  content = bytearray(whole[suffix])
  for place, value in changes:
    content[int(place * len(content))] = value
  path = folder / f"odd{suffix}"
  path.write_bytes(content[: int(share * len(content))] if share < 0.5 else content)
  for read in (probe.probe, lambda path: reader.read(path, frames=1)):
    try:
      read(path)
    except media.ClipError as error:
      assert error.reason


def png(width, height):
  def chunk(kind, data):
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def test_pictures_larger_than_memory(tmp_path, monkeypatch, whole):
  path = tmp_path / "big.png"
  path.write_bytes(png(60_000, 60_000))
  message = r"big.png: too large: Image size \(3600000000 pixels\) exceeds limit of 178"
  for read in (reader.read, probe.probe):
    with pytest.raises(media.ClipError, match=message):
      read(path)
  monkeypatch.setattr(media, "MOST_PIXELS", 32 * 48 - 1)
  for suffix in (".mp4", ".webm", ".gif"):
    path = pathlib.Path(tmp_path / f"big{suffix}")
    path.write_bytes(whole[suffix])
    for read in (reader.read, probe.probe):
      with pytest.raises(media.ClipError, match="48x32 pixels, more than the 1535"):
        read(path)
