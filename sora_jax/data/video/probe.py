"""Measures media files: their length, rate and size, without reading all frames."""

import dataclasses
from fractions import Fraction

import av

from sora_jax.data.video import images, media


@dataclasses.dataclass(frozen=True)
class Info:
  """Length and size of a media file as `reader.read` returns it: after rotation."""

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
    stream = container.streams.video[0]
    base = stream.time_base or Fraction(1)
    try:
      pts: list[int] = []
      ends: list[int] = []
      latest = 0.0
      for packet in container.demux():
        if packet.is_corrupt:
          raise media.ClipError(path, f"damaged after {len(pts)} frames")
        if packet.pts is None or packet.is_discard:  # the flush, or trimmed away
          continue
        end = packet.pts + (packet.duration or 0)
        latest = max(latest, float(end * (packet.time_base or base)))
        if packet.stream is stream:
          pts.append(packet.pts)
          ends.append(end)
      if not pts:
        raise media.ClipError(path, "no frames in it")
      container.seek(min(pts), stream=stream, backward=True)
      frame = next(container.decode(stream))
    except media.ClipError:
      raise
    except StopIteration:
      raise media.ClipError(path, "no frame can be decoded") from None
    except media.DECODE_ERRORS as e:
      raise media.ClipError(path, f"damaged ({media.short_message(e)})") from e
    span = float((max(pts) - min(pts)) * base)
    fps = _mean_fps(stream, len(pts), span)
    last = float((max(ends) - max(pts)) * base)
    duration = span + (last if last > 0 else 1 / fps)
    latest -= (container.start_time or 0) / av.time_base
    # A cut ends all streams early; a video that ends before its sound is fine.
    for found, declared in (
      (duration, media.declared_duration(stream)),
      (latest, container.duration and container.duration / av.time_base),
    ):
      if media.is_cut_off(found, declared, fps):
        raise media.ClipError(
          path, f"cut off: {found:.2f} s found, {declared:.2f} s declared"
        )
    width, height = frame.width, frame.height
    if frame.rotation % 180 == 90:
      width, height = height, width
    return Info(len(pts), fps, width, height, duration, len(pts) == 1)


def _mean_fps(stream, count, span):
  """Rate from the frames' times; the header's rate only tidies up rounding."""
  header = float(stream.average_rate or stream.guessed_rate or 0)
  if count < 2 or span <= 0:
    return header or 1.0
  mean = (count - 1) / span
  return header if abs(header - mean) < 0.01 * mean else mean
