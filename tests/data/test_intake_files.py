"""Which files of a folder are found, named and captioned; all others are listed."""

import contextlib
import json
import os
import shutil
import tempfile

import av
import numpy as np
import PIL.Image
import pytest

from sora_jax.data import clips, sources, text_file
from sora_jax.data.intake import find
from sora_jax.data.video import media, writer

LIMITS = {"max_frames": 17, "max_pixels": 64 * 64, "size_multiple": 16}


def picture(seed=0, height=48, width=64):
  """A picture like no other."""
  noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
  return np.asarray(PIL.Image.fromarray(noise).resize((width, height)))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
  """A short video, to copy from."""
  path = tmp_path_factory.mktemp("media") / "a.mp4"
  writer.write(path, np.stack([np.roll(picture(), t, 1) for t in range(9)]), 10)
  return path


def reasons(folder, left_out):
  return {os.path.relpath(path, folder): reason for path, reason in left_out}


def encode(path, codec, rate=25, frames=9, **options):
  """Writes a video by FFmpeg, in the container that the suffix names."""
  with av.open(str(path), "w", **options) as container:
    stream = container.add_stream(codec, rate=rate)
    # H.263 has a few sizes only, and this is one.
    stream.height, stream.width, stream.pix_fmt = 144, 176, "yuv420p"
    for t in range(frames):
      array = np.roll(picture(len(codec), 144, 176), 3 * t, 1)
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


CODECS = {
  "m4v": "mpeg4", "avi": "mpeg4", "ts": "mpeg2video", "m2ts": "libx264",
  "mpg": "mpeg1video", "wmv": "wmv2", "flv": "flv", "3gp": "h263", "ogv": "libvpx",
}  # fmt: skip


def test_formats_of_all_ages(tmp_path):
  for suffix, codec in CODECS.items():
    form = {"m4v": "mp4", "m2ts": "mpegts", "ogv": "ogg"}.get(suffix)
    encode(tmp_path / f"{suffix}.{suffix}", codec, **({"format": form} if form else {}))
  images = ["webp", "tif", "tiff", "bmp", "avif", "heic"]
  pillow_heif = pytest.importorskip("pillow_heif")
  pillow_heif.register_heif_opener()
  for suffix in images:
    PIL.Image.fromarray(picture()).save(tmp_path / f"{suffix}.{suffix}")
  found, left_out = sources.scan(tmp_path, **LIMITS)
  assert not left_out
  assert {c.id: c.frames for c in found} == {
    **{suffix: 9 for suffix in CODECS}, **{suffix: 1 for suffix in images}
  }  # fmt: skip


def test_one_of_several_pictures_is_not_taken(tmp_path):
  PIL.Image.fromarray(picture()).save(tmp_path / "good.png")
  pages = [PIL.Image.fromarray(picture(i)) for i in range(3)]
  for name in ("a.webp", "b.tiff"):
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
  found, left_out = sources.scan(tmp_path, **LIMITS)
  assert [clip.id for clip in found] == ["good"]
  several = "3 pictures in it, an animation or pages"
  assert reasons(tmp_path, left_out) == {"a.webp": several, "b.tiff": several}


def mixed_files(folder, video, rng):
  """Makes 200 files: media and captions, others, damaged, hidden and nameless ones."""
  for i in range(200):
    kind, stem = i % 10, folder / f"{rng.choice(['', 'sub/', 'a/b/'])}{i:03d}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    if kind < 3:
      PIL.Image.fromarray(picture(i)).save(f"{stem}.{('png', 'JPG', 'webp')[kind]}")
    elif kind == 3:  # captions of the file before, or of none
      before = [p for p in folder.rglob(f"{i - 1:03d}.*")]
      path = before[0] if i % 20 == 3 else stem
      path.with_suffix(".txt").write_text(f"a caption {i}")
    elif kind == 4:
      shutil.copy(video, f"{stem}.mp4")
    elif kind == 5:
      stem.with_suffix(".mkv").write_bytes(video.read_bytes()[: 7 * i])
    elif kind == 6:
      stem.with_suffix((".pdf", ".json", "")[i % 3]).write_text("not media")
    elif kind == 7:
      stem.with_suffix(".png").write_bytes(b"" if i % 20 == 7 else b"no picture")
    elif kind == 8:
      (stem.parent / f".{i}.mp4").write_bytes(b"")
    else:
      name = (b"\xff%d.mp4", b"new\nline%d.png")[i // 10 % 2] % i
      with open(os.path.join(os.fsencode(folder), name), "wb") as file:
        file.write(b"x")


@pytest.mark.slow
def test_every_file_is_used_or_listed(tmp_path, video, caplog):
  mixed_files(tmp_path, video, np.random.default_rng(0))
  everything = {
    os.path.join(top, name) for top, _, names in os.walk(tmp_path) for name in names
  }
  assert len(everything) == 200
  with caplog.at_level("INFO", logger="absl"):
    found, left_out = sources.scan(tmp_path, **LIMITS)
  used, listed = {clip.path for clip in found}, {path for path, _ in left_out}
  captions = {os.path.splitext(c.path)[0] + ".txt" for c in found if c.captions}
  assert len(captions) == 10
  assert used | captions | listed == everything
  assert len(used) + len(captions) + len(listed) == 200 == len(left_out) + 90
  assert all(reason for _, reason in left_out)
  lines = "\n".join(record.getMessage() for record in caplog.records)
  assert ".mp4 20 and 30" in lines and ".pdf 0 and 7" in lines
  assert "10 files of captions" in lines
  json.loads(json.dumps(left_out))  # whatever the names


def test_hidden_folders_are_left_out_and_linked_ones_followed(tmp_path, video):
  root, other = tmp_path / "root", tmp_path / "other"
  for folder in (root / ".cache", root / "a" / ".ipynb_checkpoints", other / "deep"):
    folder.mkdir(parents=True)
    shutil.copy(video, folder / "x.mp4")
  shutil.copy(video, root / "a" / "here.mp4")
  (root / "linked").symlink_to(other)
  (other / "deep" / "loop").symlink_to(root)
  (root / "b").symlink_to(root / "a")
  (root / "again.mp4").symlink_to(root / "a" / "here.mp4")
  (root / "dangling.mp4").symlink_to(root / "nowhere")
  (root / "self").symlink_to(root / "self")
  found, left_out = sources.scan(root, **LIMITS)
  assert [clip.id for clip in found] == ["a/here", "linked/deep/x"]
  again = "a link to a folder that is looked into already"
  assert reasons(root, left_out) == {
    ".cache": "a hidden folder",
    "a/.ipynb_checkpoints": "a hidden folder",
    "b": again,
    "linked/deep/loop": again,
    "again.mp4": f"a link to {root}/a/here.mp4, which is used",
    "dangling.mp4": "cannot be read (No such file or directory)",
    "self": "cannot be read (Too many levels of symbolic links)",
  }


def test_odd_names_are_listed(tmp_path, video):
  shutil.copy(video, tmp_path / "good.mp4")
  folder = os.fsencode(tmp_path)
  for name in (b"caf\xe9.mp4", b"a\x1b[31m.mp4", "b\u2028c.mp4".encode()):
    shutil.copy(video, os.path.join(folder, name))
  os.mkfifo(tmp_path / "pipe.mp4")
  with contextlib.chdir(tmp_path):
    for _ in range(20):
      os.mkdir("d" * 250)
      os.chdir("d" * 250)
    with open("deep.mp4", "wb") as file:
      file.write(b"")
  found, left_out = sources.scan(tmp_path, **LIMITS)
  assert [clip.id for clip in found] == ["good"]
  listed = reasons(tmp_path, left_out)
  (deep,) = [name for name in listed if name.startswith("ddd")]
  assert len(deep) > 3000 and listed.pop(deep) == (
    "a folder that cannot be listed (File name too long)"
  )
  assert listed == {
    "caf\udce9.mp4": "its name is not UTF-8",
    "a\x1b[31m.mp4": "control character U+001B in its name",
    "b\u2028c.mp4": "control character U+2028 in its name",
    "pipe.mp4": "not a file but a pipe, a socket or a device",
  }
  assert find.shown("caf\udce9\x1b.mp4") == "caf\\udce9\\x1b.mp4"


@contextlib.contextmanager
def not_root():
  """As a user whom permissions hold back."""
  if os.geteuid():
    yield
    return
  os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(0)


def test_without_permission(video):
  # pytest's own folders are closed to other users.
  with tempfile.TemporaryDirectory() as folder:
    for name in ("good", "secret"):
      shutil.copy(video, f"{folder}/{name}.mp4")
    os.mkdir(f"{folder}/closed")
    shutil.copy(video, f"{folder}/closed/x.mp4")
    shutil.copy(video, f"{folder}/mute.mp4")
    with open(f"{folder}/mute.txt", "w") as text:
      text.write("a caption")
    os.chmod(folder, 0o755)
    for name in ("secret.mp4", "closed", "mute.txt"):
      os.chmod(f"{folder}/{name}", 0)
    with not_root():
      found, left_out = sources.scan(folder, **LIMITS)
    os.chmod(f"{folder}/closed", 0o755)
  assert [clip.id for clip in found] == ["good"]
  listed = reasons(folder, left_out)
  assert set(listed) == {"secret.mp4", "closed", "mute.mp4"}
  assert all("Permission denied" in reason for reason in listed.values())
  assert "mute.txt" in listed["mute.mp4"]


# --- captions

GOOD = {
  "bom": b"\xef\xbb\xbfa cat\r\nein K\xc3\xa4fer\r\n",
  "utf16": "a cat\r\nein Käfer\r\n".encode("utf-16"),
  "old_mac": "a cat\rein Käfer".encode(),
  "big_endian": b"\xfe\xff" + "a cat\nein Käfer".encode("utf-16-be"),
}


@pytest.mark.parametrize("name", GOOD)
def test_captions_of_any_editor(tmp_path, video, name):
  shutil.copy(video, tmp_path / "a.mp4")
  (tmp_path / "a.txt").write_bytes(GOOD[name])
  (clip,), _ = sources.scan(tmp_path, **LIMITS)
  assert clip.captions == ("a cat", "ein Käfer")


def test_separators_that_editors_show_inside_of_a_line(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("a\u2028cat\x0csleeps\x85here\n\n two \n", encoding="utf-8")
  assert text_file.read_lines(path) == ["a cat sleeps here", "two"]


BAD = {
  b"caf\xe9": "a.txt: captions must be UTF-8, or UTF-16 with a byte order mark",
  "a cat".encode("utf-16-le"): "a.txt:1: captions with a control character U+0000",
  b"a\x1b[31mcat": "a.txt:1: captions with a control character U+001B",
  b"x" * 100_000: "its caption has 100000 characters, not 0 to 5000",
  b"x" * (2 << 20): "a.txt: 2097152 bytes, captions are at most 1048576",
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_wrong_captions_cost_one_file(tmp_path, video, content):
  for name in ("a.mp4", "b.mp4"):
    shutil.copy(video, tmp_path / name)
  (tmp_path / "a.txt").write_bytes(content)
  found, left_out = sources.scan(tmp_path, **LIMITS)
  assert [clip.id for clip in found] == ["b"]
  assert BAD[content] in reasons(tmp_path, left_out)["a.mp4"]


def test_captions_outside_of_the_folder(tmp_path, video):
  root, linked = tmp_path / "root", tmp_path / "linked"
  for folder in (root, linked):
    folder.mkdir()
    shutil.copy(video, folder / "a.mp4")
    (folder / "a.txt").write_text("inside")
  (tmp_path / "private.txt").write_text("a secret")
  shutil.copy(video, root / "b.mp4")
  (root / "b.txt").symlink_to(tmp_path / "private.txt")
  (root / "c").symlink_to(linked)  # a folder that was put there with all it holds
  found, left_out = sources.scan(root, **LIMITS)
  assert {clip.id: clip.captions for clip in found} == {
    "a": ("inside",), "c/a": ("inside",)
  }  # fmt: skip
  ((path, reason),) = left_out
  assert path == str(root / "b.mp4")
  assert str(tmp_path / "private.txt") in reason and "allow_outside=True" in reason
  found, _ = sources.scan(root, allow_outside=True, **LIMITS)
  assert {clip.id: clip.captions for clip in found}["b"] == ("a secret",)


# --- manifests and ids


def manifest(folder, *rows, encoding="utf-8"):
  text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  (folder / "manifest.jsonl").write_bytes(text.encode(encoding))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_manifest_of_any_editor(tmp_path, video, encoding):
  shutil.copy(video, tmp_path / "a.mp4")
  manifest(tmp_path, {"path": "a.mp4", "caption": "ein Käfer"}, encoding=encoding)
  (clip,), _ = sources.scan(tmp_path, **LIMITS)
  assert clip.captions == ("ein Käfer",)


@pytest.mark.parametrize("name", ["../b.mp4", "sub/../../b.mp4", "{root}/../b.mp4"])
def test_manifest_outside_of_the_folder(tmp_path, video, name):
  root = tmp_path / "root"
  (root / "sub").mkdir(parents=True)
  shutil.copy(video, tmp_path / "b.mp4")
  manifest(root, {"path": name.format(root=root)})
  with pytest.raises(ValueError, match=r"jsonl:1: .* is outside of .*allow_outside"):
    sources.scan(root, **LIMITS)
  (clip,), _ = sources.scan(root, allow_outside=True, **LIMITS)
  assert os.path.samefile(clip.path, tmp_path / "b.mp4")


def test_one_file_is_one_clip_however_it_is_spelled(tmp_path, video):
  shutil.copy(video, tmp_path / "a.mp4")
  spellings = ["a.mp4", "./a.mp4", "x/../a.mp4", str(tmp_path / "a.mp4")]
  manifest(tmp_path, *({"path": name, "caption": name} for name in spellings))
  (clip,), left_out = sources.scan(tmp_path, **LIMITS)
  assert (clip.id, clip.captions) == ("a", ("a.mp4",))
  assert len(left_out) == 3
  for number, (_, reason) in enumerate(left_out, 2):
    assert f"manifest.jsonl:{number}: the same file as a.mp4" in reason


def test_manifest_with_odd_rows(tmp_path, video):
  shutil.copy(video, tmp_path / "a.mp4")
  (tmp_path / "folder.mp4").mkdir()
  rows = [{"path": name} for name in ("x" * 5000 + ".mp4", "a\0.mp4", "folder.mp4")]
  manifest(tmp_path, {"path": "a.mp4"}, *rows)
  (clip,), left_out = sources.scan(tmp_path, **LIMITS)
  assert clip.id == "a"
  for (_, reason), want in zip(
    left_out,
    ("File name too long", "control character U+0000", "a folder"),
    strict=True,
  ):
    assert want in reason


def test_ids_are_unique(tmp_path, video):
  frames = np.stack([np.roll(picture(1), t, 1) for t in range(34)])
  writer.write(tmp_path / "a.mp4", frames, 10)
  for name in ("a#0.mp4", "b.mp4", "b.png.mp4", "c.mp4", "c.mkv"):
    shutil.copy(video, tmp_path / name)
  PIL.Image.fromarray(picture()).save(tmp_path / "b.png")
  found, _ = sources.scan(tmp_path, **LIMITS)
  assert sorted(clip.id for clip in found) == [
    "a#0", "a#0.mp4", "a#1", "b.mp4", "b.png", "b.png.mp4", "c.mkv", "c.mp4"
  ]  # fmt: skip
  path = tmp_path / "out" / "manifest.jsonl"
  clips.write_manifest(path, found)
  assert clips.read_manifest(path) == found
  assert clips.read_manifest(path)[0].measured == found[0].measured


def test_a_folder_whose_name_is_no_text(tmp_path):
  folder = tmp_path / "caf\udce9"
  folder.mkdir()
  with pytest.raises(ValueError, match=r"caf\\udce9: its name is not UTF-8"):
    sources.scan(folder, **LIMITS)


def test_suffixes_have_one_list():
  assert not set(media.VIDEO_SUFFIXES) & set(media.IMAGE_SUFFIXES)
  with pytest.raises(ValueError, match=r"cannot write '\.webp', only \.png"):
    writer.write("x.webp", np.zeros((1, 16, 16, 3), np.uint8), 1)
