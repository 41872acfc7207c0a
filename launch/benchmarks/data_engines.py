"""One data set through every engine: the same manifest, the same training batches.

  python launch/benchmarks/data_engines.py --files=10000

Makes tiny clips and images, prepares them on one core, on all cores and, where it is
installed, by Apache Beam with two workers, makes a TFDS data set of the manifest (alone
and by Beam) and prepares that, too. It ends with an error unless all manifests are the
same to the byte (that of TFDS: the same clips in the same order, with other ids, paths
and figures of their pixels), and the first batches of VAE training are, too. Seconds
by the clock, and of all cores' work, are kept in benchmarks.jsonl of the folder, see
record.py.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import tempfile
import time

import numpy as np
import PIL.Image
import record
from absl import flags, logging

from sora_jax import prepare
from sora_jax.data import clips
from sora_jax.data.batches import Batches
from sora_jax.data.clip_dataset import ClipDataset
from sora_jax.data.video import writer
from sora_jax.run import cli
from sora_jax.run import recipe as recipes

FILES = flags.DEFINE_integer("files", 1000, "Clips to make.", 8)
BATCHES = flags.DEFINE_integer("compared", 100, "Batches of 8 to compare.", 1)
FOLDER = flags.DEFINE_string("folder", None, "Where to make them; a temporary one.")
CONFIG = record.ROOT / "configs" / "quickstart.py"
BATCH, CROP = 8, (5, 32, 32)
BEAM = (
  "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner",
  "--direct_running_mode=multi_processing",
  "--direct_num_workers=2",
)
# What a clip has of the data set that it is in, and of how its pixels are stored there.
_OWN = ("id", "path", "measured")


def make_clips(folder: pathlib.Path, count: int) -> None:
  """Writes videos of 9 to 17 frames, every tenth file an image, and their captions."""
  rng = np.random.default_rng(0)
  rows = []
  for number in range(count):
    small = rng.integers(30, 226, (6, 8, 3), np.uint8)
    picture = np.asarray(PIL.Image.fromarray(small).resize((64, 48)))
    name = f"{number:06d}.{'mp4' if number % 10 else 'png'}"
    frames, step = int(rng.integers(9, 18)), int(rng.integers(1, 4))
    video = [np.roll(picture, step * t, 1) for t in range(frames if number % 10 else 1)]
    writer.write(folder / name, np.stack(video), 8)
    rows.append(json.dumps({"path": name, "caption": f"clip {number}"}))
  # Last, so that a folder with a manifest is whole.
  clips.write_lines(folder / "manifest.jsonl", rows)


def read_recipe(source: str, beam: tuple[str, ...] = ()) -> recipes.Recipe:
  """The recipe of the quickstart for a source of tiny clips."""
  spec = importlib.util.spec_from_file_location("quickstart", CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.data.source = source
  config.data.max_pixels = 48 * 64
  config.data.beam = beam
  return recipes.read(config)


@contextlib.contextmanager
def one_core():
  """This process, and those that it starts, have one core."""
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, {min(before)})
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


@contextlib.contextmanager
def timed(name: str, figures: dict[str, record.Figure]):
  """Adds seconds by the clock, and of cores, also of processes that have ended."""
  begin, before = time.perf_counter(), sum(os.times()[:4])
  yield
  clock, cores = time.perf_counter() - begin, sum(os.times()[:4]) - before
  logging.info("%s: %.1f s, %.1f s of cores", name, clock, cores)
  figures[name] = record.Figure(clock, "s")
  figures[f"{name}, cores"] = record.Figure(cores, "s")


def prepared(folder, name, source, beam=(), on=contextlib.nullcontext) -> pathlib.Path:
  """The manifest of a data set prepared into folder/name."""
  with on():
    prepare.run(read_recipe(str(source), beam), folder / name)
  return folder / name / "data" / "manifest.jsonl"


def built(folder, name, manifest, beam=()) -> str:
  """The source that a TFDS data set made of a manifest is."""
  import tensorflow_datasets as tfds

  from sora_jax.data.tfds_builder import SoraClips

  config = tfds.download.DownloadConfig()
  if beam:
    from apache_beam.options.pipeline_options import PipelineOptions

    config.beam_options = PipelineOptions(list(beam))
  builder = SoraClips(
    manifest=str(manifest), data_dir=str(folder / name), file_format="array_record"
  )
  builder.download_and_prepare(download_config=config)
  return f"tfds:{builder.data_dir}"


def facts(manifest) -> list[dict]:
  """The clips of a manifest, without what is `_OWN`."""
  rows = map(dataclasses.asdict, clips.read_manifest(manifest))
  return [{k: v for k, v in row.items() if k not in _OWN} for row in rows]


def batches_hash(manifest, count: int) -> str:
  """Hash of the first training batches of a manifest."""
  found, made = hashlib.sha256(), ClipDataset(clips.read_manifest(manifest), CROP, 0)
  batches = Batches(made, BATCH, workers=0)
  for _ in range(count):
    for name, array in sorted(next(batches).items()):
      found.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
  batches.close()
  return found.hexdigest()


def compare(folder: pathlib.Path, count: int, batches: int) -> dict[str, record.Figure]:
  """Runs all engines; figures by name, see `timed`.

  Raises:
    ValueError: one of them gives another manifest, or other batches.
  """
  source, manifests = folder / "clips", {}
  figures: dict[str, record.Figure] = {}
  if not (source / "manifest.jsonl").exists():
    make_clips(source, count)
  has_beam = importlib.util.find_spec("apache_beam") is not None
  engines = {"one core": {"on": one_core}, "all cores": {}}
  if has_beam:
    engines["Beam, two workers"] = {"beam": BEAM}
  for name, options in engines.items():
    with timed(name, figures):
      manifests[name] = prepared(folder, name, source, **options)
  first = manifests["one core"]
  for name, beam in (("TFDS", ()), ("TFDS by Beam", BEAM))[: 1 + has_beam]:
    with timed(f"{name}, made", figures):
      made = built(folder, f"{name}-set", first, beam)
    with timed(f"{name}, prepared", figures):
      manifests[name] = prepared(folder, name, made)
  wanted = batches_hash(first, batches)
  for name, manifest in manifests.items():
    if name in engines and manifest.read_bytes() != first.read_bytes():
      raise ValueError(f"{manifest} is not {first}")
    if facts(manifest) != facts(first):
      raise ValueError(f"{manifest} has other clips than {first}")
    if batches_hash(manifest, batches) != wanted:
      raise ValueError(f"the first {batches} batches of {manifest} are others")
  logging.info(
    "%d files, %d clips: the same manifest and the same first %d batches by %s",
    count, len(facts(first)), batches, ", ".join(manifests),
  )  # fmt: skip
  return figures


def main(argv):
  del argv
  cli.start_logging()
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(FOLDER.value or temporary)
    figures = compare(folder, FILES.value, BATCHES.value)
    settings = {"files": FILES.value, "batches": BATCHES.value}
    record.append("data_engines", settings, figures, FOLDER.value or "runs")


if __name__ == "__main__":
  record.define_flag()
  cli.run_app(main)
