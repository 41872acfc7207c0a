"""Frames that tests of media files write and know again."""

import av
import numpy as np


def numbered(frames, height=48, width=64):
  """Frames that tell their number by brightness, in the left half."""
  video_THWC = np.full((frames, height, width, 3), 40, np.uint8)
  for t in range(frames):
    video_THWC[t, :, : width // 2] = 30 + 180 * t // max(frames - 1, 1)
  return video_THWC


def numbers(video_THWC, frames):
  left = video_THWC[:, :, : video_THWC.shape[2] // 2 - 4].mean(axis=(1, 2, 3))
  return ((left - 30) * max(frames - 1, 1) / 180).round().astype(int).tolist()


def noise(frames, height=64, width=64):
  """Frames that do not compress, so that a file can be cut anywhere."""
  shape = (frames, height, width, 3)
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def psnr(a, b):
  return 10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9))


def write_pts(path, video_THWC, pts, base):
  """Writes frames at given times, with B-frames."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=30)
    stream.height, stream.width = video_THWC.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.options = {"bf": "3", "g": "12", "crf": "10"}
    stream.time_base = stream.codec_context.time_base = base
    for array, when in zip(video_THWC, pts, strict=True):
      frame = av.VideoFrame.from_ndarray(array, format="rgb24")
      frame.pts, frame.time_base = int(when), base
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def sound(stream, seconds):
  """Packets of silence."""
  for start in range(0, int(seconds * 16000), 1024):
    silence = np.zeros((1, 1024), np.float32)
    frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 16000, start
    yield from stream.encode(frame)
  yield from stream.encode(None)
