"""What media files have in common: their kinds, how they are opened, how they fail."""

import os
import pathlib

import av

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".gif")

# What FFmpeg and Pillow raise on bytes that are not what they claim to be.
DECODE_ERRORS = (av.error.FFmpegError, OSError, ValueError, SyntaxError, EOFError)


class ClipError(ValueError):
  """A media file that cannot be used; `reason` is the message without the path."""

  def __init__(self, path, reason):
    super().__init__(path, reason)  # both in args, so that it pickles
    self.path = str(path)
    self.reason = reason

  def __str__(self):
    return f"{self.path}: {self.reason}"


def check_file(path) -> None:
  """Raises ClipError for a file that is missing, empty or not readable."""
  try:
    if os.path.getsize(path) == 0 and os.path.isfile(path):
      raise ClipError(path, "empty file (0 bytes)")
  except OSError as e:
    raise ClipError(path, f"cannot be read ({e.strerror})") from e


def is_image(path) -> bool:
  """Whether the suffix is that of an image."""
  return pathlib.Path(path).suffix.lower() in IMAGE_SUFFIXES


def short_message(error: Exception) -> str:
  """What a library's error says, in a few words."""
  return str(getattr(error, "strerror", None) or error or type(error).__name__)[:100]


def open_video(path) -> av.container.InputContainer:
  """Opens a video for reading, with one decoding thread.

  Raises:
    ClipError: the file is no video, or has only sound.
  """
  try:
    container = av.open(os.fspath(path))
  except DECODE_ERRORS as e:
    raise ClipError(path, f"not a video ({short_message(e)})") from e
  if not container.streams.video:
    container.close()
    raise ClipError(path, "no video stream in it")
  # Pipelines decode in many processes, so each one keeps to a single thread.
  container.streams.video[0].thread_count = 1
  return container


def declared_duration(stream) -> float | None:
  """Length of the video stream that the header states, in seconds, or None."""
  if stream.duration:
    return float(stream.duration * stream.time_base)
  tag = stream.metadata.get("DURATION")  # Matroska: hours:minutes:seconds
  try:
    hours, minutes, seconds = tag.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
  except (AttributeError, ValueError):
    return None


def is_cut_off(found: float, declared: float | None, fps: float) -> bool:
  """Whether the seconds found are fewer than the header declares."""
  # Headers round and may leave out the last frame's duration, hence the slack.
  if not declared:
    return False
  return declared - found > max(2.5 / fps, 0.02 * declared)
