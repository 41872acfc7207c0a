"""`pytest -m "not slow"` leaves out what takes long, and still tests every room."""

import re
import subprocess
import sys

import pytest
import tiny
from test_imports import ROOMS


def collected(*arguments) -> tuple[set[str], str]:
  """Ids of the tests that pytest would run, and its summary."""
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-n", "0", "-q", "--collect-only", *arguments],
    cwd=tiny.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout
  *lines, summary = done.stdout.strip().splitlines()
  return {line for line in lines if "::" in line}, summary


@pytest.mark.slow
def test_quick_tests_are_of_every_room():
  quick, summary = collected("-m", "not slow")
  assert int(re.search(r"(\d+) deselected", summary)[1]) > 50
  files = {test.split("::")[0] for test in quick}
  folders = {file.split("/")[1] for file in files if file.count("/") > 1}
  assert {*ROOMS, "commands", "launch"} <= folders
  # The run of all stages takes half a minute: what needs it is slow by itself.
  assert not any("test_main.py::test_a_run" in test for test in quick)


@pytest.mark.slow
def test_what_starts_processes_or_notebooks_can_be_left_out():
  found, _ = collected(
    "-m", "multiprocess or notebook",
    "tests/runtime/test_hosts.py", "tests/commands/test_notebooks.py",
  )  # fmt: skip
  names = [test.split("::")[1] for test in found]
  assert len(names) == 3 + 4
  notebooks = {"test_captions", "test_packing", "test_sampling", "test_training"}
  assert notebooks < {*names}


@pytest.mark.slow
def test_unknown_markers_are_an_error(tmp_path):
  path = tmp_path / "test_x.py"
  path.write_text("import pytest\n\n@pytest.mark.slwo\ndef test_x():\n  pass\n")
  settings = tiny.ROOT / "pyproject.toml"
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-n", "0", "-c", str(settings), str(path)],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode != 0 and "'slwo' not found in `markers`" in done.stdout
