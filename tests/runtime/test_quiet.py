"""What libraries say of failures that were reported stays out of the log."""

import logging
import sys
import types

import pytest

from sora_jax.runtime import quiet


@pytest.fixture
def shown(monkeypatch):
  """Objects whose exceptions Python's own hook was given."""
  objects = []
  monkeypatch.setattr(sys, "unraisablehook", lambda given: objects.append(given.object))
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  filters = [list(logger.filters) for logger in loggers]
  quiet.install()
  yield objects
  for logger, before in zip(loggers, filters, strict=True):
    logger.filters[:] = before


def record(path, message, error=None):
  info = error and (type(error), error, None)
  return logging.LogRecord("x", logging.WARNING, path, 1, message, (), info)


def test_only_what_was_reported_is_left_out(shown):
  of_orbax = types.SimpleNamespace(
    cr_code=types.SimpleNamespace(co_filename="/lib/orbax/serialization.py")
  )
  ours = types.SimpleNamespace(cr_code=types.SimpleNamespace(co_filename="/ours.py"))
  for thing, error in (
    (of_orbax, ValueError("pages")),
    (None, RuntimeError("Event loop is closed")),
    (ours, ValueError("ours")),
    (None, RuntimeError("another")),
  ):
    sys.unraisablehook(types.SimpleNamespace(object=thing, exc_value=error))
  assert shown == [ours, None]
  absl, asyncio = logging.getLogger("absl"), logging.getLogger("asyncio")
  assert not absl.filter(record("/lib/orbax/x.py", "failed", OSError(28, "full")))
  assert not absl.filter(record("/lib/orbax/x.py", "Metadata file does not exist: %s"))
  assert absl.filter(record("/lib/orbax/x.py", "slow store"))
  assert absl.filter(record("/ours.py", "failed", OSError(28, "full")))
  assert not asyncio.filter(record("/a.py", "Task was destroyed but it is pending!"))
  assert asyncio.filter(record("/a.py", "a slow callback"))
