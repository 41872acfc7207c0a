"""Clips that could not be read: noted by every process, and reported at the end."""

import collections
import json
import os

from absl import logging

_FILE = "bad_clips.jsonl"


class BadClips:
  """Notes clips that could not be read, once a process, in <folder>/bad_clips.jsonl."""

  def __init__(self, folder: str | os.PathLike | None):
    self._path = None
    if folder is not None:
      os.makedirs(folder, exist_ok=True)
      self._path = os.path.join(os.fspath(folder), _FILE)
    self._seen: set[str] = set()

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
