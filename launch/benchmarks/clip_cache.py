"""Waiting for data in VAE training on real files: without and with a cache of clips.

  python launch/benchmarks/clip_cache.py

Makes videos of 720p with much detail, prepares them as `python -m sora_jax.prepare`
does, and trains the VAE of configs/quickstart.py on windows of them: the share of the
loop's time spent waiting for data by config.data.cache, and how long the cache takes
to be made. The figures are kept in benchmarks.jsonl of the folder, see record.py.
"""

import dataclasses
import importlib.util
import pathlib
import tempfile
import time

import numpy as np
import record
import training
from absl import flags, logging

from sora_jax import prepare, train_vae
from sora_jax.data.video import writer
from sora_jax.run import cli
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding

VIDEOS = flags.DEFINE_integer("videos", 30, "Files to make.", 2)
SECONDS = flags.DEFINE_float("seconds", 4.0, "Length of each.", 0.5)
FOLDER = flags.DEFINE_string("folder", None, "Where to make them; a temporary one.")
CONFIG = record.ROOT / "configs" / "quickstart.py"
FPS = 24


def film(seed: int, seconds: float):
  """Yields chunks of a video: a photo-like texture that moves, with grain."""
  rng = np.random.default_rng(seed)
  height, width = 720, 1280
  spectrum = np.fft.rfft2(rng.standard_normal((2 * height, 2 * width)))
  y, x = np.fft.fftfreq(2 * height)[:, None], np.fft.rfftfreq(2 * width)
  scale = 1 / np.maximum(np.hypot(y, x), 1e-3)  # as photos have it
  texture = np.fft.irfft2(spectrum * scale)
  texture = (texture - texture.mean()) / texture.std() * 50 + 128
  grain = rng.integers(-6, 7, (height, width, 3))
  for t in range(round(FPS * seconds)):
    top, left = 3 * t % height, 5 * t % width
    grey = texture[top : top + height, left : left + width, None]
    colours = grey + np.array([20, 0, -20]) + np.roll(grain, 37 * t, 1)
    yield colours.clip(0, 255).astype(np.uint8)[None]


def make_videos(folder: pathlib.Path, count: int, seconds: float) -> None:
  """Writes the videos that are not there yet."""
  for number in range(count):
    path = folder / f"{number:03d}.mp4"
    if not path.exists():
      writer.write_chunks(path, film(number, seconds), FPS, crf=23)


def read_recipe(folder: pathlib.Path, cache: str) -> recipes.Recipe:
  """The recipe of the quickstart for a folder of videos."""
  spec = importlib.util.spec_from_file_location("quickstart", CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.data.source = str(folder)
  config.data.max_pixels = 256 * 144
  config.data.cache = cache
  config.dit.tokens = 2048
  return recipes.read(config)


def measure(folder: pathlib.Path, cache: str, steps: int) -> dict[str, record.Figure]:
  """Prepares, fills the cache and trains; figures by name."""
  recipe = read_recipe(folder / "videos", cache)
  workdir = folder / f"run-{cache}"
  prepare.run(recipe, workdir)
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
  begin = time.perf_counter()
  setup = train_vae.setup(recipe, workdir, mesh)
  filled = time.perf_counter() - begin
  row = training.measure("vae", setup, recipe.vae.train, mesh, recipe.seed, steps)
  logging.info(
    "cache %s: wait %.1f %%, step %.3f s, with the loader %.3f s, loader alone %.2f "
    "batches/s, %.1f s to begin",
    cache, 100 * row["wait"], row["step_s"], row["loop_s"],
    row["loader_batches_per_s"], filled,
  )  # fmt: skip
  return {
    f"{cache} wait": record.Figure(100 * row["wait"], "%"),
    f"{cache} loader": record.Figure(
      row["loader_batches_per_s"], "batches/s", "higher"
    ),
    f"{cache} beginning": record.Figure(filled, "s"),
  }


def main(argv):
  del argv
  cli.start_logging()
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(FOLDER.value or temporary)
    make_videos(folder / "videos", VIDEOS.value, SECONDS.value)
    figures = {}
    for cache in ("none", "h264", "raw"):
      figures |= measure(folder, cache, training.STEPS.value)
    settings = {"videos": VIDEOS.value, "seconds": SECONDS.value}
    record.append("clip_cache", settings, figures, FOLDER.value or "runs")


if __name__ == "__main__":
  record.define_flag()
  cli.run_app(main)
