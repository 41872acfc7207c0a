"""Which files a folder's captions come from: a manifest, or texts beside the media."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from sora_jax.data import clips, parquet_rows, text_file
from sora_jax.data.intake import find

MANIFESTS = ("manifest.jsonl", "manifest.parquet")
_READ = {"path", "caption", "captions", "split", "truth"}  # keys of a row


class LeftOut(Exception):
  """A file that is left out; the argument is the reason."""


def sidecar(root: pathlib.Path, name: str, found: find.Found, outside: bool):
  """Name of the text beside a medium and its captions; (None, []) without one.

  Args:
    root: the folder. name: of the medium in it. found: what is in the folder.
    outside: whether the text may be a link that leads out of the folder, and of the
      folders that are linked from it.

  Raises:
    LeftOut: the text cannot be read, is not text, or leads out of the folder.
  """
  text = str(pathlib.PurePosixPath(name).with_suffix(".txt"))
  if text not in found.texts:
    return None, []
  real = os.path.realpath(root / text)
  if not outside and not any(_is_inside(real, folder) for folder in found.folders):
    raise LeftOut(
      f"its captions {root / text} are a link to {real}, outside of the folder; "
      "config.data.allow_outside=True takes them"
    )
  try:
    return text, text_file.read_lines(root / text)
  except ValueError as e:
    raise LeftOut(f"its captions cannot be used: {e}") from e


def read_manifest(
  path: pathlib.Path, locate: Callable[[str, str], str], root: str
) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
  """Reads and checks a manifest, of JSON lines or Parquet.

  Args:
    path: of the manifest, on this disk.
    locate: (path of a row, where that is) -> the key of its file; raises LeftOut for
      one that cannot be used, ValueError for one that is wrong.
    root: what paths of rows are relative to, for messages.

  Returns:
    {key: row}, "captions" being a list; and (path, reason) of the entries that are left
    out.

  Raises:
    ValueError: naming the line, for a row that is wrong.
  """
  rows: dict[str, dict[str, Any]] = {}
  spelled: set[str] = set()
  left_out: list[tuple[str, str]] = []
  others: set[str] = set()
  read = parquet_rows.read_rows if path.suffix == ".parquet" else clips.read_rows
  for number, row in read(path):
    where = f"{path}:{number}"
    name = row.get("path")
    if not isinstance(name, str) or not name:
      raise ValueError(f'{where}: "path" must be a file name, not {name!r}')
    if name in spelled:
      raise ValueError(f"{where}: {name} occurs twice")
    spelled.add(name)
    others |= row.keys() - _READ
    try:
      key = locate(name, where)
      if key in rows:
        raise LeftOut(f"{where}: the same file as {key}, which is used")
      rows[key] = {**row, "captions": of_row(row, where)}
    except LeftOut as e:
      left_out.append((os.path.join(root, name), str(e)))
  if others:
    logging.warning("%s: keys that nothing reads: %s", path, ", ".join(sorted(others)))
  return rows, left_out


def local_file(root: pathlib.Path, outside: bool) -> Callable[[str, str], str]:
  """`locate` for files of a folder: the normal form of a path, a.mp4 of ./a.mp4."""

  def locate(name, where):
    if fault := find.name_fault(name):
      raise LeftOut(f"{where}: {fault}")
    key = os.path.normpath(name)
    if os.path.isabs(key) and _is_inside(key, str(root)):
      key = os.path.relpath(key, root)
    if not outside and (os.path.isabs(key) or key.split(os.sep)[0] == ".."):
      raise ValueError(
        f"{where}: {name} is outside of {root}; config.data.allow_outside=True takes it"
      )
    try:
      is_file = os.path.isfile(root / key)
      if not is_file:
        os.stat(root / key)  # says what is wrong with a name that is too long
        raise LeftOut(f"{where}: not a file but a folder, a pipe or a device")
    except FileNotFoundError as e:
      raise ValueError(f"{where}: no such file: {root / key}") from e
    except OSError as e:
      raise LeftOut(f"{where}: cannot be read ({e.strerror})") from e
    return key

  return locate


def of_row(row: Mapping[str, Any], where: str) -> list[str]:
  """Captions of a manifest's row, cleaned; its split is checked, too.

  Raises:
    ValueError: they are no texts, or there is no such split.
    LeftOut: a caption has a control character.
  """
  captions = row.get("captions", [])
  if "caption" in row:
    captions = [row["caption"]]
  good = isinstance(captions, list) and all(isinstance(c, str) for c in captions)
  if not good:
    raise ValueError(
      f'{where}: "caption" must be a text, "captions" a list of texts, not {captions!r}'
    )
  if row.get("split", "train") not in ("train", "heldout"):
    raise ValueError(
      f'{where}: "split" must be "train" or "heldout", not {row["split"]!r}'
    )
  # A line break is nothing unusual in a field of JSON.
  cleaned = [text_file.clean(" ".join(c.splitlines())) for c in captions]
  for caption in cleaned:
    if fault := text_file.control_character(caption):
      raise LeftOut(f"{where}: a caption with a {fault}")
  return [caption for caption in cleaned if caption]


def _is_inside(path: str, folder: str) -> bool:
  return os.path.commonpath([path, folder]) == folder
