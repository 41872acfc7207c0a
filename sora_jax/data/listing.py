"""What a source of clips consists of, before any of it is opened.

/a/folder                      its media, captions beside them or in a manifest
/a/list.jsonl, /a/list.parquet a manifest, wherever it is
/a/*.tar, /a/x-{000..041}.tar  WebDataset shards, see `tar_source`
tfds:NAME                      a TFDS data set, see `tfds_source`
gs://, s3://, https://         any of these but tfds, see `remote_source`
mixture                        several of these, see `mixed`
"""

import glob
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging

from sora_jax.data import remote, remote_source, shapes, tar_source, tfds_source
from sora_jax.data.intake import captions, find
from sora_jax.data.intake.captions import MANIFESTS, LeftOut
from sora_jax.data.intake.ledger import Ledger, key_of
from sora_jax.data.video import media

# Of the framework itself: neither clips nor left out.
_OWN = (*MANIFESTS, shapes.MARKER)
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_INDEX_VERSION = "1"  # of what `tar_source.read_contents` returns


class Listing(NamedTuple):
  """The media of a source.

  Attributes:
    folder: that paths are relative to.
    rows: path -> what a manifest says of it, with a list "captions".
    left_out: (path, reason) of all else.
    texts: number of files that captions come from.
    names: path -> what its id is made from; of others the path itself.
    sources: path -> name of the source in a mixture; of others none.
  """

  folder: pathlib.Path
  rows: dict[str, dict[str, Any]]
  left_out: Sequence[tuple[str, str]] = ()
  texts: int = 0
  names: dict[str, str] = {}
  sources: dict[str, str] = {}


def of_source(
  source: str,
  work: pathlib.Path,
  *,
  fps: float = 0.0,
  allow_outside: bool = False,
  copy_remote: bool = True,
) -> Listing:
  """Lists a source.

  Args:
    source: see above.
    work: folder for an index of tar files, and for copies of remote ones.
    fps: rate of frames of a TFDS data set that do not say it; 0 = none.
    allow_outside: captions, and files of a manifest, may be outside of the folder.
    copy_remote: keep a copy of each remote file; else they are read over the network
      each time.

  Raises:
    ValueError: there is no such source, or nothing in it can be used.
  """
  listed = _of_source(source, work, fps, allow_outside, copy_remote)
  if not listed.rows and not listed.left_out:
    raise ValueError(f"{source}: there is nothing in it")
  return listed


def _of_source(source, work, fps, allow_outside, copy_remote) -> Listing:
  work = pathlib.Path(work).absolute()
  if source.startswith(tfds_source.PREFIX):
    folder, rows = tfds_source.rows(source, fps)
    return Listing(pathlib.Path(folder), rows)
  at = remote_source.Place(work / "remote", "remote" if copy_remote else "stream")
  if remote.is_remote(source):
    return _of_remote(source, work, at, allow_outside)
  if source.endswith(tar_source.SUFFIX):
    paths = [path for part in _braces(source) for path in sorted(glob.glob(part))]
    if not paths:
      raise ValueError(f"{source}: no such tar files{_nearby(source)}")
    return of_tars({os.path.abspath(p): os.path.basename(p) for p in paths}, work)
  path = pathlib.Path(source).absolute()
  if path.suffix in (".jsonl", ".parquet") and not path.is_dir():
    if not path.is_file():
      raise ValueError(f"{path}: no such manifest{_nearby(path)}")
    rows, left_out = _manifest(path, allow_outside, at)
    return Listing(path.parent, _sorted(rows), left_out, names=at.names(rows))
  return of_folder(path, allow_outside, at)


def of_folder(
  folder: pathlib.Path, allow_outside: bool, at: remote_source.Place | None = None
) -> Listing:
  """Lists a folder on this disk.

  Raises:
    ValueError: there are no media files in it, or no such folder.
  """
  if not folder.is_dir():
    raise ValueError(f"{find.shown(str(folder))}: no such folder")
  if fault := find.name_fault(str(folder)):
    raise ValueError(f"{find.shown(str(folder))}: {fault}, which no manifest can hold")
  found = find.find(folder)
  manifests = [name for name in MANIFESTS if (folder / name).is_file()]
  of_own = {str(folder / name) for name in manifests}
  left_out = [row for row in found.left_out if row[0] not in of_own]
  if len(manifests) > 1:
    raise ValueError(f"{folder}: {' and '.join(manifests)}; which one is meant?")
  if manifests:
    rows, others = _manifest(folder / manifests[0], allow_outside, at)
    taken = set(_OWN)
  else:
    rows, others, taken = _with_sidecars(folder, found, allow_outside)
  known = {*rows, *taken, *(os.path.relpath(path, folder) for path, _ in others)}
  why = "not in the manifest" if manifests else "captions of no file beside it"
  for name in sorted({*found.media, *found.texts} - known):
    left_out.append((str(folder / name), why))
  if not rows and not others:
    wanted = " ".join(media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES)
    raise ValueError(
      f"{folder}: no media files in it; looked for {wanted}{_nearby(folder)}"
    )
  names = at.names(rows) if at else {}
  return Listing(
    folder, _sorted(rows), left_out + others, len(taken & found.texts), names
  )


def _manifest(path, allow_outside, at):
  """(rows, left out) of a manifest on this disk."""
  locate = captions.local_file(path.parent, allow_outside)
  if at is None:
    return captions.read_manifest(path, locate, str(path.parent))
  locate = remote_source.or_remote(locate, allow_outside)
  rows, left_out = captions.read_manifest(path, locate, str(path.parent))
  rows, others = at.resolved(rows)
  return rows, left_out + others


def _with_sidecars(folder, found, allow_outside):
  """(rows of media, [(path, reason)] of those left out, names of captions' files)."""
  rows, left_out, taken = {}, [], set()
  for name in found.media:
    try:
      text, texts = captions.sidecar(folder, name, found, allow_outside)
      rows[name] = {"captions": texts}
    except LeftOut as e:
      left_out.append((str(folder / name), str(e)))
      text = os.path.splitext(name)[0] + ".txt"
    taken.add(text)
  return rows, left_out, taken


def of_tars(tars: dict[str, str], work: pathlib.Path) -> Listing:
  """Lists WebDataset shards, each looked through once, for as long as it stays.

  Args:
    tars: path -> name; paths may be remote ones, see `stored`.
    work: folder of the index, tar_index.jsonl.

  Raises:
    ValueError: none of them holds any media.
  """
  rows, names = {}, {}
  left_out: list[tuple[str, str]] = []
  with Ledger(work / "tar_index.jsonl", [_INDEX_VERSION]) as index:
    for path, name in tars.items():
      try:
        contents = _contents(path, index)
      except (OSError, ValueError) as e:
        left_out.append((path, f"cannot be read ({e})"))
        continue
      for member, place, row in contents.rows:
        key = f"{path}::tar/{place}"
        rows[key], names[key] = row, f"{name}/{member}"
      left_out += [(f"{path}/{member}".rstrip("/"), why)
                   for member, why in contents.left_out]  # fmt: skip
  damaged = [(path, reason) for path, reason in left_out if path in tars]
  for path, reason in damaged:
    logging.warning("%s: %s", find.shown(path), reason)
  if not rows:
    path, reason = (damaged or left_out or [(next(iter(tars)), "it is empty")])[0]
    raise ValueError(f"no media in {len(tars)} tar files; first {path}: {reason}")
  return Listing(pathlib.Path("/"), rows, left_out, names=names)


def _contents(path, index) -> tar_source.Contents:
  """What is in a tar file: from the index, or looked through and put there."""
  key = key_of(pathlib.Path(path), path)
  if key not in index:
    source = media.opened(path)
    with open(source, "rb") if isinstance(source, str) else source as file:
      index.add(key, {"record": tar_source.read_contents(file)._asdict()})
  return tar_source.Contents(**index.get(key)["record"])


def mixed(listings: dict[str, Listing]) -> Listing:
  """Several sources as one; ids begin with the names of their sources.

  A file that several of them have is of the first.
  """
  rows, names, texts = {}, {}, 0
  sources: dict[str, str] = {}
  left_out: list[tuple[str, str]] = []
  for source, listing in listings.items():
    left_out += listing.left_out
    texts += listing.texts
    for name, row in listing.rows.items():
      path = os.path.normpath(listing.folder / name)
      if path in rows:
        left_out.append((path, f"of the source {sources[path]}, which is used"))
        continue
      rows[path], sources[path] = row, source
      names[path] = f"{source}/{listing.names.get(name, name)}"
  return Listing(pathlib.Path("/"), rows, left_out, texts, names, sources)


def _of_remote(source, work, at, allow_outside) -> Listing:
  """Lists what is at an address: a manifest, tar files, or a folder."""
  if source.endswith(tar_source.SUFFIX):
    tars = at.tars(_braces(source))
    return of_tars({path: os.path.basename(url) for path, url in tars.items()}, work)
  rows, left_out = at.rows(source, allow_outside)
  return Listing(pathlib.Path("/"), _sorted(rows), left_out, names=at.names(rows))


def _braces(pattern: str) -> list[str]:
  """x-{08..10}.tar -> x-08.tar, x-09.tar, x-10.tar, as WebDataset has it."""
  found = _BRACES.search(pattern)
  if not found:
    return [pattern]
  first, last = found.groups()
  return [
    made
    for number in range(int(first), int(last) + 1)
    for made in _braces(
      f"{pattern[: found.start()]}{number:0{len(first)}d}{pattern[found.end() :]}"
    )
  ]


def _nearby(path) -> str:
  """What else a folder holds that could be a source, for messages."""
  folder = pathlib.Path(path)
  folder = folder if folder.is_dir() else folder.parent
  for suffix in (tar_source.SUFFIX, ".parquet", ".jsonl"):
    found = sorted(folder.glob(f"*{suffix}"))
    if found and folder.is_dir():
      example = folder / f"*{suffix}" if suffix == tar_source.SUFFIX else found[0]
      return f"; {len(found)} {suffix} files are there: config.data.source={example}"
  return ""


def _sorted(rows):
  return dict(sorted(rows.items()))
