"""Faults of processes and their machines: killed, stopped, of another time."""

import os
import pathlib
import signal
import sys
import time

from faults.catalogue import fault
from faults.runs import EVERY, Followed, Outcome, wait_for_step

from sora_jax.runtime import watchdog

TENSOR = "--config.mesh.tensor=2"  # 4 processes share batches of 2 rows
DEADLINE = 20  # seconds; ten times that for the first step, on a busy machine
_FAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"


def children(pid: int) -> list[int]:
  """Processes that one has started, in their order."""
  found = pathlib.Path(f"/proc/{pid}/task").glob("*/children")  # of each thread
  return sorted(int(child) for path in found for child in path.read_text().split())


@fault
def one_of_several(runs, tries):
  """One of 2 or 4 processes is killed, or stopped: all end within a minute."""
  for count in (2, 4):
    flags = (TENSOR,) if count == 4 else ()
    like = runs.whole_of(count, flags)
    for i in range(min(2, tries)):
      victim = (0, count - 1)[i]
      outcome = _one_of(runs, count, victim, signal.SIGKILL, flags, like)
      yield f"one of {count} processes killed", outcome
  flags = (f"--config.dit.train.deadline={DEADLINE}",)
  for victim in range(min(2, tries)):
    outcome = _one_of(runs, 2, victim, signal.SIGSTOP, flags, runs.whole_of(2))
    yield "one of 2 processes stopped", outcome


def _one_of(runs, count, victim, number, flags, like) -> Outcome:
  work = runs.without_dit()
  followed = Followed(runs.start(work, flags=flags, processes=count))
  wait_for_step(followed.process, work, runs.random.randrange(EVERY, 3 * EVERY))
  if followed.process.poll() is not None:  # another fault than the one to be tried
    code, log = followed.end()
    return runs.outcome(work, code or 1, runs.keep(log))
  processes, begin = children(followed.process.pid), time.monotonic()
  os.kill(processes[victim], number)
  code, log = followed.end()
  seconds = time.monotonic() - begin
  runs.keep(log)
  outcome = runs.go_on(work, like=like, flags=flags, processes=count)
  outcome.seconds = seconds
  outcome.note = f"process {victim}, code {code}, {seconds:.1f} s"
  if code in (0, None):
    outcome.went_on, outcome.note = False, f"{outcome.note}: did not end"
  return outcome


@fault
def dead_worker(runs, tries):
  """A data worker gets SIGSEGV: they begin again, in the same order."""
  for _ in range(min(3, tries)):
    work = runs.without_dit()
    followed = Followed(runs.start(work, flags=("--config.data.workers=2",)))
    wait_for_step(followed.process, work, 1)
    workers = [pid for pid in children(followed.process.pid) if _is_worker(pid)]
    if workers:
      os.kill(runs.random.choice(workers), signal.SIGSEGV)
    code, log = followed.end()
    outcome = runs.outcome(work, code, runs.keep(log))
    outcome.said = "workers begin again" in log
    outcome.note = "began again" if outcome.said else "had all of its batches"
    yield "segfault of a data worker", outcome


def _is_worker(pid) -> bool:
  command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
  return b"multiprocessing" in command and b"resource_tracker" not in command


@fault
def clock_jumps(runs, tries):
  """The clock of the machine goes on or back while a run trains.

  TensorStore waits with a save that is under way until the clock is again where it was:
  seconds of them pass. Of a month the watchdog ends the run, and it goes on.
  """
  found = sorted(pathlib.Path("/").glob(_FAKETIME.lstrip("/")))
  if not found:
    sys.stderr.write("clock: left out, as libfaketime is not installed\n")
    return
  for jump, deadline in (("+30d", 0), ("-10", 0), ("-30d", DEADLINE))[:tries]:
    work, stamp = runs.without_dit(), runs.folder / "clock"
    stamp.write_text("+0\n")
    extra = {
      "LD_PRELOAD": str(found[0]),
      "FAKETIME_TIMESTAMP_FILE": str(stamp),
      "FAKETIME_CACHE_DURATION": "1",
      "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    flags = (f"--config.dit.train.deadline={deadline}",)
    followed = Followed(runs.start(work, flags=flags, extra=extra))
    wait_for_step(followed.process, work, EVERY + 1)
    stamp.write_text(f"{jump}\n")
    code, log = followed.end()
    outcome = runs.outcome(work, code, runs.keep(log))
    if code == watchdog.EXIT_CODE:
      outcome = runs.go_on(work)
      outcome.note = "ended by the watchdog, and went on"
    yield f"the clock jumps by {jump}", outcome
