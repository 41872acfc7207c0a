"""The stage "vae" makes its cache of clips, by config, and reads it."""

import dataclasses

import numpy as np
import pytest
import tiny
from data.batch_checks import assert_equal
from data.media_samples import noise

from sora_jax import train_vae
from sora_jax.data import clips, pixel_cache
from sora_jax.data.video import writer
from sora_jax.run import recipe as recipes
from sora_jax.runtime import hosts, sharding
from sora_jax.runtime.limits import UnreadableError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  found = []
  for number in range(3):
    path = folder / f"{number}.mp4"
    writer.write(path, noise(9, 96, 128), 8.0)
    split = "heldout" if number == 2 else "train"
    found.append(clips.Clip(str(number), str(path), 0.0, 9, 8.0, 48, 64, (), split))
  clips.write_manifest(folder / "data" / "manifest.jsonl", found)
  return folder


def recipe_of(**changed):
  recipe = recipes.read(tiny.get_config())
  data = dataclasses.replace(recipe.data, source="a folder", **changed)
  return dataclasses.replace(recipe, data=data)


def element(workdir, **changed):
  recipe = recipe_of(**changed)
  cache = train_vae._cache(recipe, workdir)
  return train_vae._dataset(recipe, workdir, "train", cache)[0]


def names(workdir):
  return sorted(path.name for path in (workdir / "data" / "pixels").glob("*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_stage_makes_and_reads_a_cache(workdir, workers):
  want = element(workdir, cache="none")
  got = element(workdir, cache="auto", workers=workers)
  assert_equal(got, want)
  (name,) = names(workdir)
  assert name.startswith("raw-")
  # What is read is the cache: without the files, too.
  path = workdir / "0.mp4"
  cache = train_vae._cache(recipe_of(), workdir)
  path.rename(workdir / "gone.mp4")
  dataset = train_vae._dataset(recipe_of(), workdir, "train", cache)
  assert_equal(dataset[0], want)
  (workdir / "gone.mp4").rename(path)
  (workdir / "data" / "pixels" / name).unlink()


@pytest.mark.parametrize("cache", ["none", "raw"])
def test_a_disk_that_is_gone_is_said_before_training(workdir, tmp_path, cache):
  """As if the run had been copied without what is beside it."""
  (tmp_path / "data").mkdir()
  manifest = (workdir / "data" / "manifest.jsonl").read_bytes()
  (tmp_path / "data" / "manifest.jsonl").write_bytes(manifest)
  message = f"^{tmp_path}: none of [12] media files looked at, of [12] in the manifest"
  with pytest.raises(ValueError, match=message):
    train_vae.setup(recipe_of(cache=cache), tmp_path, sharding.make_mesh())
  assert not list(tmp_path.glob("*/*/*"))


def test_clips_that_cannot_be_cached_are_limited(tmp_path):
  found = []
  for number in range(10):
    path = tmp_path / f"{number}.mp4"
    writer.write(path, noise(9, 48, 64), 8.0)
    if number:
      path.write_bytes(b"no video at all" * 10)
    clip = clips.Clip(str(number), str(path), 0.0, 9, 8.0, 48, 64)
    found.append(clip)
  clips.write_manifest(tmp_path / "data" / "manifest.jsonl", found)
  message = r"9 of 10 clips .*max_unreadable 0\.05; the first is '1': not a video"
  with pytest.raises(UnreadableError, match=message):
    train_vae._cache(recipe_of(cache="raw"), tmp_path)
  for changed in ({"max_unreadable": 0.9}, {"leave_out": ("1", "2")}):
    train_vae._cache(recipe_of(cache="raw", **changed), tmp_path)


def test_another_codec_stands_beside_it(workdir):
  raw = element(workdir, cache="raw")
  lossy = element(workdir, cache="h264")
  assert [name[:4] for name in names(workdir)] == ["h264", "raw-"]
  difference = lossy["video_THWC"].astype(int) - raw["video_THWC"]
  assert 0 < np.abs(difference).mean() < 8  # of noise, which no codec likes


def test_a_linked_run_keeps_its_cache(workdir, tmp_path, monkeypatch):
  """Such as of a sweep, that another version of the code goes on with."""
  element(workdir, cache="raw")
  before = names(workdir)
  monkeypatch.setattr(pixel_cache, "_code", lambda: ["another"])
  (tmp_path / "data").symlink_to(workdir / "data", target_is_directory=True)
  element(tmp_path, cache="raw")
  assert set(names(workdir)) > set(before)
  element(workdir, cache="raw")
  assert not set(names(workdir)) & {name for name in before if name.startswith("raw")}


def test_hosts_with_files_of_their_own_have_no_cache(workdir, monkeypatch, caplog):
  monkeypatch.setattr(hosts, "gather", lambda value: [value, value[:-1] + "x"])
  # What auto has chosen is the first host's choice.
  assert train_vae._cache(recipe_of(cache="auto"), workdir) is None
  assert "hosts do not share a cache of clips" in caplog.text
  with pytest.raises(ValueError, match=r'share.*config\.data\.cache "none"'):
    train_vae._cache(recipe_of(cache="raw"), workdir)


@pytest.mark.parametrize(
  "changed, message",
  [
    ({"cache": "av1"}, r"config\.data\.cache 'av1' is none of \('auto', 'none', 'raw'"),
    ({"workers": -2}, r"config\.data\.workers -2 must be at least -1"),
  ],
)
def test_wrong_keys(changed, message):
  config = tiny.get_config()
  config.data.update(changed)
  with pytest.raises(ValueError, match=message):
    recipes.read(config)
