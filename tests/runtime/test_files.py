"""A file that is replaced is the old one or the new one, never a part."""

import json
import pathlib

import pytest
from etils import epath

from sora_jax.runtime import files


def names(folder):
  return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", [str, pathlib.Path, epath.Path])
def test_files_are_written_and_replaced(tmp_path, kind):
  path = tmp_path / "new" / "folder" / "name.json"
  files.write_text(kind(path), "é\n")
  assert path.read_bytes() == "é\n".encode()
  files.write_bytes(kind(path), b"\x00\xff")
  assert path.read_bytes() == b"\x00\xff"
  files.write_json(kind(path), {"b": 1, "a": [2]}, sort_keys=True)
  assert json.loads(path.read_text()) == {"a": [2], "b": 1}
  assert path.read_text().index("a") < path.read_text().index("b")
  assert names(path.parent) == ["name.json"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
  path = tmp_path / "name.mp4"
  path.write_text("old")
  with files.replacing(path, ".mp4") as partial:
    assert partial.parent == tmp_path and partial.suffix == ".mp4"
    # Hidden, so that a search for media or models does not take it for one.
    assert partial.name.startswith(".")
    partial.write_text("half")
    assert path.read_text() == "old"
    partial.write_text("new")
  assert path.read_text() == "new" and names(tmp_path) == ["name.mp4"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_failed_leaves_nothing_behind(tmp_path, error):
  path = tmp_path / "name"
  path.write_text("old")
  with pytest.raises(error), files.replacing(path) as partial:
    partial.write_text("half")
    raise error
  assert path.read_text() == "old" and names(tmp_path) == ["name"]


def test_a_body_that_fails_before_it_writes_says_why(tmp_path):
  with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "name"):
    raise ZeroDivisionError
  assert names(tmp_path) == []
