"""A cache of clips at training size: the same batches, never stale or damaged ones."""

import dataclasses
import json
import os
import pathlib
import tracemalloc

import numpy as np
import pytest
from data.batch_checks import assert_equal, take
from data.media_samples import psnr

from sora_jax.data import cache_filling, pixel_cache
from sora_jax.data.batches import Batches, default_workers
from sora_jax.data.clip_dataset import ClipDataset
from sora_jax.data.clip_reader import read_clip
from sora_jax.data.clips import Clip
from sora_jax.data.records import RecordError
from sora_jax.data.video import short_gop, writer

CROP = (9, 32, 32)


def moving(frames, height, width, phase=0):
  """Smooth colours that move, so that every window of a video is another one."""
  t, y, x = np.meshgrid(*map(np.arange, (frames, height, width)), indexing="ij")
  waves = [
    np.sin((x + 3 * t + phase) / 9),
    np.cos((y - 2 * t) / 7),
    np.sin((x + y) / 9),
  ]
  return (128 + 100 * np.stack(waves, -1)).astype(np.uint8)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """Clips of larger files: videos, an image, two pieces of one video, a broken file."""
  folder = tmp_path_factory.mktemp("files")
  found = []
  for i in range(3):
    writer.write(folder / f"{i}.mp4", moving(34, 96, 128, i), 16.0)
    path = str(folder / f"{i}.mp4")
    found.append(Clip(f"{i}#0", path, 0.0, 17, 16.0, 48, 64))
    found.append(Clip(f"{i}#1", path, 17 / 16, 17, 16.0, 48, 64))
  writer.write(folder / "image.png", moving(1, 96, 128), 1.0)
  found.append(Clip("image", str(folder / "image.png"), 0.0, 1, 1.0, 48, 64))
  (folder / "broken.mp4").write_bytes(b"no video" * 100)
  found.append(Clip("broken", str(folder / "broken.mp4"), 0.0, 17, 16.0, 48, 64))
  found.append(dataclasses.replace(found[0], id="held out", split="heldout"))
  return found


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
  monkeypatch.setattr(pixel_cache, "SHARD_BYTES", 2 * 17 * 48 * 64 * 3)


def made(clips, folder, codec="raw", processes=0):
  shards = pixel_cache.plan(clips, range(len(clips) - 1), folder, codec)
  count = cache_filling.fill(shards, folder, processes=processes)
  return shards, count, cache_filling.open_cache(shards)


def batches_of(clips, cache, workers=0, folder=None):
  dataset = ClipDataset(clips, CROP, 0, cache=cache, bad_clips_folder=folder)
  return take(Batches(dataset, 4, workers=workers), 6)


@pytest.fixture(scope="module")
def cached(clips, tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pixel_cache, "SHARD_BYTES", 2 * 17 * 48 * 64 * 3)
    return made(clips, tmp_path_factory.mktemp("cache"))


def test_batches_are_those_without_a_cache(clips, cached, tmp_path):
  shards, count, cache = cached
  assert count == len(shards) == 4
  want = batches_of(clips, None)
  assert any(not row.any() for batch in want for row in batch["valid_3"])  # broken.mp4
  for got, other in zip(batches_of(clips, cache, folder=tmp_path), want, strict=True):
    assert_equal(got, other)
  row = json.loads((tmp_path / "bad_clips.jsonl").read_text().splitlines()[0])
  assert row["id"] == "broken" and "not a video" in row["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(clips, cached, workers):
  want = batches_of(clips, cached[2])
  for got, other in zip(batches_of(clips, cached[2], workers), want, strict=True):
    assert_equal(got, other)


def test_a_run_goes_on_with_or_without_a_cache(clips, cached, caplog):
  want = batches_of(clips, None)
  batches = Batches(ClipDataset(clips, CROP, 0), 4)
  for _ in range(3):
    next(batches)
  state = json.loads(json.dumps(batches.get_state()))
  batches.close()
  batches = Batches(ClipDataset(clips, CROP, 0, cache=cached[2]), 4)
  batches.set_state(state)
  for got, other in zip(take(batches, 3), want[3:], strict=True):
    assert_equal(got, other)
  assert "not the one of the checkpoint" not in caplog.text


def test_an_interrupted_cache_goes_on(clips, tmp_path):
  shards, _, _ = made(clips, tmp_path)
  kept, times = shards[1:], [os.stat(shard.path).st_mtime_ns for shard in shards]
  os.unlink(shards[0].path)
  with pytest.raises(RecordError, match=r"raw-\w+\.array_record: not in the cache"):
    pixel_cache.PixelCache(shards)
  assert made(clips, tmp_path)[1] == 1
  assert [os.stat(shard.path).st_mtime_ns for shard in kept] == times[1:]
  assert made(clips, tmp_path)[1] == 0
  assert len(list(tmp_path.iterdir())) == len(shards)  # nothing is left behind


def test_what_is_damaged_is_made_again(clips, tmp_path):
  shards, _, cache = made(clips, tmp_path)
  want = cache.read(0, clips[0], 3, 9)
  content = pathlib.Path(shards[0].path).read_bytes()
  pathlib.Path(shards[0].path).write_bytes(content[: len(content) // 2])
  assert made(clips, tmp_path)[1] == 1
  assert pathlib.Path(shards[0].path).read_bytes() == content
  # A flipped bit is found when it is read, and the clip is left out with the reason.
  flipped = bytearray(content)
  flipped[len(content) // 4] ^= 1
  pathlib.Path(shards[0].path).write_bytes(flipped)
  cache = pixel_cache.PixelCache(shards)
  with pytest.raises(RecordError, match=r"raw-\w+\.array_record: records 0 to 2"):
    cache.read(0, clips[0], 0, 17)
  pathlib.Path(shards[0].path).write_bytes(content)
  np.testing.assert_array_equal(cache.read(0, clips[0], 3, 9), want)


def test_a_cache_of_other_files_is_stale(clips, tmp_path, monkeypatch):
  folder = tmp_path / "cache"
  path = tmp_path / "a.mp4"
  writer.write(path, moving(17, 48, 64), 16.0)
  mine = [dataclasses.replace(clips[0], path=str(path)), clips[1], clips[-1]]
  old, _, _ = made(mine, folder)
  (folder / "h264-0123456789abcdef.array_record").touch()
  writer.write(path, moving(17, 48, 64, 40), 16.0)
  new, count, cache = made(mine, folder)
  assert count == 1 and new[0].path != old[0].path
  assert not np.array_equal(
    cache.read(0, mine[0], 0, 17), pixel_cache.PixelCache(old).read(0, mine[0], 0, 17)
  )
  assert pixel_cache.remove_stale(new, folder) == 1
  names = {p.name for p in folder.iterdir()}
  assert names == {
    os.path.basename(new[0].path), "h264-0123456789abcdef.array_record"
  }  # fmt: skip
  # Sizes and code count, captions do not.
  other = [dataclasses.replace(clip, captions=("x",)) for clip in mine]
  assert pixel_cache.plan(other, [0, 1], folder)[0].path == new[0].path
  other = [dataclasses.replace(clip, width=48) for clip in mine]
  assert pixel_cache.plan(other, [0, 1], folder)[0].path != new[0].path
  monkeypatch.setattr(pixel_cache, "_code", lambda: ["newer"])
  assert pixel_cache.plan(mine, [0, 1], folder)[0].path != new[0].path


def test_h264_is_nearly_the_same(clips, tmp_path):
  _, _, cache = made(clips, tmp_path, "h264")
  block = read_clip(clips[0], 0, 8)
  assert len(short_gop.encode(block)) < block.nbytes / 8
  for index in (0, 1, 6):
    want = read_clip(clips[index], 0, clips[index].frames)
    assert psnr(cache.read(index, clips[index], 0, clips[index].frames), want) > 37
    part = cache.read(index, clips[index], clips[index].frames // 2, 1)
    assert psnr(part, want[clips[index].frames // 2 :][:1]) > 37
  plain, lossy = (ClipDataset(clips, CROP, 0, cache=c) for c in (None, cache))
  assert plain.fingerprint != lossy.fingerprint
  with pytest.raises(ValueError, match="damaged group of pictures|0 pictures"):
    short_gop.decode(b"\x91\xc4\x05abcde", 8)


def test_a_file_that_kills_its_decoder_is_left_out(clips, tmp_path, monkeypatch):
  """As `_start` sees it: the process is gone, and a note says at which clip."""

  def start(shards, left_out):
    for shard in shards:
      for clip in shard.clips:
        if clip.id == "1#0" and clip.id not in left_out:
          pixel_cache.note_path(shard.path).write_text(clip.id)
          return -11, "Segmentation fault"
      pixel_cache.write_shard(shard, left_out)
    return 0, ""

  monkeypatch.setattr(cache_filling, "_start", start)
  shards, count, cache = made(clips, tmp_path, processes=2)
  assert count == len(shards)
  assert cache.reasons[2] == "its decoder died (SIGSEGV)"
  assert set(cache.reasons) == {2, 7}
  monkeypatch.setattr(cache_filling, "_start", lambda *_: (1, "No space left"))
  os.unlink(shards[0].path)
  with pytest.raises(OSError, match=r"exit code 1\): No space left"):
    made(clips, tmp_path, processes=2)


@pytest.mark.slow
def test_processes_write_what_one_does(clips, cached, tmp_path):
  shards, _, _ = made(clips, tmp_path, processes=2)
  for shard, want in zip(shards, cached[0], strict=True):
    content = pathlib.Path(shard.path).read_bytes()
    assert content == pathlib.Path(want.path).read_bytes()


def test_memory_is_flat_in_the_number_of_clips(clips, tmp_path):
  peaks = []
  for count in (2, 12):
    many = tuple(dataclasses.replace(clips[0], id=str(i)) for i in range(count))
    shard = pixel_cache.Shard(str(tmp_path / str(count)), "raw", (), many)
    tracemalloc.start()
    pixel_cache.write_shard(shard)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < peaks[0] + pixel_cache.raw_bytes(clips[0])


def test_what_auto_chooses(clips, tmp_path, monkeypatch, caplog):
  def choose(setting="auto", visits=100, generated=False):
    return cache_filling.choose(
      setting, clips, range(8), tmp_path, visits=visits, generated=generated
    )

  assert choose() == "raw"
  assert choose(visits=15) is None
  assert choose(generated=True) is None
  assert choose("h264", generated=True) == "h264" and choose("none") is None
  with monkeypatch.context() as patch:  # tests may run as root, who may write anywhere
    patch.setattr(os, "access", lambda place, mode: place != tmp_path)
    assert choose() is None
  assert f"no cache of clips: {tmp_path} cannot be written" in caplog.text
  needed = sum(pixel_cache.raw_bytes(clip) for clip in clips[:8])
  monkeypatch.setattr(pixel_cache, "free_space", lambda folder: 1.9 * needed)
  assert choose() is None
  assert "no cache of clips: raw frames take" in caplog.text
  shards = pixel_cache.plan(clips, range(8), tmp_path)
  pixel_cache.check_space(shards, tmp_path)
  monkeypatch.setattr(pixel_cache, "free_space", lambda folder: 0.9 * needed)
  with pytest.raises(ValueError, match=r"takes .* GB, but .* GB of the disk are free"):
    cache_filling.fill(shards, tmp_path, processes=0)
  with pytest.raises(ValueError, match=r"one of \('raw', 'h264'\), not 'av1'"):
    pixel_cache.plan(clips, range(8), tmp_path, "av1")


def test_a_disk_that_is_full_is_noticed(clips, tmp_path, monkeypatch):
  """The writer of ArrayRecord says nothing, and the file is cut."""
  real = pixel_cache.open_shard

  def cut(path):
    with open(path, "r+b") as file:
      file.truncate(os.path.getsize(path) // 2)
    return real(path)

  monkeypatch.setattr(pixel_cache, "open_shard", cut)
  shards = pixel_cache.plan(clips, range(2), tmp_path)
  with pytest.raises(OSError, match="could not be written whole; is the disk full"):
    pixel_cache.write_shard(shards[0])
  assert not list(tmp_path.glob("*.array_record"))


def test_workers_are_what_the_machine_has(monkeypatch):
  for cores, want in ((1, 0), (2, 0), (8, 3), (16, 7), (208, 16)):
    monkeypatch.setattr("sora_jax.data.batches.cores", lambda cores=cores: cores)
    assert default_workers() == want
  script = type("Main", (), {"__file__": "/home/me/train.py", "__spec__": None})
  monkeypatch.setitem(__import__("sys").modules, "__main__", script)
  assert default_workers() == 0
