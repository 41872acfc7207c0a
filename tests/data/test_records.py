"""Latent shards: round trip, damage, rebuilding the manifest."""

import os
import pickle

import numpy as np
import pytest

from sora_jax.data import records


def make_record(i, t=3, extras=2):
  rng = np.random.default_rng(i)
  return {
    "id": f"folder/clip {i}",
    "latent_THWC": rng.standard_normal((t, 4, 6, 8)),
    "extras_NHWC": rng.standard_normal((extras, 4, 6, 8)),
    "extras": [0.25 * k for k in range(extras)],
    "fps": 16.0,
    "captions": ["a red circle", "ein roter Kreis, 赤い円"],
    "split": "train",
    "frames": 1 + 4 * (t - 1),
    "height": 32,
    "width": 48,
    "truth": {"objects": [{"color": "red", "trajectory": [[0.5, 0.25]]}]},
  }


@pytest.fixture
def shard(tmp_path):
  path = str(tmp_path / "latents-00000.array_record")
  return path, records.write_shard(path, (make_record(i) for i in range(20)))


def test_round_trip(shard):
  path, clips = shard
  reader = records.LatentReader(os.path.dirname(path))
  for i in (7, 0, 19):
    got = reader.read(clips[i])
    for name in ("latent_THWC", "extras_NHWC"):
      want = make_record(i)[name].astype(np.float16).astype(np.float32)
      assert got[name].dtype == np.float32
      np.testing.assert_array_equal(got[name], want)
  assert clips[7].shape == (3, 4, 6)
  assert clips[7].extras == (0.0, 0.25)
  assert [clip.index for clip in clips] == list(range(20))
  reader.close()


def test_an_image_without_extras(tmp_path):
  path = str(tmp_path / "a.array_record")
  clips = records.write_shard(path, [make_record(0, t=1, extras=0)])
  got = records.LatentReader(tmp_path).read(clips[0])
  assert got["latent_THWC"].shape == (1, 4, 6, 8)
  assert got["extras_NHWC"].shape == (0, 4, 6, 8)


def test_manifest_round_trip_and_rebuild(shard, tmp_path):
  path, clips = shard
  manifest = str(tmp_path / "latents.jsonl")
  records.write_latents_manifest(manifest, clips)
  assert records.read_latents_manifest(manifest) == clips
  assert records.read_shard_clips(path) == clips


def test_reader_is_picklable_after_use(shard):
  path, clips = shard
  reader = records.LatentReader(os.path.dirname(path))
  want = reader.read(clips[3])["latent_THWC"]
  copy = pickle.loads(pickle.dumps(reader))
  np.testing.assert_array_equal(copy.read(clips[3])["latent_THWC"], want)


def test_a_shard_appears_only_when_complete(tmp_path):
  path = tmp_path / "a.array_record"

  def interrupted():
    yield make_record(0)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    records.write_shard(path, interrupted())
  assert list(tmp_path.iterdir()) == []


def test_flipped_bit_loses_one_record(shard):
  path, clips = shard
  reader = records.LatentReader(os.path.dirname(path))
  latent = reader.read(clips[5])["latent_THWC"].astype(np.float16).tobytes()
  with open(path, "rb") as f:
    data = bytearray(f.read())
  data[data.index(latent[:64]) + 40] ^= 4
  with open(path, "wb") as f:
    f.write(data)
  reader = records.LatentReader(os.path.dirname(path))
  for clip in clips:
    if clip.index == 5:
      with pytest.raises(
        records.RecordError, match="latents-00000.array_record: record 5: Corr"
      ):
        reader.read(clip)
    else:
      reader.read(clip)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "text"])
def test_damaged_shard_is_named(shard, damage):
  path, clips = shard
  if damage == "truncated":
    os.truncate(path, os.path.getsize(path) * 2 // 3)
  elif damage == "empty":
    os.truncate(path, 0)
  elif damage == "missing":
    os.remove(path)
  else:
    with open(path, "w") as f:
      f.write("not a shard\n" * 100)
  reader = records.LatentReader(os.path.dirname(path))
  with pytest.raises(records.RecordError, match="latents-00000.*record 3: "):
    reader.read(clips[3])
  with pytest.raises(records.RecordError, match="latents-00000"):
    records.read_shard_clips(path)


def test_manifest_of_another_run_is_noticed(tmp_path):
  clips = records.write_shard(tmp_path / "a", [make_record(0), make_record(1)])
  records.write_shard(tmp_path / "a", [make_record(2)])
  reader = records.LatentReader(tmp_path)
  with pytest.raises(records.RecordError, match="record 0: holds 'folder/clip 2'"):
    reader.read(clips[0])
  with pytest.raises(records.RecordError, match="record 1: the shard has 1 records"):
    reader.read(clips[1])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_latents_that_float16_cannot_hold(tmp_path, value):
  record = make_record(4)
  record["latent_THWC"][1, 2, 3, 4] = value
  with pytest.raises(ValueError, match="clip 4: a latent must be finite"):
    records.write_shard(tmp_path / "a", [make_record(3), record])
  assert list(tmp_path.iterdir()) == []


def test_extras_without_times(tmp_path):
  with pytest.raises(ValueError, match="clip 4: 2 extra latents but 1 times"):
    records.write_shard(tmp_path / "a", [{**make_record(4), "extras": [0.5]}])


def test_bad_manifest_row_is_named(tmp_path):
  path = tmp_path / "latents.jsonl"
  path.write_text('{"id": "a"}\n')
  with pytest.raises(ValueError, match="latents.jsonl:1"):
    records.read_latents_manifest(path)
  with pytest.raises(ValueError, match="nothing.jsonl"):
    records.read_latents_manifest(tmp_path / "nothing.jsonl")


def test_captions_of_a_model_are_counted(tmp_path):
  path = str(tmp_path / "a.array_record")
  both = [make_record(0), {**make_record(1), "synthetic": 1}]
  clips = records.write_shard(path, both)
  manifest = tmp_path / "latents.jsonl"
  records.write_latents_manifest(str(manifest), clips)
  assert [clip.synthetic for clip in clips] == [0, 1]
  assert records.read_latents_manifest(str(manifest)) == clips
  assert records.read_shard_clips(path) == clips
  # Rows of clips without are as they always were.
  assert ["synthetic" in line for line in manifest.read_text().splitlines()] == [0, 1]
