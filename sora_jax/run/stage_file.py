"""stage.json: what a stage was made with; it has a checksum and a spare copy."""

import json
import pathlib
from typing import Any

from absl import logging

from sora_jax.runtime import checksums, files

NAME, SPARE = "stage.json", "stage.json.bak"


def load(folder: pathlib.Path) -> dict[str, Any]:
  """{"config", "inputs", "complete", maybe "made"} of a stage; {} if there is none.

  Where stage.json is damaged or lost, the spare copy is read, and that is logged. Files
  of older versions have no checksum and no spare.

  Raises:
    ValueError: if both are damaged; says what to do.
  """
  paths = [path for path in (folder / NAME, folder / SPARE) if path.exists()]
  faults = []
  for path in paths:
    try:
      stage = read(path)
    except ValueError as error:
      faults.append(f"{path} is damaged ({error})")
      continue
    if path.name == SPARE:
      why = faults[0] if faults else f"{folder / NAME} is missing"
      logging.warning("%s: taken from its spare copy %s", why, path)
    return stage
  if faults:
    raise ValueError(
      f"{' and '.join(faults)}: put a copy back; or, if the config is still the one "
      f"that the stage was made with, delete {' and '.join(map(str, paths))}, and what "
      f"the stage has made is taken over; or delete {folder} to make it again"
    )
  return {}


def store(folder: pathlib.Path, stage: dict[str, Any]) -> None:
  """Replaces stage.json and then its spare copy, each at once."""
  sealed = checksums.seal(stage)
  for name in (NAME, SPARE):
    files.write_json(folder / name, sealed, sort_keys=True)


def read(path: pathlib.Path) -> dict[str, Any]:
  """A stage.json, or its spare copy. ValueError if it is not one or was changed."""
  try:
    stage = json.loads(path.read_text())
  except OSError as error:
    raise ValueError(f"cannot be read: {error.strerror}") from error
  if not isinstance(stage, dict):
    raise ValueError(f"not a JSON object but {stage!r:.20}")
  for key, kind in (("config", dict), ("inputs", dict), ("complete", bool)):
    if not isinstance(stage.get(key), kind):
      raise ValueError(f"{key!r} is not {'true or false' if kind is bool else 'there'}")
  known = {"config", "inputs", "complete", "made"}
  if stage.keys() - known and not checksums.is_whole(stage):
    raise ValueError("it is not what was written: its checksum differs")
  return checksums.unsealed(stage)
