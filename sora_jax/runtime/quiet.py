"""Keeps what libraries print of their own affairs out of the log of a command.

A read or write that failed is reported once, in a line, by whoever asked for it. Orbax
and TensorStore say it again, with pages of details: in the log, and where Python
collects the parts of a read that were still under way.
"""

import logging
import sys

_LIBRARY = "orbax"


def install() -> None:
  """Filters the loggers of Orbax and asyncio, and exceptions that nobody can catch."""
  # At its servers and channels Beam says many things that are no user's concern.
  logging.getLogger("apache_beam").setLevel(logging.WARNING)
  logging.getLogger("absl").addFilter(_is_wanted)
  logging.getLogger("asyncio").addFilter(lambda record: not _is_left(record))
  before = sys.unraisablehook

  def hook(unraisable):
    coroutine = getattr(unraisable.object, "cr_code", None)
    of_orbax = coroutine is not None and _LIBRARY in coroutine.co_filename
    closed = "Event loop is closed" in str(unraisable.exc_value)
    if not of_orbax and not closed:
      before(unraisable)

  sys.unraisablehook = hook


def _is_wanted(record: logging.LogRecord) -> bool:
  """Whether a record is neither Orbax's trace of a failure nor what it looks for."""
  if _LIBRARY not in record.pathname:
    return True
  return not record.exc_info and "Metadata file does not exist" not in str(record.msg)


def _is_left(record: logging.LogRecord) -> bool:
  """Whether a record of asyncio is of a part of a read or write that was given up."""
  text = record.getMessage()
  return _LIBRARY in text or "Task was destroyed" in text
