"""Bars on a terminal, lines in a log, nothing from the other processes."""

import io
import logging as python_logging
import subprocess
import sys
import types

import pytest
from absl import logging
from rich.console import Console

from sora_jax.runtime import progress, text


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still until it is moved: clock[0], in seconds."""
  now = [100.0]
  fake = types.SimpleNamespace(monotonic=lambda: now[0])
  monkeypatch.setattr(progress, "time", fake)  # not the one of threads
  return now


@pytest.fixture
def lines(caplog):
  """What is logged, and no terminal."""
  caplog.set_level(python_logging.INFO, logger="absl")
  return lambda: [record.getMessage() for record in caplog.records]


def test_a_log_has_a_line_now_and_then(clock, lines):
  with progress.Progress("encoded", 40, "clips") as job:
    for _ in range(20):
      clock[0] += 1.0
      job.advance(2, note="shard 3")
  assert lines() == [
    "encoded 20/40 clips, 2.0/s, ETA 10s (shard 3)",
    "encoded 40/40 clips, 2.0/s, ETA 0s (shard 3)",
  ]


def test_the_end_of_a_quick_job_is_said(clock, lines):
  with progress.Progress("sampled", 2) as job:
    clock[0] += 0.5
    job.advance(2)
  assert lines() == ["sampled 2/2, 4.0/s, ETA 0s"]


def test_what_was_there_already_does_not_count_for_the_rate(clock, lines):
  with progress.Progress("encoded", 100, "clips") as job:
    job.skip(80)
    clock[0] += 20.0
    job.advance(1)
  assert lines() == ["encoded 81/100 clips, 20 s each, ETA 6m20s"]


def test_a_job_that_was_all_there_says_nothing(clock, lines):
  with progress.Progress("encoded", 3, "clips") as job:
    job.skip(3)
  assert lines() == [] and job.text() == "3/3 clips"


def test_other_processes_are_silent(clock, lines):
  with progress.Progress("encoded", 2, "clips", process=1) as job:
    clock[0] += 60.0
    job.advance(2)
  assert lines() == [] and job.done == 2


def test_track(clock, lines):
  seen = []
  for item in progress.track("abc", "measured", "files"):
    seen.append(item)
    clock[0] += 10.0
  assert seen == list("abc")
  assert [line.split(",")[0] for line in lines()] == [
    f"measured {n}/3 files" for n in (1, 2, 3)
  ]


def make_terminal(monkeypatch):
  """A terminal in the place of standard error, where the log goes too.

  It is no fixture: pytest has another standard error in tests than in fixtures.
  """
  out = io.StringIO()
  console = Console(file=out, force_terminal=True, width=100, color_system=None)
  monkeypatch.setattr(progress, "_display", progress._Display(console))
  monkeypatch.setattr(sys, "stderr", out)
  handler = logging.get_absl_handler().python_handler
  monkeypatch.setattr(handler, "stream", out)
  return out


def test_a_terminal_has_bars_and_the_log_above_them(monkeypatch, clock, lines):
  terminal = make_terminal(monkeypatch)
  with progress.Progress("sampled", 4, "videos") as outer:
    clock[0] += 2.0
    outer.advance()
    with progress.Progress("decoded", 8, "frames") as inner:
      inner.advance(2)
      sys.stderr.write("a line of somebody else\n")
    outer.advance(3)
  shown = terminal.getvalue()
  assert "sampled" in shown and "1/4 videos, 0.5/s, ETA 6s" in shown
  assert "4/4 videos" in shown and "2/8 frames" in shown
  assert "a line of somebody else\n" in shown
  assert lines() == []  # no line of the log where there is a bar
  assert sys.stderr is terminal, "the terminal is given back"
  assert logging.get_absl_handler().python_handler.stream is terminal


def test_an_error_gives_the_terminal_back(monkeypatch):
  terminal = make_terminal(monkeypatch)
  with pytest.raises(RuntimeError), progress.Progress("sampled", 4):
    raise RuntimeError
  assert sys.stderr is terminal and progress._display._bars is None


def test_progress_does_not_import_jax():
  check = "import sys, sora_jax.runtime.progress; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_markdown_lines():
  assert text.markdown_lines(["a", "b"], [["x y", "1"], ["z", "2 %"]]) == [
    "| a   |   b |",
    "|-----|----:|",
    "| x y |   1 |",
    "| z   | 2 % |",
  ]


def test_table_lines():
  lines = text.table_lines(
    ["mode", "kept", "s"], [["first image", "(22.0)", "1.5"], ["[red]", "-", "12"]]
  )
  assert lines[0] == "mode            kept     s"
  assert set(lines[1]) == {"─"}
  assert lines[2:] == ["first image   (22.0)   1.5", "[red]              -    12"]
  with pytest.raises(ValueError, match="2 cells in a table of 3"):
    text.table_lines(["a", "b", "c"], [["1", "2"]])
