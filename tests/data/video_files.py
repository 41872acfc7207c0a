"""Video files of many kinds that tests make, with known numbers in their planes."""

import fractions
import struct

import av
import numpy as np


def planes_frame(fmt, planes):
  """A frame with these arrays [H, W] as its planes."""
  height, width = planes[0].shape
  frame = av.VideoFrame(width, height, fmt)
  for plane, array in zip(frame.planes, planes, strict=True):
    rows = np.zeros((plane.height, plane.line_size // array.itemsize), array.dtype)
    rows[:, : array.shape[1]] = array
    plane.update(rows.tobytes())
  return frame


def write(
  path, frames, codec="libx264", *, fps=8, pts=None, base=None, options=None, **context
):
  """Encodes VideoFrames, losslessly by default; `context` is set on the encoder.

  pts: of the frames, in units of base; by default one after the other.
  """
  # FFV1's first version has no slices, which a picture of 1 pixel could not fill.
  lossless = {"libx264": {"qp": "0"}, "ffv1": {"level": "1"}}.get(codec, {})
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=fps)
    stream.height, stream.width = frames[0].height, frames[0].width
    stream.pix_fmt = frames[0].format.name
    stream.options = {**lossless, **(options or {})}
    for name, value in context.items():
      setattr(stream.codec_context, name, value)
    if base is not None:
      stream.time_base = stream.codec_context.time_base = base
    for number, frame in enumerate(frames):
      frame.pts = number if pts is None else pts[number]
      frame.time_base = base or fractions.Fraction(1, fps)
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def yuv_frames(video_THWC):
  """RGB pictures as frames of 4:2:0."""
  return [
    av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
    for frame in video_THWC
  ]


def flat(height, width, y, u, v, fmt="yuv420p"):
  """A frame of one colour, by its numbers."""
  shift = (fmt in ("yuv420p", "yuvj420p")), fmt != "yuv444p"
  small = (-(-height // (1 + shift[0])), -(-width // (1 + shift[1])))
  sizes = ((height, width), small, small)
  return planes_frame(
    fmt, [np.full(s, n, np.uint8) for s, n in zip(sizes, (y, u, v), strict=True)]
  )


def rgb_frame(rgb_HWC, fmt="yuv444p"):
  """An RGB picture as a frame, by BT.601 as FFmpeg takes it untagged."""
  how = av.video.reformatter.Interpolation
  return av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24").reformat(
    format=fmt, interpolation=how.BICUBIC | how.ACCURATE_RND | how.FULL_CHR_H_INT
  )


def filtered(frame, filters):
  """A frame through filters of FFmpeg."""
  graph = av.filter.Graph()
  source = graph.add_buffer(
    width=frame.width,
    height=frame.height,
    format=frame.format,
    time_base=frame.time_base or fractions.Fraction(1),
  )
  nodes = [graph.add(name, args) for name, args in filters]
  graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
  graph.vpush(frame)
  graph.vpush(None)
  return graph.vpull()


def turn(path, a, b, c, d):
  """Sets the display matrix in an mp4's track header."""
  data = bytearray(path.read_bytes())
  at = data.index(b"tkhd") + 4 + 40
  numbers = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
  data[at : at + 36] = struct.pack(">9i", *numbers)
  path.write_bytes(data)


# The display matrix (a, b, c, d) of each EXIF orientation.
MATRICES = {
  1: (1, 0, 0, 1),
  2: (-1, 0, 0, 1),
  3: (-1, 0, 0, -1),
  4: (1, 0, 0, -1),
  5: (0, 1, 1, 0),
  6: (0, 1, -1, 0),
  7: (0, -1, -1, 0),
  8: (0, -1, 1, 0),
}


def exif_upright(picture_HWC, orientation):
  """What EXIF 2.32 says that a stored picture looks like, by its orientation."""
  turned = picture_HWC.swapaxes(0, 1) if orientation > 4 else picture_HWC
  flip_x = orientation in (2, 3, 6, 7)
  flip_y = orientation in (3, 4, 7, 8)
  return turned[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def corners(height=48, width=64):
  """A picture whose four corners differ: red, green, blue and white."""
  picture_HWC = np.full((height, width, 3), 128, np.uint8)
  h, w = height // 3, width // 3
  picture_HWC[:h, :w] = (220, 30, 30)
  picture_HWC[:h, -w:] = (30, 200, 30)
  picture_HWC[-h:, :w] = (30, 30, 220)
  picture_HWC[-h:, -w:] = 255
  return picture_HWC
