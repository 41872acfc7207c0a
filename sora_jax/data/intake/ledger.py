"""What was measured of each file, kept on disk from one run to the next.

One line for each file, added when it is measured; so a run that was stopped goes on
where it was, and one with other thresholds measures nothing. Memory holds a place in
the file for each of them, not the figures.
"""

import importlib.util
import json
import os
import pathlib
from typing import Any, BinaryIO

import av
import PIL

from sora_jax.data import stored
from sora_jax.runtime import files

FIGURES = 3  # version of what `measure.measure_file` returns


def version() -> list[str]:
  """What measures and decodes, see `Ledger`."""
  heif = "heif" if importlib.util.find_spec("pillow_heif") else ""
  return [str(FIGURES), av.__version__, PIL.__version__, heif]


class Ledger:
  """Results by key, in a file of JSON lines; a later line of a key counts."""

  def __init__(self, path: pathlib.Path | None, version: list[str]):
    """Opens or begins the file.

    Args:
      path: of it; None keeps the results in memory, for this run only.
      version: of what measures, see `version`: a ledger of other figures begins
        anew, and files that other decoders could not read are tried again.
    """
    self._path, self._version = path, version
    self._places: dict[str, int] = {}
    self._memory: dict[str, dict[str, Any]] = {}
    self._file: BinaryIO | None = None
    if path is not None:
      self._open(path)

  def __enter__(self) -> "Ledger":
    return self

  def __exit__(self, *error) -> None:
    if self._file:
      self._file.close()

  def __contains__(self, key: str) -> bool:
    return key in self._places or key in self._memory

  def get(self, key: str) -> dict[str, Any]:
    """The result of a key."""
    if key in self._memory or self._file is None:
      return self._memory[key]
    self._file.seek(self._places[key])
    return json.loads(self._file.readline())["result"]

  def add(self, key: str, result: dict[str, Any]) -> None:
    """Keeps the result of a key, on disk when this returns.

    A crash may have been for want of memory: it is no result for the next run.
    """
    if self._file is None or "crashed" in result:
      self._memory[key] = result
      return
    row = {"key": key, "result": result}
    if "record" not in result:
      row["version"] = self._version
    self._places[key] = self._file.seek(0, os.SEEK_END)
    self._file.write(json.dumps(row).encode() + b"\n")
    self._file.flush()

  def _open(self, path):
    head = json.dumps({"measure": self._version[0]})
    if not path.exists() or path.open().readline().rstrip("\n") != head:
      files.write_text(path, head + "\n")
    self._file = file = open(path, "r+b")
    file.readline()
    while True:
      place, line = file.tell(), file.readline()
      if not line.endswith(b"\n"):  # the end, or a line of a run that was killed
        file.truncate(place)
        return
      try:
        row = json.loads(line)
      except ValueError:  # of a disk that has lost something: that is measured again
        continue
      if not isinstance(row, dict) or "key" not in row:
        continue
      if row.get("version", self._version) == self._version:
        self._places[row["key"]] = place


def key_of(path: pathlib.Path, name: str, *more: Any) -> str:
  """Key of a file as it is now: another size or time of change is another file.

  Raises:
    OSError: the file cannot be looked at.
  """
  return json.dumps([name, *stored.stamp(path), *more])
