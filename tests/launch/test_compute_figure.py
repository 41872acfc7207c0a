"""The figure of compute: read from folders of runs, drawn, and its table."""

import importlib.util
import json
import sys

import numpy as np
import PIL.Image
import pytest
import tiny
from ml_collections import ConfigDict

from sora_jax.data.video import writer

sys.path.insert(0, str(tiny.ROOT / "launch"))
import compute_figure  # noqa: E402


def make_run(folder, steps, share, prompts=("a", "b")):
  for stage in ("dit", "sample", "evaluate"):
    (folder / stage).mkdir(parents=True)
  rows = [
    {"step": steps, "tflops_per_device": 0.5, "seconds_per_step": 2.0},
    {"step": steps, "eval/loss": 1.0 / steps},
  ]
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "dit" / "metrics.jsonl").write_text(lines)
  shares = {"samples": share, "low": share - 0.1, "high": share + 0.1}
  results = {"attributes": {"shape": shares}}
  (folder / "evaluate" / "results.json").write_text(json.dumps(results))
  samples = []
  for seed, prompt in enumerate(prompts):
    frames, name = (9, f"{prompt}.mp4") if seed else (1, f"{prompt}.png")
    video_THWC = np.full((frames, 16, 16, 3), 200, np.uint8)
    writer.write(folder / "sample" / name, video_THWC, 8)
    samples.append({"file": name, "prompt": prompt, "seed": seed, "frames": frames})
  lines = "".join(json.dumps(row) + "\n" for row in samples)
  (folder / "sample" / "samples.jsonl").write_text(lines)
  return folder


def test_runs_are_drawn_in_the_order_of_their_compute(tmp_path):
  large = compute_figure.read(make_run(tmp_path / "a", 160, 0.8))
  small = compute_figure.read(make_run(tmp_path / "b", 10, 0.4))
  assert small.flops == 10e12 and large.flops == 160e12  # steps of 0.5 TFLOP/s, 2 s
  assert compute_figure.table([large, small])[2:] == [
    "| 1x | 10 | 0.100 | 40.0 (30-50) |",
    "| 16x | 160 | 0.006 | 80.0 (70-90) |",
  ]
  path = tmp_path / "figure.png"
  compute_figure.draw(path, [large, small])
  assert PIL.Image.open(path).width > 500


def test_what_is_missing_is_named(tmp_path):
  run = compute_figure.read(make_run(tmp_path / "a", 10, 0.5))
  with pytest.raises(ValueError, match="two runs or more, not 1"):
    compute_figure.draw(tmp_path / "x.png", [run])
  other = compute_figure.read(make_run(tmp_path / "b", 20, 0.5, prompts=("c",)))
  with pytest.raises(ValueError, match="a and b have no sample of one prompt"):
    compute_figure.draw(tmp_path / "x.png", [run, other])
  (tmp_path / "b" / "evaluate" / "results.json").unlink()
  with pytest.raises(ValueError, match="b: has no evaluate/results.json"):
    compute_figure.read(tmp_path / "b")
  with pytest.raises(ValueError, match="none: has no dit/metrics.jsonl"):
    compute_figure.read(tmp_path / "none")


def test_the_sweep_keeps_the_shares_of_the_schedule():
  path = tiny.ROOT / "configs" / "sweeps" / "compute.py"
  spec = importlib.util.spec_from_file_location("compute", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  train = {"steps": 5000, "warmup_steps": 100, "decay_steps": 0}
  runs = list(module.sweep(ConfigDict({"dit": {"train": train}})))
  assert [run["dit.train.steps"] for run in runs] == [313, 1250, 5000]
  assert [run["dit.train.warmup_steps"] for run in runs] == [7, 25, 100]
  assert not any("dit.train.decay_steps" in run for run in runs)
