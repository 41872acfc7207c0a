"""Media that are no file on this disk, under paths of their own.

`/data/toy/1.0.0::tfds/00000012/train/12/video.mp4` is a video inside a TFDS data set:
what holds it, "::", the kind of that, and where it is there. All that reads media takes
such a path: manifests hold it as any other, and nothing is unpacked. Kinds are

  tfds     an example of a TFDS data set, see `tfds_source`
  tar      a member of a tar file, see `tar_source`
  remote   a file of a bucket or a web server that is copied here once, see `remote`
  stream   one that is read over the network each time

and what holds one may be another: a tar file may be remote.
"""

import functools
import io
import os
import re
from typing import BinaryIO

from sora_jax.data import remote, tar_members, tfds_source
from sora_jax.data.tfds_examples import INFO

# The last mark counts: what holds a file may be inside of something, too.
_INSIDE = re.compile(r"(.*)::(tfds|tar|remote|stream)/(.*)", re.DOTALL)


def is_inside(path) -> bool:
  """Whether a path is of something that is no file on this disk."""
  return bool(_INSIDE.fullmatch(os.fspath(path)))


def stamp(path) -> list[int]:
  """What tells that media have changed: size and times of change of what holds them.

  Of remote files it is the size and hash that their path says: nothing is asked.

  Raises:
    OSError: there is no such file.
  """
  holder = os.fspath(path)
  while found := _INSIDE.fullmatch(holder):
    if found[2] in ("remote", "stream"):
      return remote.stamp(found[3])
    holder = found[1]
    if found[2] == "tfds":
      holder = os.path.join(holder, INFO)
      break
  status = os.stat(holder)
  return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def holder(path) -> str | None:
  """The file on this disk that media are in, or are; None if they are remote."""
  found = os.fspath(path)
  while inside := _INSIDE.fullmatch(found):
    if inside[2] in ("remote", "stream"):
      return None
    found = inside[1]
  return found


def opened(path) -> str | BinaryIO:
  """What PyAV and Pillow open: a path on this disk, or a file.

  Raises:
    OSError, ValueError: what holds it cannot be read.
  """
  path = os.fspath(path)
  found = _INSIDE.fullmatch(path)
  if not found:
    return path
  holder, kind, member = found.groups()
  if kind == "tfds":
    return io.BytesIO(_content(path, stamp(path)[1]))
  if kind == "tar":
    return tar_members.opened(opened(holder), member)
  if kind == "remote":
    return remote.local_copy(holder, member)
  return remote.streamed(member)


@functools.lru_cache(maxsize=1)  # a file is opened several times in a row
def _content(path, changed):
  del changed  # part of the key
  holder, _, member = _INSIDE.fullmatch(path).groups()
  return tfds_source.content(holder, member)
