"""Clips that could not be read: noted by every process, and reported at the end."""

import collections
import json
import os

from absl import logging

from sora_jax.runtime import limits

_FILE = "bad_clips.jsonl"


class BadClips:
  """Notes clips that could not be read, once a process, in <folder>/bad_clips.jsonl."""

  def __init__(
    self, folder: str | os.PathLike | None, total: int = 0, most: float = 1.0
  ):
    """Args: where the file is, None only logs; for `tried`, how many clips this process
    is to read in all, and the share of them that may be unreadable.
    """
    self._path, self._total, self._most, self._tried = None, total, most, 0
    if folder is not None:
      os.makedirs(folder, exist_ok=True)
      self._path = os.path.join(os.fspath(folder), _FILE)
    self._seen: set[str] = set()

  @property
  def count(self) -> int:
    """Clips that this process could not read."""
    return len(self._seen)

  def tried(self, count: int) -> None:
    """Notes that so many clips, other ones than before, were read or were not.

    Raises:
      UnreadableError: if too many of them could not be read.
    """
    self._tried += count
    if limits.too_many(self.count, self._tried, self._most, self._tried):
      raise limits.UnreadableError(
        f"{self.count} of {self._tried} clips so far, of {self._total}, cannot be "
        f"read, more than config.data.max_unreadable {self._most:g}; {self._path} says "
        "which. Is the disk with the files there?"
      )

  def add(self, clip_id: str, reason: str) -> None:
    """Logs a clip and appends {"id", "reason"}."""
    if clip_id in self._seen:
      return
    self._seen.add(clip_id)
    logging.warning("left out clip %s: %s", clip_id, reason)
    if self._path is None:
      return
    line = json.dumps({"id": clip_id, "reason": reason}, ensure_ascii=False) + "\n"
    # One write to a descriptor in append mode: lines of several workers do not mix.
    descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
      os.write(descriptor, line.encode())
    finally:
      os.close(descriptor)


def report_bad_clips(folder: str | os.PathLike, total: int) -> int:
  """Logs how many clips of `total` could not be read so far, and why; the count."""
  path = os.path.join(os.fspath(folder), _FILE)
  if not os.path.exists(path):
    return 0
  with open(path, encoding="utf-8") as file:
    # Several processes may have noted the same clip.
    reasons = {row["id"]: row["reason"] for row in map(json.loads, file)}
  counts = collections.Counter(reasons.values()).most_common(5)
  shown = "; ".join(f"{count} x {reason}" for reason, count in counts)
  logging.warning(
    "%d of %d clips could not be read: %s; all in %s", len(reasons), total, shown, path
  )
  return len(reasons)
