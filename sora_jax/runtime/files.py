"""Files that appear whole or not at all; without JAX, for the sake of data workers."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replacing(path, suffix: str = ".tmp") -> Iterator[pathlib.Path]:
  """Gives the path of a new file to write, which takes the place of `path` at the end.

  A reader sees the file that was there before or the whole new one. Where the body
  raises, the new file is removed and the old one stays. A process that is killed
  leaves a hidden file behind, which no reader looks for.

  The new file is not flushed to the disk (fsync): this guards against a process that
  dies, as those on preempted machines do. After a machine has lost its power a file may
  be empty, which readers find; flushing each of thousands of clips would take longer
  than writing them.

  Args:
    path: of the file; its folder is created. A path object stays of its own kind, so
      that one of a bucket (`etils.epath`) is replaced there.
    suffix: of the new file, for writers that take the format from it.
  """
  file: Any = path if isinstance(path, pathlib.PurePath) else pathlib.Path(path)
  file.parent.mkdir(parents=True, exist_ok=True)
  # Processes may write the same file at once: each has a name of its own.
  partial = file.with_name(f".{file.name}.{os.getpid()}{suffix}")
  try:
    yield partial
    partial.replace(file)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def write_text(path, text: str) -> None:
  """Writes a text file (UTF-8) as `replacing` does."""
  write_bytes(path, text.encode())


def write_bytes(path, content: bytes) -> None:
  """Writes a file of bytes as `replacing` does."""
  with replacing(path) as partial:
    partial.write_bytes(content)


def write_json(path, value, sort_keys: bool = False) -> None:
  """Writes an indented JSON file as `replacing` does."""
  write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")
