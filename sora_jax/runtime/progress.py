"""How far a long job has come: a bar on a terminal, a line now and then in a log.

  for clip in progress.track(clips, "measured", "clips"):
    ...

  with progress.Progress("encoded", len(clips), "clips") as done:
    done.skip(40)  # what an earlier start has done says nothing about the rate
    done.advance(8)

Where standard error is no terminal (a log file, a pipe, a notebook), the same figures
are lines of the log, at most one in `LINE_SECONDS`. Of several processes the first one
shows its share. Nothing here imports jax, so that a command can say how far it is
before it looks for an accelerator.
"""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from absl import logging
from rich import progress as bars
from rich.console import Console

from sora_jax.runtime.text import format_seconds

LINE_SECONDS = 10.0
Item = TypeVar("Item")


class Progress:
  """A job of known length, as a context; several may be open, one inside the other.

  Args:
    what: is done to each, in the past tense, as "encoded".
    total: how many there are.
    unit: what they are, in the plural, as "clips".
    process: index of this process; only the first one, 0, shows anything.
  """

  def __init__(self, what: str, total: int, unit: str = "", process: int = 0):
    self.what, self.total, self.unit = what, total, unit
    self.done, self._skipped = 0, 0
    self._silent = process != 0
    self._bar: bars.TaskID | None = None
    self._begin = self._last_line = 0.0

  def __enter__(self) -> "Progress":
    self._begin = self._last_line = time.monotonic()
    if not self._silent:
      self._bar = _display.open(self.what, self.total)
    return self

  def __exit__(self, *error) -> None:
    if self._bar is not None:
      _display.close(self._bar)

  def skip(self, count: int = 1) -> None:
    """Counts what was done before this job began; the rate is of the others alone."""
    self._skipped += count
    self._update(count, "")

  def advance(self, count: int = 1, note: str = "") -> None:
    """Counts what is done now.

    note: what else is to be said, such as the file that was written.
    """
    self._update(count, note)

  def text(self, note: str = "") -> str:
    """Returns '12/40 clips, 3.1/s, ETA 9s (note)'; without a rate before the first."""
    parts = [f"{self.done}/{self.total} {self.unit}".strip()]
    fresh = self.done - self._skipped
    seconds = time.monotonic() - self._begin
    if fresh and seconds > 0:
      rate = fresh / seconds
      parts.append(f"{rate:.1f}/s" if rate >= 0.1 else f"{1 / rate:.0f} s each")
      parts.append(f"ETA {format_seconds(max(self.total - self.done, 0) / rate)}")
    return ", ".join(parts) + (f" ({note})" if note else "")

  def _update(self, count, note):
    self.done += count
    if self._silent:
      return
    if self._bar is not None:
      _display.update(self._bar, count, self.text(note))
      return
    now = time.monotonic()
    # The end is always said, unless there was nothing to do.
    ended = self.done >= self.total > self._skipped
    if ended or now - self._last_line >= LINE_SECONDS:
      self._last_line = now
      logging.info("%s %s", self.what, self.text(note))


def track(
  items: Sequence[Item], what: str, unit: str = "", process: int = 0
) -> Iterator[Item]:
  """Yields the items, each of which counts as done when the next one is asked for.

  The arguments are those of `Progress`.
  """
  with Progress(what, len(items), unit, process) as progress:
    for item in items:
      yield item
      progress.advance()


class _Display:
  """The bars on the terminal: one under the other, for as long as any is open."""

  def __init__(self, console: Console | None = None):
    self._console = console
    self._lock = threading.Lock()
    self._bars: bars.Progress | None = None
    self._open: set[bars.TaskID] = set()
    self._log_stream = None

  def open(self, what: str, total: int) -> bars.TaskID | None:
    """Returns the id of a new bar, or None where there is no terminal."""
    console = self._console or Console(stderr=True)
    if not console.is_terminal:
      return None
    with self._lock:
      if self._bars is None:
        self._bars = bars.Progress(
          bars.TextColumn("{task.description}"),
          bars.BarColumn(),
          bars.TextColumn("{task.fields[figures]}"),
          bars.TimeElapsedColumn(),
          console=console,
        )
        before = sys.stderr
        self._bars.start()
        # rich puts itself in the place of sys.stderr, to write the lines of others
        # above its bars; the log's handler holds the stream that was there before.
        handler = logging.get_absl_handler().python_handler
        if handler.stream is before:
          self._log_stream = handler.setStream(sys.stderr)
      bar = self._bars.add_task(what, total=total, figures=f"0/{total}")
      self._open.add(bar)
      return bar

  def update(self, bar: bars.TaskID, count: int, figures: str) -> None:
    """Moves a bar on by `count` and shows other figures beside it."""
    with self._lock:
      if self._bars is not None:
        self._bars.update(bar, advance=count, figures=figures)

  def close(self, bar: bars.TaskID) -> None:
    """Ends a bar; the last one gives the terminal back."""
    with self._lock:
      self._open.discard(bar)
      if self._bars is None or self._open:
        return
      self._bars.stop()
      self._bars = None
      if self._log_stream is not None:
        logging.get_absl_handler().python_handler.setStream(self._log_stream)
        self._log_stream = None


_display = _Display()
