"""Has files and clips measured that are not in the ledger yet."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sora_jax.data.clips import Clip
from sora_jax.data.intake import workers
from sora_jax.data.intake.ledger import Ledger, key_of


@dataclasses.dataclass(frozen=True)
class Measuring:
  """How files are measured; nothing of it changes a figure.

  decode: measure every frame; without, headers are read and damage is not seen.
  score_fn: "module:function", see `intake.score`; "" for none.
  processes: that measure; 0 measures in this one, which a decoder may then crash.
  ledger: file that keeps what is measured for the next time; None keeps nothing.
  beam: flags of an Apache Beam pipeline that measures in place of these processes, see
    `beam_pipeline`; () for none. It needs a ledger, beside which its results arrive.
  """

  decode: bool = True
  score_fn: str = ""
  processes: int = 0
  ledger: pathlib.Path | None = None
  beam: tuple[str, ...] = ()


def measure_files(
  folder: pathlib.Path,
  names: Iterable[str],
  how: Measuring,
  ledger: Ledger,
  watch: Callable,
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (name, result) of files in their order; see `workers` for results.

  A file that changes while it is measured is measured as it was found.
  """
  do = "measure" if how.decode else "probe"
  keys: dict[str, str] = {}
  faults: dict[str, dict[str, Any]] = {}
  for name in names:
    try:
      keys[name] = key_of(folder / name, name, do)
    except OSError as e:
      faults[name] = {"reason": f"cannot be read ({e.strerror})"}
  jobs = [
    {"do": do, "path": str(folder / name), "key": key}
    for name, key in keys.items()
    if key not in ledger
  ]
  _fill(jobs, how, ledger, watch, "measured", "files")
  for name in names:
    yield name, faults[name] if name in faults else ledger.get(keys[name])


def score_clips(
  clips: list[Clip], how: Measuring, ledger: Ledger, watch: Callable
) -> Iterator[tuple[Clip, dict[str, Any]]]:
  """Yields (clip, result) of `how.score_fn`, in order.

  ValueError if the function fails, which is for its author to see.
  """
  fields = ("path", "start", "frames", "fps", "height", "width", "crop", "captions")
  jobs, keys = [], []
  for clip in clips:
    facts = {name: getattr(clip, name) for name in fields}
    key = key_of(pathlib.Path(clip.path), clip.path, how.score_fn, facts)
    keys.append(key)
    if key not in ledger:
      job = {"do": "score", "function": how.score_fn, "clip": facts, "key": key}
      jobs.append(job)
  _fill(jobs, how, ledger, watch, "scored", "clips")
  for clip, key in zip(clips, keys, strict=True):
    yield clip, ledger.get(key)


def _fill(jobs, how, ledger, watch, what, unit):
  """Does the jobs and puts their results into the ledger."""
  done = _done(jobs, how)
  for job, result in watch(_Sized(done, len(jobs)), what, unit):
    if "error" in result:
      raise ValueError(
        f"config.data.score_fn {job['function']!r} fails on {job['clip']['path']}: "
        f"{result['error']}"
      )
    ledger.add(job["key"], result)


def _done(jobs, how) -> Iterator[tuple[workers.Job, workers.Job]]:
  """Has the jobs done by what `how` says; (job, result) as they are done."""
  if not how.beam or not jobs:
    return workers.run(jobs, min(how.processes, len(jobs)))
  try:
    # Only here: importing it takes seconds, and few have it.
    from sora_jax.data.intake import beam_pipeline
  except ImportError as e:
    raise ValueError(f"--beam needs `pip install 'sora_jax[beam]'` ({e})") from e
  return beam_pipeline.run(jobs, how.beam, how.ledger.with_name("beam"))


@dataclasses.dataclass(frozen=True)
class _Sized:
  """An iterator whose length is known."""

  items: Iterator
  length: int

  def __iter__(self):
    return self.items

  def __len__(self):
    return self.length
