"""Sources other than folders: manifests, tar files, buckets and web servers."""

import collections
import dataclasses
import functools
import http.server
import io
import json
import pathlib
import re
import shutil
import tarfile
import threading

import fsspec
import numpy as np
import pyarrow
import pytest
import tiny
from data.media_samples import noise
from pyarrow import parquet

from sora_jax import prepare
from sora_jax.data import clips, listing, mixture, remote, sources, stored
from sora_jax.data.clip_reader import read_clip
from sora_jax.data.intake import measure
from sora_jax.data.intake.measuring import Measuring
from sora_jax.data.video import in_memory, media
from sora_jax.run import recipe as recipes

LIMITS = {"max_frames": 9, "max_pixels": 48 * 64, "size_multiple": 16}
VIDEO = noise(9, 48, 64)
MP4 = in_memory.encode(VIDEO, 8.0, "mp4", "libx264rgb", {"qp": "0"})
OTHER = in_memory.encode(VIDEO[::-1], 8.0, "mp4", "libx264rgb", {"qp": "0"})


def scan(source, work, decode=False, **options):
  """Clips of a source, and what is left out, as the manifest of a run keeps them."""
  listed = listing.of_source(str(source), work, **options)
  how = Measuring(decode=decode, ledger=work / "measured.jsonl")
  found, rejected = sources.scan("", listed=listed, **LIMITS, how=how)
  clips.write_manifest(work / "manifest.jsonl", found)
  return clips.read_manifest(work / "manifest.jsonl"), rejected


@pytest.fixture
def folder(tmp_path):
  """Two videos and what describes them."""
  made = tmp_path / "folder"
  (made / "deep").mkdir(parents=True)
  (made / "a.mp4").write_bytes(MP4)
  (made / "deep" / "b c.mp4").write_bytes(OTHER)
  (made / "a.txt").write_text("one\ntwo\n")
  (made / "notes.pdf").write_text("x")
  return made


# --- manifests


def write_table(path, rows):
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_a_parquet_manifest_is_like_one_of_lines(folder, tmp_path):
  rows = [
    {"path": "a.mp4", "captions": ["é", "two"], "split": None},
    {"path": "deep/b c.mp4", "captions": None, "split": "heldout"},
  ]
  write_table(folder / "list.parquet", rows)
  text = [json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows]
  (folder / "list.jsonl").write_text("\n".join(text))
  table, _ = scan(folder / "list.parquet", tmp_path / "1")
  lines, _ = scan(folder / "list.jsonl", tmp_path / "2")
  assert table == lines
  assert [(c.id, c.captions, c.split) for c in table] == [
    ("a", ("é", "two"), "train"), ("deep/b c", (), "heldout"),
  ]  # fmt: skip
  # In a folder by its name; what it does not name is listed.
  (folder / "list.parquet").rename(folder / "manifest.parquet")
  found, rejected = scan(folder, tmp_path / "3")
  assert found == table
  assert (str(folder / "a.txt"), "not in the manifest") in rejected
  (folder / "list.jsonl").rename(folder / "manifest.jsonl")
  with pytest.raises(ValueError, match="manifest.jsonl and manifest.parquet; which"):
    scan(folder, tmp_path / "3")


def test_wrong_tables_name_the_row(folder, tmp_path):
  path = folder / "list.parquet"
  write_table(path, [{"path": "a.mp4"}, {"path": "gone.mp4"}])
  with pytest.raises(ValueError, match=r"list.parquet:2: no such file: .*gone.mp4"):
    scan(path, tmp_path)
  write_table(path, [{"path": "a.mp4"}, {"path": "../x.mp4"}])
  with pytest.raises(ValueError, match=r"list.parquet:2: ../x.mp4 is outside of"):
    scan(path, tmp_path)
  write_table(path, [{"path": "a.mp4"}, {"path": "https://x.org/a.mp4"}])
  with pytest.raises(ValueError, match=r":2: https://x.org/a.mp4 is outside"):
    scan(path, tmp_path)
  write_table(path, [])
  with pytest.raises(ValueError, match=r"list.parquet: there is nothing in it"):
    scan(path, tmp_path)
  write_table(path, [{"path": "a.mp4"}])
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(ValueError, match="list.parquet: not a Parquet table, or damaged"):
    scan(path, tmp_path)


# --- tar files


def write_tar(path, members, **options):
  with tarfile.open(path, "w", **options) as tar:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


SAMPLES = (
  ("x/1.mp4", MP4),
  ("x/1.txt", b"one\ntwo\n"),
  ("x/1.json", b'{"caption": null, "split": null}'),
  ("x/2.mp4", OTHER),
  ("x/2.json", b'{"caption": "three", "split": "heldout", "score": 5}'),
  ("x/2.txt", b"three, as the JSON says"),
)


def test_members_are_read_where_they_lie(tmp_path):
  long = "y" * 150
  write_tar(tmp_path / "a-000.tar", SAMPLES)
  write_tar(tmp_path / "a-001.tar", [(f"{long}.mp4", MP4)])  # its header is two
  found, rejected = scan(tmp_path / "a-{000..001}.tar", tmp_path / "run", decode=True)
  assert not rejected
  assert [(c.id, c.captions, c.split) for c in found] == [
    ("a-000.tar/x/1", ("one", "two"), "train"),
    ("a-000.tar/x/2", ("three",), "heldout"),
    (f"a-001.tar/{long}", (), "train"),
  ]
  for clip, want in zip(found, (VIDEO, VIDEO[::-1], VIDEO), strict=True):
    np.testing.assert_array_equal(read_clip(clip), want)
    np.testing.assert_array_equal(read_clip(clip, 3, 2), want[3:5])
  assert found[0].measured["digest"] == found[2].measured["digest"]
  assert found[0].measured["digest"] == measure.digest(found[0].path)
  same, _ = scan(tmp_path / "*.tar", tmp_path / "run", decode=True)
  assert same == found


def test_a_tar_file_is_looked_through_once(tmp_path, monkeypatch):
  write_tar(tmp_path / "a.tar", SAMPLES)
  first, _ = scan(tmp_path / "a.tar", tmp_path)
  with monkeypatch.context() as patched:
    patched.setattr("sora_jax.data.tar_source.read_contents", None)
    assert scan(tmp_path / "a.tar", tmp_path)[0] == first
  # Another file under its name: the index does not hide it, nor is it read for it.
  write_tar(tmp_path / "a.tar", [("0.txt", b"0"), *SAMPLES])
  with pytest.raises(media.ClipError, match="has changed; prepare the data again"):
    read_clip(first[0])
  assert [c.id for c in scan(tmp_path / "a.tar", tmp_path)[0]] == [c.id for c in first]


def test_each_member_that_is_not_used_is_listed(tmp_path):
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    link = tarfile.TarInfo("link.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar.addfile(link)
    for name, content in (
      ("../up.mp4", MP4), ("/root.mp4", MP4), (".hidden/a.mp4", MP4),
      ("a.mp4", MP4), ("a.jpg", b"a picture of it"), ("b.cls", b"3"), ("c.txt", b"c"),
      ("d.mp4", MP4), ("d.json", b"[]"), ("e.mp4", MP4), ("e.txt", b"\xff\xfeq"),
      ("f\n.mp4", MP4), ("g.mp4", MP4), ("g.json", b'{"caption": 3}'),
      ("x::remote/http%3A%2F%2Fevil/1-2/a.mp4", MP4),
    ):  # fmt: skip
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  found, rejected = scan(tmp_path / "a.tar", tmp_path)
  assert [clip.id for clip in found] == ["a.tar/a"]
  reasons = {path.partition("a.tar/")[2]: reason for path, reason in rejected}
  for name, reason in {
    "link.mp4": "a link", "../up.mp4": "leads out of", "/root.mp4": "leads out of",
    ".hidden/a.mp4": "hidden", "a.jpg": "a.mp4 is the medium of its sample",
    "b.cls": "not a video or an image", "d.mp4": "a JSON object is needed",
    "e.mp4": "must be UTF-8", "g.mp4": '"caption" must be a text',
    "f\n.mp4": "control character", "c.txt": "captions of no file",
    "x::remote/http%3A%2F%2Fevil/1-2/a.mp4": "marks what is inside of",
  }.items():  # fmt: skip
    assert reason in reasons.pop(name), name
  assert not reasons


@pytest.mark.parametrize("damage", ["data", "header", "end", "middle", "gz", "empty"])
def test_damaged_tar_files_are_named(tmp_path, damage, caplog):
  path, whole = tmp_path / "a.tar", tmp_path / "b.tar"
  write_tar(path, SAMPLES)
  shutil.copy(path, whole)
  content = bytearray(path.read_bytes())
  with tarfile.open(path) as tar:
    third = tar.getmember("x/2.mp4")
    data, last = third.offset_data, tar.getmembers()[-1]
  reason, used = "damaged or", 1
  if damage == "data":  # in the middle of the second video
    content, reason = content[: data + 1000], "data"
  elif damage == "header":
    content, reason = content[: third.offset + 100], "a.tar"
  elif damage == "end":
    content = content[: last.offset_data + tarfile.BLOCKSIZE]
    reason, used = "no mark of the end", 2
  elif damage == "middle":
    content[third.offset : third.offset + 512] = b"\xff" * 512
  elif damage == "gz":
    content, reason, used = b"\x1f\x8b" + bytes(600), "damaged or no tar file", 0
  else:
    content, used = b"", 0
  path.write_bytes(content)
  found, rejected = scan(tmp_path / "*.tar", tmp_path / "run")
  assert [clip.id for clip in found if clip.id.startswith("a")] == (
    ["a.tar/x/1", "a.tar/x/2"][:used]
  )
  assert sum(clip.id.startswith("b.tar") for clip in found) == 2
  named = dict(rejected)
  assert reason in named[str(path)] + str(named)
  assert str(path) in caplog.text and str(whole) not in caplog.text


def test_what_is_there_is_said(tmp_path):
  write_tar(tmp_path / "a.tar", SAMPLES)
  with pytest.raises(ValueError, match=rf"1 \.tar files .*source={tmp_path}/\*\.tar"):
    scan(tmp_path, tmp_path)
  with pytest.raises(ValueError, match=r"b-\*\.tar: no such tar files; 1 \.tar"):
    scan(tmp_path / "b-*.tar", tmp_path)


# --- buckets and servers


@pytest.fixture
def bucket(folder):
  """The folder as a bucket, in memory."""
  memory = fsspec.filesystem("memory")
  for path in folder.rglob("*"):
    if path.is_file():
      memory.pipe(f"/bucket/{path.relative_to(folder)}", path.read_bytes())
  yield "memory://bucket"
  memory.store.clear()


class Handler(http.server.SimpleHTTPRequestHandler):
  """A server of files, and of parts of them, that notes what it is asked for."""

  requests: list[str] = []

  def send_head(self):
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
    if not wanted:
      return super().send_head()
    with open(self.translate_path(self.path), "rb") as file:
      first, last = map(int, wanted.groups())
      file.seek(first)
      part = file.read(last + 1 - first)
      size = file.seek(0, 2)
    self.send_response(206)
    self.send_header("Content-Length", str(len(part)))
    self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{size}")
    self.end_headers()
    return io.BytesIO(part)

  def log_message(self, *_):
    self.requests.append(f"{self.command} {self.path}")


@pytest.fixture
def server(folder):
  """The folder on a web server."""
  Handler.requests = []
  handler = functools.partial(Handler, directory=str(folder))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
    thread = threading.Thread(target=served.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    thread.join()


@pytest.fixture(params=["bucket", "server"])
def url(request):
  return request.getfixturevalue(request.param)


@pytest.mark.parametrize("copy", [True, False])
def test_a_remote_folder_is_like_one_here(url, folder, tmp_path, copy):
  work = tmp_path / "run"
  found, rejected = scan(url, work, decode=True, copy_remote=copy)
  here, _ = scan(folder, tmp_path / "here", decode=True)
  root = url.partition("://")[2]
  assert [clip.id for clip in found] == [f"{root}/{clip.id}" for clip in here]
  for clip, other in zip(found, here, strict=True):
    assert (clip.captions, clip.measured) == (other.captions, other.measured)
    np.testing.assert_array_equal(read_clip(clip), read_clip(other))
  assert [reason for _, reason in rejected] == ["not a video or an image: .pdf"]
  kept = {path.suffix for path in (work / "remote").iterdir()}
  assert kept == ({".mp4", ".txt"} if copy else {".txt"})


def test_a_copy_is_made_once(server, tmp_path):
  found, _ = scan(server, tmp_path, decode=True)
  Handler.requests.clear()
  again, _ = scan(server, tmp_path, decode=True)
  read_clip(again[0])
  assert again == found and "GET /a.mp4" not in Handler.requests
  # One that has lost its end is no copy.
  copy = pathlib.Path(stored.opened(found[0].path))
  copy.write_bytes(MP4[:100])
  np.testing.assert_array_equal(read_clip(found[0]), VIDEO)
  assert Handler.requests.count("GET /a.mp4") == 1


@pytest.mark.parametrize("copy", [True, False])
def test_what_changes_or_goes_is_refused(url, folder, tmp_path, copy):
  found, _ = scan(url, tmp_path, copy_remote=copy)
  shutil.rmtree(tmp_path / "remote")
  memory = fsspec.filesystem("memory")
  memory.pipe("/bucket/a.mp4", OTHER + b"x")
  (folder / "a.mp4").write_bytes(OTHER + b"x")
  with pytest.raises(media.ClipError, match=r"a.mp4: has changed since it was listed"):
    read_clip(found[0])
  changed, _ = scan(url, tmp_path, copy_remote=copy)
  np.testing.assert_array_equal(read_clip(changed[0]), VIDEO[::-1])
  assert stored.stamp(changed[0].path) != stored.stamp(found[0].path)
  shutil.rmtree(tmp_path / "remote")
  memory.rm("/bucket/a.mp4")
  (folder / "a.mp4").unlink()
  with pytest.raises(media.ClipError, match="a.mp4"):
    read_clip(changed[0])


def test_a_remote_manifest_and_remote_tar_files(url, folder, tmp_path):
  rows = [{"path": "deep/b c.mp4", "caption": "b"}, {"path": "./a.mp4"},
          {"path": "gone.mp4"}]  # fmt: skip
  write_table(folder / "list.parquet", rows)
  write_tar(folder / "x-0.tar", SAMPLES)
  memory = fsspec.filesystem("memory")
  for name in ("list.parquet", "x-0.tar"):
    memory.pipe(f"/bucket/{name}", (folder / name).read_bytes())
  root = url.partition("://")[2]
  found, rejected = scan(f"{url}/list.parquet", tmp_path)
  assert {c.id.removeprefix(f"{root}/"): c.captions for c in found} == {
    "a": (), "deep/b c": ("b",),
  }  # fmt: skip
  ((path, reason),) = rejected
  assert path == f"{url}/gone.mp4" and "cannot be read" in reason
  found, _ = scan(f"{url}/x-{{0..0}}.tar", tmp_path, copy_remote=False)
  assert [clip.captions for clip in found] == [("one", "two"), ("three",)]
  np.testing.assert_array_equal(read_clip(found[1]), VIDEO[::-1])
  write_table(folder / "list.parquet", [{"path": "../a.mp4"}])
  memory.pipe("/bucket/list.parquet", (folder / "list.parquet").read_bytes())
  with pytest.raises(ValueError, match=r"\.\./a\.mp4 is outside of"):
    scan(f"{url}/list.parquet", tmp_path)


def test_addresses_that_cannot_be_used(server, tmp_path):
  for source, message in (
    ("nothing://x/y", "nothing://x/y: cannot be read .*sora_jax.remote"),
    ("memory://empty", "memory://empty: "),
    (f"{server}/gone/", "gone/: nothing is there"),
    (f"{server}/gone.jsonl", "gone.jsonl: no such manifest"),
    (f"{server}/gone.tar", "gone.tar: no such tar file"),
  ):
    with pytest.raises(ValueError, match=message):
      scan(source, tmp_path)


def test_less_than_was_promised_is_no_copy(bucket, tmp_path, monkeypatch):
  found, _ = scan(bucket, tmp_path)
  shutil.rmtree(tmp_path / "remote")
  system = remote.file_system(bucket)

  def cut(url, path):
    pathlib.Path(path).write_bytes(MP4[:50])

  monkeypatch.setattr(system, "get_file", cut)
  with pytest.raises(media.ClipError, match=rf"a.mp4: 50 of {len(MP4)} bytes came"):
    read_clip(found[0])
  assert not list((tmp_path / "remote").iterdir())


def test_what_fails_on_the_way_is_tried_again(bucket, tmp_path, monkeypatch, caplog):
  found, _ = scan(bucket, tmp_path)
  shutil.rmtree(tmp_path / "remote")
  system, waits = remote.file_system(bucket), []
  faults, fetch = [ConnectionResetError("gone"), KeyError("x")], system.get_file

  def fail_twice(url, path):
    if faults:
      raise faults.pop()
    fetch(url, path)

  monkeypatch.setattr(system, "get_file", fail_twice)
  monkeypatch.setattr(remote.time, "sleep", waits.append)
  np.testing.assert_array_equal(read_clip(found[0]), VIDEO)
  assert waits == [1.0, 5.0] and "a.mp4: gone; trying again in 5 s" in caplog.text


def test_a_manifest_here_may_name_files_of_servers(server, tmp_path):
  path = tmp_path / "list.jsonl"
  (tmp_path / "own.mp4").write_bytes(OTHER)
  rows = [{"path": f"{server}/a.mp4", "caption": "é"}, {"path": "own.mp4"},
          {"path": f"{server}/gone.mp4"}]  # fmt: skip
  path.write_text("\n".join(map(json.dumps, rows)))
  with pytest.raises(ValueError, match=r"list.jsonl:1: http://.*a.mp4 is outside of"):
    scan(path, tmp_path)
  found, ((gone, _),) = scan(path, tmp_path, allow_outside=True)
  assert {clip.id: clip.captions for clip in found} == {
    f"{server.partition('://')[2]}/a": ("é",), "own": (),
  }  # fmt: skip
  assert gone == f"{server}/gone.mp4"
  assert all(read_clip(clip).shape == (9, 48, 64, 3) for clip in found)


def test_addresses_that_differ_only_in_what_is_asked(server, folder, tmp_path):
  (folder / "again.mp4").write_bytes(OTHER)
  path = tmp_path / "list.jsonl"
  rows = [{"path": f"{server}/again.mp4?id={i}", "caption": f"{i}"} for i in (1, 2)]
  path.write_text("\n".join(map(json.dumps, rows)))
  ids = []
  for _ in range(2):
    found, rejected = scan(path, tmp_path, allow_outside=True)
    assert {clip.captions for clip in found} == {("1",), ("2",)} and not rejected
    ids.append({clip.captions: clip.id for clip in found})
  assert ids[0] == ids[1] and len({*ids[0].values()}) == 2


# --- mixtures


def test_sources_are_mixed(folder, tmp_path):
  write_tar(tmp_path / "a.tar", SAMPLES)
  (tmp_path / "link").symlink_to(folder)
  work = tmp_path / "run"
  parts = {
    "films": listing.of_source(str(folder), work),
    "tars": listing.of_source(str(tmp_path / "a.tar"), work),
    "again": listing.of_source(str(folder), work),
  }
  listed = listing.mixed(parts)
  found, rejected = sources.scan("", listed=listed, **LIMITS)
  assert [(clip.id, clip.source) for clip in found] == [
    ("films/a", "films"), ("films/deep/b c", "films"),
    ("tars/a.tar/x/1", "tars"), ("tars/a.tar/x/2", "tars"),
  ]  # fmt: skip
  twice = "of the source films, which is used"
  assert sum(reason == twice for _, reason in rejected) == 2


@pytest.mark.slow
def test_prepare_makes_one_manifest_of_a_mixture(server, tmp_path):
  """In processes that have what is remote copied, each in its turn."""
  (tmp_path / "tars").mkdir()
  write_tar(tmp_path / "tars" / "a.tar", SAMPLES)
  recipe = recipes.read(tiny.get_config())
  sources_of = ((server, 3.0), (str(tmp_path / "tars" / "*.tar"), 1.0))
  data = dataclasses.replace(recipe.data, source="mixture", mixture=sources_of)
  prepare.run(dataclasses.replace(recipe, data=data), tmp_path)
  found = clips.read_manifest(tmp_path / "data" / "manifest.jsonl")
  name = mixture.names([server])[0]
  assert collections.Counter(clip.source for clip in found) == {name: 2, "tars": 2}
  # The tar file has the videos of the server; one is marked there.
  by_id = {clip.id.rpartition("/")[2]: clip.split for clip in found}
  assert by_id["b c"] == by_id["2"] == "heldout"
  for clip in found:
    assert read_clip(clip).shape == (9, 48, 64, 3)
