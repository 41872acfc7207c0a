"""Ends a process that hangs, and says where: a stopped run is better than a silent one.

On several hosts a step waits for all of them. If one is stopped, or its file system
hangs, the others wait inside a call of the runtime that nothing interrupts, and a
launcher sees processes that live. So each host watches itself, and needs no other.
"""

import contextlib
import faulthandler
import os
import pathlib
import threading
import time
from collections.abc import Iterator

EXIT_CODE = 70  # EX_SOFTWARE: not that of an error that a user has made
_STDERR = 2
_PAUSE = 10.0  # deadlines that compilation, evaluation and saving may take
_GRACE = 30.0  # seconds after which the interpreter's own watchdog ends the process


class Watchdog:
  """Ends the process with EXIT_CODE when `beat` was not called for a deadline.

  All stacks are written to standard error and to a file before. What watches is a
  thread, which a main thread inside a C call does not hold up; should that call hold
  the interpreter's lock, a timer of `faulthandler` ends the process _GRACE later (with
  exit code 1, and the stacks in standard error alone). Time for which the machine or
  the process was stopped counts.
  """

  def __init__(self, deadline: float, path: str | os.PathLike):
    """Starts to watch; the first deadline is a long one, see `pause`.

    Args:
      deadline: seconds; 0 = does nothing.
      path: of the file for the stacks; its folder is created when it is needed.
    """
    self._deadline, self._path = deadline, pathlib.Path(path)
    self._changed = threading.Condition()
    self._what, self._allowed, self._begin, self._closed = "", 0.0, 0.0, False
    self._thread: threading.Thread | None = None
    if deadline:
      self._rearm("the first step", _PAUSE * deadline)
      self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
      self._thread.start()

  def beat(self) -> None:
    """A step is finished: the next one has a whole deadline."""
    self._rearm("a step", self._deadline)

  @contextlib.contextmanager
  def pause(self, what: str) -> Iterator[None]:
    """What is done inside, an evaluation say, has ten deadlines of its own."""
    before = self._what, self._allowed
    self._rearm(what, _PAUSE * self._deadline)
    try:
      yield
    finally:
      self._rearm(*before)

  def close(self) -> None:
    """Stops watching."""
    with self._changed:
      self._closed = True
      self._changed.notify()
    if self._thread:
      self._thread.join()
      self._thread = None
      faulthandler.cancel_dump_traceback_later()

  def _rearm(self, what, allowed):
    if not self._deadline:
      return
    with self._changed:
      self._what, self._allowed, self._begin = what, allowed, time.monotonic()
      self._changed.notify()
    _kill_later(allowed + _GRACE)

  def _watch(self):
    with self._changed:
      while not self._closed:
        left = self._begin + self._allowed - time.monotonic()
        if left <= 0:
          break
        self._changed.wait(left)
      if self._closed:
        return
      message = (
        f"watchdog: {self._what} has not ended within {self._allowed:g} s "
        f"(train.deadline {self._deadline:g}): this host, or one that it waits for, "
        "hangs. Stacks of all threads:"
      )
    try:
      _dump(message, self._path)
    finally:
      os._exit(EXIT_CODE)


def _kill_later(seconds):
  with contextlib.suppress(ValueError, OSError, RuntimeError):
    faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)


def _dump(message, path):
  """Writes the stacks of all threads to standard error, then to a file."""
  # Not by logging: the thread that hangs may hold its lock.
  with contextlib.suppress(Exception):
    os.write(_STDERR, f"{message}\n".encode())
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
  # A file system that hangs must not keep the process: this has a limit of its own.
  writer = threading.Thread(target=_write, args=(message, path), daemon=True)
  writer.start()
  writer.join(5.0)


def _write(message, path):
  with contextlib.suppress(Exception):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
      file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
      file.flush()
      faulthandler.dump_traceback(file=file, all_threads=True)
    os.write(_STDERR, f"watchdog: the stacks are in {path}\n".encode())
