"""Measures media files: their length, rate and size, without reading all frames."""

import dataclasses
from typing import NamedTuple

import av

from sora_jax.data.video import colour, frames, images, media


@dataclasses.dataclass(frozen=True)
class Info:
  """Length and size of a media file as `reader.read` returns it: upright, with
  square pixels."""

  frames: int
  fps: float  # mean rate; 1.0 for images
  width: int
  height: int
  duration: float  # seconds, the last frame's own duration included
  is_image: bool


def probe(path) -> Info:
  """Measures a file from its packets and one decoded frame.

  Raises:
    ClipError: missing, empty, not a media file, no video in it, or cut off.
  """
  media.check_file(path)
  if media.is_image(path):
    height, width, _ = images.read(path).shape
    return Info(1, 1.0, width, height, 1.0, True)
  with media.open_video(path) as container:
    try:
      times = _times(container, path)
      fps, duration = _length(container, path, times)
    except media.VIDEO_ERRORS as e:
      raise media.damaged(path, e) from e
  height, width = _first_size(path)
  count = len(times.pts)
  return Info(count, fps, width, height, duration, count == 1)


class _Times(NamedTuple):
  """Times of a stream's packets in its ticks, and the last of all streams' in s."""

  pts: list[int]
  ends: list[int]
  latest: float


def _times(container, path):
  """Reads all packets. ClipError if one is damaged, or there are none."""
  stream = media.video_stream(container)
  pts, ends, latest = [], [], 0.0
  for packet in container.demux():
    if packet.is_corrupt:
      raise media.ClipError(path, f"damaged after {len(pts)} frames")
    if packet.pts is None or packet.is_discard:  # the flush, or trimmed away
      continue
    end = packet.pts + (packet.duration or 0)
    latest = max(latest, float(end * (packet.time_base or stream.time_base)))
    if packet.stream is stream:
      pts.append(packet.pts)
      ends.append(end)
  if not pts:
    raise media.ClipError(path, "no frames in it")
  return _Times(pts, ends, latest - (container.start_time or 0) / av.time_base)


def _length(container, path, times):
  """(fps, duration). ClipError if the header declares a longer file."""
  stream = media.video_stream(container)
  pts, base = times.pts, stream.time_base
  span = float((max(pts) - min(pts)) * base)
  fps = _mean_fps(stream, len(pts), span)
  last = float((max(times.ends) - max(pts)) * base)
  duration = span + (last if last > 0 else 1 / fps)
  # A cut ends all streams early; a video that ends before its sound is fine.
  for found, declared in (
    (duration, media.declared_duration(stream, float(min(pts) * base))),
    (times.latest, media.declared_total(container)),
  ):
    if media.is_cut_off(found, declared, fps):
      raise media.ClipError(
        path, f"cut off: {found:.2f} s found, {declared:.2f} s declared"
      )
  return fps, duration


def _first_size(path):
  """(height, width) as shown of the first frame, once it is seen that it converts."""
  with media.open_video(path) as container:
    stream = media.video_stream(container)
    try:
      first = next(frames.decode(container, path)).frame
      colour.Converter(path, stream, (16, 16))(first)
      return colour.shown_size(path, stream, first)
    except StopIteration:
      raise media.ClipError(path, "no frame can be decoded") from None
    except media.VIDEO_ERRORS as e:
      raise media.damaged(path, e) from e


def _mean_fps(stream, count, span):
  """Rate from the frames' times; the header's rate only tidies up rounding."""
  header = float(stream.average_rate or stream.guessed_rate or 0)
  if count < 2 or span <= 0:
    return header or 1.0
  mean = (count - 1) / span
  return header if abs(header - mean) < 0.01 * mean else mean
