"""Figures over time: what a measuring script keeps, and what the report makes of it."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tiny
from absl import flags

# Only for these imports: the folder's training.py would hide the one of tests/.
sys.path.insert(0, str(tiny.ROOT / "launch" / "benchmarks"))
import record  # noqa: E402
import report  # noqa: E402

sys.path.pop(0)

SCRIPTS = (
  "clip_cache", "compare_diffusers", "compare_gpu", "data_engines", "import_memory",
  "loaders", "packing", "safety", "sampling", "scene_cuts", "training", "vae_memory",
)  # fmt: skip


@pytest.fixture
def flag(monkeypatch):
  """Sets --record as a command line would."""
  values = flags.FlagValues()
  flags.DEFINE_string("record", None, "", flag_values=values)
  values.mark_as_parsed()
  monkeypatch.setattr(record.flags, "FLAGS", values)
  return lambda path: setattr(values, "record", path)


def line(value, time="2026-01-01T00:00:00+00:00", better="lower", **changed):
  return {
    "format": record.FORMAT,
    "time": time,
    "benchmark": "training",
    "settings": {"config": "x.py"},
    "commit": "0123456789abcdef",
    "dirty": False,
    "machine": {
      "cpu": "a cpu", "cores": 2, "load": value, "platform": "cpu", "device": "cpu",
      "devices": 1,
    },
    "versions": {},
    "figures": {"step": {"value": value, "unit": "s", "better": better}},
    **changed,
  }  # fmt: skip


def marks(values, better="lower", threshold=0.1, window=5):
  lines = [line(value, better=better) for value in values]
  (series,) = report.series_of(lines, threshold, window)
  return [point.mark for point in series.points]


# --- record


def test_a_run_appends_a_line(tmp_path, flag):
  figures = {"step": record.Figure(0.5, "s"), "psnr": record.Figure(30, "dB", "higher")}
  path = record.append("training", {"steps": 3}, figures, tmp_path / "run")
  assert path == tmp_path / "run" / "benchmarks.jsonl"
  assert record.append("training", {"steps": 3}, figures, tmp_path / "run") == path
  first, second = map(json.loads, path.read_text().splitlines())
  assert first["benchmark"] == "training" and first["settings"] == {"steps": 3}
  assert first["figures"] == second["figures"] == {
    "step": {"value": 0.5, "unit": "s", "better": "lower"},
    "psnr": {"value": 30, "unit": "dB", "better": "higher"},
  }  # fmt: skip
  assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first["time"])
  machine = first["machine"]
  assert machine["cores"] == len(os.sched_getaffinity(0)) and machine["cpu"]
  # The tests' simulated devices.
  assert (machine["platform"], machine["devices"]) == ("cpu", 8)
  assert {"python", "jax", "numpy"} <= first["versions"].keys()


def test_the_flag_says_where_and_whether(tmp_path, flag):
  device = record.Device("tpu", "TPU v5", 4)
  flag(str(tmp_path / "here.jsonl"))
  path = record.append("x", {}, {}, tmp_path / "run", device)
  assert path == tmp_path / "here.jsonl" and not (tmp_path / "run").exists()
  (kept,) = map(json.loads, path.read_text().splitlines())
  assert kept["machine"] | {"device": "TPU v5", "devices": 4} == kept["machine"]
  flag("")
  assert record.append("x", {}, {}, tmp_path / "run", device) is None
  assert not (tmp_path / "run").exists()


def test_the_commit_and_whether_files_differ(tmp_path, flag, monkeypatch):
  def git(*arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(tmp_path), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

  monkeypatch.setattr(record, "ROOT", tmp_path)
  flag(str(tmp_path.parent / f"{tmp_path.name}.jsonl"))
  device = record.Device("cpu", "cpu", 1)

  def kept():
    path = record.append("x", {}, {}, device=device)
    found = json.loads(path.read_text().splitlines()[-1])
    return found["commit"], found["dirty"]

  assert kept() == (None, None)
  git("init", "--quiet")
  (tmp_path / "a").write_text("1")
  git("add", "a")
  git("commit", "--quiet", "-m", "a")
  head = git("rev-parse", "HEAD").strip()
  assert kept() == (head, False)
  (tmp_path / "a").write_text("2")
  assert kept() == (head, True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_keeps_its_figures(name):
  text = (tiny.ROOT / "launch" / "benchmarks" / f"{name}.py").read_text()
  assert "record.define_flag()" in text and f'record.append("{name}"' in text


def test_all_scripts_are_named_above():
  folder = tiny.ROOT / "launch" / "benchmarks"
  others = {"record", "report", "torch_dit"}
  assert {path.stem for path in folder.glob("*.py")} == {*SCRIPTS, *others}


# --- report


def test_changes_beyond_the_threshold_are_marked():
  assert marks([1.0, 1.05, 1.3]) == ["", "", "worse"]
  assert marks([1.0, 0.95, 0.7]) == ["", "", "better"]
  assert marks([1.0, 1.3], better="higher") == ["", "better"]
  assert marks([1.0, 0.7], better="higher") == ["", "worse"]
  assert marks([1.0, 0.7, 1.3], better="") == ["", "changed", "changed"]
  assert marks([1.0, 1.3], threshold=0.5) == ["", ""]
  assert marks([0.0, 0.0, 1.0]) == ["", "", "worse"]
  # One outlier does not shift what later values are compared with; a lasting change
  # becomes the usual once it fills half the window.
  assert marks([1.0, 1.0, 2.0, 1.0]) == ["", "", "worse", ""]
  assert marks([1.0, 2.0, 2.0, 2.0], window=2)[-1] == ""


def test_only_comparable_runs_are_compared():
  lines = [
    line(1.0),
    line(9.0, settings={"config": "y.py"}),
    line(9.0, machine=line(0)["machine"] | {"cores": 64}),
    line(9.0, benchmark="sampling"),
    line(1.0, commit=None, dirty=None),
  ]
  found = report.series_of(lines, 0.1, 5)
  assert sorted(len(series.points) for series in found) == [1, 1, 1, 2]
  assert not any(point.mark for series in found for point in series.points)


def run(*arguments, cwd):
  script = tiny.ROOT / "launch" / "benchmarks" / "report.py"
  return subprocess.run(
    [sys.executable, script, *arguments],
    cwd=cwd,
    capture_output=True,
    text=True,
    check=False,
  )


def write(path, *lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(x) + "\n" for x in lines))


@pytest.mark.slow
def test_tables_plot_and_exit_code(tmp_path):
  # Two files, and the later line first: the course is by time.
  write(
    tmp_path / "runs" / "benchmarks.jsonl",
    line(0.5, time="2026-02-03T04:05:06+00:00", dirty=True),
  )
  write(tmp_path / "runs" / "a" / "benchmarks.jsonl", line(0.25))
  done = run("--plot=runs/course.png", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  text = done.stdout
  assert "### training\na cpu, 2 cores; config=x.py\n" in text
  assert (
    "| figure | unit | 2026-01-01 00:00 012345678 | 2026-02-03 04:05 012345678+ | "
    "change |\n| :-- | :-- | --: | --: | --: |\n"
    "| step | s | 0.25 | 0.5 worse | +100.0% |\n"
  ) in text
  assert "worse by more than 10%: training: step" in text
  image = np.asarray(PIL.Image.open(tmp_path / "runs" / "course.png").convert("RGB"))
  red = (image == [214, 39, 40]).all(-1)  # tab:red, the marked value
  assert red.sum() > 10 and image.shape[1] == 500

  assert run("--fail", cwd=tmp_path).returncode == 1
  assert run("--fail", "--threshold=2", cwd=tmp_path).returncode == 0
  one = run("runs/a/benchmarks.jsonl", cwd=tmp_path).stdout
  assert "| step | s | 0.25 |  |\n" in one
  last = run("--runs=1", cwd=tmp_path).stdout
  assert "| step | s | 0.5 worse | +100.0% |\n" in last


def test_figures_that_a_run_left_out_are_blank():
  two = line(2.0, time="2026-01-02T00:00:00+00:00")
  two["figures"] = {"memory": {"value": 7.0, "unit": "GB", "better": "lower"}}
  text = report.table(report.series_of([line(1.0), two], 0.1, 5), runs=5)
  assert text.endswith("| memory | GB |  | 7 |  |\n| step | s | 1 |  |  |")


def test_what_cannot_be_read_is_named(tmp_path):
  done = run(cwd=tmp_path)
  assert done.returncode == 1 and "no figures in runs/benchmarks.jsonl" in done.stderr
  assert "no such file: x.jsonl" in run("x.jsonl", cwd=tmp_path).stderr
  path = tmp_path / "x.jsonl"
  path.write_text(json.dumps(line(1.0)) + '\n{"format": 1, "ti\n')
  with pytest.raises(ValueError, match="x.jsonl:2 is no line of figures"):
    report.read([path])
  path.write_text(json.dumps(line(1.0, format=2)) + "\n")
  with pytest.raises(ValueError, match="x.jsonl:1 is of format 2, this script reads 1"):
    report.read([path])
