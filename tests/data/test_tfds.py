"""TFDS data sets as sources, and a manifest as a TFDS data set; without TensorFlow."""

import copy
import dataclasses
import io
import json
import pathlib
import struct
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from data.batch_checks import assert_equal, take
from data.media_samples import noise

from sora_jax import prepare
from sora_jax.data import (
  clips,
  listing,
  pixel_cache,
  sources,
  stored,
  tfds_examples,
)
from sora_jax.data.batches import Batches
from sora_jax.data.clip_dataset import ClipDataset
from sora_jax.data.records import RecordError
from sora_jax.data.tfds_builder import SoraClips, encode
from sora_jax.data.video import media, reader, writer

F = tfds.features
LIMITS = {"max_frames": 9, "max_pixels": 48 * 64, "size_multiple": 16}
VIDEO = noise(9, 48, 64)


def png(frame_HWC):
  file = io.BytesIO()
  PIL.Image.fromarray(frame_HWC).save(file, "png")
  return file.getvalue()


class Toy(tfds.core.GeneratorBasedBuilder):
  """One example a split; `features` and `example` are set by `make`."""

  VERSION = tfds.core.Version("1.0.0")
  features: dict = {}
  example: dict = {}
  splits = ("train", "test")

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(self.features))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples() for split in self.splits}

  def _generate_examples(self):
    yield "0", copy.deepcopy(self.example)  # files are read to their end


@pytest.fixture
def make(tmp_path, monkeypatch):
  def build(features, example, splits=("train", "test")):
    monkeypatch.setattr(Toy, "features", features)
    monkeypatch.setattr(Toy, "example", example)
    monkeypatch.setattr(Toy, "splits", splits)
    builder = Toy(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    return f"tfds:{builder.data_dir}"

  return build


def scan(source, **options):
  listed = listing.of_source(source, "", fps=options.pop("fps", 0.0))
  found, rejected = sources.scan("", listed=listed, **LIMITS, **options)
  assert not rejected
  return found


def read(clip):
  return reader.read(
    clip.path, start=clip.start, frames=clip.frames, fps=clip.fps,
    size=(clip.height, clip.width),
  )  # fmt: skip


MP4 = encode(VIDEO, 8.0)
SEQUENCE = F.Sequence(F.Scalar(np.object_))
KINDS = {
  "bytes": (F.Scalar(np.object_), MP4),
  "frames as PNG": (SEQUENCE, [png(frame) for frame in VIDEO]),
  "images": (F.Sequence(F.Image()), [io.BytesIO(png(frame)) for frame in VIDEO]),
  "tensor": (F.Tensor(shape=(None, 48, 64, 3), dtype=np.uint8), VIDEO),
  "grey tensor": (F.Tensor(shape=(9, 48, 64, 1), dtype=np.uint8), VIDEO[..., :1]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_media_of_all_kinds_have_their_very_pixels(make, kind):
  feature, value = KINDS[kind]
  source = make(
    {"video": feature, "caption": F.Text()}, {"video": value, "caption": "é"}
  )
  train, test = scan(source, fps=8.0)
  assert (train.split, test.split) == ("train", "heldout")
  assert (train.captions, train.fps, train.frames) == (("é",), 8.0, 9)
  want = np.repeat(VIDEO[..., :1], 3, -1) if kind == "grey tensor" else VIDEO
  np.testing.assert_array_equal(read(train), want)
  np.testing.assert_array_equal(
    reader.read(train.path, start=3 / 8, frames=4, fps=8.0), want[3:7]
  )


@pytest.mark.parametrize(
  "pixel, kind, want", [((200, 0, 0, 0), np.uint8, 255), (20000, np.uint16, 78)]
)
def test_encoded_frames_are_what_files_of_them_are(make, pixel, kind, want):
  """Transparency lies on white; grey of 16 bits is not cut off at 8."""
  frame = np.full((*VIDEO.shape[1:3], *np.shape(pixel)), pixel, kind)
  source = make({"video": SEQUENCE}, {"video": [png(frame)] * 9})
  assert (read(scan(source, fps=8.0)[0]) == want).all()


def test_an_image_is_a_clip_of_one_frame(make):
  example = {"image": io.BytesIO(png(VIDEO[0])), "label": "dog"}
  features = {"image": F.Image(), "label": F.ClassLabel(names=["cat", "dog"])}
  (clip,) = scan(make(features, example, ("train",)) + "?text=label")
  assert (clip.frames, clip.fps, clip.captions) == (1, 1.0, ("dog",))
  assert clip.path.endswith(".png")
  np.testing.assert_array_equal(read(clip), VIDEO[:1])


def test_a_video_feature_needs_no_tensorflow(make):
  """TFDS cannot even describe one without; it is stored as encoded frames."""
  frames = [png(frame) for frame in VIDEO]
  source = make({"clip": SEQUENCE, "fps": np.float32}, {"clip": frames, "fps": 4.0})
  path = pathlib.Path(source.removeprefix("tfds:"), "features.json")
  features = json.loads(path.read_text())
  features["featuresDict"]["features"]["clip"] = {
    "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
    "video": {"shape": {"dimensions": ["-1", "48", "64", "3"]}, "dtype": "uint8"},
  }
  path.write_text(json.dumps(features))
  clip, _ = scan(source)
  assert clip.fps == 4.0  # the example's own
  np.testing.assert_array_equal(read(clip), VIDEO)
  assert "tensorflow" not in sys.modules


def test_tfrecord_is_read_at_random(make):
  """The format that TFDS prepares by default, and cannot write without TensorFlow."""
  source = make({"video": F.Scalar(np.object_)}, {"video": MP4}, ("train",))
  folder = pathlib.Path(source.removeprefix("tfds:"))
  shard = next(folder.glob("*.array_record-*"))
  content = tfds_examples.open_shard(shard).read([0])[0]
  record = struct.pack("<QI", len(content), 0) + content + bytes(4)
  path = folder / shard.name.replace("array_record", "tfrecord")
  path.write_bytes(2 * record)
  info = json.loads((folder / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  info["splits"][0]["shardLengths"] = ["2"]
  (folder / "dataset_info.json").write_text(json.dumps(info))
  clip, second = scan(source)
  np.testing.assert_array_equal(read(second), VIDEO)
  path.write_bytes(2 * record[:-9])
  with pytest.raises(media.ClipError, match=r"tfrecord-00000-of-00001: example 1: "):
    reader.read(clip.path.replace("/0/", "/1/"))
  with pytest.raises(RecordError, match=r"tfrecord-00000-of-00001: example 1: "):
    tfds_examples.read_example(tfds_examples.read_info(folder), "train", 1)
  info["fileFormat"] = "riegeli"
  (folder / "dataset_info.json").write_text(json.dumps(info))
  with pytest.raises(ValueError, match="the shard is missing"):
    tfds_examples.read_info(folder)


def test_what_is_meant_must_be_clear(make, monkeypatch, tmp_path):
  features = {
    "left": F.Scalar(np.object_),
    "right": F.Scalar(np.object_),
    "title": F.Text(),
    "url": F.Text(),
  }
  example = {"left": MP4, "right": MP4, "title": "a", "url": "b"}
  source = make(features, example)
  with pytest.raises(
    ValueError, match=r"left, right; name one as tfds:NAME\?video=ONE"
  ):
    scan(source)
  with pytest.raises(ValueError, match="features of text are title, url; say which"):
    scan(source + "?video=left")
  assert scan(source + "?video=left&text=title,url")[0].captions == ("a", "b")
  assert scan(source + "?video=left&text=")[0].captions == ()
  for wrong, message in (
    ("?video=middle", "there is no 'middle'"),
    ("?video=left&text=x", "there is no feature 'x', only left"),
    ("?vidoe=left", "'vidoe' is none of video, text, fps"),
  ):
    with pytest.raises(ValueError, match=message):
      scan(source + wrong)
  monkeypatch.setattr(
    "tensorflow_datasets.core.utils.file_utils.list_data_dirs", lambda: [tmp_path]
  )
  assert len(scan("tfds:toy?video=left&text=")) == 2
  assert len(scan("tfds:toy:1.0.0?video=left&text=")) == 2
  with pytest.raises(ValueError, match=f"tfds:gone is no .* nor in {tmp_path}/gone"):
    scan("tfds:gone")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"empty holds no dataset_info\.json"):
    scan("tfds:empty")


def test_frames_without_a_rate_are_refused(make):
  source = make({"video": SEQUENCE}, {"video": [png(frame) for frame in VIDEO]})
  with pytest.raises(ValueError, match=r"do not say their rate; set config\.data\.fps"):
    scan(source)
  assert scan(source + "?fps=5")[0].fps == 5.0


def test_what_is_gone_or_damaged_is_a_reason(make):
  clip, _ = scan(make({"video": F.Scalar(np.object_)}, {"video": MP4}))
  folder = pathlib.Path(clip.path.partition("::")[0])
  with pytest.raises(media.ClipError, match="no example 7 of a split 'train'"):
    reader.read(clip.path.replace("/0/", "/7/"))
  content = bytearray((shard := next(folder.glob("*train*"))).read_bytes())
  content[len(content) // 4] ^= 1
  tfds_examples._open_array_record.cache_clear()
  stored._content.cache_clear()
  shard.write_bytes(content)
  with pytest.raises(media.ClipError):
    read(clip)
  (folder / "dataset_info.json").unlink()
  with pytest.raises(media.ClipError, match="No such file"):
    read(clip)


# --- manifest -> TFDS -> training


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
  folder = tmp_path_factory.mktemp("manifest")
  rng, found = np.random.default_rng(0), []
  for number in range(5):
    frames, fps = (9, 24.0) if number % 2 else (13, 30000 / 1001)
    video = rng.integers(0, 256, (frames, 48, 64, 3), np.uint8)
    writer.write(folder / f"{number}.mp4", video, fps)
    split = "heldout" if number == 2 else "train"
    path = str(folder / f"{number}.mp4")
    texts = (f"clip {number}", "é")
    found.append(clips.Clip(str(number), path, 0, 9, fps, 48, 64, texts, split))
  writer.write(folder / "image.png", VIDEO[:1], 1)
  path = str(folder / "image.png")
  found.append(clips.Clip("image", path, 0.0, 1, 1.0, 48, 64, (), "train"))
  clips.write_manifest(folder / "manifest.jsonl", found)
  return folder / "manifest.jsonl"


def batches_of(found, cache=None):
  return take(Batches(ClipDataset(found, (5, 32, 32), 0, cache=cache), 2), 10)


@pytest.fixture(scope="module")
def built(manifest):
  builder = SoraClips(
    manifest=str(manifest), data_dir=str(manifest.parent / "tfds"),
    file_format="array_record",
  )  # fmt: skip
  builder.download_and_prepare()
  return builder


def test_a_manifest_goes_to_tfds_and_back(manifest, built, tmp_path):
  want = clips.read_manifest(manifest)
  found = scan(f"tfds:{built.data_dir}")
  same = ("start", "frames", "height", "width", "captions", "split")
  for clip, other in zip(found, want, strict=True):
    assert [getattr(clip, k) for k in same] == [getattr(other, k) for k in same]
    assert clip.fps == pytest.approx(other.fps)
  clips.write_manifest(tmp_path / "manifest.jsonl", found)
  found = clips.read_manifest(tmp_path / "manifest.jsonl")
  shards = pixel_cache.plan(found, [0, 1, 3, 4, 5], tmp_path / "cache")
  for shard in shards:
    pixel_cache.write_shard(shard)
  cache = pixel_cache.PixelCache(shards)
  for a, b, c in zip(
    batches_of(want), batches_of(found), batches_of(found, cache), strict=True
  ):
    assert_equal(b, a)
    assert_equal(c, a)


def test_tfds_itself_reads_what_is_built(built):
  info = tfds.builder_from_directory(str(built.data_dir)).info
  assert {name: split.num_examples for name, split in info.splits.items()} == {
    "train": 5, "heldout": 1,
  }  # fmt: skip
  source = built.as_data_source("train")
  assert [example["row"] for example in source] == [0, 1, 3, 4, 5]
  assert source[0]["captions"][1] == "é".encode()
  assert source[0]["video"][4:8] == b"ftyp"


@pytest.mark.slow
def test_tfds_build(manifest, tmp_path):
  """The command of TFDS, whose main module, but not this one, imports TensorFlow."""
  import sora_jax.data.tfds_builder as module

  done = subprocess.run(
    [
      sys.executable, "-c",
      "import sys, simple_parsing; from tensorflow_datasets.scripts.cli import build; "
      "simple_parsing.parse(build.Args, args=sys.argv[1:]).execute()",
      module.__file__, f"--manual_dir={manifest.parent}", f"--data_dir={tmp_path}",
      "--file_format=array_record",
    ],
    cwd=pathlib.Path(module.__file__).parents[2], capture_output=True, text=True,
    check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert len(scan(f"tfds:{tmp_path}/sora_clips")) == 6


@pytest.mark.slow
def test_prepare_takes_a_data_set(built, tmp_path):
  import tiny

  from sora_jax.run import recipe as recipes

  recipe = recipes.read(tiny.get_config())
  data = dataclasses.replace(recipe.data, source=f"tfds:{built.data_dir}")
  prepare.run(dataclasses.replace(recipe, data=data), tmp_path)
  found = clips.read_manifest(tmp_path / "data" / "manifest.jsonl")
  assert [clip.split for clip in found].count("heldout") == 1 and len(found) == 6
