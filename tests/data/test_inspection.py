"""What the page of a run is made of: figures, reasons, rows, and escaped text."""

import dataclasses
import json

import numpy as np
import pytest
from data.media_samples import numbered

from sora_jax.data import clips as manifests
from sora_jax.data.clips import Clip
from sora_jax.data.inspection import (
  figures,
  left_out,
  packed_rows,
  page,
  pictures,
  sections,
)
from sora_jax.data.packed_dataset import PackedOptions, segment_of
from sora_jax.data.records import LatentClip
from sora_jax.data.video import writer
from sora_jax.packing import packed_row
from sora_jax.packing.planner import Budget


def clip(i=0, **changes):
  base = Clip(f"c{i}", f"/x/{i}.mp4", 0.0, 9, 8.0, 64, 96, ("a cat",))
  return dataclasses.replace(base, **changes)


def tokens_of(frames, height, width):
  if height > 64:
    raise ValueError("does not divide")
  return (1 + (frames - 1) // 4) * height * width // 256


# --- figures


def test_figures_of_a_manifest(tmp_path):
  found = [
    clip(0, measured={"digest": "d0"}),
    clip(1, frames=1, captions=("one", "three"), truth={"height": 64, "width": 96}),
    clip(2, height=128, captions=()),
    clip(3, split="heldout"),
  ]  # fmt: skip
  manifests.write_manifest(tmp_path / "manifest.jsonl", found)
  info = {"info": {"height": 720, "width": 720}, "digest": "d0"}
  ledger = [{"measure": "1"}, {"key": "k", "result": {"record": info}}]
  ledger += [{"key": "s", "result": {"record": {"aesthetic": 1.0}}},
             {"key": "r", "result": {"reason": "damaged"}}]  # fmt: skip
  manifests.write_lines(tmp_path / "measured.jsonl", map(json.dumps, ledger))
  made = figures.measure(tmp_path, tokens_of, sample=10)
  assert made.splits == {"train": 3, "heldout": 1}
  assert (made.images, made.silent, made.unknown, made.misfits) == (1, 1, 1, 1)
  assert made.sizes == {(96, 64): 2, (96, 128): 1}
  assert made.seconds.tolist() == [1.125] * 2 and made.fps.tolist() == [8.0] * 2
  assert made.tokens.tolist() == [72, 24]
  assert made.caption_lengths.tolist() == [5, 3, 5]
  np.testing.assert_allclose(made.cropped, [1 / 3, 0], rtol=1e-6)
  assert [c.id for c in made.sample] == ["c0", "c1", "c2"]


@pytest.mark.parametrize(
  "size, crop, lost",
  [
    ((64, 96), None, 0),
    ((640, 960), None, 0),
    ((100, 100), None, 1 / 3),  # 96 x 64 of 96 x 96
    ((128, 96), (0.25, 0.0, 0.25, 0.0), 0),  # bars are no part of the picture
    ((64, 192), None, 0.5),
  ],
)
def test_pixels_lost_to_the_crop(size, crop, lost):
  assert figures.lost_to_crop(*size, clip(crop=crop)) == pytest.approx(lost)


def test_a_reservoir_is_fair_and_ordered():
  seen = np.zeros(40)
  kept = figures.Reservoir(8)
  for i in range(40):
    kept.add(i)
  assert list(kept) == sorted(kept) and len(list(kept)) == 8
  for seed in range(400):
    kept = figures.Reservoir(8)
    kept._random.seed(seed)
    for i in range(40):
      kept.add(i)
    seen[list(kept)] += 1
  assert 50 < seen.min() and seen.max() < 115  # 80 of each, give or take 4 deviations
  assert list(figures.Reservoir(0)) == []


def test_no_clips_are_a_page_too(tmp_path):
  manifests.write_manifest(tmp_path / "manifest.jsonl", [])
  shown = sections.clips(figures.measure(tmp_path, tokens_of, 4))
  assert "0, of which 0 images" in shown and "not known" in shown


# --- what was left out


def test_reasons_are_counted_by_kind(tmp_path):
  reasons = [
    ("/d/a.mp4", "too short: 3 frames at 8 fps, 5 needed"),
    ("/d/b.mp4", "too short: 4 frames at 23.98 fps, 5 needed"),
    ("/d/l.mp4", "a link to /d/a.mp4, which is used"),
    ("/d/m.mp4", "a link to /d/b.mp4, which is used"),
    ("/d/c.mp4", "clip c#0: motion 0.1 is below 1.0"),
    ("/d/\udcff.mp4", "its name is not UTF-8"),
  ]
  rows = [json.dumps({"path": path, "reason": reason}) for path, reason in reasons]
  manifests.write_lines(tmp_path / "data" / "rejected.jsonl", rows)
  bad = [json.dumps({"id": "e", "reason": "damaged"})] * 2
  manifests.write_lines(tmp_path / "encode" / "bad_clips.jsonl", bad)
  kinds = left_out.kinds(tmp_path, examples=1)
  assert [(kind.stage, kind.reason, kind.count) for kind in kinds] == [
    ("data", "too short: N frames at N fps, N needed", 2),
    ("data", "a link to \N{HORIZONTAL ELLIPSIS} which is used", 2),
    ("data", "motion N is below N", 1),
    ("data", "its name is not UTF-8", 1),
    ("encode", "damaged", 1),
  ]
  assert all(len(kind.examples) == 1 for kind in kinds)
  shown = sections.left_out(kinds)
  shown.encode()  # a name that is no UTF-8 is shown all the same
  assert "7 files or clips." in shown and "udcff" in shown
  assert left_out.kinds(tmp_path / "nowhere") == []


def test_many_kinds_of_reasons_are_one_row(tmp_path):
  rows = [{"path": f"/d/{i}", "reason": "x" * i} for i in range(1, 101)]
  manifests.write_lines(tmp_path / "data" / "rejected.jsonl", map(json.dumps, rows))
  kinds = left_out.kinds(tmp_path)
  assert len(kinds) == 41 and sum(kind.count for kind in kinds) == 100
  assert kinds[0].reason == "other reasons" and kinds[0].count == 60


def test_pictures_of_what_was_left_out(tmp_path):
  path = tmp_path / "short.mp4"
  writer.write(path, numbered(3), 8)
  assert pictures.first_frame(str(path), "too short").shape == numbered(1)[0].shape
  crashed = "its decoder has crashed the process that measured it (signal 11)"
  assert pictures.first_frame(str(path), crashed) is None
  assert pictures.first_frame(str(tmp_path / "gone.mp4"), "") is None
  # FFmpeg would follow such a list.
  playlist = tmp_path / "list.m3u8"
  playlist.write_text(f"#EXTM3U\n#EXTINF:1,\n{path}\n")
  assert pictures.first_frame(str(playlist), "not a video or an image: .m3u8") is None


# --- rows


SHAPE, PATCH = (3, 4, 6), (1, 2, 2)


@pytest.fixture(scope="module")
def seen():
  """(row, its segments, records): a clip with two images and a box of given patches,
  and an image."""
  rng = np.random.default_rng(0)
  options = PackedOptions(Budget(60, 20, 4), PATCH, 16.0, given_prob=0.0)
  clips, segments, records = [], [], []
  for i, (t, extras) in enumerate([(3, (0.5, 1.25, 1.5)), (1, ())]):
    clips.append(LatentClip(f"c{i}", "s", i, (t, *SHAPE[1:]), 8.0, ("a",), "train",
                            extras, 1 + 4 * (t - 1), 32, 48))  # fmt: skip
    records.append({
      "latent_THWC": rng.standard_normal((t, *SHAPE[1:], 3)).astype(np.float32),
      "extras_NHWC": rng.random((len(extras), *SHAPE[1:], 3), np.float32),
    })  # fmt: skip
    text = np.array([7 + i, 1], np.int32)
    count = min(2, len(extras))
    segment = segment_of(rng, clips[i], records[i], count, text, options)
    segments.append(segment._replace(clip=i))
  given_THW = np.zeros((3, 2, 3), bool)
  given_THW[:, 0, 1:] = True
  segments[0].given_L[:18] = given_THW.reshape(-1)
  size = packed_row.RowSize(options.budget, 12)
  row = packed_row.empty(packed_row.PackedRow, size)
  rows_writer = packed_row.RowWriter(row)
  for segment in segments:
    rows_writer.add(segment)
  return row, packed_rows.segments_of(row, clips, PATCH), records, given_THW


def test_segments_are_read_from_their_tokens(seen):
  _, (video, image), records, given_THW = seen
  np.testing.assert_array_equal(video.latent_THWC, records[0]["latent_THWC"])
  np.testing.assert_array_equal(image.latent_THWC, records[1]["latent_THWC"])
  assert video.tokens == 18 + 2 * 6 and image.tokens == 6
  np.testing.assert_array_equal(video.given_THW, given_THW)
  assert not image.given_THW.any() and image.images_NHWC.shape == (0, 4, 6, 3)
  kept = records[0]["extras_NHWC"]
  for latent_HWC in video.images_NHWC:
    assert any(np.array_equal(latent_HWC, other) for other in kept)
  assert video.text_S.tolist() == [7, 1] and image.text_S.tolist() == [8, 1]


def test_rows_are_drawn_with_borders_and_given_patches(seen):
  row, (video, image), _, _ = seen
  bar = packed_rows.bar(row)
  # 60 tokens: 30 of the video, of which 12 are images, 6 of the image, padding.
  assert [tuple(bar[0, x]) for x in (10, 550, 990)] == [
    packed_rows.COLOURS[0], packed_rows.COLOURS[1], (225, 225, 225)]  # fmt: skip
  assert tuple(bar[0, 500]) == (0, 0, 0)  # where a segment begins
  assert tuple(bar[-1, 400]) == packed_rows.GIVEN != tuple(bar[-1, 550])

  def decode(latent_THWC):
    t, h, w = latent_THWC.shape[:3]
    return np.full((1 + 4 * (t - 1), 8 * h, 8 * w, 3), 90, np.uint8)

  drawn = packed_rows.picture(video, 0, decode)
  assert tuple(drawn[0, 0]) == packed_rows.COLOURS[0]
  frames = 3 + 2  # of 144 x 96 pixels each, 3 apart
  assert drawn.shape == (96 + 8, frames * 144 + 4 * 3 + 8, 3)
  inside = drawn[4:-4, 4:-4]
  yellow = (inside == packed_rows.GIVEN).all(-1)
  assert (
    yellow[0, 60:140].all() and not yellow[:, :46].any()
  )  # a box at the upper right
  assert not yellow[50:].any(where=(np.arange(yellow.shape[1]) < 144)[None])
  assert yellow[-1, 3 * 147 : 3 * 147 + 144].all()  # the first of the images
  still = packed_rows.picture(image, 1, decode)
  assert still.shape == (104, 152, 3) and tuple(still[0, 0]) == packed_rows.COLOURS[1]


# --- text


@pytest.mark.parametrize(
  "value, shown",
  [
    (
      "<script>alert('x')</script>",
      "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;",
    ),
    ('" onload="', "&quot; onload=&quot;"),
    ("a\nb\x00\u202e", "a\\nb\\x00\\u202e"),
    ("\udc80 grüße 猫", "\\udc80 grüße 猫"),
  ],
)
def test_text_is_escaped(value, shown):
  assert page.text(value) == shown


def test_long_text_is_cut():
  assert len(page.text("x" * 100_000)) == 300


def test_a_clip_that_cannot_be_read_is_said(tmp_path):
  gone = clip(path=str(tmp_path / "gone.mp4"), captions=("<b>bold</b>",))
  shown = sections.contact_sheet([gone])
  assert "cannot be read" in shown and "&lt;b&gt;" in shown and "<img" not in shown
