"""Video files that are bytes, and never lie on disk."""

import io
from collections.abc import Mapping
from fractions import Fraction
from typing import cast

import av
import numpy as np

_NO_OPTIONS: Mapping[str, str] = {}


def encode(
  video_THWC: np.ndarray,
  fps: float,
  container: str,
  codec: str,
  options: Mapping[str, str] = _NO_OPTIONS,
) -> bytes:
  """A file of uint8 [T, H, W, 3], the same bytes each time.

  Args:
    video_THWC: the frames.
    fps: frames a second.
    container: FFmpeg's name of the format.
    codec: FFmpeg's name of an encoder that takes RGB.
    options: of the encoder.
  """
  file = io.BytesIO()
  with av.open(file, "w", format=container, options={"fflags": "+bitexact"}) as opened:
    rate = Fraction(fps).limit_denominator(1001)
    stream = cast(av.VideoStream, opened.add_stream(codec, rate=rate))
    stream.height, stream.width = video_THWC.shape[1:3]
    stream.pix_fmt = "rgb24"
    stream.thread_count = 1
    stream.options = dict(options)
    for frame_HWC in video_THWC:
      frame = av.VideoFrame.from_ndarray(
        np.ascontiguousarray(frame_HWC), format="rgb24"
      )
      opened.mux(stream.encode(frame))
    opened.mux(stream.encode(None))
  return file.getvalue()
