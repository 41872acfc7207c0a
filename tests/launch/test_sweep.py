"""Sweeps: overrides, names, and a real one that is stopped, goes on and grows."""

import csv
import dataclasses
import pathlib
import sys

import numpy as np
import PIL.Image
import pytest
import sealed
import tiny
from run.fake_stages import ALL, BASE, change
from run.fake_stages import runs as fake_stages  # noqa: F401

from sora_jax.run import stages as chain
from sora_jax.run import sweeps

sys.path.insert(0, str(tiny.ROOT / "launch"))
import curves  # noqa: E402
import sweep as launcher  # noqa: E402


def test_grid_is_every_combination():
  assert list(sweeps.grid({"a.b": [1, 2], "c": ["x", "y"]})) == [
    {"a.b": 1, "c": "x"}, {"a.b": 1, "c": "y"},
    {"a.b": 2, "c": "x"}, {"a.b": 2, "c": "y"},
  ]  # fmt: skip
  two = sweeps.product([{"a": 1}, {"a": 2}], sweeps.grid({"c": [3]}))
  assert list(two) == [{"a": 1, "c": 3}, {"a": 2, "c": 3}]


def test_random_draws_stay_when_a_sweep_grows():
  draws = {"rate": sweeps.log_uniform(1e-5, 1e-1), "depth": [2, 4, 8]}
  runs = list(sweeps.random(200, draws, seed=1))
  assert runs[:5] == list(sweeps.random(5, draws, seed=1))
  more = list(sweeps.random(5, {"x": sweeps.uniform(0, 1), **draws}, seed=1))
  assert [{**run, "x": 0} for run in more] == [{**run, "x": 0} for run in runs[:5]]
  assert runs[:5] != list(sweeps.random(5, draws, seed=2))
  logs = np.log10([run["rate"] for run in runs])
  assert logs.min() > -5.01 and logs.max() < -0.99 and abs(logs.mean() + 3) < 0.3
  assert {run["depth"] for run in runs} == {2, 4, 8}
  with pytest.raises(ValueError, match="0 < low"):
    sweeps.log_uniform(0, 1)


def test_names_say_what_is_different():
  runs = [{"dit.train.steps": 3, "vae.train.steps": 4, "seed": 1}, {}]
  assert sweeps.names(runs) == ["dit.train.steps=3,vae.train.steps=4,seed=1", "base"]
  (name,) = sweeps.names([{"data.source": "/a b/" + "c" * 200}])
  assert len(name) < 110 and "/" not in name and " " not in name
  with pytest.raises(ValueError, match="two runs of the sweep are the same"):
    sweeps.names([{"seed": 1}, {"seed": 1}])


def sweep_file(folder, body):
  path = folder / "sweep.py"
  path.write_text(f"from sora_jax.run import sweeps\ndef sweep(config):\n{body}\n")
  return str(path)


@pytest.mark.parametrize(
  "body, message",
  [
    ("  return []", "yields no run"),
    ("  yield {'dit.train.stepz': 1}", "stepz"),
    ("  yield {'dit.train.steps': 1.5}", "steps"),
    ("  yield {'dit.tokens': 50}", "config.dit.tokens 50"),
  ],
)
def test_a_sweep_that_does_not_fit_fails_before_any_run(tmp_path, body, message):
  with pytest.raises(ValueError, match=message):
    launcher.load(sweep_file(tmp_path, body), tiny.get_config())


def test_files_that_hold_no_sweep(tmp_path):
  with pytest.raises(ValueError, match="nowhere.py is not a file"):
    launcher.load("nowhere.py", tiny.get_config())
  with pytest.raises(ValueError, match="has no function other"):
    path = sweep_file(tmp_path, "  return []")
    launcher.load(f"{path}:other", tiny.get_config())


def test_the_example_fits_its_config():
  from run.test_recipe import config_cases

  (quickstart,) = [c.values[0] for c in config_cases() if c.id == "quickstart"]
  path = tiny.ROOT / "configs" / "sweeps" / "learning_rate.py"
  assert len(launcher.load(str(path), quickstart())) == 6


def test_a_table_has_a_column_for_what_any_run_has(tmp_path):
  rows = [{"a": 1, "loss": 0.123456789}, {"a": 2, "psnr": 30.0}]
  lines = launcher.write_table(tmp_path / "r.csv", rows)
  assert lines[0].split() == ["a", "loss", "psnr"] and "0.12346" in lines[1]
  with (tmp_path / "r.csv").open() as file:
    read = list(csv.DictReader(file))
  assert read[0] == {"a": "1", "loss": "0.123456789", "psnr": ""}


@pytest.mark.slow
def test_curves_are_drawn(tmp_path):
  points = [(x, 1.0 / (1 + x)) for x in range(20)]
  lines = {"falls": points, "flat": [(0, 0.5), (19, 0.5)], "nan": [(3, np.nan)]}
  curves.draw(tmp_path / "a.png", lines, "loss")
  with PIL.Image.open(tmp_path / "a.png") as image:
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
  found = {tuple(int(v) for v in pixel) for pixel in np.unique(pixels, axis=0)}
  assert (0x1F, 0x77, 0xB4) in found and (0xFF, 0x7F, 0x0E) in found
  with pytest.raises(ValueError, match="no finite point"):
    curves.draw(tmp_path / "b.png", {"nan": [(3, np.nan)]})


def test_launchers_get_the_arguments_of_each_run():
  command = launcher.command("c.py", "w", {"seed": 1}, "launch/slurm.py --nodes=2")
  assert command[1:] == ["launch/slurm.py", "--nodes=2", "--", "--config=c.py",
                      "--workdir=w", "--config.seed=1"]  # fmt: skip


def test_a_sweep_runs_reports_and_goes_on(tiny_run, commands, tmp_path):
  def run(widths, *flags, **kwargs):
    body = f"  yield from sweeps.grid({{'dit.model.mlp_width': {widths}}})"
    return commands.launch(
      "sweep.py",
      *tiny.tiny_flags(tmp_path / "runs"),
      "--config.stages=('data','vae','encode','dit')",
      "--config.sample.prompts=()",
      "--config.dit.train.eval_every=0",
      f"--sweep={sweep_file(tmp_path, body)}",
      f"--base={tiny_run.workdir}",
      "--parallel=2",
      *flags,
      **kwargs,
    )

  folder = tmp_path / "runs"
  assert run([64, 32], "--dry-run").count("-m sora_jax.main") == 2
  assert not folder.exists()
  log = run([64, 32])
  assert "2 runs, 2 to do" in log and "complete" in log
  assert (folder / "mlp_width=64" / "vae").is_symlink()
  with PIL.Image.open(folder / "results.png") as image:
    assert image.width > 900

  def table():
    with (folder / "results.csv").open() as file:
      return {row["dit.model.mlp_width"]: row for row in csv.DictReader(file)}

  # The first one has the width of the run that the sweep took its VAE from.
  rows = tiny.rows(tiny_run.workdir / "dit" / "metrics.jsonl")
  loss = [row["loss"] for row in rows if "loss" in row][-1]
  assert float(table()["64"]["dit:loss"]) == pytest.approx(loss, rel=1e-6)
  assert table()["32"]["dit:loss"] != table()["64"]["dit:loss"]
  assert {row["status"] for row in table().values()} == {"complete"}

  log = run([64, 32])
  assert "2 runs, 0 to do" in log
  log = run([64, 32, 96], "--report")
  assert table()["96"]["status"] == "not started"
  # A run that was cut goes on: only that one.
  stage = folder / "mlp_width=32" / "dit" / "stage.json"
  sealed.rewrite(stage, complete=False)
  assert "2 runs, 1 to do" in run([64, 32])

  # With more steps both go on; what is there is not the result of that.
  longer = f"--config.dit.train.steps={2 * tiny.STEPS}"
  before = table()
  run([64, 32], longer, "--report")
  assert {row["status"] for row in table().values()} == {"unfinished"}
  assert "2 runs, 2 to do" in run([64, 32], longer)
  assert {row["status"] for row in table().values()} == {"complete"}
  assert all(table()[k]["dit:step"] == str(2 * tiny.STEPS) for k in before)
  assert all(table()[k]["dit:loss"] != before[k]["dit:loss"] for k in before)
  assert "2 runs, 0 to do" in run([64, 32], longer)
  # Fewer again: refused before anything begins.
  log = run([64, 32], returncode=1)
  assert "run mlp_width=64: config.dit.train.steps is 8, but" in log
  assert "to do" not in log


@pytest.fixture
def finished(fake_stages, tmp_path):  # noqa: F811
  """A run whose stages only note their names; it is complete for BASE."""
  chain.run(ALL, BASE, tmp_path / "run")
  return tmp_path / "run"


@pytest.mark.parametrize(
  "path, value, status, message",
  [
    ("dit.train.log_every", 3, "complete", None),  # free
    ("dit.train.steps", 20, "unfinished", "dit.train.steps is 20 and was 10: goes on"),
    ("evaluate.clips", 5, "unfinished", "evaluate.clips is 5 and was 64: runs again"),
  ],
)
def test_a_run_is_complete_for_its_config_of_now(
  finished, path, value, status, message
):
  recipe = change(BASE, path, value)
  before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
  left = launcher.to_do(finished, recipe)
  assert message in left if message else left is None
  assert launcher.results(finished, recipe)["status"] == status
  # Without the stages that would run it is complete.
  shorter = dataclasses.replace(recipe, stages=("data", "vae", "encode"))
  assert launcher.to_do(finished, shorter) is None
  assert before == {path: path.read_bytes() for path in before}
  assert launcher.to_do(finished.with_name("new"), recipe) is not None
  assert launcher.results(finished.with_name("new"), recipe)["status"] == "not started"


def test_a_run_that_cannot_go_on_is_refused(finished, caplog):
  recipe = change(BASE, "dit.train.learning_rate", 1.0)
  message = "the run run: config.dit.train.learning_rate is 1.0, but stage dit"
  with pytest.raises(ValueError, match=message):
    launcher.to_do(finished, recipe)
  assert launcher.results(finished, recipe)["status"] == "another config"
  assert message in caplog.text


def test_stages_of_a_base_are_those_that_the_config_makes(finished, tmp_path):
  shared = ["data", "vae", "encode"]
  launcher.check_base(finished, shared, BASE)
  other = change(change(BASE, "vae.train.steps", 20), "data.workers", 2)
  with pytest.raises(ValueError, match=r"--base=.*--shared=vae.*steps is 20"):
    launcher.check_base(finished, shared, other)
  launcher.check_base(finished, ["data"], other)
  # Stages that the config does not make are taken as they are.
  launcher.check_base(finished, shared, dataclasses.replace(other, stages=("dit",)))
  sealed.delete(finished / "encode" / "stage.json")
  with pytest.raises(ValueError, match="stage encode is not complete there"):
    launcher.check_base(finished, shared, BASE)
  launcher.link(tmp_path / "new", finished, ["data", "vae"])
  launcher.link(tmp_path / "new", finished, ["data", "vae"])
  with pytest.raises(ValueError, match="stage vae would run .* is a link to another"):
    chain.left_to_do(["vae"], change(BASE, "vae.train.steps", 20), tmp_path / "new")


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
  runner = launcher.Runner(1)
  commands = {
    tmp_path / "bad": [sys.executable, "-c", "print('why'); raise SystemExit(3)"],
    tmp_path / "good": [sys.executable, "-c", "print('done')"],
  }
  codes = {folder.name: code for folder, code in runner.run(commands).items()}
  assert codes == {"bad": 3, "good": 0}
  assert pathlib.Path(tmp_path / "bad" / "log.txt").read_text() == "why\n"
