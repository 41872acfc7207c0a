"""JSON files of published models."""

import json
import pathlib
from typing import Any


def read(path: pathlib.Path) -> dict[str, Any]:
  """The object of a file. ValueError, naming the file, if there is none in it."""
  try:
    return dict(json.loads(path.read_text()))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path}: no JSON object ({error})") from error
