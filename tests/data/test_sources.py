"""Folders of media, with captions in a manifest, beside the files, or missing."""

import json
import math
import shutil

import numpy as np
import PIL.Image
import pytest
from data.media_samples import noise

from sora_jax.data import clips, sources
from sora_jax.data.video import reader, writer

_LIMITS = {"max_frames": 17, "max_pixels": 64 * 64, "size_multiple": 16}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
  """A folder with one short video, to copy from."""
  path = tmp_path_factory.mktemp("media") / "a.mp4"
  frames = np.full((10, 48, 64, 3), 90, np.uint8)
  frames += np.arange(10, dtype=np.uint8)[:, None, None, None]
  writer.write(path, frames, 10)
  return path


def _manifest(folder, *rows):
  text = "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows)
  (folder / "manifest.jsonl").write_text(text)


def test_folder_with_captions_beside_the_files(tmp_path, media):
  shutil.copy(media, tmp_path / "one.MP4")
  (tmp_path / "one.txt").write_text("a grey scene\n\n  getting lighter \n")
  (tmp_path / "deep" / "er").mkdir(parents=True)
  PIL.Image.new("L", (200, 100)).save(tmp_path / "deep" / "er" / "two.JPEG")
  (tmp_path / "notes.pdf").write_text("not media")
  found, rejected = sources.scan(tmp_path, **_LIMITS)
  assert rejected == [(str(tmp_path / "notes.pdf"), "not a video or an image: .pdf")]
  image, one = found
  assert one == clips.Clip(
    "one", str(tmp_path / "one.MP4"), 0.0, 9, 10.0, 48, 64,
    ("a grey scene", "getting lighter"),
  )  # fmt: skip
  assert (image.id, image.frames, image.fps) == ("deep/er/two", 1, 1.0)
  assert (image.height, image.width, image.captions) == (48, 80, ())


def test_manifest_says_what_to_use(tmp_path, media):
  for name in ("a.mp4", "c.mp4", "unused.mp4"):
    shutil.copy(media, tmp_path / name)
  writer.write(tmp_path / "b.mp4", noise(10, 48, 64), 10)
  _manifest(
    tmp_path,
    {"path": "a.mp4", "caption": "one"},
    "\n",
    {"path": "b.mp4", "captions": ["one", "two"], "split": "heldout"},
    {"path": "c.mp4", "truth": {"count": 1}},
  )
  found, rejected = sources.scan(tmp_path, **_LIMITS)
  assert rejected == [(str(tmp_path / "unused.mp4"), "not in the manifest")]
  assert [clip.id for clip in found] == ["a", "b", "c"]
  assert [clip.captions for clip in found] == [("one",), ("one", "two"), ()]
  assert [clip.split for clip in found] == ["train", "heldout", "train"]
  assert found[2].truth == {"count": 1}


@pytest.mark.parametrize("copy", ["bytes", "codec"])
def test_an_unmarked_copy_of_a_heldout_clip_is_held_out(tmp_path, media, copy, caplog):
  caplog.set_level("INFO", logger="absl")
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (4, 1, 6, 8, 3), np.uint8)
  videos = np.broadcast_to(coarse.repeat(8, 2).repeat(8, 3), (4, 9, 48, 64, 3))
  for name, video in zip("abcd", videos, strict=True):
    writer.write(tmp_path / f"{name}.mp4", video, 10)
  if copy == "bytes":
    shutil.copy(tmp_path / "a.mp4", tmp_path / "again.mp4")
    shutil.copy(tmp_path / "b.mp4", tmp_path / "more.mp4")
  else:
    writer.write(tmp_path / "again.mp4", videos[0], 10, crf=35)
    writer.write(tmp_path / "more.mp4", videos[1], 10, crf=35)
  rows = [{"path": f"{name}.mp4"} for name in ("again", "b", "c", "d", "more")]
  rows[1]["split"] = "train"
  options = {**_LIMITS, "heldout_share": 0.9}

  def splits(split_of_a):
    _manifest(tmp_path, {"path": "a.mp4", "split": split_of_a}, *rows)
    found, _ = sources.scan(tmp_path, **options)
    assert len(found) == 6
    return {clip.id: clip.split for clip in found}

  found = splits("heldout")
  assert found["a"] == found["again"] == "heldout"
  assert found["b"] == found["more"] == "train"
  assert "1 unmarked clips are copies of held-out ones" in caplog.text
  assert splits("train")["again"] == "train"
  # Where both are marked, both stay, and are named.
  rows[0]["split"] = "train"
  assert splits("heldout")["again"] == "train"
  assert f"{tmp_path}/again.mp4 is marked to be trained on, but shows the same as " \
    f"{tmp_path}/a.mp4, which is held out" in caplog.text  # fmt: skip
  assert "1 clips are trained on that show the same as held-out ones" in caplog.text


def test_long_videos_are_cut(tmp_path):
  frames = np.repeat(np.arange(44, dtype=np.uint8) * 5, 48 * 64 * 3)
  frames = frames.reshape(44, 48, 64, 3)
  writer.write(tmp_path / "long.mp4", frames, 20)
  found, _ = sources.scan(tmp_path, **_LIMITS)
  assert [c.id for c in found] == ["long#0", "long#1", "long#2"]
  assert [c.frames for c in found] == [17, 17, 9]
  assert [c.start for c in found] == pytest.approx([0.0, 0.85, 1.7])
  for clip in found:
    got = reader.read(
      clip.path, start=clip.start, frames=clip.frames, fps=clip.fps,
      size=(clip.height, clip.width),
    )  # fmt: skip
    first = round(clip.start * 20)
    want = np.arange(first, first + clip.frames) * 5
    np.testing.assert_allclose(got.mean(axis=(1, 2, 3)), want, atol=2)
  slow, _ = sources.scan(tmp_path, fps=5, **_LIMITS)
  assert [(c.frames, c.fps, c.start) for c in slow] == [(9, 5, 0.0)]
  found, _ = sources.scan(tmp_path, **{**_LIMITS, "max_frames": 41})
  assert [(c.id, c.frames) for c in found] == [("long", 41)]  # 3 frames are left out


def test_bad_files_are_listed_and_left_out(tmp_path, media):
  shutil.copy(media, tmp_path / "good.mp4")
  (tmp_path / "empty.mp4").write_bytes(b"")
  (tmp_path / "text.webm").write_text("hello " * 100)
  data = media.read_bytes()
  (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
  writer.write(tmp_path / "short.mp4", np.zeros((3, 32, 32, 3), np.uint8), 10)
  found, rejected = sources.scan(tmp_path, **_LIMITS)
  assert [clip.id for clip in found] == ["good"]
  reasons = {path.rsplit("/", 1)[1]: reason for path, reason in rejected}
  assert set(reasons) == {"empty.mp4", "text.webm", "cut.mp4", "short.mp4"}
  assert reasons["empty.mp4"] == "empty file (0 bytes)"
  assert "3 frames" in reasons["short.mp4"] and "5 needed" in reasons["short.mp4"]


def test_folders_that_cannot_be_used(tmp_path):
  with pytest.raises(ValueError, match="nowhere: no such folder"):
    sources.scan(tmp_path / "nowhere", **_LIMITS)
  with pytest.raises(ValueError, match=f"{tmp_path}: no media files"):
    sources.scan(tmp_path, **_LIMITS)
  (tmp_path / "a.mp4").write_bytes(b"")
  with pytest.raises(ValueError, match=r"none of 1 media files.*a\.mp4: empty file"):
    sources.scan(tmp_path, **_LIMITS)


@pytest.mark.parametrize(
  "row, message",
  [
    ("{broken\n", r"manifest\.jsonl:2: not JSON"),
    ("[1, 2]\n", r"manifest\.jsonl:2: a JSON object is needed, not list"),
    ({"caption": "x"}, r'manifest\.jsonl:2: "path" must be'),
    ({"path": "gone.mp4"}, r"manifest\.jsonl:2: no such file: .*gone\.mp4"),
    ({"path": "a.mp4"}, r"manifest\.jsonl:2: a\.mp4 occurs twice"),
    ({"path": "b.mp4", "caption": 3}, r"manifest\.jsonl:2: .*not \[3\]"),
    ({"path": "b.mp4", "captions": "x"}, r"manifest\.jsonl:2: .*not 'x'"),
    ({"path": "b.mp4", "split": "test"}, r"manifest\.jsonl:2: .*not 'test'"),
  ],
)
def test_wrong_manifests_name_the_line(tmp_path, media, row, message):
  for name in ("a.mp4", "b.mp4"):
    shutil.copy(media, tmp_path / name)
  _manifest(tmp_path, {"path": "a.mp4", "caption": "fine"}, row)
  with pytest.raises(ValueError, match=message):
    sources.scan(tmp_path, **_LIMITS)


def test_captions_that_are_not_utf8(tmp_path, media):
  shutil.copy(media, tmp_path / "a.mp4")
  (tmp_path / "a.txt").write_bytes(b"caf\xe9")
  with pytest.raises(ValueError, match=r"a\.txt: captions must be UTF-8"):
    sources.scan(tmp_path, **_LIMITS)


def test_heldout_share_depends_on_content_only(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(40):
    pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
    PIL.Image.fromarray(pixels).resize((64, 64)).save(tmp_path / f"{i}.png")
  found, _ = sources.scan(tmp_path, heldout_share=0.3, **_LIMITS)
  first = {clip.id: clip.split for clip in found}
  assert 4 <= sum(split == "heldout" for split in first.values()) <= 20
  # Other files, and other names of the same ones, move none.
  (tmp_path / "deep").mkdir()
  for i in range(40):
    (tmp_path / f"{i}.png").rename(tmp_path / "deep" / f"b{i}.png")
  PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "more.png")
  found, _ = sources.scan(tmp_path, heldout_share=0.3, **_LIMITS)
  again = {c.id.removeprefix("deep/b"): c.split for c in found if c.id != "more"}
  assert again == first


def test_same_stem_gives_two_ids(tmp_path, media):
  shutil.copy(media, tmp_path / "a.mp4")
  PIL.Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
  found, _ = sources.scan(tmp_path, **_LIMITS)
  assert [clip.id for clip in found] == ["a.mp4", "a.png"]


def test_legal_sizes():
  assert sources.legal_size(64, 96, 64 * 96, 16) == (64, 96)
  assert sources.legal_size(1080, 1920, 256 * 256, 16) == (192, 336)
  rng = np.random.default_rng(0)
  for _ in range(300):
    height, width = (int(x) for x in rng.integers(8, 2000, 2))
    limit = int(rng.integers(64 * 64, 512 * 512))
    h, w = sources.legal_size(height, width, limit, 16)
    assert h % 16 == w % 16 == 0 and min(h, w) >= 16 and h * w <= limit
    assert h < height + 16 and w < width + 16
    if min(h, w) >= 64:
      assert abs(math.log(h * width / (w * height))) < 0.25
  with pytest.raises(ValueError, match="max_pixels 100 .* 16x16"):
    sources.legal_size(64, 64, 100, 16)


def test_clips_of_no_frame_are_refused(tmp_path):
  with pytest.raises(ValueError, match="at least 1 frame is needed, not 0"):
    sources.scan(tmp_path, max_frames=0, max_pixels=64 * 64, size_multiple=16)


def test_manifest_round_trip(tmp_path):
  folder = tmp_path / "a"
  want = [
    clips.Clip("x#0", str(folder / "x.mp4"), 0.5, 9, 12.0, 64, 96, ("é",), "train"),
    clips.Clip("y", str(tmp_path / "y.png"), 0.0, 1, 1.0, 64, 64, truth={"count": 1}),
  ]
  clips.write_manifest(folder / "clips.jsonl", want)
  assert clips.read_manifest(folder / "clips.jsonl") == want
  folder.rename(tmp_path / "b")  # paths in it are relative
  moved = clips.read_manifest(tmp_path / "b" / "clips.jsonl")
  assert moved[0].path == str(tmp_path / "b" / "x.mp4")
  with pytest.raises(ValueError, match="no such manifest"):
    clips.read_manifest(folder / "clips.jsonl")
  path = tmp_path / "b" / "clips.jsonl"
  path.write_text(path.read_text() + '{"id": 3}\n')
  with pytest.raises(ValueError, match=r"clips\.jsonl:3: not a clip"):
    clips.read_manifest(path)
