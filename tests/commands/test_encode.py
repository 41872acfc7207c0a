"""Encoding: exact padding, extras, sizes, resume by shard, damaged clips."""

import copy
import dataclasses
import json
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
import tiny

from sora_jax import encode, train_dit
from sora_jax.data import buckets, records
from sora_jax.data.bad_clips import BadClips
from sora_jax.data.clips import Clip, write_manifest
from sora_jax.data.video import reader, writer
from sora_jax.encoders.autoencoder import Autoencoder
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding
from sora_jax.runtime.limits import UnreadableError


@pytest.fixture(scope="module")
def autoencoder(tiny_run):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return Autoencoder(tiny_run.workdir / "vae" / "model", mesh)


RECIPE = recipes.read(tiny.get_config())
CONFIG = recipes.Encode(batch_size=2, extras=2, frame_buckets=(1, 9))


def make_clip(path, frames=9, split="train"):
  rng = np.random.default_rng([frames, *path.name.encode()])
  noise = rng.integers(0, 256, (frames, 8, 8, 3), np.uint8)
  writer.write(path, noise.repeat(8, axis=1).repeat(8, axis=2), 8)
  return Clip(path.stem, str(path), 0.0, frames, 8.0, 64, 64, ("noise",), split)


def spoil(clip):
  """Damages a file behind its first frames, so that only reading all of it can tell."""
  with open(clip.path, "r+b") as file:
    size = file.seek(0, 2)
    file.seek(size // 2)
    file.write(b"\xff" * (size - size // 2))


def encoded(clips, autoencoder, config=CONFIG, seed=0, folder=None, given=None):
  """id -> record, before it is rounded to float16."""
  bad_clips = BadClips(folder)
  made = encode.encode_clips(clips, autoencoder, config, seed, bad_clips, None, given)
  return {record["id"]: record for record in made}


# --- what a record holds


def test_padding_in_time_is_exact(autoencoder, tmp_path):
  clips = [make_clip(tmp_path / f"{frames}.mp4", frames) for frames in (5, 9)]
  short = encoded(clips[:1], autoencoder)["5"]["latent_THWC"]
  both = encoded(clips, autoencoder)
  padded = both["5"]["latent_THWC"]
  assert padded.shape == short.shape == (2, 8, 8, 4)
  assert both["9"]["latent_THWC"].shape == (3, 8, 8, 4)
  np.testing.assert_allclose(padded, short, atol=1e-5)
  # And none at all: the video by itself, of 5 frames.
  video_THWC = reader.read(clips[0].path)
  (alone,) = autoencoder.encode(video_THWC[None])
  assert np.std(alone) > 0.1
  np.testing.assert_allclose(padded, alone, atol=1e-5)


def test_long_clips_are_streamed_to_the_same_latents(autoencoder, tmp_path):
  """Also beside clips of other lengths, and beside one that is damaged."""
  clips = [make_clip(tmp_path / f"{frames}.mp4", frames) for frames in (5, 9, 17, 21)]
  whole = encoded(clips, autoencoder, dataclasses.replace(CONFIG, frame_buckets=(21,)))
  config = dataclasses.replace(CONFIG, stream_frames=4)
  (tmp_path / "bad.mp4").write_bytes((tmp_path / "9.mp4").read_bytes())
  bad = dataclasses.replace(clips[1], id="bad", path=str(tmp_path / "bad.mp4"))
  spoil(bad)
  parts = encoded([*clips, bad], autoencoder, config)
  assert parts.keys() == whole.keys() == {"5", "9", "17", "21"}
  for name, record in whole.items():
    assert parts[name]["extras"] == record["extras"]
    for array in ("latent_THWC", "extras_NHWC"):
      assert parts[name][array].shape == record[array].shape
      np.testing.assert_allclose(parts[name][array], record[array], atol=1e-5)


class Ends:
  """In place of `GivenFrames`: keeps the first and the last frame as they come."""

  def frames(self, count):
    return {0, count - 1}

  def encode(self, clip, frames):
    return {"ends": frames}


@pytest.mark.parametrize("stream_frames", [4, 128])
def test_given_frames_are_decoded_with_the_clip(autoencoder, tmp_path, stream_frames):
  """Of whole clips, of clips in parts and of an image, and beside extras."""
  clips = [make_clip(tmp_path / f"{frames}.mp4", frames) for frames in (9, 17)]
  clips.append(make_clip(tmp_path / "1.png", 1))
  config = dataclasses.replace(CONFIG, stream_frames=stream_frames, frame_buckets=(17,))
  made = encoded(clips, autoencoder, config, given=Ends())
  assert made.keys() == {"9", "17", "1"}
  for clip in clips:
    video_THWC = reader.read(clip.path)
    assert made[clip.id]["ends"].keys() == {0, clip.frames - 1}
    for at, frame_HWC in made[clip.id]["ends"].items():
      np.testing.assert_array_equal(frame_HWC, video_THWC[at])
    assert len(made[clip.id]["extras"]) == (2 if clip.frames > 1 else 0)


def test_memory_is_flat_in_the_length_of_clips(autoencoder, tmp_path):
  """Of frames, which are what is large; the VAE's own are those of one part."""
  config = dataclasses.replace(CONFIG, stream_frames=8, extras=0, batch_size=1)

  def peak(frames):
    clip = make_clip(tmp_path / f"{frames}.mp4", frames)
    encoded([clip], autoencoder, config)  # compiles
    tracemalloc.start()
    peaks = []
    try:
      # Beside other work, threads now and then hold a part more for a moment.
      for _ in range(3):
        tracemalloc.reset_peak()
        encoded([clip], autoencoder, config)
        peaks.append(tracemalloc.get_traced_memory()[1])
      return min(peaks)
    finally:
      tracemalloc.stop()

  # Both are long enough that a part is read while another is encoded.
  short, long = peak(65), peak(129)
  one_frame = 64 * 64 * 3
  assert short > 8 * one_frame  # a part of 8 frames is seen
  assert long < short + 16 * one_frame  # of 64 frames more
  assert long < 129 * one_frame


def test_extras_are_the_frames_as_images(autoencoder, tmp_path):
  clip = make_clip(tmp_path / "a.mp4")
  record = encoded([clip], autoencoder)["a"]
  assert len(record["extras"]) == 2 and record["extras_NHWC"].shape == (2, 8, 8, 4)
  video_THWC = reader.read(clip.path)
  frames = [int(time * 4) for time in record["extras"]]
  assert frames == sorted(set(frames)) and 0 < frames[0] and frames[-1] < 9
  # One of the two at least is the last of its latent frame, as a given end begins.
  assert set(frames) & {4, 8}
  # Latent k ends with frame 4k, so frame f is at f / 4.
  assert record["extras"] == tuple(frame / 4 for frame in frames)
  images = autoencoder.encode(video_THWC[frames][:, None])[:, 0]
  np.testing.assert_allclose(record["extras_NHWC"], images, atol=1e-5)
  assert not np.allclose(images[0], images[1], atol=1e-2)


def test_extras_are_drawn_by_the_seed_and_the_clip(autoencoder, tmp_path):
  clips = [make_clip(tmp_path / f"{name}.mp4") for name in "abcd"]

  def times(clips, seed=0):
    made = encoded(clips, autoencoder, seed=seed)
    return {name: record["extras"] for name, record in made.items()}

  assert times(clips) == times(clips[::-1]) == times(clips[:1]) | times(clips[1:])
  assert len(set(times(clips).values())) > 1
  assert times(clips) != times(clips, seed=1)


def test_images_have_no_extras(autoencoder, tmp_path):
  clip = make_clip(tmp_path / "image.png", 1)
  record = encoded([clip], autoencoder)["image"]
  assert record["latent_THWC"].shape == (1, 8, 8, 4)
  assert record["extras"] == () and record["extras_NHWC"].shape == (0, 8, 8, 4)


def test_without_extras(autoencoder, tmp_path):
  config = dataclasses.replace(CONFIG, extras=0)
  record = encoded([make_clip(tmp_path / "a.mp4")], autoencoder, config)["a"]
  assert record["extras"] == () and record["extras_NHWC"].shape == (0, 8, 8, 4)


def test_latents_are_normalised(tiny_run):
  """Mean 0 and standard deviation 1, about; the statistics are of other crops."""
  folder = str(tiny_run.workdir / "encode")
  reader = records.LatentReader(folder)
  latents = np.concatenate(
    [
      reader.read(clip)["latent_THWC"].reshape(-1, 4)
      for clip in records.read_latents_manifest(f"{folder}/latents.jsonl")
    ]
  )
  assert np.abs(latents.mean(0)).max() < 1
  assert 0.4 < latents.std(0).min() and latents.std(0).max() < 2.5


# --- resume, and damage


def run(workdir, autoencoder, monkeypatch, recipe=RECIPE):
  # The one that is compiled already, on one device as in the command.
  monkeypatch.setattr(encode, "Autoencoder", lambda *_: autoencoder)
  encode.run(recipe, workdir)


def test_resumes_by_shard(tiny_run, autoencoder, monkeypatch, tmp_path):
  for name in ("data", "encode"):
    shutil.copytree(tiny_run.workdir / name, tmp_path / name)
  folder = tmp_path / "encode"
  shards = sorted(folder.glob("*.array_record"))
  assert len(shards) == 3
  manifest = folder / "latents.jsonl"
  clips = records.read_latents_manifest(str(manifest))

  def read():
    reader = records.LatentReader(str(folder))
    return [reader.read(clip) for clip in clips]

  before, text = read(), manifest.read_text()
  kept = {path: path.read_bytes() for path in (shards[0], shards[2])}
  # What a killed run leaves: no manifest, one shard missing, one half written.
  manifest.unlink()
  shards[1].rename(f"{shards[1]}.123.tmp")
  times = {path: path.stat().st_mtime_ns for path in kept}
  run(tmp_path, autoencoder, monkeypatch)
  assert manifest.read_text() == text
  assert {path: path.read_bytes() for path in kept} == kept
  assert {path: path.stat().st_mtime_ns for path in kept} == times
  # Compiled with other flags here, so not to the last bit.
  for one, other in zip(before, read(), strict=True):
    for name in ("latent_THWC", "extras_NHWC"):
      np.testing.assert_allclose(one[name], other[name], rtol=2e-3, atol=1e-3)


def test_shards_of_another_vae_are_refused(tiny_run, autoencoder, monkeypatch,
                                           tmp_path):  # fmt: skip
  for name in ("data", "encode"):
    shutil.copytree(tiny_run.workdir / name, tmp_path / name)
  folder = tmp_path / "encode"
  run(tmp_path, autoencoder, monkeypatch)  # complete: nothing is made
  other = copy.copy(autoencoder)
  other.meta = dataclasses.replace(autoencoder.meta, id="0123456789abcdef")
  path = min(folder.glob("*.array_record"))
  message = rf"{path}: latents of another VAE \({autoencoder.meta.id}\) than"
  with pytest.raises(records.OtherVAEError, match=message):
    run(tmp_path, other, monkeypatch)


def test_clips_are_encoded_at_several_budgets(tiny_run, autoencoder, monkeypatch,
                                              tmp_path):  # fmt: skip
  clips = [make_clip(tmp_path / "a.mp4"), make_clip(tmp_path / "b.mp4", 9, "heldout"),
           make_clip(tmp_path / "c.png", 1)]  # fmt: skip
  clips = [dataclasses.replace(clip, source="x") for clip in clips]
  write_manifest(tmp_path / "data" / "manifest.jsonl", clips)
  config = dataclasses.replace(CONFIG, budgets=((32 * 32, 5), (64 * 64, 9)))
  run(tmp_path, autoencoder, monkeypatch, dataclasses.replace(RECIPE, encode=config))
  folder = tmp_path / "encode"
  latents = records.read_latents_manifest(str(folder / "latents.jsonl"))
  assert [(c.budget, c.id, c.shape, c.frames) for c in latents] == [
    (0, "a", (2, 4, 4), 5), (0, "b", (2, 4, 4), 5), (0, "c", (1, 4, 4), 1),
    (1, "a", (3, 8, 8), 9), (1, "b", (3, 8, 8), 9), (1, "c", (1, 8, 8), 1),
  ]  # fmt: skip
  assert {clip.source for clip in latents} == {"x"}
  reader = records.LatentReader(str(folder), autoencoder.meta.id)
  whole = encoded([clips[0]], autoencoder, seed=RECIPE.seed)["a"]["latent_THWC"]
  np.testing.assert_allclose(
    reader.read(latents[3])["latent_THWC"], whole, rtol=2e-3, atol=1e-3
  )
  assert np.isfinite(reader.read(latents[0])["latent_THWC"]).all()
  _trains_by_schedule(tiny_run, tmp_path, config, latents)


def _trains_by_schedule(tiny_run, workdir, config, latents):
  """The small size for two steps, half of it images, then the large one."""
  shutil.copytree(tiny_run.workdir / "vae", workdir / "vae")
  stage = dataclasses.replace(
    RECIPE.dit, schedule=(0, 2), image_share=(0.5, 0.0), rows=8
  )
  recipe = dataclasses.replace(RECIPE, encode=config, dit=stage)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  ready = train_dit.setup(recipe, workdir, mesh)
  seen = [next(ready.data)["clip_N"] for _ in range(4)]
  ready.data.close()
  clips = [[latents[n] for n in batch[batch >= 0]] for batch in seen]
  assert [{clip.budget for clip in batch} for batch in clips] == [{0}, {0}, {1}, {1}]
  assert {clip.frames for batch in clips[:2] for clip in batch} == {1, 5}
  assert {clip.frames for batch in clips[2:] for clip in batch} == {9}


def test_damaged_clips_are_left_out(autoencoder, monkeypatch, tmp_path, caplog):
  """Also where they fill a batch or a whole shard."""
  names = ("a", "b", "bad1", "bad2", "c")
  clips = [make_clip(tmp_path / f"{name}.mp4") for name in names]
  clips.append(make_clip(tmp_path / "heldout.png", 1, "heldout"))
  clips.append(make_clip(tmp_path / "gone.mp4"))
  write_manifest(tmp_path / "data" / "manifest.jsonl", clips)
  spoil(clips[2])
  spoil(clips[3])
  (tmp_path / "gone.mp4").unlink()
  config = dataclasses.replace(CONFIG, clips_per_shard=1)
  recipe = dataclasses.replace(RECIPE, encode=config)
  run(tmp_path, autoencoder, monkeypatch, recipe)
  folder = tmp_path / "encode"
  latents = records.read_latents_manifest(str(folder / "latents.jsonl"))
  assert [clip.id for clip in latents] == ["a", "b", "c", "heldout"]
  bad = [json.loads(line) for line in open(folder / "bad_clips.jsonl")]
  assert sorted(row["id"] for row in bad) == ["bad1", "bad2", "gone"]
  reasons = {row["id"]: row["reason"] for row in bad}
  assert "damaged" in reasons["bad1"] and "No such file" in reasons["gone"]
  assert "3 of 7 clips could not be read" in caplog.text
  # The others are what they are without them.
  reader = records.LatentReader(str(folder))
  alone = encoded([clips[1]], autoencoder, seed=recipe.seed)["b"]["latent_THWC"]
  np.testing.assert_allclose(
    reader.read(latents[1])["latent_THWC"], alone, rtol=2e-3, atol=1e-3
  )


def test_a_disk_that_is_gone_leaves_no_hollow_shards(
  autoencoder, monkeypatch, tmp_path
):
  clips = [make_clip(tmp_path / f"{i:02}.mp4") for i in range(12)]
  clips.append(make_clip(tmp_path / "heldout.png", 1, "heldout"))
  write_manifest(tmp_path / "data" / "manifest.jsonl", clips)
  (tmp_path / "disk").mkdir()
  for clip in clips[1:12]:
    shutil.move(clip.path, tmp_path / "disk")
  config = dataclasses.replace(CONFIG, clips_per_shard=3)
  recipe = dataclasses.replace(RECIPE, encode=config)
  message = r"[89] of \d+ clips so far, of 13, cannot be read.*max_unreadable 0\.05"
  with pytest.raises(UnreadableError, match=message):
    run(tmp_path, autoencoder, monkeypatch, recipe)
  assert not (tmp_path / "encode" / "latents.jsonl").exists()
  for path in (tmp_path / "disk").iterdir():
    shutil.move(path, tmp_path)
  run(tmp_path, autoencoder, monkeypatch, recipe)
  latents = records.read_latents_manifest(str(tmp_path / "encode" / "latents.jsonl"))
  assert [clip.id for clip in latents] == [clip.id for clip in clips]


def test_clips_to_leave_out_are_not_encoded(autoencoder, monkeypatch, tmp_path):
  clips = [make_clip(tmp_path / f"{name}.mp4") for name in "abc"]
  clips.append(make_clip(tmp_path / "heldout.png", 1, "heldout"))
  write_manifest(tmp_path / "data" / "manifest.jsonl", clips)
  data = dataclasses.replace(RECIPE.data, leave_out=("b",))
  recipe = dataclasses.replace(RECIPE, data=data)
  run(tmp_path, autoencoder, monkeypatch, recipe)
  latents = records.read_latents_manifest(str(tmp_path / "encode" / "latents.jsonl"))
  assert [clip.id for clip in latents] == ["a", "c", "heldout"]
  data = dataclasses.replace(RECIPE.data, leave_out=("z",))
  recipe = dataclasses.replace(RECIPE, data=data)
  with pytest.raises(ValueError, match="no clip of this run has the id 'z'"):
    run(tmp_path, autoencoder, monkeypatch, recipe)


def test_no_clip_of_a_split_is_an_error(autoencoder, monkeypatch, tmp_path):
  clips = [make_clip(tmp_path / "a.mp4"), make_clip(tmp_path / "b.mp4", 9, "heldout")]
  write_manifest(tmp_path / "data" / "manifest.jsonl", clips)
  spoil(clips[1])
  with pytest.raises(ValueError, match="encode: no clip of split 'heldout' could be"):
    run(tmp_path, autoencoder, monkeypatch)


# --- plans: pure functions


def sized(*sizes):
  return [Clip(str(i), "", 0.0, 9, 8.0, h, w) for i, (h, w) in enumerate(sizes)]


def test_limit_sizes():
  clips = sized((64, 64), (64, 64), (64, 96), (64, 96), (96, 64), (48, 96), (80, 64))
  assert buckets.limit_sizes(clips, 5) is clips
  made = buckets.limit_sizes(clips, 2)
  assert [clip.id for clip in made] == [clip.id for clip in clips]
  assert [(clip.height, clip.width) for clip in made] == [
    *[(64, 64)] * 2,
    *[(64, 96)] * 2,
    (64, 64),
    (64, 96),
    (64, 64),
  ]
  assert {(c.height, c.width) for c in buckets.limit_sizes(clips, 1)} == {(64, 64)}
  # Equally common: always the same ones.
  pair = sized((64, 96), (96, 64))
  assert buckets.limit_sizes(pair, 1)[0].width == (
    buckets.limit_sizes(pair[::-1], 1)[0].width
  )


def test_frame_bucket():
  frames = [1, 5, 9, 13, 17, 21, 33, 37]
  assert [buckets.frame_bucket(n) for n in frames] == [1, 5, 9, 17, 17, 33, 33, 65]
  # Beyond the last bucket, the powers again.
  given = [buckets.frame_bucket(n, (25, 1, 9)) for n in frames]
  assert given == [1, 9, 9, 25, 25, 25, 33, 65]
  for n in range(1, 200, 4):
    bucket = buckets.frame_bucket(n)
    assert n <= bucket and (n == 1 or bucket < 2 * n) and bucket % 4 == 1


def test_plan_shards():
  clips = sized((64, 64), (64, 96), (64, 64), (64, 96), (64, 64))
  clips[0] = dataclasses.replace(clips[0], frames=17)
  shards = buckets.plan_shards(clips, 2)
  assert [[clip.id for clip in shard] for shard in shards] == [
    ["2", "4"],
    ["0", "1"],
    ["3"],
  ]
  assert buckets.plan_shards(clips[::-1], 2) == shards
