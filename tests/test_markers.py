"""`pytest -m "not slow"` leaves out what takes long, and still tests every room."""

import subprocess
import sys

import pytest
import tiny
from test_imports import ROOMS


def collected(*arguments) -> set[str]:
  """Ids of the tests that pytest would run."""
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-n", "0", "-q", "--collect-only", *arguments],
    cwd=tiny.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout
  return {line for line in done.stdout.splitlines() if "::" in line}


@pytest.mark.slow
def test_quick_tests_are_of_every_room():
  quick, slow = collected("-m", "not slow"), collected("-m", "slow")
  assert not quick & slow and len(slow) > 50
  files = {test.split("::")[0] for test in quick}
  folders = {file.split("/")[1] for file in files if file.count("/") > 1}
  assert folders == {*ROOMS, "commands", "launch"}
  # The run of all stages takes half a minute: what needs it is slow by itself.
  assert not any("test_main.py::test_a_run" in test for test in quick)


@pytest.mark.slow
def test_what_starts_processes_or_notebooks_can_be_left_out():
  hosts = collected("-m", "multiprocess", "tests/runtime/test_hosts.py")
  assert len(hosts) == 3
  notebooks = collected("-m", "notebook", "tests/commands/test_notebooks.py")
  assert {test.split("::")[1] for test in notebooks} == {
    "test_packing", "test_sampling", "test_training",
  }  # fmt: skip


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
