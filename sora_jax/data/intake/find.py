"""Finds the files under a folder, and says of each that is no clip why not."""

import os
import pathlib
import stat
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from sora_jax.data import stored
from sora_jax.data.video import media


class Found(NamedTuple):
  """All that is under a folder.

  Attributes:
    media: paths of videos and images relative to the folder, sorted.
    texts: of .txt files, which may hold captions.
    left_out: (path, reason) of every other file, and of folders not looked into.
    folders: real paths of the folder and of the linked folders in it.
  """

  media: list[str]
  texts: set[str]
  left_out: list[tuple[str, str]]
  folders: list[str]


def find(root: pathlib.Path) -> Found:
  """Lists a folder with its subfolders, linked ones too, each of them once.

  Nothing is opened. What cannot be listed or used is in `left_out` and ends nothing:
  hidden files and folders (`.cache/`, `.ipynb_checkpoints/`), folders without
  permission, names that are no text, pipes and devices, dangling links, files with the
  suffix of no medium, and a second link to a file that is there already.
  """
  found = Found([], set(), [], [os.path.realpath(root)])
  links = []
  for name, entry in _entries(root, found):
    if entry.is_symlink():
      links.append(name)
    else:
      _sort(root, name, found)
  # After all files that are here themselves, so that those are what is kept.
  present = {os.path.realpath(root / name) for name in found.media}
  for name in links:
    real = os.path.realpath(root / name)
    if real in present:
      found.left_out.append((str(root / name), f"a link to {real}, which is used"))
    elif _sort(root, name, found):
      present.add(real)
  found.media.sort()
  found.left_out.sort()
  return found


def name_fault(name: str) -> str | None:
  """Says why a relative path cannot be an id; None if it can."""
  try:
    name.encode()
  except UnicodeEncodeError:
    return "its name is not UTF-8"
  if stored.is_inside(name):
    return "'::' in its name, which marks what is inside of larger files"
  for character in name:
    if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
      return f"control character U+{ord(character):04X} in its name"
  return None


def shown(path: str) -> str:
  """A path as it can be printed, whatever bytes are in it."""
  text = path.encode("utf-8", "backslashreplace").decode()
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _entries(root, found) -> Iterator[tuple[str, os.DirEntry]]:
  """(relative path, entry) of all files; looks into each folder once, loops or not."""
  todo: list[str] = [""]
  later: list[str] = []
  seen: set[tuple[int, int]] = set()
  while todo or later:
    # Links come last: where one leads to a folder in the tree, its own name is used.
    name = todo.pop() if todo else later.pop()
    try:
      status = os.stat(root / name)
      if (status.st_dev, status.st_ino) in seen:
        reason = "a link to a folder that is looked into already"
        found.left_out.append((str(root / name), reason))
        continue
      seen.add((status.st_dev, status.st_ino))
      with os.scandir(root / name) as listing:
        entries = sorted(listing, key=lambda entry: entry.name, reverse=True)
    except OSError as e:
      reason = f"a folder that cannot be listed ({e.strerror})"
      found.left_out.append((str(root / name), reason))
      continue
    if os.path.islink(root / name) and name:
      found.folders.append(os.path.realpath(root / name))
    for entry in entries:
      path = f"{name}/{entry.name}" if name else entry.name
      if not _is_folder(entry):
        yield path, entry
      elif entry.name.startswith("."):
        found.left_out.append((str(root / path), "a hidden folder"))
      else:
        (later if entry.is_symlink() else todo).append(path)


def _is_folder(entry) -> bool:
  """Whether an entry, or what it links to, is a folder."""
  try:
    return entry.is_dir()
  except OSError:  # links in a circle, or one that may not be followed
    return False


def _sort(root, name, found) -> bool:
  """Puts a file where it belongs; whether that is `media`."""
  suffix = pathlib.PurePosixPath(name).suffix.lower()
  reason = _fault(root / name, name, suffix)
  if reason is not None:
    found.left_out.append((str(root / name), reason))
  elif suffix == ".txt":
    found.texts.add(name)
  else:
    found.media.append(name)
  return reason is None and suffix != ".txt"


def _fault(path, name, suffix) -> str | None:
  """Why a file is neither a medium nor a text, as far as its name and kind say."""
  if path.name.startswith("."):
    return "a hidden file"
  if fault := name_fault(name):
    return fault
  try:
    mode = os.stat(path).st_mode
  except OSError as e:
    return f"cannot be read ({e.strerror})"
  if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
    return "not a file but a pipe, a socket or a device"
  if suffix not in (*media.VIDEO_SUFFIXES, *media.IMAGE_SUFFIXES, ".txt"):
    return f"not a video or an image: {suffix or 'no suffix'}"
  return None
