"""The frames of a video in the order of their times: whole and progressive."""

import collections
import heapq
from collections.abc import Iterator
from typing import NamedTuple

import av

from sora_jax.data.video import media

# FFmpeg's own decoders of these leave the transparency out.
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Decoders of formats that know no interlaced pictures.
_PROGRESSIVE = ("vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "gif")
_REORDERED = 16  # frames at most that H.264 decodes before one that is shown earlier


class Timed(NamedTuple):
  """A frame, and when it is on screen."""

  frame: av.VideoFrame
  time: float  # seconds from the video's first frame
  duration: float  # seconds; 0.0 where the file does not say


def decode(
  container: av.container.InputContainer, path, start: float = 0.0
) -> Iterator[Timed]:
  """Yields every frame from `start` on as Timed, and maybe some before it.

  Args:
    container: of the file, newly opened.
    path: of the file, for messages.
    start: seconds from the first frame.

  Raises:
    ClipError: a frame is damaged.
  """
  if start > 0:
    found = _from(container, path, start)
    first = next(found, None)
    if first is not None and first.time <= max(0.0, start - _early(container)):
      yield first
      yield from found
      return
    # Some containers have no index of key frames (MPEG-TS), or none for times before
    # zero: there all that comes before is decoded, too.
    with media.open_video(path) as again:
      yield from _timed(again, path, None)
  else:
    yield from _timed(container, path, None)


def _from(container, path, start):
  """Frames from the key frame before a time on; maybe from a later one."""
  stream = media.video_stream(container)
  packet = next(p for p in container.demux(stream) if p.pts is not None or not p.size)
  origin = _origin(stream, None if packet.is_discard else packet.pts)
  before = max(0.0, start - 2 * _early(container))
  offset = origin + int(before / stream.time_base)
  try:
    container.seek(offset, stream=stream, backward=True)
  except av.error.FFmpegError:
    return  # not before it, so from the beginning
  yield from _timed(container, path, origin)


def _origin(stream, first):
  """The stream's tick that is time 0, for the pts of what comes first, or None."""
  start = stream.start_time or 0
  if first is None:
    return start
  # FFmpeg says 0 of all AVI files, also of those whose video begins later.
  is_avi = stream.container.format.name == "avi"
  return first if is_avi else min(start, first)


def _early(container) -> float:
  """Seconds before a frame from which on it must be decoded to be what it is.

  A deinterlaced frame is made of its neighbours.
  """
  stream = media.video_stream(container)
  context = stream.codec_context
  if context.field_order == 1 or context.name in _PROGRESSIVE:  # 0 is unknown
    return 0.0
  return 1.5 / float(stream.average_rate or stream.guessed_rate or 25)


def _timed(container, path, origin):
  """Frames with their times; without an origin the first frame has time 0."""
  stream = media.video_stream(container)
  base = float(stream.time_base)
  shown = _decoded(container, stream, path)
  if container.format.name == "avi" and stream.codec_context.name == "h264":
    shown = _in_order(shown)
  for frame in _progressive(shown, stream):
    if frame.pts is None:
      continue
    if origin is None:
      origin = _origin(stream, frame.pts)
    time = (frame.pts - origin) * base
    if frame.is_corrupt:
      raise media.ClipError(path, f"damaged at {time:.2f} s")
    yield Timed(frame, time, (frame.duration or 0) * base)


def _decoded(container, stream, path):
  """Frames as the decoder gives them, with transparency where there is some."""
  name = _WITH_ALPHA.get(stream.codec_context.name)
  if name is None or stream.metadata.get("alpha_mode") != "1":
    yield from container.decode(stream)
    return
  try:
    context = av.CodecContext.create(name, "r")
  except av.codec.codec.UnknownCodecError as e:
    raise media.ClipError(
      path, f"transparent; that needs the decoder {name}, which this PyAV lacks"
    ) from e
  context.thread_count = 1
  for packet in container.demux(stream):
    yield from context.decode(packet)


def _in_order(shown) -> Iterator[av.VideoFrame]:
  """Frames in the order in which they are shown, with rising times.

  AVI has no times of showing. FFmpeg takes those of decoding, which is in another order
  where frames refer to later ones.
  """
  times: list[int] = []
  waiting: collections.deque = collections.deque()
  for frame in shown:
    if frame.pts is None:
      continue
    heapq.heappush(times, frame.pts)
    waiting.append(frame)
    if len(waiting) > _REORDERED:
      first = waiting.popleft()
      first.pts = heapq.heappop(times)
      yield first
  while waiting:
    first = waiting.popleft()
    first.pts = heapq.heappop(times)
    yield first


def _progressive(frames, stream) -> Iterator[av.VideoFrame]:
  """Frames without combs: from the first interlaced one on all pass a filter.

  FFmpeg's bwdif makes one frame of each and leaves progressive ones as they are. Files
  that are interlaced in name only come through with a little less sharpness.
  """
  graph, look = None, None
  waiting: collections.deque = collections.deque()
  for frame in frames:
    new = (frame.width, frame.height, frame.format.name)
    if graph is not None and new != look:  # the size changes in the middle
      yield from _pull(graph, waiting, end=True)
      graph = None
    if graph is None:
      if not frame.interlaced_frame:
        yield frame
        continue
      graph, look = _deinterlacer(frame, stream), new
    waiting.append((frame.pts, frame.duration))
    graph.vpush(frame)
    yield from _pull(graph, waiting)
  if graph is not None:
    yield from _pull(graph, waiting, end=True)


def _deinterlacer(frame, stream):
  graph = av.filter.Graph()
  graph.threads = 1
  source = graph.add_buffer(
    width=frame.width,
    height=frame.height,
    format=frame.format,
    time_base=stream.time_base,
  )
  graph.link_nodes(
    source,
    graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced"),
    graph.add("buffersink"),
  ).configure()
  return graph


def _pull(graph, waiting, end=False):
  """What the filter has ready, one frame for each that went in, with its time."""
  if end:
    graph.vpush(None)
  while True:
    try:
      frame = graph.vpull()
    except (av.error.BlockingIOError, av.error.EOFError):
      return
    frame.pts, frame.duration = waiting.popleft()
    yield frame
