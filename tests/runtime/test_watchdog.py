"""A process that hangs ends by itself, in whatever it hangs, and says where."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from sora_jax.runtime import watchdog
from sora_jax.runtime.watchdog import Watchdog

ROOT = pathlib.Path(__file__).parents[2]
HANGS = {
  "python": "time.sleep(1000)",
  "a lock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
  "a C call": "ctypes.CDLL(None).sleep(1000)",
  "a C call with the interpreter's lock": "ctypes.PyDLL(None).sleep(1000)",
  "a pause": "stack = w.pause('an evaluation'); stack.__enter__(); time.sleep(1000)",
}


def start(folder, deadline, then):
  """A process that finishes steps for half a second, and then hangs in `then`."""
  program = f"""
import ctypes, sys, threading, time
from sora_jax.runtime import watchdog
watchdog._GRACE = 1.0
w = watchdog.Watchdog({deadline}, {str(folder / "new" / "stacks.txt")!r})
for _ in range(5):
  time.sleep(0.1)
  w.beat()
print("hangs", flush=True)
{then}
"""
  return subprocess.Popen(
    [sys.executable, "-c", program],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize("hang", HANGS)
def test_a_process_that_hangs_ends_with_its_stacks(tmp_path, hang):
  process = start(tmp_path, 0.2 if hang == "a pause" else 0.5, HANGS[hang])
  assert process.stdout.readline() == "hangs\n"
  begin = time.monotonic()
  _, log = process.communicate(timeout=30)
  assert time.monotonic() - begin < 15
  assert 'File "<string>", line 10 in <module>' in log
  if "interpreter" in hang:  # only the timer inside of the interpreter is left
    assert process.returncode == 1 and "Timeout" in log
    return
  assert process.returncode == watchdog.EXIT_CODE
  what = "an evaluation has not ended within 2 s" if hang == "a pause" else (
    "a step has not ended within 0.5 s"
  )  # fmt: skip
  stacks = (tmp_path / "new" / "stacks.txt").read_text()
  for text in (log, stacks):
    assert what in text and re.search(r"line 10 in <module>", text)


def test_steps_in_time_go_on(tmp_path):
  process = start(tmp_path, 1.0, "w.close(); time.sleep(1.2); print('ended')")
  assert process.communicate(timeout=30)[0] == "hangs\nended\n"
  assert process.returncode == 0 and not (tmp_path / "new").exists()


def test_without_a_deadline_it_does_nothing(tmp_path):
  guard = Watchdog(0.0, tmp_path / "stacks.txt")
  with guard.pause("a save"):
    guard.beat()
  guard.close()
  assert guard._thread is None


def test_time_for_which_a_process_was_stopped_counts(tmp_path):
  """It waits for hosts that have given it up meanwhile."""
  process = start(tmp_path, 1.5, "time.sleep(1000)")
  assert process.stdout.readline() == "hangs\n"
  process.send_signal(signal.SIGSTOP)
  time.sleep(2.0)
  assert process.poll() is None
  begin = time.monotonic()
  process.send_signal(signal.SIGCONT)
  process.communicate(timeout=30)
  assert process.returncode == watchdog.EXIT_CODE
  assert time.monotonic() - begin < 1.4
