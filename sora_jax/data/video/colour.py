"""Decoded frames as upright RGB of a size: matrix, range, siting, alpha, HDR, shape.

FFmpeg's swscale resizes straight from the decoder's planes, several times as fast as
Pillow does the whole RGB frame, with the same filter: both ways give the same pixels to
a level or two.
"""

import fractions
from collections.abc import Callable

import av
import numpy as np

from sora_jax.data.video import (
  chroma_siting,
  media,
  orientation,
  pictures,
  resizing,
  tone_mapping,
)

# FFmpeg's AVColorSpace as names of its filter `scale`.
_MATRICES = {
  1: "bt709",
  4: "fcc",
  5: "bt470bg",
  6: "smpte170m",
  7: "smpte240m",
  9: "bt2020nc",
}
_RGB, _UNSPECIFIED = 0, 2
_HD_LINES = 720
_FULL_RANGE = 2
# Without these flags swscale repeats colour samples and rounds down: 15 dB less.
_FLAGS = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp:threads=1"
# Wider pixels than any standard has; they would make frames of any size.
_MAX_PIXEL_ASPECT = 10
# Times the larger of frame and result that a resized frame may be before its crop.
_MAX_GROWTH = 4
# What swscale makes of YUV's white with 16 bits: that of 8 bits, shifted.
_WHITE_OF_YUV = 255 << 8


class Converter:
  """Converts the decoded frames of one stream to uint8 [H, W, 3].

  Turned upright, with square pixels; transparency is laid over white; PQ and HLG are
  mapped to standard range. Without a matrix in the stream it is BT.709 from 720 lines
  on and BT.601 below, as players have it.
  """

  def __init__(
    self,
    path,
    stream: av.VideoStream,
    size: tuple[int, int] | None = None,
    fit: str = "crop",
  ):
    """size, fit: of the results, see `resizing.fit_frame`."""
    self._path, self._stream = path, stream
    self._size, self._fit = size, fit
    self._pixel_aspect = pixel_aspect(path, stream)
    self._look: tuple | None = None
    self._convert: Callable[[av.VideoFrame], np.ndarray] | None = None
    self._shape: tuple[int, int] | None = None

  def __call__(self, frame: av.VideoFrame) -> np.ndarray:
    """One frame. ClipError if it is of a kind that cannot be converted."""
    look = _look_of(frame)
    if self._convert is None or look != self._look:
      self._convert, self._look = self._prepare(frame), look
    frame_HWC = self._convert(frame)
    shape = frame_HWC.shape[:2]
    if self._shape not in (None, shape):
      raise media.ClipError(
        self._path,
        f"its frames change from {self._shape[1]}x{self._shape[0]} to "
        f"{shape[1]}x{shape[0]}, and no size is asked for",
      )
    self._shape = shape
    return frame_HWC

  def _prepare(self, frame):
    """What converts frames that look like this one."""
    turn = orient(self._path, frame)
    shape = (frame.height, frame.width)
    size = self._size and turn.turned(self._size)
    placement = resizing.place(shape, size, self._fit, self._pixel_aspect)
    transparent = _is_transparent(frame)
    largest = max(_area(placement.size), _area(shape))
    # Colours that nothing shows must not mix with others, and the whole of a strip may
    # be huge before its crop: these are resized as RGB.
    late = transparent or _area(placement.scaled) > _MAX_GROWTH * largest
    to_rgb = self._to_rgb(frame, shape if late else placement.scaled, transparent)

    def convert(frame):
      frame_HWC = to_rgb(frame)
      if late:
        frame_HWC = resizing.fit_frame(frame_HWC, size, self._fit, self._pixel_aspect)
      else:
        frame_HWC = _cut(frame_HWC, placement)
      return turn.apply(frame_HWC)

    return convert

  def _to_rgb(self, frame, size, transparent):
    """What makes uint8 [H, W, 3] of a size of such frames, as they are stored."""
    source = _source(self._path, self._stream, frame)
    base = self._stream.time_base
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    hdr = transfer in (tone_mapping.PQ, tone_mapping.HLG)
    if transparent and hdr:
      raise media.ClipError(
        self._path, "transparent in high dynamic range, which cannot be converted"
      )
    if not hdr:
      graph = scaler(frame, source, size, "rgba" if transparent else "rgb24", base)
      return lambda frame: _shown(_through(graph, frame), primaries)
    if primaries not in tone_mapping.PRIMARIES:
      raise media.ClipError(
        self._path,
        f"high dynamic range with colour primaries {primaries} (FFmpeg's number); "
        f"only {sorted(tone_mapping.PRIMARIES)} can be converted",
      )
    graph = scaler(frame, source, size, "rgb48le", base)
    white = 65535 if frame.format.is_rgb else _WHITE_OF_YUV
    return lambda frame: tone_mapping.to_sdr(
      _through(graph, frame), transfer, primaries, white
    )


def _shown(pixels_HWC, primaries):
  """uint8 [H, W, 3] of standard range, of any primaries, with transparency or none."""
  if pixels_HWC.shape[-1] == 4:
    pixels_HWC = pictures.over_white(pixels_HWC)
  if primaries in tone_mapping.WIDE:
    return tone_mapping.to_bt709(pixels_HWC, primaries)
  return pixels_HWC


def pixel_aspect(path, stream: av.VideoStream) -> float:
  """Width of the stream's pixels divided by their height.

  Raises:
    ClipError: no screen has such pixels.
  """
  aspect = float(stream.sample_aspect_ratio or 1) or 1.0
  if not 1 / _MAX_PIXEL_ASPECT <= aspect <= _MAX_PIXEL_ASPECT:
    raise media.ClipError(
      path,
      f"its pixels are {aspect:g} times as wide as high; 1/{_MAX_PIXEL_ASPECT} to "
      f"{_MAX_PIXEL_ASPECT} is possible",
    )
  return aspect


def orient(path, frame: av.VideoFrame) -> orientation.Orientation:
  """`orientation.of`, with the file's name in its error."""
  try:
    return orientation.of(frame)
  except ValueError as e:
    raise media.ClipError(path, str(e)) from e


def shown_size(path, stream: av.VideoStream, frame: av.VideoFrame) -> tuple[int, int]:
  """(height, width) of a frame as `Converter` gives it where no size is asked for."""
  shape = (frame.height, frame.width)
  square = resizing.place(shape, None, pixel_aspect=pixel_aspect(path, stream)).size
  return orient(path, frame).turned(square)


def _area(size):
  return size[0] * size[1]


def _look_of(frame):
  """All that the conversion of a frame depends on, but its pixels."""
  matrix = frame.side_data.get("DISPLAYMATRIX")
  return (
    frame.width,
    frame.height,
    frame.format.name,
    frame.colorspace,
    frame.color_range,
    frame.color_trc,
    frame.color_primaries,
    matrix and bytes(matrix),
  )


def _is_transparent(frame):
  return frame.format.name == "pal8" or any(c.is_alpha for c in frame.format.components)


def _source(path, stream, frame):
  """Options of `scale` that say what the numbers of a frame mean."""
  name = frame.format.name
  if frame.format.is_rgb or name == "pal8":
    return ""
  colorspace = int(frame.colorspace)
  if colorspace in (_UNSPECIFIED, _RGB):  # as RGB it says nothing of YUV
    matrix = "bt709" if frame.height >= _HD_LINES else "smpte170m"
  elif colorspace in _MATRICES:
    matrix = _MATRICES[colorspace]
  else:
    raise media.ClipError(
      path,
      f"its colour matrix {colorspace} (FFmpeg's number) is none of "
      f"{sorted(_MATRICES)} that can be converted",
    )
  full = int(frame.color_range) == _FULL_RANGE or name.startswith("yuvj")
  if int(frame.color_range) == 0 and name.startswith("gray"):
    full = True
  options = f"in_color_matrix={matrix}:in_range={'full' if full else 'limited'}"
  if len(frame.format.components) >= 3:
    options += f":in_chroma_loc={chroma_siting.of(stream, colorspace)}"
  return options + ":"


def scaler(
  frame: av.VideoFrame,
  options: str,
  size: tuple[int, int],
  kind: str,
  time_base: fractions.Fraction,
) -> av.filter.Graph:
  """A graph that resizes frames like this one and converts them.

  Args:
    frame: an example.
    options: of FFmpeg's filter `scale`, each with a colon after it.
    size: (height, width) of the results.
    kind: their pixel format.
    time_base: of the frames.
  """
  graph = av.filter.Graph()
  graph.threads = 1
  nodes = (
    graph.add_buffer(
      width=frame.width,
      height=frame.height,
      format=frame.format,
      time_base=time_base,
    ),
    graph.add("scale", f"{size[1]}:{size[0]}:{options}{_FLAGS}"),
    graph.add("format", kind),
    graph.add("buffersink"),
  )
  graph.link_nodes(*nodes).configure()
  return graph


def _through(graph, frame):
  graph.vpush(frame)
  return graph.vpull().to_ndarray()


def _cut(array, placement):
  """The middle of a resized frame, or the frame in the middle of black."""
  (height, width), size = placement
  top, left = max(0, (height - size[0]) // 2), max(0, (width - size[1]) // 2)
  middle = array[top : top + size[0], left : left + size[1]]
  return resizing.pad(middle, size)
