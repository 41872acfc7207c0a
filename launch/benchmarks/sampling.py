"""What the ways to sample faster bring, and cost, on a trained run and this machine.

  python launch/benchmarks/sampling.py --checkpoint=runs/quickstart

Three tables, with medians of calls that take turns:

  reuse     `sample --reuse`: time by threshold, PSNR against the same videos without
            it, and the share of them whose colour is as the prompt says.
  guidance  the two predictions of guidance as two rows of a batch, as sampling makes
            them, and as two segments of one row of twice the length.
  ahead     a long video to a file: windows made while frames of those before are
            fetched and written, or one after the other.

The figures are kept in the run's benchmarks.jsonl, see record.py.
"""

import functools
import pathlib
import statistics
import tempfile
import time
from unittest import mock

import jax
import numpy as np
import record
from absl import app, flags

from sora_jax.data.clips import read_manifest
from sora_jax.data.video import writer
from sora_jax.diffusion.solvers import Options
from sora_jax.evaluation import shape_attributes
from sora_jax.evaluation.quality import psnr
from sora_jax.models import dit
from sora_jax.packing import patches
from sora_jax.sampling import pipeline
from sora_jax.sampling.conditioning import Request
from sora_jax.sampling.job import Job
from sora_jax.sampling.pipeline import Sampler
from sora_jax.tasks import dit as dit_task

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run.", required=True)
REUSE = flags.DEFINE_multi_float("reuse", [0.05, 0.1, 0.2, 0.3], "Thresholds.")
STEPS = flags.DEFINE_integer("steps", 24, "Of the solver.", 1)
CLIPS = flags.DEFINE_integer("clips", 16, "Held-out captions to sample.", 1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that each is timed.", 1)
FRAMES = flags.DEFINE_integer("frames", 193, "Of the long video.", 17)
ONLY = flags.DEFINE_multi_enum(
  "only", ["reuse", "guidance", "ahead"], ["reuse", "guidance", "ahead"], "Tables."
)
record.define_flag()


def seconds(calls: dict, rounds: int) -> dict:
  """Median seconds of each call, in turns, after one that compiles."""
  for call in calls.values():
    call()
  taken = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      begin = time.perf_counter()
      call()
      taken[name].append(time.perf_counter() - begin)
  return {name: statistics.median(values) for name, values in taken.items()}


def compare_reuse(model) -> dict[str, record.Figure]:
  """Prints the table of thresholds; the figures of it."""
  clips = read_manifest(pathlib.Path(CHECKPOINT.value) / "data" / "manifest.jsonl")
  clips = [c for c in clips if c.split == "heldout" and c.frames >= 17 and c.truth]
  clips = clips[: CLIPS.value]
  requests = [
    Request(clip.captions[0], 64, 64, 17, clip.fps, i) for i, clip in enumerate(clips)
  ]
  videos = {}

  def call(reuse):
    options = Options(steps=STEPS.value, shift=3.0, reuse=reuse)
    videos[reuse] = model.sample(requests, options)

  limits = [0.0, *REUSE.value]
  taken = seconds({x: functools.partial(call, x) for x in limits}, ROUNDS.value)
  print(f"\n| reuse | s for {len(clips)} videos | times as fast | PSNR dB | colour |")
  print("| --: | --: | --: | --: | --: |")
  figures = {}
  for limit in limits:
    colour = [
      shape_attributes.score(shape_attributes.analyse_video(video_THWC), clip.truth)[
        "color"
      ]
      for video_THWC, clip in zip(videos[limit], clips, strict=True)
    ]
    alike = [psnr(a, b) for a, b in zip(videos[limit], videos[0.0], strict=True)]
    print(
      f"| {limit:g} | {taken[limit]:.2f} | {taken[0.0] / taken[limit]:.2f} "
      f"| {f'{np.mean(alike):.1f}' if limit else ''} | {np.mean(colour):.0%} |"
    )
    name = f"reuse {limit:g}"
    figures[name] = record.Figure(taken[limit], "s")
    figures[f"{name}, colour"] = record.Figure(100 * np.mean(colour), "%", "higher")
    if limit:
      figures[f"{name}, PSNR"] = record.Figure(float(np.mean(alike)), "dB", "higher")
  return figures


def compare_guidance(model) -> dict[str, record.Figure]:
  """Prints the table of rows and segments; the figures of it."""
  config, dtype = model.denoiser.model, model.dtype
  predict = jax.jit(functools.partial(dit_task.predict, config, dtype=dtype))
  rng = np.random.default_rng(0)
  print("\n| tokens | two rows ms | two segments ms | segments / rows |")
  print("| --: | --: | --: | --: |")
  figures = {}
  for grid in ((5, 8, 8), (9, 8, 8), (9, 16, 16)):
    tokens, texts, calls = int(np.prod(grid)), 64, {}
    for name, rows, segments in (("rows", 2, 1), ("segments", 1, 2)):

      def each(count, rows=rows, segments=segments):
        ids = np.repeat(np.arange(1, segments + 1, dtype=np.int32), count)
        return np.repeat(ids[None], rows, 0)

      batch = {
        "segment_L": each(tokens),
        "group_L": 2 * (each(tokens) - 1),
        "text_segment_S": each(texts),
        "position_L3": np.tile(patches.grid_positions(grid), (rows, segments, 1)),
      }
      x_BLP = rng.standard_normal((rows, segments * tokens, config.patch_width))
      text_BSE = rng.standard_normal((rows, segments * texts, config.text_width))
      level_BG = np.full((rows, 2 * segments), 0.5, np.float32)
      inputs = jax.device_put(
        (
          x_BLP.astype(np.float32),
          level_BG,
          dit.Context.of_batch(batch, text_BSE.astype(np.float32)),
        )
      )

      def call(inputs=inputs):
        jax.block_until_ready(predict(model.params, *inputs))

      calls[name] = call
    with jax.set_mesh(model.denoiser.mesh):
      taken = seconds(calls, 3 * ROUNDS.value)
    print(
      f"| {tokens} | {1e3 * taken['rows']:.1f} | {1e3 * taken['segments']:.1f} "
      f"| {taken['segments'] / taken['rows']:.2f} |"
    )
    for name, value in taken.items():
      figures[f"guidance, two {name} of {tokens}"] = record.Figure(1e3 * value, "ms")
  return figures


def compare_ahead(model) -> dict[str, record.Figure]:
  """Prints the table of a long video's times; the figures of it."""
  options = Options(steps=STEPS.value, shift=3.0)
  job = Job("a red circle moves right", frames=FRAMES.value, size=(128, 128))
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "long.mp4"

    def write(ahead):
      with mock.patch.object(pipeline, "ahead", ahead):
        writer.write_chunks(path, model.stream(job, options), 12.0)

    calls = {"ahead": pipeline.ahead, "in turn": lambda items: items}
    taken = seconds(
      {name: functools.partial(write, ahead) for name, ahead in calls.items()},
      ROUNDS.value,
    )
  print(f"\n| {FRAMES.value} frames of 128x128 | s |\n| :-- | --: |")
  for name, value in taken.items():
    print(f"| {name} | {value:.2f} |")
  return {f"windows, {name}": record.Figure(s, "s") for name, s in taken.items()}


def main(_):
  model = Sampler.from_checkpoint(CHECKPOINT.value)
  tables = {
    "reuse": compare_reuse, "guidance": compare_guidance, "ahead": compare_ahead,
  }  # fmt: skip
  figures = {}
  for name in ONLY.value:
    figures |= tables[name](model)
  settings = {name: flags.FLAGS[name].value for name in ("steps", "clips", "frames")}
  settings["model_steps"] = model.meta.steps
  record.append("sampling", settings, figures, CHECKPOINT.value)


if __name__ == "__main__":
  app.run(main)
