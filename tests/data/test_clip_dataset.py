"""Pixel clips: windows, padding, damage, exact resume."""

import dataclasses
import json

import numpy as np
import pytest
from data.batch_checks import assert_equal, rows_of, take

from sora_jax.data.batches import Batches
from sora_jax.data.clip_dataset import ClipDataset
from sora_jax.data.clips import Clip
from sora_jax.data.video import writer


def ramp(frames, height, width):
  """A video in which time is red, y green and x blue."""
  t, y, x = np.meshgrid(*map(np.arange, (frames, height, width)), indexing="ij")
  return np.stack([7 * t, 3 * y, 3 * x], -1).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pixels")
  clips = []
  for i in range(9):
    frames, height, width = [(17, 32, 48), (1, 48, 32), (9, 32, 32)][i % 3]
    path = str(folder / f"{i}.{'png' if frames == 1 else 'mp4'}")
    writer.write(path, ramp(frames, height, width), 16.0)
    split = "heldout" if i == 8 else "train"
    clips.append(Clip(str(i), path, 0.0, frames, 16.0, height, width, (), split, None))
  return clips


CROP = (9, 32, 32)


def test_clip_elements(pixels):
  dataset = ClipDataset(pixels, CROP, seed=0)
  assert dataset.elements_per_epoch() == 8
  visited, windows = [], set()
  for i in range(8 * 6):
    element = dataset[i]
    assert element["video_THWC"].shape == (*CROP, 3)
    assert element["video_THWC"].dtype == np.uint8
    assert element["valid_3"].dtype == element["clip"].dtype == np.int32
    clip = pixels[element["clip"]]
    t, h, w = element["valid_3"]
    assert (t, h, w) == (min(9, clip.frames), 32, 32)
    visited.append(int(element["clip"]))
    # The colours of the first pixel tell where the window was.
    corner = element["video_THWC"][0, :2, :2].reshape(-1, 3).mean(0)
    window = np.round((corner - [0, 1.5, 1.5]) / [7, 3, 3]).astype(int)
    windows.add((clip.frames, *window.tolist()))
    size = np.array([clip.frames - t, clip.height - h, clip.width - w])
    assert np.all(window >= -1) and np.all(window <= size + 1)
    if t < 9:
      np.testing.assert_array_equal(
        element["video_THWC"][t:], np.repeat(element["video_THWC"][t - 1 : t], 9 - t, 0)
      )
    want = ramp(clip.frames, clip.height, clip.width)
    first, top, left = np.clip(window, 0, size)
    want = want[first : first + t, top : top + 32, left : left + 32].astype(int)
    assert np.abs(element["video_THWC"][:t] - want).mean() < 6
  for epoch in range(6):
    assert sorted(visited[8 * epoch : 8 * epoch + 8]) == list(range(8))
  assert visited[:8] != visited[8:16]
  assert len({w for w in windows if w[0] == 17}) > 8


def test_small_clips_are_padded_with_the_edge(pixels):
  element = ClipDataset(pixels, (9, 64, 64), seed=0)[0]
  t, h, w = element["valid_3"]
  assert (h, w) == (pixels[element["clip"]].height, pixels[element["clip"]].width)
  inside = element["video_THWC"][:t, :h, :w]
  np.testing.assert_array_equal(
    element["video_THWC"],
    np.pad(inside, ((0, 9 - t), (0, 64 - h), (0, 64 - w), (0, 0)), mode="edge"),
  )


def test_clip_draws_are_deterministic(pixels):
  want = [ClipDataset(pixels, CROP, seed=0)[i] for i in range(12)]
  batches = Batches(ClipDataset(pixels, CROP, seed=0), 4)
  next(batches)
  state = json.loads(json.dumps(batches.get_state()))
  batches.close()
  pair = [
    Batches(ClipDataset(pixels, CROP, 0), 4, process_index=i, process_count=2)
    for i in range(2)
  ]
  for batches in pair:
    batches.set_state(state)
  got = rows_of([take(batches, 2) for batches in pair])
  for i in range(8):
    assert_equal({k: v[i % 4] for k, v in got[i // 4].items()}, want[4 + i])


def test_bad_files_are_left_out(pixels, tmp_path):
  broken = str(tmp_path / "broken.mp4")
  with open(pixels[0].path, "rb") as f:
    data = f.read()
  with open(broken, "wb") as f:
    f.write(data[: len(data) // 2])
  clips = [
    pixels[0],
    dataclasses.replace(pixels[0], id="broken", path=broken),
    dataclasses.replace(pixels[0], id="gone", path=str(tmp_path / "gone.mp4")),
    dataclasses.replace(pixels[0], id="short", frames=401),
  ]
  dataset = ClipDataset(clips, CROP, 0, bad_clips_folder=str(tmp_path))
  bad = 0
  for i in range(8):
    element = dataset[i]
    assert element["video_THWC"].shape == (*CROP, 3)
    if not element["valid_3"].any():
      assert not element["video_THWC"].any()
      assert element["clip"] == -1 and element["clip_unreadable"] in (1, 2, 3)
      bad += 1
    else:
      assert element["clip"] == 0 and element["clip_unreadable"] == -1
  assert bad >= 4
  with open(tmp_path / "bad_clips.jsonl") as f:
    reasons = {line["id"]: line["reason"] for line in map(json.loads, f)}
  assert {"broken", "gone"} <= reasons.keys()
  assert all(reasons.values())
  assert "0" not in reasons


def test_a_clip_to_leave_out_is_padding_and_no_other_changes(pixels):
  whole = ClipDataset(pixels, CROP, 0)
  without = ClipDataset(pixels, CROP, 0, leave_out=["3"])
  assert without.fingerprint == whole.fingerprint
  for i in range(16):
    want, got = whole[i], without[i]
    if want["clip"] == 3:
      assert got["clip"] == got["clip_unreadable"] == -1
      assert not got["valid_3"].any() and not got["video_THWC"].any()
    else:
      assert_equal(got, want)


def test_clip_errors(pixels):
  with pytest.raises(ValueError, match=r"a crop has 1 \+ 4k frames, got 16"):
    ClipDataset(pixels, (16, 32, 32), 0)
  with pytest.raises(ValueError, match="no clip of split 'train' among 1 clips"):
    ClipDataset(pixels[8:], CROP, 0)
