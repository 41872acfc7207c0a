"""A small run of the real commands: made once, broken, gone on with, compared."""

import dataclasses
import json
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import tiny

from sora_jax.run import api, build
from sora_jax.runtime import checkpoint, sharding, train_checkpoints
from sora_jax.training import loop

STEPS, EVERY = 24, 4
OVERRIDES = {
  "dit.train.steps": STEPS,
  "dit.train.save_every": EVERY,
  "dit.train.eval_every": 0,
  "dit.train.keep": 3,
}
ALL, DIT = '("data","vae","encode","dit")', '("dit",)'


@dataclasses.dataclass
class Outcome:
  """How one try ended.

  went_on: by itself, to the end. refused: ended with an error of one line.
  lost: steps that were made again. equal: whether the params are, bit for bit; None
  where they cannot be.
  said: whether the log warned of it or named it. seconds: until the first run ended.
  """

  went_on: bool
  refused: bool = False
  lost: int = 0
  equal: bool | None = None
  said: bool = True
  note: str = ""
  seconds: float | None = None

  @property
  def silently_wrong(self) -> bool:
    """Completed, with other values, or with values that have to differ, untold."""
    return self.went_on and (not self.said if self.equal is None else not self.equal)


class Runs:
  """Runs in a folder: `whole` is uninterrupted, `cut` was killed in its stage dit."""

  def __init__(self, folder: pathlib.Path, seed: int):
    self.folder, self.random = folder, random.Random(seed)
    self.commands = tiny.Commands(folder, folder / "compilations")
    self.whole, self.cut = folder / "whole", folder / "cut"
    self._count = 0

  def prepare(self) -> None:
    """Makes both, unless they are there."""
    if not (self.whole / "dit" / "model" / "model.json").exists():
      self._finish(self.start(self.whole, ALL))
    if not self.cut.exists():
      partial = self.folder / "partial"
      shutil.rmtree(partial, ignore_errors=True)
      shutil.copytree(self.whole, partial)
      shutil.rmtree(partial / "dit")
      self.stop(partial, signal.SIGKILL, 3 * EVERY + 2)
      partial.rename(self.cut)

  def copy(self, of: pathlib.Path) -> pathlib.Path:
    """A copy to break; the one before it is deleted."""
    work = self.folder / "broken"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(of, work)
    return work

  def start(self, workdir, stages: str = DIT, flags=(), processes=1, extra=None):
    """Starts the main job, as a user does; its log is in `stdout`.

    flags: further ones. extra: further environment.
    """
    command = [sys.executable, "-m", "sora_jax.main"]
    if processes > 1:
      launcher = tiny.ROOT / "launch" / "local.py"
      command = [sys.executable, launcher, f"--processes={processes}", "--grace=20"]
      command.append("--")
    overrides = [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    flags = [*overrides, f"--config.stages={stages}", *flags]
    return subprocess.Popen(
      [*command, *tiny.tiny_flags(workdir), *flags],
      env={**self.commands.environment(), **(extra or {})},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
    )

  def whole_of(self, processes: int, flags=()) -> pathlib.Path:
    """An uninterrupted run whose stage dit was trained by several processes."""
    work = self.folder / f"whole{processes}"
    if not (work / "dit" / "model" / "model.json").exists():
      shutil.rmtree(work, ignore_errors=True)
      self.without_dit(work)
      self._finish(self.start(work, flags=flags, processes=processes))
    return work

  def without_dit(self, work: pathlib.Path | None = None) -> pathlib.Path:
    """A copy of the whole run before its stage dit; by default the one to break."""
    work = work or self.folder / "broken"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(self.whole, work, ignore=shutil.ignore_patterns("dit"))
    return work

  def stop(
    self, workdir, number, step: int, delay: float = 0.0, saving: bool = False
  ) -> tuple[int, float]:
    """Sends a signal at a step of the stage dit; (exit code, seconds that it took).

    saving: in the first save after that step.
    """
    process = self.start(workdir)
    folder = pathlib.Path(workdir) / "dit"
    wait_for_step(process, workdir, step)
    while saving and process.poll() is None and not partial_saves(folder):
      time.sleep(0.0005)
    time.sleep(delay)
    begin = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=300)
    return process.returncode, time.monotonic() - begin

  def go_on(self, workdir, stages: str = DIT, like=None, **options) -> Outcome:
    """Types the command again, and compares the model with that of the whole run.

    like: another run to compare with. options: of `start`.
    """
    rows = tiny.rows(workdir / "dit" / "metrics.jsonl")
    reached = max((row["step"] for row in rows), default=0)
    code, log = self._finish(self.start(workdir, stages, **options), None)
    return self.outcome(workdir, code, log, reached, like)

  def outcome(self, workdir, code: int, log: str, reached=0, like=None) -> Outcome:
    """What became of a run, by its exit code and its log; reached: step before it."""
    marked = re.compile(r"(\[\d+\] )?[WE]\d{4} ")
    warnings = [line for line in log.splitlines() if marked.match(line)]
    note = warnings[-1].split("] ", 1)[-1] if warnings else ""
    if code:
      return Outcome(False, code == 1 and "Traceback" not in log, note=note)
    begun = re.search(r"dit: .* params, mesh .* from step (\d+) to", log)
    lost = max(0, reached - int(begun[1])) if begun else 0
    equal = same_params((like or self.whole) / "dit/model", workdir / "dit/model")
    return Outcome(True, False, lost, equal, bool(warnings), note)

  def _finish(self, process, expected: int | None = 0):
    log, _ = process.communicate(timeout=600)
    assert expected is None or process.returncode == expected, log
    return process.returncode, self.keep(log)

  def keep(self, log: str) -> str:
    """Writes a log to a file of its own, and returns it."""
    self._count += 1
    (self.folder / f"{self._count:03d}.log").write_text(log)
    return log


class Followed:
  """A process whose log is read while it runs."""

  def __init__(self, process):
    self.process, self._lines = process, []
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def wait(self, text: str, seconds: float = 300) -> bool:
    """Waits for a text in the log; False if the process ends without."""
    deadline = time.monotonic() + seconds
    while text not in self.log() and time.monotonic() < deadline:
      if self.process.poll() is not None:
        self._reader.join()
        break
      time.sleep(0.01)
    return text in self.log()

  def end(self, seconds: float = 300) -> tuple[int | None, str]:
    """(exit code, log) once it has ended; None, and killed, if it does not."""
    try:
      code = self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      code = None
      self.process.kill()
      self.process.wait()
    self._reader.join()
    return code, self.log()

  def log(self) -> str:
    return "".join(self._lines)

  def _read(self):
    for line in self.process.stdout:
      self._lines.append(line)


def wait_for_step(process, workdir, step: int) -> None:
  """Waits until the stage dit has logged a step, or the process has ended."""
  path = pathlib.Path(workdir) / "dit" / "metrics.jsonl"
  while process.poll() is None and not any(
    row["step"] >= step for row in tiny.rows(path)
  ):
    time.sleep(0.005)


def same_params(first, second) -> bool:
  """Whether two models are equal, bit for bit."""
  (a, _), (b, _) = checkpoint.load_model(first), checkpoint.load_model(second)
  return same(a, b)


def same(first, second) -> bool:
  """Whether two trees of arrays are equal, bit for bit."""
  if jax.tree.structure(first) != jax.tree.structure(second):
    return False
  pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
  return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def state_of(workdir, overrides=None):
  """(open checkpoints, abstract state) of the stage dit of a run, in this process."""
  recipe = api.load_config(tiny.__file__, overrides or OVERRIDES)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  task, rules = build.make_task(recipe)
  built = loop.build(task, recipe.dit.train, mesh, rules, recipe.seed)
  folder = workdir / "dit" / "checkpoints"
  return train_checkpoints.Checkpoints(folder, keep=9), built.abstract


def files_of(folder) -> list[pathlib.Path]:
  """Files that hold something, in a fixed order."""
  paths = sorted(path for path in folder.rglob("*") if path.is_file())
  return [path for path in paths if path.stat().st_size]


def flip(files, chosen: random.Random) -> tuple[pathlib.Path, bytes]:
  """Flips a bit at a random place of all bytes of files; (file, its content before)."""
  sizes = [path.stat().st_size for path in files]
  (path,) = chosen.choices(files, weights=sizes)
  before = path.read_bytes()
  content = bytearray(before)
  content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
  path.write_bytes(content)
  return path, before


def steps_of(workdir) -> list[int]:
  """Steps of the checkpoints of the stage dit."""
  return train_checkpoints.steps_in(workdir / "dit" / "checkpoints")


def partial_saves(folder) -> list[pathlib.Path]:
  """What a save that is under way, or was killed, has in the folder of a stage."""
  return sorted((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def edit(path, change) -> None:
  """Changes a JSON file, and not its checksum."""
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))
