"""Errors of a user, and of a disk, are one line; those of the program a trace."""

import pytest
from absl import logging

from sora_jax.run import cli


@pytest.fixture
def run(monkeypatch):
  """Runs a function that raises as a command would run it."""
  monkeypatch.setattr(cli.app, "run", lambda main, **_: main(["command"]))

  def run(error):
    def raises(argv):
      raise error

    cli.run_app(raises)

  return run


@pytest.mark.parametrize(
  "error",
  [
    ValueError("config.x is 3"),
    OSError(28, "No space left on device", "/runs/x"),
    OSError(30, "Read-only file system", "/runs/x"),
    PermissionError(13, "Permission denied", "/runs/x"),
  ],
)
def test_a_line(run, error, caplog):
  with pytest.raises(SystemExit) as ended:
    run(error)
  assert ended.value.code == 1
  assert caplog.messages == [f"{error} (--verbosity=1 shows where)"]


@pytest.mark.parametrize("error", [FileNotFoundError(2, "none", "x"), TypeError("x")])
def test_a_trace(run, error):
  with pytest.raises(type(error)):
    run(error)


def test_where_it_was_can_be_seen(run):
  before = logging.get_verbosity()
  logging.set_verbosity(logging.DEBUG)
  try:
    with pytest.raises(OSError, match="Read-only"):
      run(OSError(30, "Read-only file system", "/runs/x"))
  finally:
    logging.set_verbosity(before)
