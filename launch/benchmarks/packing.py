"""Packing a million clips by plan, beside batches of buckets as Open-Sora makes them.

  python launch/benchmarks/packing.py

Draws sizes, lengths and captions as collections of web videos have them, gives each
clip the size that `prepare` and `encode` give it, and plans an epoch of rows. The same
clips then go into buckets of (resolution, frames, aspect ratio) as the reports of
Open-Sora describe them: a clip goes into the largest bucket that is not larger than it,
is cropped and shortened to that, and a bucket's rest that fills no batch is dropped.
Two tables are compared: lengths 1, 5, 9, ..., 129 at 256 x 256 pixels with the batch
sizes of Open-Sora 2.0's first stage, and five resolutions and lengths as in 1.2, with
batches of at most as many tokens as a row of ours. "pod.py" are rows of that config,
which hold one of its longest clips, and rows twice as long.

Devices that train side by side wait for the one with most tokens: `fill` is the share
of a step's token slots that hold tokens, of rows and of batches alike. Nothing is
decoded, no device is used. The figures are kept in benchmarks.jsonl, see record.py.
"""

import math
import time
from typing import NamedTuple

import numpy as np
import record
from absl import app, flags, logging

from sora_jax.data import buckets, sources
from sora_jax.data.clips import Clip
from sora_jax.packing import planner, time_grid
from sora_jax.run import cli

CLIPS = flags.DEFINE_integer("clips", 1_000_000, "Rows of the manifest.", 1000)
DEVICES = flags.DEFINE_integer("devices", 64, "That train side by side.", 1)

# (height, width) of files, and how common they are among videos.
SIZES = (
  ((1080, 1920), 30), ((720, 1280), 25), ((1920, 1080), 12), ((480, 854), 6),
  ((480, 640), 6), ((360, 640), 5), ((1280, 720), 4), ((2160, 3840), 4),
  ((800, 1920), 3), ((1080, 1440), 2), ((1080, 1080), 3),
)  # fmt: skip
# What is left is of no common size: edits, screens, crops.
RATES = ((30.0, 50), (24.0, 25), (25.0, 18), (60.0, 7))
ASPECTS = (2.39, 2.0, 16 / 9, 1.85, 1.6, 1.5, 4 / 3)  # and their inverses, and 1
PIXELS = 16  # sides of a patch of the DiT, in pixels
BATCHES_2_0 = {1: 45, 33: 12, 65: 6, 97: 4, 129: 3}  # up to that many frames
AREAS_1_2 = (144 * 256, 240 * 426, 360 * 640, 480 * 854, 720 * 1280)
FRAMES_1_2 = (1, 51, 102, 204, 408)
LONG_ROW = 393_216  # tokens; batches of 1.2 have what fits into as many


class Files(NamedTuple):
  """What a manifest says of N files: pixels, frames, and tokens of a caption."""

  height_N: np.ndarray
  width_N: np.ndarray
  frames_N: np.ndarray
  text_N: np.ndarray


class Result(NamedTuple):
  """What of the clips is trained on, in percent, and how full steps are.

  seconds: that it takes to decide which clips are in which row or batch.
  fill: of token slots. dropped: clips that no batch takes. cut: pixels of frames that
  are cropped away. shortened: frames left out at the end of clips. sizes: shapes of a
  batch, each of which is a program to compile.
  """

  seconds: float
  fill: float
  dropped: float
  cut: float
  shortened: float
  sizes: int


def draw(count: int, most_frames: int, seed: int = 0) -> Files:
  """A fifth are images; videos are scenes of 1 to 60 s, half of them below 5 s."""
  rng = np.random.default_rng(seed)
  weight = np.array([share for _, share in SIZES] + [0])
  size_N = rng.choice(len(SIZES), count, p=weight[:-1] / weight.sum())
  height_N, width_N = np.array([size for size, _ in SIZES])[size_N].T
  odd_N = rng.random(count) < 0.08
  area_N = np.exp(rng.normal(math.log(720 * 900), 0.6, count))
  aspect_N = np.exp(rng.normal(0.25, 0.45, count))
  image_N = rng.random(count) < 0.2
  free_N = odd_N | image_N & (rng.random(count) < 0.6)
  height_N = np.where(free_N, np.sqrt(area_N / aspect_N), height_N).astype(int)
  width_N = np.where(free_N, np.sqrt(area_N * aspect_N), width_N).astype(int)
  rates, share = np.array(RATES).T
  rate_N = rng.choice(rates, count, p=share / share.sum())
  seconds_N = np.exp(rng.normal(math.log(4.5), 0.8, count)).clip(1, 60)
  frames_N = np.where(image_N, 1, (seconds_N * rate_N).astype(int).clip(5, most_frames))
  text_N = np.exp(rng.normal(math.log(70), 0.5, count)).astype(int).clip(5, 256)
  return Files(height_N, width_N, frames_N, text_N)


def tokens_of(frames, height, width):
  """Tokens of clips: a latent frame of 4 frames, and a patch of 16 pixels a side."""
  latent = np.where(frames == 1, 1, 1 + -(-(frames - 1) // 4))
  return latent * (height // PIXELS) * (width // PIXELS)


def by_plan(files: Files, budget: planner.Budget, pixels: int, frames: int) -> Result:
  """As `prepare`, `encode` and training do it; `seconds` are those of the plan."""
  rows = np.stack([files.height_N, files.width_N], 1)
  unique, index_N, count = np.unique(
    rows, axis=0, return_inverse=True, return_counts=True
  )
  legal = [sources.legal_size(h, w, pixels, PIXELS) for h, w in unique.tolist()]
  few = _few_sizes(legal, count)
  size_N2 = np.array([few[size] for size in legal])[index_N.reshape(-1)]
  kept_N = np.minimum(files.frames_N, frames)
  kept_N = np.where(kept_N == 1, 1, 1 + (kept_N - 1) // 4 * 4)
  assert kept_N.max() <= time_grid.round_down(frames)
  token_N = tokens_of(kept_N, *size_N2.T)
  begin = time.process_time()
  plan = planner.plan(np.stack([token_N, files.text_N], 1), budget, seed=0, epoch=0)
  seconds = time.process_time() - begin
  fill = planner.fill(np.stack([token_N, files.text_N], 1), plan, budget)
  cut = _cut(files, size_N2, kept_N)
  return Result(seconds, 100 * fill, 0.0, cut, _shortened(files, kept_N, frames), 1)


def _few_sizes(legal, count) -> dict:
  """The sizes that clips of these have once the commonest 32 are kept."""
  totals: dict[tuple[int, int], int] = {}
  for size, number in zip(legal, count.tolist(), strict=True):
    totals[size] = totals.get(size, 0) + number
  ordered = sorted(totals, key=lambda size: -totals[size])
  # A clip for each size, and the common ones twice: those are kept.
  clips = [Clip("", "", 0.0, 1, 1.0, *size) for size in ordered + ordered[:32]]
  fitted = buckets.limit_sizes(clips, 32)
  return {size: (clip.height, clip.width)
          for size, clip in zip(ordered, fitted, strict=False)}  # fmt: skip


def by_buckets(files: Files, areas, lengths, batch_of, devices, most_frames) -> Result:
  """As the reports of Open-Sora describe it.

  Args:
    files: what there is.
    areas: pixels of the resolutions. lengths: frames of the buckets, from 1.
    batch_of: (frames, tokens of a clip) -> clips of a batch.
    devices: each of which takes a batch of any bucket in a step.
    most_frames: of a clip, for the share that is left out.
  """
  begin = time.process_time()
  rng = np.random.default_rng(0)
  shape_A2 = _shapes(areas)
  area_N = files.height_N * files.width_N
  level_N = np.searchsorted(areas, area_N * 1.02, side="right") - 1
  length_N = np.searchsorted(lengths, files.frames_N, side="right") - 1
  # Smaller than the smallest resolution: there is no bucket.
  usable_N = level_N >= 0
  aspect_A = np.log([w / h for h, w in shape_A2[0]])
  order_A = np.argsort(aspect_A)
  middles = (aspect_A[order_A][1:] + aspect_A[order_A][:-1]) / 2
  log_N = np.log(files.width_N / files.height_N)
  aspect_N = order_A[np.searchsorted(middles, log_N)]
  key_N = (level_N * len(lengths) + length_N) * len(aspect_A) + aspect_N
  kept_N, token_B = np.zeros(len(key_N), bool), []
  for key in np.unique(key_N[usable_N]):
    member = rng.permutation(np.flatnonzero((key_N == key) & usable_N))
    rest, aspect = divmod(int(key), len(aspect_A))
    level, length = divmod(rest, len(lengths))
    frames = np.array(lengths[length])
    token = int(tokens_of(frames, *shape_A2[level][aspect]))
    size = batch_of(int(frames), token)
    batches = len(member) // size
    kept_N[member[: batches * size]] = True
    token_B += [size * token] * batches
  steps = rng.permutation(token_B)[: len(token_B) // devices * devices]
  steps = steps.reshape(-1, devices)
  seconds = time.process_time() - begin
  size_N2 = shape_A2[level_N, aspect_N]
  taken_N = np.array(lengths)[length_N]
  return Result(
    seconds,
    100 * steps.sum() / (steps.max(1).sum() * devices),
    100 * np.mean(~kept_N),
    _cut(files, size_N2, taken_N),
    _shortened(files, taken_N, most_frames),
    len(np.unique(key_N[usable_N])),
  )


def _shapes(areas) -> np.ndarray:
  """[resolution, aspect ratio] (height, width), in whole patches."""
  ratios = sorted({1.0, *ASPECTS, *(1 / ratio for ratio in ASPECTS)})
  whole = lambda x: max(1, round(x / PIXELS)) * PIXELS  # noqa: E731
  return np.array([
    [(whole(math.sqrt(area / r)), whole(math.sqrt(area * r))) for r in ratios]
    for area in areas
  ])  # fmt: skip


def _cut(files, size_N2, frames_N) -> float:
  """Percent of the pixels that lie outside of the crop, over all frames taken."""
  shape_N = size_N2[:, 1] / size_N2[:, 0] * files.height_N / files.width_N
  lost_N = 1 - np.minimum(shape_N, 1 / shape_N)
  return 100 * float(np.average(lost_N, weights=frames_N))


def _shortened(files, frames_N, most) -> float:
  """Percent of frames, of the first `most` of each clip, that are not taken."""
  there_N = np.minimum(files.frames_N, most)
  return 100 * (1 - float(np.minimum(frames_N, there_N).sum() / there_N.sum()))


def batch_2_0(frames: int, tokens: int) -> int:
  """Clips of a batch in the first stage of Open-Sora 2.0."""
  del tokens
  return next(size for most, size in BATCHES_2_0.items() if frames <= most)


def measure(count: int, devices: int) -> dict[str, Result]:
  """All results by name."""
  wide, long = draw(count, 129), draw(count, 408)
  small = planner.Budget(32_768, 8192, 128)
  return {
    "256px plan": by_plan(wide, small, 256 * 256, 129),
    "256px buckets": by_buckets(
      wide, [256 * 256], range(1, 130, 4), batch_2_0, devices, 129
    ),
    "720p plan": by_plan(long, planner.Budget(LONG_ROW, 16_384, 128), 720 * 1280, 405),
    "720p buckets": by_buckets(
      long, AREAS_1_2, FRAMES_1_2,
      lambda frames, tokens: LONG_ROW // tokens, devices, 408,
    ),
    "pod.py plan": by_plan(wide, planner.Budget(32_768, 2048, 16), 832 * 480, 81),
    "pod.py twice": by_plan(wide, planner.Budget(65_536, 4096, 32), 832 * 480, 81),
  }  # fmt: skip


def main(argv):
  del argv
  cli.start_logging()
  figures = {}
  for name, result in measure(CLIPS.value, DEVICES.value).items():
    logging.info(
      "%-14s fill %.2f %%, %.1f s, clips dropped %.2f %%, pixels cut %.2f %%, frames "
      "left out %.2f %%, %d shapes", name, result.fill, result.seconds, result.dropped,
      result.cut, result.shortened, result.sizes,
    )  # fmt: skip
    figures |= {
      f"{name} fill": record.Figure(result.fill, "%", "higher"),
      f"{name} time": record.Figure(result.seconds, "s"),
      f"{name} dropped": record.Figure(result.dropped, "%"),
      f"{name} cut": record.Figure(result.cut, "%"),
      f"{name} frames left out": record.Figure(result.shortened, "%"),
    }
  settings = {"clips": CLIPS.value, "devices": DEVICES.value}
  record.append("packing", settings, figures)


if __name__ == "__main__":
  record.define_flag()
  app.run(main)
