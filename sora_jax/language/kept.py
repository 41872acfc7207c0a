"""Results that cost something, kept on disk by what they are of.

One line for each, added when it comes. Each process writes a file of its own and reads
those of all, so that hosts share a folder without waiting for each other, and a process
that is killed loses only what it was about to write.
"""

import json
import os
import pathlib
import threading
from typing import Any


class Kept:
  """JSON values by key, see `read`, to which this process adds."""

  def __init__(self, folder: pathlib.Path, kind: str, process: int = 0):
    """Reads what all processes have, and opens this one's file to add to it.

    Args:
      folder: of the files; it is created.
      kind: of the values, with which the names of the files begin.
      process: index of this one.
    """
    self._lock = threading.Lock()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{process:05d}.jsonl"
    _cut_off_unfinished_line(path)
    self._file = open(path, "a", encoding="utf-8")
    self._known = read(folder, kind)

  def __enter__(self) -> "Kept":
    return self

  def __exit__(self, *error) -> None:
    self._file.close()

  def __contains__(self, key: str) -> bool:
    return key in self._known

  def __getitem__(self, key: str) -> Any:
    return self._known[key]

  def add(self, key: str, value: Any) -> None:
    """Keeps a value, on disk when this returns; threads may call it at once."""
    line = json.dumps({"key": key, "value": value}, ensure_ascii=False)
    with self._lock:
      self._file.write(line + "\n")
      self._file.flush()
      self._known[key] = value


def read(folder: pathlib.Path, kind: str) -> dict[str, Any]:
  """The values of all processes by key; of several of one key the first counts."""
  known: dict[str, Any] = {}
  for path in sorted(folder.glob(f"{kind}-*.jsonl")):
    for key, value in _lines(path):
      known.setdefault(key, value)
  return known


def _lines(path):
  """Yields the complete lines of a file: (key, value)."""
  with open(path, "rb") as f:
    for line in f:
      if not line.endswith(b"\n"):  # is being written, or of a process that was killed
        return
      try:
        row = json.loads(line)
        yield row["key"], row["value"]
      # Of a disk that has lost something: that is made again.
      except (ValueError, KeyError, TypeError):
        continue


def _cut_off_unfinished_line(path: pathlib.Path) -> None:
  """Shortens the file of a killed process to its last complete line."""
  if not path.exists():
    return
  with open(path, "r+b") as f:
    end = place = f.seek(0, os.SEEK_END)
    while place:
      start = max(0, place - (1 << 16))
      f.seek(start)
      found = f.read(place - start).rfind(b"\n")
      place = start + found + 1
      if found >= 0:
        break
    if place < end:
      f.truncate(place)
