"""Reads videos and images as uint8 RGB arrays, [T, H, W, 3].

Frames are chosen by their presentation time, never by counting, so that variable frame
rates, B-frames and cuts come out right.
"""

from collections.abc import Iterator

import numpy as np

from sora_jax.data.video import colour, images, media, resizing
from sora_jax.data.video import frames as decoded


def read(
  path,
  *,
  start: float = 0.0,
  frames: int | None = None,
  fps: float | None = None,
  size: tuple[int, int] | None = None,
  fit: str = "crop",
  crop: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
  """Decodes frames to uint8 [T, H, W, 3].

  Frames are as a player shows them: see `colour.Converter`. Interlaced ones are
  deinterlaced.

  Args:
    path: an image or a video.
    start: seconds from the first frame.
    frames: how many frames; None reads to the end.
    fps: rate to sample at: frame k is the one on screen at start + k / fps. None gives
      the file's own frames, whatever their times.
    size, fit: (height, width) of the frames, and how it is reached; see
      `resizing.fit_frame`.
    crop: shares that are cut off before, see `resizing.crop_frame`.

  Raises:
    ClipError: the file cannot be decoded, or holds fewer frames than asked for.
  """
  return np.stack(list(stream(path, start=start, frames=frames, fps=fps, size=size,
                              fit=fit, crop=crop)))  # fmt: skip


def stream(
  path,
  *,
  start: float = 0.0,
  frames: int | None = None,
  fps: float | None = None,
  size: tuple[int, int] | None = None,
  fit: str = "crop",
  crop: tuple[float, float, float, float] | None = None,
) -> Iterator[np.ndarray]:
  """Yields the frames of `read`, uint8 [H, W, 3], one by one, for any length.

  ClipError comes where the damage is, after the frames before it.
  """
  media.check_file(path)
  if frames is not None and frames < 1:
    raise ValueError(f"frames must be at least 1, not {frames}")
  if fps is not None and fps <= 0:
    raise ValueError(f"fps must be positive, not {fps}")
  if media.is_image(path):
    if frames not in (None, 1):
      raise media.ClipError(path, f"too short: 1 frame, {frames} asked for")
    whole_HWC = resizing.crop_frame(images.read(path), crop)
    yield resizing.fit_frame(whole_HWC, size, fit)
    return
  with media.open_video(path) as container:
    # What is cut off goes by shares of whole frames, so those are made first.
    whole_size = None if crop else size
    convert = colour.Converter(path, media.video_stream(container), whole_size, fit)
    count, last, shown_HWC = 0, None, np.zeros(0, np.uint8)
    try:
      for frame in _choose(container, path, start, frames, fps):
        if frame is not last:
          shown_HWC = convert(frame)
          if crop:
            part_HWC = resizing.crop_frame(shown_HWC, crop)
            shown_HWC = resizing.fit_frame(part_HWC, size, fit)
        last, count = frame, count + 1
        yield shown_HWC
    except media.VIDEO_ERRORS as e:
      raise media.damaged(path, e) from e
  if frames is not None and count < frames:
    at = "" if fps is None else f" at {fps:g} fps"
    raise media.ClipError(
      path,
      f"too short: {count} frames{at} from {start:g} s, {frames} asked for",
    )
  if not count:
    raise media.ClipError(path, f"no frames from {start:g} s on")


def _choose(container, path, start, count, fps):
  """Yields at most `count` frames from `start` on; the same frame may come twice.

  With a rate, each frame is held until the next one shows how long it stays on screen.
  """
  stream = media.video_stream(container)
  rate = float(stream.average_rate or stream.guessed_rate or 0)
  interval = 1 / rate if rate else 0.04
  # Containers round times to their tick, so k / fps may fall just before its frame.
  slack = min(max(float(stream.time_base), 1e-3), 0.25 * interval)
  emitted, held, time, end = 0, None, float("inf"), 0.0
  for frame, now, duration in decoded.decode(container, path, start):
    time, before = now, time
    # Some files do not say how long the last frame stays.
    end = time + (duration or max(interval, time - before))
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
  begin = 0.0 if held is None else float(held.pts * stream.time_base) - time
  declared = media.declared_duration(stream, begin)
  if declared is None and len(container.streams) == 1:
    declared = media.declared_total(container)
  if count is None and media.is_cut_off(end, declared, 1 / interval):
    raise media.ClipError(
      path, f"cut off: {end:.2f} s found, {declared:.2f} s declared"
    )
