"""WebDataset shards as a source of clips: tar files, of which nothing is unpacked.

Members whose names are equal up to the first dot of the last part are one sample:
`films/000012.mp4` with `films/000012.txt` (a caption a line) or `films/000012.json`
(`caption` or `captions`, `split`, and whatever else). A tar file is looked through once
and its members and captions kept in an index; then a member is read where it lies:

  /data/shard-000.tar::tar/000000001536+81920/films%2F000012.mp4

is 81,920 bytes from byte 1,536 on, behind the header that says so.
"""

import json
import os
import posixpath
import re
import tarfile
import urllib.parse
from typing import Any, BinaryIO, NamedTuple

from sora_jax.data import text_file
from sora_jax.data.intake import captions, find
from sora_jax.data.video import media as kinds

SUFFIX = ".tar"
_BLOCK = tarfile.BLOCKSIZE


class Contents(NamedTuple):
  """What is in a tar file.

  Attributes:
    rows: (name, part of a path behind "::tar/", what a manifest would say of it).
    left_out: (name, reason) of other members, and ("", reason) of the file itself.
  """

  rows: list[tuple[str, str, dict[str, Any]]]
  left_out: list[tuple[str, str]]


def read_contents(file: BinaryIO) -> Contents:
  """Looks through a tar file, without reading media.

  A damaged or truncated file has the members before the damage, and says so.
  """
  found, left_out, fault = [], [], ""
  try:
    with tarfile.open(fileobj=file, mode="r:") as tar:
      for info in tar:
        reason = _fault(info)
        if reason:
          left_out.append((info.name, reason))
        elif not info.isdir():
          found.append(info)
      fault = _end_fault(file, tar.offset)
  except (tarfile.TarError, OSError, EOFError) as e:
    fault = f"damaged or no tar file ({e})"
  size = file.seek(0, os.SEEK_END)
  for info in [info for info in found if info.offset_data + info.size > size]:
    found.remove(info)
    left_out.append((info.name, f"cut off: the tar file ends at byte {size}"))
  rows = _samples(file, found, left_out)
  if fault:
    left_out.append(("", f"{fault}; {len(rows)} media before that are used"))
  return Contents(rows, left_out)


def _fault(info) -> str | None:
  """Why a member is not used, whatever it holds."""
  name = info.name
  if info.isdir():
    return None
  if not info.isreg() or info.issparse():
    return "neither a file nor a folder but a link, a device or sparse"
  if name.startswith("/") or ".." in name.split("/"):
    return "its name leads out of the tar file"
  if any(part.startswith(".") for part in posixpath.normpath(name).split("/")):
    return "a hidden file"
  return find.name_fault(name)


def _end_fault(file, offset) -> str:
  """What is wrong behind the last member that was found; "" for the mark of the end."""
  file.seek(offset)
  mark = file.read(_BLOCK)
  if not mark:
    return "no mark of the end: it may be cut off"
  if mark.count(0) == _BLOCK:
    return ""
  return f"damaged or cut off at byte {offset}"


def _samples(file, infos, left_out):
  """Rows of the media; what else there is of their samples says what they show."""
  samples: dict[str, dict[str, tarfile.TarInfo]] = {}
  rows = []
  for info in infos:
    name = posixpath.normpath(info.name)
    folder, base = posixpath.split(name)
    key, _, kind = base.partition(".")
    parts = samples.setdefault(posixpath.join(folder, key), {})
    if kind.lower() in parts:
      left_out.append((info.name, "a second file of this name"))
    else:
      parts[kind.lower()] = info
  for key, parts in samples.items():
    media = [
      kind
      for kind in parts
      if f".{kind}".endswith(kinds.VIDEO_SUFFIXES + kinds.IMAGE_SUFFIXES)
    ]
    # A video's picture is there to be looked at.
    media.sort(key=lambda kind: (f".{kind}".endswith(kinds.IMAGE_SUFFIXES), kind))
    for kind, info in parts.items():
      if kind not in (*media[:1], "txt", "json"):
        known = f"{key}.{media[0]} is the medium of its sample" if media else ""
        left_out.append((info.name, known or "not a video or an image"))
    if not media:
      left_out += [
        (parts[kind].name, "captions of no file beside it")
        for kind in ("txt", "json")
        if kind in parts
      ]
      continue
    info = parts[media[0]]
    try:
      row = _row(file, parts, info.name)
    except captions.LeftOut as e:
      left_out.append((info.name, str(e)))
      continue
    quoted = urllib.parse.quote(f"{key}.{media[0]}", safe="")
    rows.append((f"{key}.{media[0]}", f"{info.offset_data:012d}+{info.size}/{quoted}",
                 row))  # fmt: skip
  return rows


def _row(file, parts, where) -> dict[str, Any]:
  """What a manifest would say of a sample. LeftOut if that cannot be read."""
  row: dict[str, Any] = {}
  for kind in ("json", "txt"):
    if kind not in parts:
      continue
    info = parts[kind]
    if info.size > text_file.MOST_BYTES:
      raise captions.LeftOut(f"its {kind} has {info.size} bytes")
    file.seek(info.offset_data)
    try:
      text = text_file.decode(file.read(info.size), info.name)
      if kind == "txt":
        # What JSON says of captions counts; many shards have the same in both.
        if not {"caption", "captions"} & row.keys():
          row["captions"] = re.split("\r\n|\r|\n", text)
        continue
      said = json.loads(text)
      if not isinstance(said, dict):
        raise ValueError(f"{info.name}: a JSON object is needed")
      row = {key: value for key, value in said.items() if value is not None}
    except ValueError as e:
      raise captions.LeftOut(f"its captions cannot be used: {e}") from e
  try:
    texts = captions.of_row(row, where)
  except ValueError as e:
    raise captions.LeftOut(str(e)) from e
  kept = {key: row[key] for key in ("split", "truth") if row.get(key) is not None}
  return {"captions": texts, **kept}
