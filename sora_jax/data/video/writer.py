"""Writes videos and images, each in the format that its suffix names."""

import fractions
import functools
import itertools
import os
import pathlib
from collections.abc import Iterable, Mapping

import av
import numpy as np
import PIL.Image

from sora_jax.data.video import colour, images
from sora_jax.runtime import files

_IMAGES = (".png", ".jpg", ".jpeg")
_VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".gif")


def write(
  path,
  video_THWC: np.ndarray,
  fps: float,
  *,
  crf: int = 12,
  metadata: Mapping[str, object] | None = None,
) -> None:
  """Writes uint8 [T, H, W, 3] in the format that the suffix names, atomically.

  .mp4, .mov, .mkv: H.264, yuv420p. .webm: VP9. These need even sizes: an odd height or
  width gets its last row or column repeated once, so the file is one pixel larger.
  .gif: 256 colours a frame, times rounded to 1/100 s. .png, .jpg: one frame only.

  Args:
    path: where to write; its folder is made.
    video_THWC: uint8 [T, H, W, 3].
    fps: frames per second.
    crf: quality of H.264 and VP9, lower is better.
    metadata: text by name, kept in the file where the format has a place for it.

  Raises:
    ValueError: wrong array, rate or suffix.
  """
  write_chunks(path, [video_THWC], fps, crf=crf, metadata=metadata)


def write_chunks(
  path,
  chunks: Iterable[np.ndarray],
  fps: float,
  *,
  crf: int = 12,
  metadata: Mapping[str, object] | None = None,
) -> int:
  """Writes a video that comes in chunks, as `write` does.

  Only one chunk is in memory at a time; of a .gif or an image all are.

  Returns:
    The number of frames written.
  """
  path = pathlib.Path(path)
  if not fps > 0:
    raise ValueError(f"{path}: fps must be positive, not {fps}")
  suffix = path.suffix.lower()
  if suffix not in _IMAGES + _VIDEOS:
    known = " ".join(_IMAGES + _VIDEOS)
    raise ValueError(f"{path}: cannot write {suffix!r}, only {known}")
  texts = {k: str(v) for k, v in (metadata or {}).items()}
  chunks = (_checked(path, chunk) for chunk in chunks)
  first = next(chunks)
  if suffix in _IMAGES or suffix == ".gif":
    first, chunks = np.concatenate([first, *chunks]), ()
  if suffix in _IMAGES and len(first) != 1:
    raise ValueError(f"{path}: an image holds 1 frame, not {len(first)}")
  frames = len(first)
  # The suffix names the format, before the file has its name, too.
  with files.replacing(path, path.suffix) as partial:
    if suffix in _IMAGES:
      images.write(partial, first[0], texts)
    elif suffix == ".gif":
      _write_gif(partial, first, fps, texts)
    else:
      frames = _write_video(partial, itertools.chain([first], chunks), fps, crf,
                            texts)  # fmt: skip
  return frames


def _checked(path, video):
  """The chunk as an array. ValueError if it is not uint8 [T, H, W, 3], or empty."""
  video = np.asarray(video)
  if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
    raise ValueError(
      f"{path}: video must be uint8 [T, H, W, 3], not {video.dtype} {video.shape}"
    )
  if not video.size:
    raise ValueError(f"{path}: an empty video {video.shape}")
  return video


def _write_video(path, chunks, fps, crf, metadata):
  """Encodes with FFmpeg, frame by frame; the number of frames."""
  first = next(chunks)
  height, width = first.shape[1:3]
  odd = ((0, height % 2), (0, width % 2), (0, 0))
  suffix = path.suffix.lower()
  # Without a name-keeping flag the mp4 writer drops all but a few known names.
  flags = {"movflags": "+faststart+use_metadata_tags"}
  options = flags if suffix in (".mp4", ".mov") else {}
  options["fflags"] = "+bitexact"  # no dates or random ids: same frames, same bytes
  with av.open(os.fspath(path), "w", options=options) as container:
    container.metadata.update(metadata)
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    stream = _add_stream(container, codec, fps, crf)
    stream.height, stream.width = height + height % 2, width + width % 2
    # H.264 is told where its colour samples lie; of VP9 readers take it to be left.
    siting = "left" if suffix == ".webm" else "center"
    to_yuv = f"out_color_matrix=bt709:out_range=limited:out_chroma_loc={siting}:"
    graph, count, tick = None, 0, 1 / stream.codec_context.framerate
    for array in itertools.chain(first, itertools.chain.from_iterable(chunks)):
      array = np.ascontiguousarray(np.pad(array, odd, mode="edge"))
      frame = av.VideoFrame.from_ndarray(array, format="rgb24")
      if graph is None:
        size = (frame.height, frame.width)
        graph = colour.scaler(frame, to_yuv, size, "yuv420p", tick)
      graph.vpush(frame)
      frame = graph.vpull()
      frame.pts, frame.time_base = count, tick
      count += 1
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return count


def _add_stream(container, codec, fps, crf):
  """A stream of one thread whose colours are those that `_write_video` converts to."""
  rate = fractions.Fraction(fps).limit_denominator(1001)
  stream = container.add_stream(codec, rate=rate)
  stream.pix_fmt = "yuv420p"
  stream.thread_count = 1
  # Tagged as BT.709 and converted so, because players guess by size otherwise.
  context = stream.codec_context
  context.colorspace = av.video.reformatter.Colorspace.ITU709
  context.color_primaries, context.color_trc = 1, 1
  context.color_range = av.video.reformatter.ColorRange.MPEG
  if codec == "libx264":
    stream.options = {
      "crf": str(crf),
      "preset": "fast",
      "bf": "2",
      # The conversion centres chroma on 2x2 pixels; readers assume that it is at the
      # left unless told, which would shift the colours.
      "x264-params": f"chromaloc=1{_instructions()}",
    }
  else:
    stream.options = {"crf": str(crf), "b": "0", "cpu-used": "4", "row-mt": "0"}
  return stream


@functools.cache
def _instructions() -> str:
  """Which of the CPU's instructions x264 may use, as it wants to be told."""
  # With AVX-512 one video in fifty or so has other bytes (PyAV 18.1 on AMD).
  cpu = pathlib.Path("/proc/cpuinfo")
  wide = cpu.exists() and " avx512f " in cpu.read_text()
  return ":asm=avx2" if wide else ""


def _write_gif(path, video, fps, metadata):
  ticks = np.round(np.arange(len(video) + 1) * 100 / fps).astype(int)
  frames = [PIL.Image.fromarray(np.ascontiguousarray(array)) for array in video]
  frames[0].save(
    path,
    save_all=True,
    append_images=frames[1:],
    duration=[10 * max(int(d), 1) for d in np.diff(ticks)],
    loop=0,
    comment="\n".join(f"{k}: {v}" for k, v in metadata.items()).encode() or None,
  )
