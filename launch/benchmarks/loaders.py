"""How fast clips are decoded, by one process and by two, and latents packed into rows.

  python launch/benchmarks/loaders.py

Makes videos of 720p with much detail and reads them at 448x256 as training without a
cache of clips does, beside a bare loop of PyAV's decoder and FFmpeg's scaler (area, to
RGB) over the same files, in turn, each in a process's time of one core. Batches of the
VAE's data come from one worker and from two, by the clock: 2 cores must have nothing
else to do. Rows of 32,768 tokens are packed of latents in shards, in time of one core:
as `configs/quickstart.py` has them, and of clips of 81 frames of 832x480 with 16
channels, patches of 2x2. The figures are kept in benchmarks.jsonl of the folder, see
record.py.
"""

import pathlib
import tempfile
import time

import av
import clip_cache
import numpy as np
import record
from absl import flags, logging

from sora_jax.data import records, sources, tokenizer
from sora_jax.data.batches import Batches
from sora_jax.data.caption_texts import CaptionIds
from sora_jax.data.clip_dataset import ClipDataset
from sora_jax.data.packed_dataset import PackedDataset, PackedOptions
from sora_jax.data.video import media, reader
from sora_jax.packing.planner import Budget
from sora_jax.run import cli

FOLDER = clip_cache.FOLDER
ROUNDS = flags.DEFINE_integer("rounds", 3, "Of each measurement, the best counts.", 1)
SIZE = (256, 448)
BATCH, CROP = 4, (17, 128, 128)
TOKENS = 32_768
# Latents (T, H, W), channels, patches of the DiT.
LATENTS = {
  "quickstart": ((3, 8, 8), 16, (1, 2, 2)),
  "480p": ((21, 60, 104), 16, (1, 2, 2)),
}


def bare(path: pathlib.Path) -> int:
  """Decodes and scales with nothing of ours; the number of frames."""
  height, width = SIZE
  count = 0
  with media.open_video(path) as container:
    for frame in container.decode(video=0):
      frame.reformat(
        width, height, "rgb24", interpolation=av.video.reformatter.Interpolation.AREA
      ).to_ndarray()
      count += 1
  return count


def ours(path: pathlib.Path) -> int:
  """Reads as training does; the number of frames."""
  return len(reader.read(path, size=SIZE))


def decoding(paths: list[pathlib.Path]) -> dict[str, record.Figure]:
  """Frames in a second of a core, by both, and their ratio."""
  best = {"bare": 0.0, "ours": 0.0}
  for _ in range(ROUNDS.value):
    for name, read in (("bare", bare), ("ours", ours)):
      begin = time.process_time()
      frames = sum(map(read, paths))
      speed = frames / (time.process_time() - begin)
      best[name] = max(best[name], speed)
  ratio = best["ours"] / best["bare"]
  logging.info("720p to 448x256, frames/s of a core: %s, ratio %.2f", best, ratio)
  return {
    "decode, bare PyAV": record.Figure(best["bare"], "frames/s", "higher"),
    "decode": record.Figure(best["ours"], "frames/s", "higher"),
    "decode, share of bare PyAV": record.Figure(100 * ratio, "%", "higher"),
  }


def workers(folder: pathlib.Path, batches: int = 12) -> dict[str, record.Figure]:
  """Batches by the clock from one worker and from two, and their ratio."""
  clips, _ = sources.scan(
    folder, max_frames=17, max_pixels=SIZE[0] * SIZE[1], size_multiple=16
  )
  best = {1: 0.0, 2: 0.0}
  for _ in range(ROUNDS.value):
    for count in best:
      made = Batches(ClipDataset(clips, CROP, 0), BATCH, workers=count)
      for _ in range(2 * count):  # processes start, and what is ready already
        next(made)
      begin = time.perf_counter()
      for _ in range(batches):
        next(made)
      best[count] = max(best[count], batches / (time.perf_counter() - begin))
      made.close()
  logging.info("batches/s by workers: %s, ratio %.2f", best, best[2] / best[1])
  return {
    "one worker": record.Figure(best[1], "batches/s", "higher"),
    "two workers": record.Figure(best[2], "batches/s", "higher"),
    "two workers over one": record.Figure(best[2] / best[1], "", "higher"),
  }


def packing(folder: pathlib.Path, name: str, tokens: int = 2**21) -> record.Figure:
  """Tokens in a second of a core, of rows of the latents of LATENTS[name]."""
  (t, h, w), channels, patch = LATENTS[name]
  rng = np.random.default_rng(0)
  each = t * h * w // (patch[0] * patch[1] * patch[2])
  count = max(16, TOKENS // each)

  def make(i):
    return {
      "id": f"clip{i}",
      "latent_THWC": rng.standard_normal((t, h, w, channels)),
      "extras_NHWC": np.zeros((0, h, w, channels)),
      "extras": [],
      "fps": 16.0,
      "captions": [f"the caption of clip number {i}"],
      "split": "train",
      "frames": 4 * t - 3,
      "height": 8 * h,
      "width": 8 * w,
    }

  folder = folder / f"latents-{name}"
  clips = records.write_shard(str(folder / "0.array_record"), map(make, range(count)))
  captions = [caption for clip in clips for caption in clip.captions]
  tokenizer.train(captions, str(folder / "tokenizer.model"))
  words = tokenizer.Tokenizer(str(folder / "tokenizer.model"))
  budget = Budget(TOKENS, 16 * 1024, max(1, TOKENS // each) + 1)
  dataset = PackedDataset(
    clips,
    records.LatentReader(str(folder)),
    CaptionIds(words, 32),
    PackedOptions(budget, patch, 16.0),
    0,
  )
  best, rows = 0.0, max(1, tokens // TOKENS)
  for turn in range(ROUNDS.value):
    begin = time.process_time()
    filled = sum(
      np.count_nonzero(dataset[turn * rows + i]["segment_L"]) for i in range(rows)
    )
    best = max(best, filled / (time.process_time() - begin))
  logging.info("%s: %.2f million tokens/s of a core", name, best / 1e6)
  return record.Figure(best, "tokens/s", "higher")


def main(argv):
  del argv
  cli.start_logging()
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(FOLDER.value or temporary)
    clip_cache.make_videos(folder / "videos", 4, 4.0)
    figures = decoding(sorted((folder / "videos").glob("*.mp4")))
    figures |= workers(folder / "videos")
    for name in LATENTS:
      figures[f"packing, {name}"] = packing(folder, name)
    record.append("loaders", {"rounds": ROUNDS.value}, figures, FOLDER.value or "runs")


if __name__ == "__main__":
  record.define_flag()
  cli.run_app(main)
