"""The same prompts and seeds at growing compute, and the curve of each attribute.

  python launch/compute_figure.py runs/compute/* --out=compute.png

The figure of Sora's report ("Scaling transformers for video generation"), with numbers:
a row for each of `sample.prompts`, a column for each run, the one with the least
compute first; below them held-out loss and, for shapes, the share of samples that show
each attribute with its 95 % interval. The runs are finished ones of one recipe, such as
launch/sweep.py makes by configs/sweeps/compute.py.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np
from absl import flags, logging
from matplotlib.figure import Figure

from sora_jax.data.video import reader
from sora_jax.run import cli

_SHOWN = 3  # frames of each sample
_TICKS = (0, 25, 50, 75, 100)


class Run(NamedTuple):
  """What a finished run's folder says of it.

  Attributes:
    name: of its folder.
    flops: of all steps of the DiT, forward and backward.
    loss: of the last evaluation on held-out clips.
    attributes: name -> {"samples", "low", "high", ...}, see evaluation/attributes.py;
      empty where clips have no known attributes.
    samples: prompt, seed and further settings -> file, in the recipe's order.
  """

  name: str
  flops: float
  loss: float
  attributes: dict
  samples: dict[tuple, pathlib.Path]


def read(folder: pathlib.Path) -> Run:
  """Reads a run's folder; ValueError that names what is missing there."""
  rows = _lines(folder / "dit" / "metrics.jsonl")
  step, tflop = 0, 0.0
  for row in rows:
    if "tflops_per_device" in row:
      step, tflop = row["step"], row["tflops_per_device"] * row["seconds_per_step"]
  losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
  if not step or not losses:
    raise ValueError(f"{folder}: dit/metrics.jsonl has no step or no evaluation")
  results = folder / "evaluate" / "results.json"
  if not results.exists():
    raise ValueError(f"{folder}: has no evaluate/results.json; run it to its end")
  attributes = json.loads(results.read_text()).get("attributes") or {}
  samples = {
    (row["prompt"], row["seed"], row["frames"]): folder / "sample" / row["file"]
    for row in _lines(folder / "sample" / "samples.jsonl")
  }
  return Run(folder.name, step * tflop * 1e12, losses[-1], attributes, samples)


def _lines(path):
  if not path.exists():
    raise ValueError(f"{path.parents[1]}: has no {path.parent.name}/{path.name}")
  return [json.loads(line) for line in path.read_text().splitlines()]


def draw(path: pathlib.Path, runs: list[Run]) -> None:
  """Writes the figure as a PNG.

  Raises:
    ValueError: if there are fewer than two runs, or they have no sample in common.
  """
  if len(runs) < 2:
    raise ValueError(f"a curve of compute needs two runs or more, not {len(runs)}")
  runs = sorted(runs, key=lambda run: run.flops)
  shared = [key for key in runs[0].samples if all(key in run.samples for run in runs)]
  if not shared:
    raise ValueError(
      f"{runs[0].name} and {runs[-1].name} have no sample of one prompt, seed and "
      "length; are they of one recipe?"
    )
  width = 2.9 * len(runs)
  figure = Figure(figsize=(width, len(shared) + 4.2), dpi=100, layout="constrained")
  above, below = figure.subfigures(2, height_ratios=(len(shared) + 0.5, 3.6))
  _draw_samples(above, runs, shared)
  _draw_curves(below, runs)
  figure.savefig(path, format="png")


def _times(runs, run) -> str:
  return f"{run.flops / runs[0].flops:.3g}x"


def _draw_samples(figure, runs, keys):
  grid = figure.subplots(len(keys), len(runs), squeeze=False)
  for axes_R, key in zip(grid, keys, strict=True):
    for axes, run in zip(axes_R, runs, strict=True):
      video_THWC = reader.read(run.samples[key])
      count = min(_SHOWN, len(video_THWC))
      shown = video_THWC[np.linspace(0, len(video_THWC) - 1, count).round().astype(int)]
      gap = np.full((shown.shape[1], 2, 3), 255, np.uint8)
      parts = [part for frame in shown for part in (gap, frame)][1:]
      axes.imshow(np.concatenate(parts, axis=1), interpolation="nearest")
      axes.axis("off")
    axes_R[0].set_title(key[0], fontsize=8, loc="left", pad=2)
  for axes, run in zip(grid[0], runs, strict=True):
    axes.set_title(f"{_times(runs, run)} compute", fontsize=10, loc="right", pad=2)


def _draw_curves(figure, runs):
  flops = [run.flops for run in runs]
  left, right = figure.subplots(1, 2)
  left.plot(flops, [run.loss for run in runs], marker="o", color="black")
  left.set_title("held-out loss", fontsize=9)
  for name in runs[0].attributes:
    rows = [run.attributes[name] for run in runs if name in run.attributes]
    if len(rows) < len(runs):
      continue
    value, low, high = (
      100 * np.array([row[part] for row in rows]) for part in ("samples", "low", "high")
    )
    right.errorbar(
      flops, value, (value - low, high - value), marker="o", capsize=2, label=name
    )
  if right.get_legend_handles_labels()[0]:
    right.legend(fontsize=8, frameon=False)
  right.set_title("% of samples that show it, 95 %", fontsize=9)
  right.set_yticks(_TICKS)
  for axes in (left, right):
    axes.set_xscale("log")
    axes.set_xticks(flops, [_times(runs, run) for run in runs], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("training FLOPs", fontsize=8)
    axes.grid(alpha=0.3)


def table(runs: list[Run]) -> list[str]:
  """Returns the lines of a Markdown table of the runs, the least compute first."""
  runs = sorted(runs, key=lambda run: run.flops)
  names = list(dict.fromkeys(name for run in runs for name in run.attributes))
  lines = ["| compute | TFLOP | loss | " + " | ".join(names) + " |"]
  lines.append("| --- " * (3 + len(names)) + "|")
  for run in runs:
    cells = [_times(runs, run), f"{run.flops / 1e12:.0f}", f"{run.loss:.3f}"]
    for name in names:
      row = run.attributes.get(name)
      interval = (100 * row[part] for part in ("samples", "low", "high")) if row else ()
      cells.append("{:.1f} ({:.0f}-{:.0f})".format(*interval) if row else "-")
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def main(argv):
  cli.start_logging()
  runs = [read(folder) for folder in map(pathlib.Path, argv[1:]) if folder.is_dir()]
  out = pathlib.Path(flags.FLAGS.out)
  draw(out, runs)
  for line in table(runs):
    logging.info("%s", line)
  logging.info("%s", out)


if __name__ == "__main__":
  flags.DEFINE_string("out", "compute.png", "PNG file to write.")
  cli.run_app(main)
