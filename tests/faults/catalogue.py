"""The faults: each breaks copies of a run and says how what comes after ends."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator

import sealed
from faults.runs import (
  ALL,
  EVERY,
  STEPS,
  Outcome,
  Runs,
  edit,
  files_of,
  flip,
  partial_saves,
  same,
  state_of,
  steps_of,
)  # fmt: skip

from sora_jax.data import records
from sora_jax.run import latent_shards
from sora_jax.runtime import checkpoint, train_checkpoints

FAULTS: dict[str, Callable[[Runs, int], Iterator[tuple[str, Outcome]]]] = {}


def fault(function):
  """Registers a generator of (name of a row, outcome of one try)."""
  FAULTS[function.__name__] = function
  return function


# --- bits, read back in this process


@fault
def flips_of_a_checkpoint(runs, tries):
  """A bit anywhere in the newest checkpoint, restored as a training restores it."""
  yield from flipped_checkpoint(runs.copy(runs.cut), runs.random, tries)


def flipped_checkpoint(work, chosen, tries, overrides=None):
  """`flips_of_a_checkpoint` of the run in a folder."""
  step = steps_of(work)[-1]
  checkpoints, abstract = state_of(work, overrides)
  expected = checkpoints.restore(step, abstract)
  files = files_of(work / "dit" / "checkpoints" / str(step))

  def read():
    return checkpoints.restore(step, abstract)

  for _ in range(tries):
    yield "bit of a checkpoint", _read_flipped(files, chosen, read, expected)
  checkpoints.close()


@fault
def flips_of_a_model(runs, tries):
  """A bit anywhere in vae/model or dit/model."""
  yield from flipped_model(runs.copy(runs.whole), runs.random, tries)


def flipped_model(work, chosen, tries):
  """`flips_of_a_model` of the run in a folder."""
  for name in ("vae", "dit"):
    folder = work / name / "model"
    files = [path for path in files_of(folder) if path.name != "tokenizer.model"]
    expected = checkpoint.load_model(folder)
    for _ in range((tries + 1) // 2):
      outcome = _read_flipped(
        files, chosen, lambda folder=folder: checkpoint.load_model(folder), expected
      )
      yield "bit of a model", outcome


@fault
def flips_of_a_shard(runs, tries):
  """A bit anywhere in the shards of latents."""
  yield from flipped_shard(runs.copy(runs.whole), runs.random, tries)


def flipped_shard(work, chosen, tries):
  """`flips_of_a_shard` of the run in a folder: `check` has to find each."""
  files = sorted((work / "encode").glob("*.array_record"))
  clips = records.read_latents_manifest(str(work / "encode" / "latents.jsonl"))

  def read():
    reader = records.LatentReader(str(work / "encode"))
    latents = [reader.read(clip)["latent_THWC"] for clip in clips]
    reader.close()
    return latents

  expected = read()
  for _ in range(tries):
    path, before = flip(files, chosen)
    found = latent_shards.lost(work / "encode", thorough=True)
    path.write_bytes(before)
    yield "bit of a shard, by check", Outcome(not found, bool(found), equal=not found)
    yield (
      "bit of a shard, as training reads",
      _read_flipped(files, chosen, read, expected),
    )


def _read_flipped(files, chosen, read, expected) -> Outcome:
  """Flips a bit, reads, and puts the bit back."""
  path, before = flip(files, chosen)
  try:
    found = read()
  except ValueError as error:
    one_line = "\n" not in str(error)
    return Outcome(False, one_line, note=str(error))
  finally:
    path.write_bytes(before)
  return Outcome(True, equal=same(expected, found), said=False)


# --- damage, and the command typed again


def _newest(work):
  return work / "dit" / "checkpoints" / str(steps_of(work)[-1])


def _arrays(folder):
  """The files that hold arrays, and their index: no others are read for certain."""
  return [path for path in files_of(folder) if path.parent.name == "d"]


def _each(change, files):
  for path in files:
    change(path)


def _copy_host(work):
  steps = steps_of(work)
  host = [work / f"dit/checkpoints/{step}/host/metadata" for step in steps]
  shutil.copyfile(host[0], host[-1])


def _empty_folder(work):
  newest = _newest(work)
  shutil.rmtree(newest)
  newest.mkdir()


CHECKPOINT_DAMAGE = {
  "checkpoint truncated": lambda work: _each(
    lambda path: os.truncate(path, path.stat().st_size // 2), _arrays(_newest(work))
  ),
  "checkpoint: files emptied": lambda work: _each(
    lambda path: path.write_bytes(b""), _arrays(_newest(work))
  ),
  "checkpoint partly deleted": lambda w: shutil.rmtree(_newest(w) / "state" / "d"),
  "checkpoint: an empty folder": _empty_folder,
  "host of another step": _copy_host,
}


@fault
def damaged_checkpoints(runs, tries):
  """The newest checkpoint is broken: the one before it is taken, and that is said."""
  del tries
  for name, damage in CHECKPOINT_DAMAGE.items():
    work = runs.copy(runs.cut)
    damage(work)
    yield name, runs.go_on(work)


STAGE_DAMAGE = {
  "stage.json truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
  "stage.json empty": lambda path: path.write_bytes(b""),
  "stage.json []": lambda path: path.write_text("[]"),
  "stage.json: a key less": lambda path: edit(
    path, lambda stage: stage["config"]["dit"]["train"].pop("steps")
  ),
  "stage.json: a key more": lambda path: edit(
    path, lambda stage: stage["config"]["dit"]["train"].update(warp=9)
  ),
}


@fault
def damaged_stage_files(runs, tries):
  """dit/stage.json is broken: its spare copy is taken."""
  del tries
  for name, damage in STAGE_DAMAGE.items():
    work = runs.copy(runs.cut)
    damage(work / "dit" / "stage.json")
    yield name, runs.go_on(work)


@fault
def between_stages(runs, tries):
  """The VAE or a shard is not what it was: an error, or it is made again."""
  del tries
  work = runs.copy(runs.cut)
  _each(lambda path: flip([path], runs.random), _arrays(work / "vae" / "model"))
  yield "bit of the VAE between stages", runs.go_on(work)
  work = runs.copy(runs.cut)
  path = work / "vae" / "model" / "model.json"
  sealed.rewrite(path, meta={**json.loads(path.read_text())["meta"], "id": "other"})
  yield "another VAE between stages", runs.go_on(work)
  work = runs.copy(runs.cut)
  shard = sorted((work / "encode").glob("*.array_record"))[0]
  shard.unlink()
  yield "a shard deleted", runs.go_on(work)
  yield "a shard deleted, all stages", runs.go_on(work, ALL)


# --- signals


@fault
def sigkill(runs, tries):
  """SIGKILL at random moments, every other one while a checkpoint is written."""
  for i in range(tries):
    name = ("SIGKILL", "SIGKILL in a save")[i % 2]
    yield name, _signalled(runs, signal.SIGKILL, saving=bool(i % 2))


@fault
def sigterm(runs, tries):
  """SIGTERM and SIGUSR1 save first: no step is lost."""
  for i in range(tries):
    number = (signal.SIGTERM, signal.SIGUSR1)[i % 2]
    yield number.name, _signalled(runs, number)


def _signalled(runs, number, saving=False) -> Outcome:
  work = runs.copy(runs.whole)
  shutil.rmtree(work / "dit")
  step = runs.random.randrange(1, STEPS - EVERY)
  delay = runs.random.uniform(0, 0.02 if saving else 0.3)
  code, seconds = runs.stop(work, number, step, delay, saving)
  half = len(partial_saves(work / "dit"))
  saved = max([0, *train_checkpoints.steps_in(work / "dit" / "checkpoints")])
  outcome = runs.go_on(work)
  outcome.seconds = seconds
  outcome.note = (
    f"step {step}, code {code}, {seconds:.1f} s, saved {saved}, half saved {half}"
  )
  return outcome
