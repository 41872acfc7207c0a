"""A few frames as a short group of H.264 pictures, decoded without a container.

For caches of frames: a tenth of the raw bytes, nearly without loss (all of the colour
is kept, 4:4:4), and each group is decoded by itself.
"""

import fractions

import av
import msgpack
import numpy as np

from sora_jax.data.video import media

_Interpolation = av.video.reformatter.Interpolation
_FORMAT = "yuv444p"
_CRF = "8"  # 40 dB on a moving texture of saturated colours, more on real videos


def encode(video_THWC: np.ndarray) -> bytes:
  """Compresses uint8 [T, H, W, 3]; its first frame is a key frame."""
  height, width = video_THWC.shape[1:3]
  codec = av.CodecContext.create("libx264", "w")
  codec.width, codec.height, codec.pix_fmt = width, height, _FORMAT
  codec.framerate = fractions.Fraction(25)
  codec.time_base = 1 / codec.framerate
  codec.thread_count = 1
  codec.gop_size = len(video_THWC)
  codec.options = {
    "crf": _CRF,
    "preset": "veryfast",
    "bf": "0",
    "sc_threshold": "0",
    # Players may save on colours, which a model sees as well as brightness.
    "x264-params": "chroma-qp-offset=-6",
  }
  packets = []
  for number, frame_HWC in enumerate(video_THWC):
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
    frame = frame.reformat(format=_FORMAT, **_colours("ITU709", "MPEG"))
    frame.pts = number
    packets += codec.encode(frame)
  packets += codec.encode(None)
  return msgpack.packb([bytes(packet) for packet in packets])


def decode(content: bytes, frames: int) -> np.ndarray:
  """Frames uint8 [T, H, W, 3] of what `encode` returned.

  Raises:
    ValueError: the bytes are damaged, or hold another number of frames.
  """
  codec = av.CodecContext.create("h264", "r")
  codec.thread_count = 1
  try:
    packets = [av.Packet(packet) for packet in msgpack.unpackb(content)]
    pictures = [f for packet in [*packets, None] for f in codec.decode(packet)]
  except (*media.DECODE_ERRORS, TypeError) as e:
    raise ValueError(f"damaged group of pictures ({media.short_message(e)})") from e
  if len(pictures) != frames:
    raise ValueError(f"a group of {len(pictures)} pictures, {frames} are needed")
  return np.stack(
    [
      picture.reformat(
        format="rgb24", **_colours("ITU709", "JPEG", "ITU709")
      ).to_ndarray()
      for picture in pictures
    ]
  )


def _colours(to_space, to_range, from_space=None):
  """Arguments of a conversion between RGB and BT.709."""
  spaces, ranges = av.video.reformatter.Colorspace, av.video.reformatter.ColorRange
  how = {
    "dst_colorspace": spaces[to_space],
    "dst_color_range": ranges[to_range],
    "interpolation": _Interpolation.BICUBIC | _Interpolation.ACCURATE_RND,
    "threads": 1,
  }
  if from_space:
    how |= {"src_colorspace": spaces[from_space], "src_color_range": ranges.MPEG}
  return how
