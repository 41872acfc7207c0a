"""What media files have in common: their kinds, how they are opened, how they fail."""

import os
import pathlib
from typing import BinaryIO

import av

from sora_jax.data import stored
from sora_jax.data.video.clip_error import ClipError

# What is read, in the order in which messages name them.
IMAGE_SUFFIXES = (
  ".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".avif", ".heic", ".heif",
)  # fmt: skip
VIDEO_SUFFIXES = (
  ".mp4", ".mov", ".webm", ".mkv", ".gif", ".m4v", ".avi", ".ts", ".m2ts", ".mts",
  ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv",
)  # fmt: skip

# Pixels of a video's frame at most: a file of a few bytes may say that it is larger
# than memory, and decoders keep up to 16 of them. 8K has 33 million. Images have
# Pillow's own limit.
MOST_PIXELS = 1 << 26

# What FFmpeg and Pillow raise on bytes that are not what they claim to be.
DECODE_ERRORS = (av.error.FFmpegError, OSError, ValueError, SyntaxError, EOFError)
# What FFmpeg alone raises, once a file is open: any other error is a fault of ours.
VIDEO_ERRORS = (av.error.FFmpegError, OSError, EOFError)


def check_file(path) -> None:
  """Raises ClipError for a file that is missing, empty or not readable."""
  if stored.is_inside(path):
    return  # it is seen when it is opened
  try:
    if os.path.getsize(path) == 0 and os.path.isfile(path):
      raise ClipError(path, "empty file (0 bytes)")
  except OSError as e:
    raise ClipError(path, f"cannot be read ({e.strerror})") from e


def opened(path) -> str | BinaryIO:
  """What PyAV and Pillow open: a path, or a file where none is on this disk.

  Raises:
    ClipError: what holds it cannot be read.
  """
  try:
    return stored.opened(path)
  except (OSError, ValueError) as e:
    raise ClipError(path, str(e)) from e


def is_image(path) -> bool:
  """Whether the suffix is that of an image."""
  return pathlib.Path(path).suffix.lower() in IMAGE_SUFFIXES


def short_message(error: Exception) -> str:
  """What a library's error says, in a few words."""
  return str(getattr(error, "strerror", None) or error or type(error).__name__)[:100]


def damaged(path, error: Exception) -> ClipError:
  """The error of a decoder as one of the file."""
  return ClipError(path, f"damaged ({short_message(error)})")


def open_video(path) -> av.container.InputContainer:
  """Opens a video for reading, with one decoding thread.

  Raises:
    ClipError: the file is no video, has only sound, or an unknown codec.
  """
  source = opened(path)
  try:
    # Old files have names and comments that are no UTF-8; nobody needs them here.
    container = av.open(source, "r", metadata_errors="replace")
  except DECODE_ERRORS as e:
    raise ClipError(path, f"not a video ({short_message(e)})") from e
  video = _video(container)
  if video is None:
    pictures = len(container.streams.video)
    container.close()
    only = ", only a cover picture" if pictures else ""
    raise ClipError(path, f"no video stream in it{only}")
  if video.codec_context is None:
    container.close()
    raise ClipError(path, "its codec is none that FFmpeg knows")
  context = video.codec_context
  if context.width * context.height > MOST_PIXELS:
    container.close()
    raise ClipError(
      path,
      f"its header says {context.width}x{context.height} pixels, more than the "
      f"{MOST_PIXELS} that are read",
    )
  # Frames that grow in the middle of a file are for the decoder to refuse.
  context.options = {"max_pixels": str(MOST_PIXELS)}
  # Pipelines decode in many processes, so each one keeps to a single thread.
  video.thread_count = 1
  return container


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
  """The video, and no cover picture, of what `open_video` opened."""
  found = _video(container)
  assert found is not None  # `open_video` has looked
  return found


def _video(container) -> av.VideoStream | None:
  """The video that FFmpeg, and players by it, would show; no cover picture."""
  cover = av.stream.Disposition.attached_pic
  videos = [s for s in container.streams.video if not s.disposition & cover]
  best = container.streams.best("video")
  return best if best in videos else next(iter(videos), None)


def counts_from_zero(container: av.container.Container) -> bool:
  """Whether the container's times and lengths begin at 0, wherever a stream begins."""
  name = container.format.name
  return "matroska" in name or name in ("avi", "asf", "flv")


def declared_duration(stream: av.VideoStream, begin: float) -> float | None:
  """Seconds from the stream's first frame to its end as the header has it, or None.

  Args:
    stream: a video.
    begin: the first frame's time in the file, in seconds.
  """
  late = max(0.0, begin) if counts_from_zero(stream.container) else 0.0
  if stream.duration:
    return stream.duration * float(stream.time_base or 1) - late
  tag = stream.metadata.get("DURATION", "")  # Matroska: hours:minutes:seconds
  try:
    hours, minutes, seconds = tag.split(":")
    end = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
  except ValueError:
    return None
  return end - late


def declared_total(container: av.container.InputContainer) -> float | None:
  """Seconds from the first of all streams to the last's end by the header, or None."""
  if not container.duration:
    return None
  total = container.duration / av.time_base
  if counts_from_zero(container):
    total -= max(0, container.start_time or 0) / av.time_base
  return total


def is_cut_off(found: float, declared: float | None, fps: float) -> bool:
  """Whether the seconds found are fewer than the header declares."""
  # Headers round and may leave out the last frame's duration, hence the slack.
  if not declared:
    return False
  return declared - found > max(2.5 / fps, 0.02 * declared)
