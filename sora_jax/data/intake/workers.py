"""Runs jobs on media files in processes of their own, one for each core.

FFmpeg decodes bytes that nobody has checked: a process that a damaged file brings down
costs that file, not the run. The processes import neither JAX nor the main program.

A job and its result are dicts that JSON can hold:
  {"do": "measure" | "probe", "path"} -> {"record": ...}, or {"reason": why it cannot be
    used}, with "crashed": True if it ended a process
  {"do": "score", "function", "clip"} -> {"record": {name: number}}, {"reason": ...}, or
    {"error": what the user's function has raised}
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging

Job = dict[str, Any]
_START = "from sora_jax.data.intake import workers; workers.serve()"


def cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def run(jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, Job]]:
  """Yields (job, result) as they are done; with 0 workers in this process, in order.

  At most two results for each worker wait, so memory does not grow with the jobs.
  """
  if workers == 0:
    for job in jobs:
      yield job, do(job)
    return
  source, lock = iter(jobs), threading.Lock()
  processes = [Process() for _ in range(workers)]
  done: queue.Queue = queue.Queue(2 * workers)
  stop = threading.Event()

  def work(process):
    try:
      while not stop.is_set():
        with lock:
          job = next(source, None)
        if job is None:
          break
        done.put((job, process.do(job)))
    except BaseException as e:  # raised where the results are read
      done.put((None, e))
    finally:
      process.end()
      done.put((None, None))

  threads = [
    threading.Thread(target=work, args=(process,), daemon=True) for process in processes
  ]
  for thread in threads:
    thread.start()
  left = workers
  try:
    while left:
      job, result = done.get()
      if isinstance(result, BaseException):
        raise result
      if job is None:
        left -= 1
      else:
        yield job, result
  finally:
    stop.set()
    while any(thread.is_alive() for thread in threads):
      # Who reads has stopped, and does not wait for long jobs. A process may have been
      # about to start, so this is said until all threads have heard it.
      if left:
        for process in processes:
          process.kill()
      with contextlib.suppress(queue.Empty):  # whoever waits to put one can end
        done.get(timeout=0.05)


def do(job: Job) -> Job:
  """Does one job; whatever is wrong with the file is in the result."""
  # Only here, since OpenCV and the detectors are for those who measure.
  from sora_jax.data.intake import measure, score
  from sora_jax.data.video import media

  scores = job["do"] == "score"
  try:
    if scores:
      return {"record": score.score(job["function"], job["clip"])}
    work = {"measure": measure.measure_file, "probe": measure.probe_file}[job["do"]]
    return {"record": work(job["path"])}
  except media.ClipError as e:
    return {"reason": e.reason}
  # A file can break in more ways than the decoders name; none of them ends a run.
  except Exception as e:
    fault = f"{type(e).__name__}: {e}"[:300]
    logging.debug("%s", job, exc_info=True)
    return {"error": fault} if scores else {"reason": f"cannot be measured ({fault})"}


def serve() -> None:
  """The program of a worker: a job a line in, a result a line out, until the end."""
  # An interrupt goes to all processes of a terminal; the first one ends the others.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  results = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what a library prints is not a result
  for line in sys.stdin:
    results.write(json.dumps(do(json.loads(line))) + "\n")
    results.flush()


class Process:
  """Does one job after the other in a process, and in another one once it has died."""

  def __init__(self):
    self._process: Any = None  # a Popen with pipes

  def do(self, job: Job) -> Job:
    """The result of a job, as the function `do` has it, or that it was a crash."""
    if self._process is None:
      self._process = _start()
    line = ""
    # Who died of the job before takes no other one, and tells nothing.
    with contextlib.suppress(OSError):
      self._process.stdin.write(json.dumps(job) + "\n")
      self._process.stdin.flush()
      line = self._process.stdout.readline()
    if line.endswith("\n"):
      return json.loads(line)
    return {"reason": _how_it_ended(self.end()), "crashed": True}

  def kill(self) -> None:
    """Ends the process in the middle of a job."""
    if process := self._process:
      process.kill()

  def end(self) -> int:
    """Ends the process, if there is one; its exit code, negative for a signal."""
    process, self._process = self._process, None
    if process is None:
      return 0
    with contextlib.suppress(OSError):
      process.stdin.close()
    code = process.wait()
    process.stdout.close()
    return code


def _start() -> subprocess.Popen:
  # It finds what this process finds: the package, and a user's score function.
  path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
  return subprocess.Popen(
    [sys.executable, "-c", _START],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    text=True,
  )


def _how_it_ended(code: int) -> str:
  how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
  return f"its decoder has crashed the process that measured it ({how})"
