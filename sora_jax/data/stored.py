"""Media inside larger files, under paths of their own.

`/data/toy/1.0.0::tfds/00000012/train/12/video.mp4` is a video inside a TFDS data set:
"::", the kind of what holds it, and where it is there. All that reads media takes such
a path: manifests hold it as any other, and nothing is unpacked.
"""

import functools
import io
import os
import re

from sora_jax.data import tfds_source
from sora_jax.data.tfds_examples import INFO

_INSIDE = re.compile(r"::(tfds)/")
_CONTENTS = {"tfds": tfds_source.content}


def is_inside(path) -> bool:
  """Whether a path is of something inside a larger file."""
  return bool(_INSIDE.search(os.fspath(path)))


def holder(path) -> str:
  """The file on disk that tells by its time of change whether media have changed."""
  path = os.fspath(path)
  found = _INSIDE.search(path)
  if not found:
    return path
  return os.path.join(path[: found.start()], INFO)


def opened(path) -> str | io.BytesIO:
  """What PyAV and Pillow open: the path itself, or the bytes of what is inside.

  Raises:
    OSError, ValueError: what holds it cannot be read.
  """
  path = os.fspath(path)
  if not is_inside(path):
    return path
  return io.BytesIO(_content(path, os.stat(holder(path)).st_mtime_ns))


@functools.lru_cache(maxsize=1)  # a file is opened several times in a row
def _content(path, changed):
  del changed  # part of the key
  found = _INSIDE.search(path)
  return _CONTENTS[found[1]](path[: found.start()], path[found.end() :])
