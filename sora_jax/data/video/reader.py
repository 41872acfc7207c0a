"""Reads videos and images as uint8 RGB arrays, [T, H, W, 3].

Frames are chosen by their presentation time, never by counting, so that variable frame
rates, B-frames and cuts come out right.
"""

import av
import numpy as np

from sora_jax.data.video import images, media, resizing

_Interpolation = av.video.reformatter.Interpolation
# Exact rounding and full resolution chroma: 3 dB on small saturated shapes, but 20
# times slower than the default, which nobody can tell from it on large frames.
EXACT = (
  _Interpolation.BICUBIC
  | _Interpolation.ACCURATE_RND
  | _Interpolation.FULL_CHR_H_INT
  | _Interpolation.FULL_CHR_H_INP
)
_EXACT_PIXELS = 384 * 384


def read(
  path,
  *,
  start: float = 0.0,
  frames: int | None = None,
  fps: float | None = None,
  size: tuple[int, int] | None = None,
  fit: str = "crop",
) -> np.ndarray:
  """Decodes frames to uint8 [T, H, W, 3].

  Rotation is applied; grey becomes RGB; transparency is laid over white.

  Args:
    path: an image or a video.
    start: seconds from the first frame.
    frames: how many frames; None reads to the end.
    fps: rate to sample at: frame k is the one on screen at start + k / fps. None gives
      the file's own frames, whatever their times.
    size, fit: (height, width) of the frames, and how it is reached; see
      `resizing.fit_frame`.

  Raises:
    ClipError: the file cannot be decoded, or holds fewer frames than asked for.
  """
  media.check_file(path)
  if frames is not None and frames < 1:
    raise ValueError(f"frames must be at least 1, not {frames}")
  if fps is not None and fps <= 0:
    raise ValueError(f"fps must be positive, not {fps}")
  if media.is_image(path):
    if frames not in (None, 1):
      raise media.ClipError(path, f"too short: 1 frame, {frames} asked for")
    return resizing.fit_frame(images.read(path), size, fit)[None]
  with media.open_video(path) as container:
    try:
      chosen = _choose(container, path, start, frames, fps)
      video = [resizing.fit_frame(_to_rgb(frame), size, fit) for frame in chosen]
    except media.ClipError:
      raise
    except media.DECODE_ERRORS as e:
      raise media.ClipError(path, f"damaged ({media.short_message(e)})") from e
  if frames is not None and len(video) < frames:
    at = "" if fps is None else f" at {fps:g} fps"
    raise media.ClipError(
      path,
      f"too short: {len(video)} frames{at} from {start:g} s, {frames} asked for",
    )
  if not video:
    raise media.ClipError(path, f"no frames from {start:g} s on")
  return np.stack(video)


def _choose(container, path, start, count, fps):
  """Yields at most `count` frames from `start` on; the same frame may come twice.

  With a rate, each frame is held until the next one shows how long it stays on screen.
  """
  stream = container.streams.video[0]
  base = float(stream.time_base)
  origin = stream.start_time or 0
  rate = float(stream.average_rate or stream.guessed_rate or 0)
  interval = 1 / rate if rate else 0.04
  # Containers round times to their tick, so k / fps may fall just before its frame.
  slack = min(max(base, 1e-3), 0.25 * interval)
  if start > 0:
    container.seek(origin + int(start / base), stream=stream, backward=True)
  emitted, held, time, end = 0, None, float("inf"), 0.0
  for frame in container.decode(stream):
    if frame.pts is None:
      continue
    time, before = (frame.pts - origin) * base, time
    # Some files do not say how long the last frame stays.
    end = time + (frame.duration * base or max(interval, time - before))
    if fps is None:
      if time >= start - slack:
        yield frame
        emitted += 1
    elif held is not None:
      while emitted != count and start + emitted / fps < time - slack:
        yield held
        emitted += 1
    if emitted == count:
      return
    held = frame
  if fps is not None and held is not None:
    while emitted != count and start + emitted / fps < end - slack:
      yield held
      emitted += 1
  declared = media.declared_duration(stream)
  if declared is None and container.duration and len(container.streams) == 1:
    declared = container.duration / av.time_base
  if count is None and media.is_cut_off(end, declared, 1 / interval):
    raise media.ClipError(
      path, f"cut off: {end:.2f} s found, {declared:.2f} s declared"
    )


def _to_rgb(frame):
  """Converts a decoded frame to uint8 [H, W, 3] and turns it upright."""
  exact = frame.width * frame.height <= _EXACT_PIXELS
  how = {"interpolation": EXACT if exact else _Interpolation.BICUBIC, "threads": 1}
  name = frame.format.name
  if name == "pal8" or any(c.is_alpha for c in frame.format.components):
    array = images.over_white(frame.to_ndarray(format="rgba", **how))
  else:
    array = frame.to_ndarray(format="rgb24", **how)
  return np.rot90(array, frame.rotation // 90)
