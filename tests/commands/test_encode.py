"""Encoding: exact padding, extras, sizes, resume by shard, damaged clips."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from sora_jax import encode
from sora_jax.data import buckets, records
from sora_jax.data.bad_clips import BadClips
from sora_jax.data.clips import Clip, write_manifest
from sora_jax.data.video import reader, writer
from sora_jax.encoders.autoencoder import Autoencoder
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding


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


def encoded(clips, autoencoder, config=CONFIG, seed=0, folder=None):
  """id -> record, before it is rounded to float16."""
  bad_clips = BadClips(folder)
  made = encode.encode_clips(clips, autoencoder, config, seed, bad_clips)
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


def test_extras_are_the_frames_as_images(autoencoder, tmp_path):
  clip = make_clip(tmp_path / "a.mp4")
  record = encoded([clip], autoencoder)["a"]
  assert len(record["extras"]) == 2 and record["extras_NHWC"].shape == (2, 8, 8, 4)
  video_THWC = reader.read(clip.path)
  frames = [int(time * 4) for time in record["extras"]]
  assert frames == sorted(set(frames)) and 0 < frames[0] and frames[-1] < 9
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
