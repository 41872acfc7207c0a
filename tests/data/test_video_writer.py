"""What is written reads back, with the same bytes each time."""

import av
import numpy as np
import pytest
from data.media_samples import noise, numbered, numbers, psnr

from sora_jax.data.video import probe, reader, writer


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".gif"])
def test_written_video_reads_back(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"
  want = numbered(17)
  writer.write(path, want, 12, metadata={"prompt": "ein grüner Kreis"})
  info = probe.probe(path)
  assert (info.frames, info.height, info.width, info.is_image) == (17, 48, 64, False)
  assert info.fps == pytest.approx(12, rel=0.01)
  assert info.duration == pytest.approx(17 / 12, abs=0.02)
  got = reader.read(path)
  assert got.dtype == np.uint8 and got.shape == want.shape
  assert psnr(got, want) > 36
  np.testing.assert_array_equal(reader.read(path, frames=17, fps=12), got)
  # Every start and rate gives the frame on screen at that time.
  assert numbers(reader.read(path, start=5 / 12, fps=6, frames=6), 17) == [
    5, 7, 9, 11, 13, 15,
  ]  # fmt: skip
  assert numbers(reader.read(path, fps=24, frames=4), 17) == [0, 0, 1, 1]
  assert list(tmp_path.iterdir()) == [path]  # nothing half written left behind


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".gif", ".png"])
def test_same_frames_give_same_bytes(tmp_path, suffix):
  frames = numbered(1 if suffix == ".png" else 9)
  for name in "ab":
    writer.write(tmp_path / f"{name}{suffix}", frames, 8)
  first, second = (tmp_path / f"{name}{suffix}" for name in "ab")
  assert first.read_bytes() == second.read_bytes()


def test_metadata_is_kept(tmp_path):
  path = tmp_path / "a.mp4"
  writer.write(path, numbered(5), 8, metadata={"prompt": "a red circle", "seed": 3})
  with av.open(str(path)) as container:
    assert container.metadata["prompt"] == "a red circle"
    assert container.metadata["seed"] == "3"


def test_odd_sizes_are_padded(tmp_path):
  path = tmp_path / "odd.mp4"
  want = numbered(5, 47, 63)
  writer.write(path, want, 8)
  got = reader.read(path)
  assert got.shape == (5, 48, 64, 3)
  assert psnr(got[:, :47, :63], want) > 36
  gif = tmp_path / "odd.gif"
  writer.write(gif, want, 8)
  assert reader.read(gif).shape == want.shape


def test_write_refuses_what_it_cannot_write(tmp_path):
  for array, fps, name, word in (
    (noise(2).astype(np.float32), 8, "a.mp4", "float32"),
    (noise(2)[..., 0], 8, "a.mp4", r"\(2, 64, 64\)"),
    (noise(2)[:0], 8, "a.mp4", "empty"),
    (noise(2), 0, "a.mp4", "fps must be positive, not 0"),
    (noise(2), 8, "a.avi", "'.avi'"),
  ):
    with pytest.raises(ValueError, match=word):
      writer.write(tmp_path / name, array, fps)
  assert not list(tmp_path.iterdir())
