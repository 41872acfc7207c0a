"""Members of tar files, read where they lie; `tar_source` looks for them."""

import io
import os
import tarfile
from typing import BinaryIO


def opened(holder: str | BinaryIO, member: str) -> BinaryIO:
  """A member of a tar file, as a file of its own.

  Args:
    holder: the tar file, or its path.
    member: part of a path behind "::tar/".

  Raises:
    OSError, ValueError: the tar file cannot be read, or is not the one that was
      looked through.
  """
  place = member.split("/")[0]
  offset, size = map(int, place.split("+"))
  file = open(holder, "rb", buffering=0) if isinstance(holder, str) else holder
  file.seek(offset - tarfile.BLOCKSIZE)
  try:
    header = tarfile.TarInfo.frombuf(
      file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape"
    )
  except tarfile.HeaderError as e:
    header = None
    fault = str(e)
  else:
    fault = f"{header.size} bytes begin there"
  # Large sizes, and those of long names, are in a header before this one.
  if header is None or header.size not in (size, 0):
    raise ValueError(
      f"no member of {size} bytes at byte {offset} of the tar file ({fault}): it has "
      "changed; prepare the data again"
    )
  return io.BufferedReader(_Part(file, offset, size), 1 << 16)


class _Part(io.RawIOBase):
  """A part of a file, as a file."""

  def __init__(self, file: BinaryIO, start: int, size: int):
    super().__init__()
    self._file, self._start, self._size, self._at = file, start, size, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
    self._at = max(0, base + offset)
    return self._at

  def readinto(self, buffer) -> int:
    wanted = max(0, min(len(buffer), self._size - self._at))
    self._file.seek(self._start + self._at)
    content = self._file.read(wanted)
    if wanted and not content:
      raise OSError(f"the tar file ends {self._size - self._at} bytes too early")
    buffer[: len(content)] = content
    self._at += len(content)
    return len(content)

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()
