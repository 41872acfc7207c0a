"""Files of buckets and web servers (`gs://`, `s3://`, `https://`), by fsspec.

A path in a manifest says where copies are, which file is meant, and in which state:

  /runs/a/data/remote::remote/gs%3A%2F%2Fbucket%2Fa.mp4/1024-3f09c2a1b7d4/a.mp4

1024 being its size in bytes, and what follows a hash of what the server says changes
with it (ETag, MD5, time of change). Another state is another path, and so measured and
copied anew; a file that has changed since `prepare` is refused instead of trained on.
"""

import contextlib
import datetime
import hashlib
import json
import os
import posixpath
import re
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

from absl import logging

from sora_jax.runtime import files

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# What file systems call that which changes with a file's content.
_CHANGES = (
  "etag", "md5hash", "content-md5", "digest", "crc32c", "generation", "last-modified",
  "lastmodified", "last_modified", "updated", "mtime", "modified", "created",
)  # fmt: skip
_THREADS = 16  # of requests that wait for a server
_WAITS = (1.0, 5.0, 20.0)  # seconds before a copy is tried again
_UNKNOWN = "x"


class Member(NamedTuple):
  """A remote file in one state: its address, size ("x" if unknown) and hash."""

  url: str
  size: str
  state: str
  name: str

  def text(self) -> str:
    """The part of a path behind "::remote/"."""
    url = urllib.parse.quote(self.url, safe="")
    return f"{url}/{self.size}-{self.state}/{self.name}"


def is_remote(path) -> bool:
  """Whether a path is an address with a protocol."""
  return bool(_URL.match(str(path)))


def file_system(url: str):
  """fsspec's file system of an address.

  Raises:
    ValueError: there is no such protocol, or its package is not installed.
  """
  import fsspec

  try:
    return fsspec.core.url_to_fs(url)[0]
  except (ImportError, ValueError) as e:
    raise ValueError(
      f"{url}: cannot be read ({e}); `pip install 'sora_jax[remote]'` has what gs://, "
      "s3:// and https:// need"
    ) from e


def member(url: str, info: Mapping[str, Any] | None = None) -> Member:
  """A remote file as it is now.

  Args:
    url: of the file.
    info: what a listing said of it; asked for if None, or if it lacks the size.

  Raises:
    OSError: there is no such file, or no answer.
  """
  if info is None or info.get("size") is None:
    with _as_oserror(url):
      info = file_system(url).info(url)
  if info.get("type") == "directory":
    raise IsADirectoryError(f"{url}: a folder")
  facts = {key.lower(): value for key, value in info.items()}
  changes = [_text(facts[key]) for key in _CHANGES if facts.get(key) is not None]
  size = _UNKNOWN if info.get("size") is None else str(int(info["size"]))
  # The surest only: a listing may say more than a question of its own, or less.
  state = hashlib.sha256(json.dumps(changes[:1]).encode()).hexdigest()[:12]
  # Of a web address alone, what follows ? and # is no name.
  path = urllib.parse.urlsplit(url).path if url.startswith("http") else url
  name = urllib.parse.unquote(posixpath.basename(path))
  return Member(url, size, state, urllib.parse.quote(name, safe=""))


def _text(value) -> str:
  """A fact as text: times are a number in listings, and a date elsewhere."""
  return str(value.timestamp() if isinstance(value, datetime.datetime) else value)


def members(urls: Sequence[str], infos: Sequence = ()) -> list[Member | OSError]:
  """[url] remote files as they are now, or why they cannot be read; asks in threads.

  infos: what a listing said of each; web servers say no sizes in one.
  """

  def look(url, info):
    try:
      return member(url, info)
    except OSError as e:
      return e

  with ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(look, urls, infos or [None] * len(urls)))


def list_files(url: str) -> dict[str, Member | OSError]:
  """{path relative to the address: file, or why it cannot be read} of all below it.

  Raises:
    ValueError: it cannot be listed, or nothing is there.
  """
  system, root = file_system(url), url.rstrip("/")
  try:
    with _as_oserror(url):
      listing = system.find(root + "/", detail=True)
  except (OSError, ValueError) as e:
    raise ValueError(f"{url}: cannot be listed ({e})") from e
  stripped = system._strip_protocol(root).rstrip("/") + "/"
  infos = {
    name[len(stripped) :]: info
    for name, info in listing.items()
    if name.startswith(stripped) and not name.endswith("/")
  }
  if not infos:
    raise ValueError(f"{url}: nothing is there, or its server lists no files")
  names = map(urllib.parse.unquote, infos) if root.startswith("http") else infos
  made = members([f"{root}/{name}" for name in infos], list(infos.values()))
  return dict(zip(names, made, strict=True))


@contextlib.contextmanager
def _as_oserror(url):
  """Clients of servers have errors of their own for what fails on the way."""
  try:
    yield
  except (OSError, ValueError):
    raise
  except Exception as e:
    raise OSError(f"{url}: {type(e).__name__}: {e}") from e


def _parse(text: str) -> Member:
  url, state, name = text.split("/")
  size, _, digest = state.partition("-")
  return Member(urllib.parse.unquote(url), size, digest, name)


def stamp(text: str) -> list[int]:
  """What tells a file's state from others: its size, -1 if unknown, and the hash."""
  _, size, state, _ = _parse(text)
  return [-1 if size == _UNKNOWN else int(size), int(state, 16)]


def _check(wanted: Member) -> None:
  found = member(wanted.url)
  if found[1:3] != wanted[1:3]:
    raise ValueError(
      f"{wanted.url}: has changed since it was listed ({wanted.size} bytes then, "
      f"{found.size} now); prepare the data again"
    )


def local_copy(folder: str, text: str) -> str:
  """Path of a remote file's copy, which is made unless it is there whole.

  Args:
    folder: of copies. text: of `Member.text`.

  Raises:
    OSError, ValueError: it cannot be had, has changed, or less of it came than it is.
  """
  wanted = _parse(text)
  digest = hashlib.sha256(wanted.url.encode()).hexdigest()[:24]
  suffix = posixpath.splitext(wanted.name)[1]
  path = os.path.join(folder, f"{digest}-{wanted.size}-{wanted.state}{suffix}")
  if os.path.exists(path) and _is_whole(path, wanted):
    return path
  _check(wanted)
  with files.replacing(path) as partial:
    _fetch(wanted.url, str(partial))
    if not _is_whole(partial, wanted):
      raise ValueError(
        f"{wanted.url}: {os.path.getsize(partial)} of {wanted.size} bytes came"
      )
  return path


def _fetch(url: str, path: str) -> None:
  """Copies a file; what fails on the way is tried again, after a while."""
  for wait in (*_WAITS, None):
    try:
      with _as_oserror(url):
        file_system(url).get_file(url, path)
      return
    except OSError as e:
      if wait is None or isinstance(e, (FileNotFoundError, PermissionError)):
        raise
      logging.warning("%s: %s; trying again in %g s", url, e, wait)
      time.sleep(wait)


def _is_whole(path, wanted) -> bool:
  return wanted.size in (_UNKNOWN, str(os.path.getsize(path)))


def streamed(text: str) -> BinaryIO:
  """A remote file whose parts are read over the network as they are needed.

  Raises:
    OSError, ValueError: it cannot be had, or has changed.
  """
  wanted = _parse(text)
  _check(wanted)
  with _as_oserror(wanted.url):
    return file_system(wanted.url).open(wanted.url, "rb")
