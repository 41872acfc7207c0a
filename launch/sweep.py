"""Runs a config with the overrides of a sweep; a table and a plot of what came out.

  python launch/sweep.py --config=configs/quickstart.py --workdir=runs/rates \
    --sweep=configs/sweeps/learning_rate.py --parallel=2

The file has a function `sweep(config)` that yields overrides (see sora_jax.run.sweeps);
with FILE:NAME it is another one. Each run is python -m sora_jax.main in a folder of its
own below --workdir. Typed again, runs that are finished with the config as it is now
are skipped and others go on, so that a sweep can be stopped, and can grow: more runs,
or more steps of each (--config.dit.train.steps). A config that a run cannot go on with
is refused before any of them begins. --base=RUN links the stages of --shared from that
run, where the sweep does not change them: then a sweep of the DiT trains one VAE.

With --launcher="launch/slurm.py --nodes=2" each run is submitted by that launcher, and
--launcher="launch/local.py --processes=2" runs it here on several processes. Once jobs
are done, --report writes the table of what is there and starts nothing.
The results are in results.csv and results.png in --workdir.
"""

import concurrent.futures
import csv
import importlib.util
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading

import curves
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from sora_jax.run import cli, stages, sweeps
from sora_jax.run import recipe as recipes

ROOT = pathlib.Path(__file__).parents[1]
TRAINED = ("vae", "dit")


def load(text: str, config) -> list[sweeps.Overrides]:
  """Returns the overrides of FILE:FUNCTION for a config.

  Raises:
    ValueError: if there is no such function, it yields none, or one that the config
      does not have or that does not fit; names the override.
  """
  path, _, name = text.partition(":")
  name = name or "sweep"
  if not pathlib.Path(path).is_file():
    raise ValueError(f"--sweep: {path} is not a file")
  spec = importlib.util.spec_from_file_location("sweep", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, name):
    raise ValueError(f"--sweep: {path} has no function {name}")
  runs = [dict(overrides) for overrides in getattr(module, name)(config)]
  if not runs:
    raise ValueError(f"--sweep={text} yields no run")
  for overrides in runs:
    try:
      recipes.read(changed(config, overrides))
    except (ValueError, AttributeError, KeyError, TypeError) as error:
      raise ValueError(f"the run {overrides} of {text}: {error}") from error
  return runs


def changed(config, overrides):
  """Returns a copy of a ConfigDict with overrides; only keys that it has can be set."""
  config = ConfigDict(config.to_dict()).lock()
  config.update_from_flattened_dict(overrides)
  return config


def curve(path: pathlib.Path, metric: str) -> list[tuple[int, float]]:
  """Returns (step, value) of a metric in a metrics.jsonl, but no half-written line."""
  if not path.exists():
    return []
  rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
  return [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]


def to_do(folder: pathlib.Path, recipe: recipes.Recipe) -> str | None:
  """Returns why a run has to go on; None if it is finished with this recipe.

  Raises:
    ValueError: naming the run, if it was made with a config that it cannot go on with.
  """
  try:
    return stages.left_to_do(recipe.stages, recipe, folder)
  except ValueError as error:
    raise ValueError(f"the run {folder.name}: {error}") from error


def status(folder: pathlib.Path, recipe: recipes.Recipe) -> str:
  """Returns how far a run is, for the table."""
  if not folder.exists():
    return "not started"
  try:
    return "unfinished" if to_do(folder, recipe) else "complete"
  except ValueError as error:
    logging.warning("%s", error)
    return "another config"


def results(folder: pathlib.Path, recipe: recipes.Recipe) -> dict:
  """Returns the status of a run, and the last loss and evaluation of each stage."""
  row = {"status": status(folder, recipe)}
  for stage in TRAINED:
    path = folder / stage / "metrics.jsonl"
    if stage not in recipe.stages or not path.exists():
      continue
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    for values in rows:
      for key, value in values.items():
        if key in ("step", "loss", "goodput") or key.startswith("eval/"):
          row[f"{stage}:{key}"] = value
  return row


def write_table(path: pathlib.Path, rows: list[dict]) -> list[str]:
  """Writes a CSV with a column for each key of any row; the lines of it as text."""
  columns = list(dict.fromkeys(key for row in rows for key in row))
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)

  def shown(value):
    return f"{value:.5g}" if isinstance(value, float) else str(value)

  cells = [columns] + [[shown(row.get(c, "")) for c in columns] for row in rows]
  widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
  return [
    "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
    for line in cells
  ]


def check_base(base: pathlib.Path, shared, recipe: recipes.Recipe) -> None:
  """Checks that a run can take stages over from another run.

  Raises:
    ValueError: if one of them is not complete there, or not as this recipe makes it.
  """
  for stage in shared:
    if not stages.is_complete(stage, base):
      raise ValueError(f"--base={base}: stage {stage} is not complete there")
    if stage not in recipe.stages:
      continue  # it is taken as it is
    try:
      left = stages.left_to_do([stage], recipe, base)
    except ValueError as error:
      left = str(error)
    if left:
      raise ValueError(f"--base={base} has not what --shared={stage} needs: {left}")


def link(folder: pathlib.Path, base: pathlib.Path, shared) -> None:
  """Makes stages of another run those of this one, which has none of its own."""
  folder.mkdir(parents=True, exist_ok=True)
  for stage in shared:
    if not (folder / stage).exists():
      (folder / stage).symlink_to((base / stage).resolve(), target_is_directory=True)


def command(config: str, workdir, overrides, launcher=None) -> list[str]:
  """Returns the command that runs one run of a sweep."""
  arguments = [f"--config={config}", f"--workdir={workdir}"]
  arguments += [f"--config.{key}={value}" for key, value in overrides.items()]
  if launcher:
    return [sys.executable, *shlex.split(launcher), "--", *arguments]
  return [sys.executable, "-m", "sora_jax.main", *arguments]


class Runner:
  """Runs commands, several at once, with a log file each; ends them all on SIGTERM."""

  def __init__(self, parallel: int):
    self._parallel, self._processes = parallel, set()
    self._lock, self._stopped = threading.Lock(), False

  def run(self, commands: dict[pathlib.Path, list[str]]) -> dict[pathlib.Path, int]:
    """Folder -> exit code; what a command says is in log.txt in its folder."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with concurrent.futures.ThreadPoolExecutor(self._parallel) as pool:
      futures = {f: pool.submit(self._one, f, c) for f, c in commands.items()}
      try:
        return {folder: future.result() for folder, future in futures.items()}
      except BaseException:
        self._stop()
        raise

  def _one(self, folder, command):
    folder.mkdir(parents=True, exist_ok=True)
    with self._lock:
      if self._stopped:
        return 1
      logging.info("begins: %s", folder)
      with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
          command,
          stdout=log,
          stderr=log,
          stdin=subprocess.DEVNULL,
          start_new_session=True,  # of Ctrl-C it gets one signal, from `_stop`
        )
      self._processes.add(process)
    code = process.wait()
    shown = "ends" if code == 0 else f"fails with code {code}, see log.txt"
    logging.info("%s: %s", shown, folder)
    return code

  def _stop(self):
    with self._lock:
      self._stopped = True
      for process in self._processes:
        if process.poll() is None:
          process.terminate()


def report(workdir, runs, read, plot) -> None:
  """Writes results.csv and results.png, and logs the table.

  read: folder of each run -> its recipe.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  stage, _, metric = plot.partition(":")
  rows, drawn = [], {}
  for overrides, (folder, recipe) in zip(runs, read.items(), strict=True):
    rows.append({**overrides, **results(folder, recipe)})
    if points := curve(folder / stage / "metrics.jsonl", metric):
      drawn[folder.name] = points
  for line in write_table(workdir / "results.csv", rows):
    logging.info("%s", line)
  if drawn:
    curves.draw(workdir / "results.png", drawn, plot)
    logging.info("%s", workdir / "results.png")
  else:
    logging.warning("no run has %s: no plot", plot)


def _define_flags():
  flags.DEFINE_string("sweep", None, "FILE or FILE:FUNCTION.", required=True)
  flags.DEFINE_integer("parallel", 1, "Runs at once.", 1)
  flags.DEFINE_string("launcher", None, "Script and its flags, for each run.")
  flags.DEFINE_string("base", None, "Folder of a run to take stages from.")
  flags.DEFINE_list("shared", ["data", "vae", "encode"], "Stages of --base.")
  flags.DEFINE_string("plot", "dit:loss", "What is drawn: <stage>:<metric>.")
  flags.DEFINE_bool("report", False, "Only the results of what is there.")
  flags.DEFINE_bool("dry-run", False, "Print the commands, run nothing.")


def main(argv):
  args = flags.FLAGS
  if len(argv) > 1:
    raise ValueError(f"unexpected arguments {argv[1:]}")
  cli.start_logging()
  config, workdir = flags.FLAGS.config, pathlib.Path(cli.workdir())
  runs = load(args.sweep, config)
  read = {
    workdir / name: recipes.read(changed(config, overrides))
    for name, overrides in zip(sweeps.names(runs), runs, strict=True)
  }
  if args.report:
    return report(workdir, runs, read, args.plot)
  flag = flags.FLAGS["config"]
  path = config_flags.get_config_filename(flag)
  common = config_flags.get_override_values(flag)
  commands = {
    folder: command(path, folder, {**common, **overrides}, args.launcher)
    for overrides, (folder, recipe) in zip(runs, read.items(), strict=True)
    if to_do(folder, recipe)
  }
  if args["dry-run"].value:
    for run in commands.values():
      sys.stdout.write(f"{shlex.join(run)}\n")
    return
  if args.base:
    base = pathlib.Path(args.base)
    own = {f: [s for s in args.shared if not (f / s).exists()] for f in commands}
    for folder, shared in own.items():
      check_base(base, shared, read[folder])
    for folder, shared in own.items():
      link(folder, base, shared)
  workdir.mkdir(parents=True, exist_ok=True)
  logging.info("%d runs, %d to do", len(runs), len(commands))
  codes = Runner(args.parallel).run(commands)
  report(workdir, runs, read, args.plot)
  if any(codes.values()):
    sys.exit(f"{sum(map(bool, codes.values()))} of {len(codes)} runs failed")


if __name__ == "__main__":
  _define_flags()
  # Runs of a sweep started from anywhere find the package.
  os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
  )
  cli.define_flags()
  flags.mark_flag_as_required("config")
  cli.run_app(main)
