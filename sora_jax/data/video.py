"""Reads and writes videos and images as uint8 RGB arrays, [T, H, W, 3].

An image is a video of one frame. Frames are chosen by their presentation time, never
by counting, so that variable frame rates, B-frames and cuts come out right.
"""

import dataclasses
import fractions
import functools
import itertools
import os
import pathlib

import av
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps
import PIL.PngImagePlugin

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".gif")

_Interpolation = av.video.reformatter.Interpolation
# Exact rounding and full resolution chroma: 3 dB on small saturated shapes, but 20
# times slower than the default, which nobody can tell from it on large frames.
_EXACT = (
  _Interpolation.BICUBIC
  | _Interpolation.ACCURATE_RND
  | _Interpolation.FULL_CHR_H_INT
  | _Interpolation.FULL_CHR_H_INP
)
_EXACT_PIXELS = 384 * 384

# What FFmpeg and Pillow raise on bytes that are not what they claim to be.
_DECODE_ERRORS = (av.error.FFmpegError, OSError, ValueError, SyntaxError, EOFError)


class ClipError(ValueError):
  """A media file that cannot be used; `reason` is the message without the path."""

  def __init__(self, path, reason):
    super().__init__(path, reason)  # both in args, so that it pickles
    self.path = str(path)
    self.reason = reason

  def __str__(self):
    return f"{self.path}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Info:
  """Size of a media file as `read` returns it, that is after rotation."""

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
  _check_file(path)
  if _is_image(path):
    height, width, _ = _read_image(path).shape
    return Info(1, 1.0, width, height, 1.0, True)
  with _open(path) as container:
    stream = container.streams.video[0]
    base = stream.time_base
    try:
      pts, ends, latest = [], [], 0.0
      for packet in container.demux():
        if packet.is_corrupt:
          raise ClipError(path, f"damaged after {len(pts)} frames")
        if packet.pts is None or packet.is_discard:  # the flush, or trimmed away
          continue
        end = packet.pts + (packet.duration or 0)
        latest = max(latest, float(end * packet.time_base))
        if packet.stream is stream:
          pts.append(packet.pts)
          ends.append(end)
      if not pts:
        raise ClipError(path, "no frames in it")
      container.seek(min(pts), stream=stream, backward=True)
      frame = next(container.decode(stream))
    except ClipError:
      raise
    except StopIteration:
      raise ClipError(path, "no frame can be decoded") from None
    except _DECODE_ERRORS as e:
      raise ClipError(path, f"damaged ({_short(e)})") from e
    span = float((max(pts) - min(pts)) * base)
    fps = _mean_fps(stream, len(pts), span)
    last = float((max(ends) - max(pts)) * base)
    duration = span + (last if last > 0 else 1 / fps)
    latest -= (container.start_time or 0) / av.time_base
    # A cut ends all streams early; a video that ends before its sound is fine.
    for found, declared in (
      (duration, _declared_duration(stream)),
      (latest, container.duration and container.duration / av.time_base),
    ):
      if _is_cut_off(found, declared, fps):
        raise ClipError(
          path, f"cut off: {found:.2f} s found, {declared:.2f} s declared"
        )
    width, height = frame.width, frame.height
    if frame.rotation % 180 == 90:
      width, height = height, width
    return Info(len(pts), fps, width, height, duration, len(pts) == 1)


def read(
  path, *, start=0.0, frames=None, fps=None, size=None, fit="crop"
) -> np.ndarray:
  """Decodes frames to uint8 [T, H, W, 3].

  Rotation is applied; grey becomes RGB; transparency is laid over white.

  Args:
    path: an image or a video.
    start: seconds from the first frame.
    frames: how many frames; None reads to the end.
    fps: rate to sample at: frame k is the one on screen at start + k / fps. None gives
      the file's own frames, whatever their times.
    size: (height, width), reached by resizing without distortion. fit: "crop" fills it
      and cuts off what is over at the sides, "pad" keeps all and adds black there.

  Raises:
    ClipError: the file cannot be decoded, or holds fewer frames than asked for.
  """
  _check_file(path)
  if frames is not None and frames < 1:
    raise ValueError(f"frames must be at least 1, not {frames}")
  if fps is not None and fps <= 0:
    raise ValueError(f"fps must be positive, not {fps}")
  if _is_image(path):
    if frames not in (None, 1):
      raise ClipError(path, f"too short: 1 frame, {frames} asked for")
    return _fit(_read_image(path), size, fit)[None]
  with _open(path) as container:
    try:
      chosen = _choose(container, path, start, frames, fps)
      video = [_fit(_to_rgb(frame), size, fit) for frame in chosen]
    except ClipError:
      raise
    except _DECODE_ERRORS as e:
      raise ClipError(path, f"damaged ({_short(e)})") from e
  if frames is not None and len(video) < frames:
    at = "" if fps is None else f" at {fps:g} fps"
    raise ClipError(
      path,
      f"too short: {len(video)} frames{at} from {start:g} s, {frames} asked for",
    )
  if not video:
    raise ClipError(path, f"no frames from {start:g} s on")
  return np.stack(video)


def resize(video, size, fit="crop") -> np.ndarray:
  """uint8 [T, H, W, 3] at another (height, width), see `read`."""
  return np.stack([_fit(frame, size, fit) for frame in video])


def write(path, video, fps, *, crf=12, metadata=None):
  """Writes uint8 [T, H, W, 3] in the format that the suffix names, atomically.

  .mp4, .mov, .mkv: H.264, yuv420p. .webm: VP9. These need even sizes: an odd height or
  width gets its last row or column repeated once, so the file is one pixel larger.
  .gif: 256 colours a frame, times rounded to 1/100 s. .png, .jpg: one frame only.

  Args:
    path: where to write; its folder is made.
    video: uint8 [T, H, W, 3].
    fps: frames per second.
    crf: quality of H.264 and VP9, lower is better.
    metadata: text by name, kept in the file where the format has a place for it.

  Raises:
    ValueError: wrong array, rate or suffix.
  """
  write_chunks(path, [video], fps, crf=crf, metadata=metadata)


def write_chunks(path, chunks, fps, *, crf=12, metadata=None) -> int:
  """Writes a video that comes in chunks, as `write` does; the number of its frames.

  Only one chunk is in memory at a time, but of a .gif or an image all.
  """
  path = pathlib.Path(path)
  if not fps > 0:
    raise ValueError(f"{path}: fps must be positive, not {fps}")
  suffix = path.suffix.lower()
  if suffix not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
    known = " ".join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
    raise ValueError(f"{path}: cannot write {suffix!r}, only {known}")
  metadata = {k: str(v) for k, v in (metadata or {}).items()}
  chunks = (_checked(path, chunk) for chunk in chunks)
  first = next(chunks)
  if suffix in IMAGE_SUFFIXES or suffix == ".gif":
    first, chunks = np.concatenate([first, *chunks]), ()
  if suffix in IMAGE_SUFFIXES and len(first) != 1:
    raise ValueError(f"{path}: an image holds 1 frame, not {len(first)}")
  path.parent.mkdir(parents=True, exist_ok=True)
  # The suffix stays last, because it names the format.
  partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
  frames = len(first)
  try:
    if suffix in IMAGE_SUFFIXES:
      _write_image(partial, first[0], metadata)
    elif suffix == ".gif":
      _write_gif(partial, first, fps, metadata)
    else:
      frames = _write_video(partial, itertools.chain([first], chunks), fps, crf,
                            metadata)  # fmt: skip
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
  return frames


def _checked(path, video):
  video = np.asarray(video)
  if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
    raise ValueError(
      f"{path}: video must be uint8 [T, H, W, 3], not {video.dtype} {video.shape}"
    )
  if not video.size:
    raise ValueError(f"{path}: an empty video {video.shape}")
  return video


def contact_sheet(path, videos, captions=None, *, columns=6, scale=2):
  """Draws one row a video: evenly spaced frames, and its caption under them.

  Args:
    path: image file to write.
    videos: list of uint8 [T, H, W, 3]; lengths and sizes may differ.
    captions: one text a video, or None.
    columns: frames shown of each video.
    scale: enlargement of the frames, an integer.

  Raises:
    ValueError: no videos, or another number of captions than of videos.
  """
  if not len(videos):
    raise ValueError(f"{path}: no videos for a contact sheet")
  if captions is not None and len(captions) != len(videos):
    raise ValueError(f"{path}: {len(captions)} captions for {len(videos)} videos")
  gap, font = 4, PIL.ImageFont.load_default(size=12)
  line = 0 if captions is None else 18
  cells = [video.shape[2] * scale + gap for video in videos]
  width = max(columns * max(cells) + gap, 240)
  height = gap + sum(video.shape[1] * scale + gap + line for video in videos)
  sheet = PIL.Image.new("RGB", (width, height), "white")
  draw = PIL.ImageDraw.Draw(sheet)
  top = gap
  for row, (video, cell) in enumerate(zip(videos, cells, strict=True)):
    count = min(columns, len(video))
    for column, t in enumerate(np.linspace(0, len(video) - 1, count).round()):
      frame = PIL.Image.fromarray(np.asarray(video[int(t)]))
      frame = frame.resize((frame.width * scale, frame.height * scale), 0)
      sheet.paste(frame, (gap + column * cell, top))
    top += video.shape[1] * scale + gap
    if captions is not None:
      text = captions[row]
      while text and draw.textlength(text, font=font) > width - 2 * gap:
        text = text[:-2].rstrip("\N{HORIZONTAL ELLIPSIS}") + "\N{HORIZONTAL ELLIPSIS}"
      draw.text((gap, top - gap + 2), text, fill="black", font=font)
      top += line
  write(path, np.asarray(sheet)[None], 1)


def _check_file(path):
  try:
    if os.path.getsize(path) == 0 and os.path.isfile(path):
      raise ClipError(path, "empty file (0 bytes)")
  except OSError as e:
    raise ClipError(path, f"cannot be read ({e.strerror})") from e


def _is_image(path):
  return pathlib.Path(path).suffix.lower() in IMAGE_SUFFIXES


def _short(error):
  return str(getattr(error, "strerror", None) or error or type(error).__name__)[:100]


# --- decoding


def _open(path):
  try:
    container = av.open(os.fspath(path))
  except _DECODE_ERRORS as e:
    raise ClipError(path, f"not a video ({_short(e)})") from e
  if not container.streams.video:
    container.close()
    raise ClipError(path, "no video stream in it")
  # Pipelines decode in many processes, so each one keeps to a single thread.
  container.streams.video[0].thread_count = 1
  return container


def _mean_fps(stream, count, span):
  """Rate from the frames' times; the header's rate only tidies up rounding."""
  header = float(stream.average_rate or stream.guessed_rate or 0)
  if count < 2 or span <= 0:
    return header or 1.0
  mean = (count - 1) / span
  return header if abs(header - mean) < 0.01 * mean else mean


def _declared_duration(stream):
  """Length of the video stream that the header states, in seconds, or None."""
  if stream.duration:
    return float(stream.duration * stream.time_base)
  tag = stream.metadata.get("DURATION")  # Matroska: hours:minutes:seconds
  try:
    hours, minutes, seconds = tag.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
  except (AttributeError, ValueError):
    return None


def _is_cut_off(found, declared, fps):
  # Headers round and may leave out the last frame's duration, hence the slack.
  return bool(declared) and declared - found > max(2.5 / fps, 0.02 * declared)


def _choose(container, path, start, count, fps):
  """Yields at most `count` frames from `start` on; the same frame may come twice."""
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
  declared = _declared_duration(stream)
  if declared is None and container.duration and len(container.streams) == 1:
    declared = container.duration / av.time_base
  if count is None and _is_cut_off(end, declared, 1 / interval):
    raise ClipError(path, f"cut off: {end:.2f} s found, {declared:.2f} s declared")


def _to_rgb(frame):
  """uint8 [H, W, 3], upright."""
  exact = frame.width * frame.height <= _EXACT_PIXELS
  how = {"interpolation": _EXACT if exact else _Interpolation.BICUBIC, "threads": 1}
  name = frame.format.name
  if name == "pal8" or any(c.is_alpha for c in frame.format.components):
    array = _over_white(frame.to_ndarray(format="rgba", **how))
  else:
    array = frame.to_ndarray(format="rgb24", **how)
  return np.rot90(array, frame.rotation // 90)


def _over_white(rgba):
  alpha = rgba[..., 3:].astype(np.uint16)
  rgb = rgba[..., :3] * alpha + 255 * (255 - alpha)
  return ((rgb + 127) // 255).astype(np.uint8)


def _read_image(path):
  try:
    with PIL.Image.open(path) as image:
      image.load()
      image = PIL.ImageOps.exif_transpose(image)
      if image.mode.startswith("I"):  # 16 bit grey, which Pillow would clip
        grey = np.asarray(image).astype(np.float32) / 257
        image = PIL.Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
      if image.has_transparency_data:
        return _over_white(np.asarray(image.convert("RGBA")))
      return np.asarray(image.convert("RGB"))
  except (*_DECODE_ERRORS, PIL.Image.DecompressionBombError) as e:
    raise ClipError(path, f"not an image ({_short(e)})") from e


def _fit(array, size, fit="crop"):
  """Resizes [H, W, 3] to cover `size` and crops the centre, or to fit inside."""
  height, width = array.shape[:2]
  if size is None or tuple(size) == (height, width):
    return np.ascontiguousarray(array)
  if fit == "pad":
    scale = min(size[0] / height, size[1] / width)
    inner = tuple(max(1, round(n * scale)) for n in (height, width))
    top, left = ((n - m) // 2 for n, m in zip(size, inner, strict=True))
    padded = np.zeros((*size, 3), np.uint8)
    padded[top : top + inner[0], left : left + inner[1]] = _fit(array, inner)
    return padded
  scale = max(size[0] / height, size[1] / width)
  top, left = (height - size[0] / scale) / 2, (width - size[1] / scale) / 2
  box = (left, top, width - left, height - top)
  image = PIL.Image.fromarray(np.ascontiguousarray(array))
  # Pillow widens the filter when it shrinks, so this does not alias.
  return np.asarray(image.resize((size[1], size[0]), PIL.Image.Resampling.BICUBIC, box))


# --- encoding


def _write_video(path, chunks, fps, crf, metadata):
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
    rate = fractions.Fraction(fps).limit_denominator(1001)
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    stream = container.add_stream(codec, rate=rate)
    stream.height, stream.width = height + height % 2, width + width % 2
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
        # The conversion below centres chroma on 2x2 pixels; readers assume that it is
        # at the left unless told, which would shift the colours.
        "x264-params": f"chromaloc=1{_instructions()}",
      }
    else:
      stream.options = {"crf": str(crf), "b": "0", "cpu-used": "4", "row-mt": "0"}
    reformatter = av.video.reformatter.VideoReformatter()
    count = 0
    for array in itertools.chain(first, itertools.chain.from_iterable(chunks)):
      count += 1
      array = np.ascontiguousarray(np.pad(array, odd, mode="edge"))
      frame = av.VideoFrame.from_ndarray(array, format="rgb24")
      frame = reformatter.reformat(
        frame,
        format="yuv420p",
        dst_colorspace=av.video.reformatter.Colorspace.ITU709,
        dst_color_range=av.video.reformatter.ColorRange.MPEG,
        interpolation=_EXACT,
        threads=1,
      )
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return count


@functools.cache
def _instructions() -> str:
  """Which of the CPU's instructions x264 may use, as it wants to be told."""
  # With AVX-512 one video in fifty or so has other bytes (PyAV 18.1 on AMD).
  cpu = pathlib.Path("/proc/cpuinfo")
  wide = cpu.exists() and " avx512f " in cpu.read_text()
  return ":asm=avx2" if wide else ""


def _write_gif(path, video, fps, metadata):
  ticks = np.round(np.arange(len(video) + 1) * 100 / fps).astype(int)
  images = [PIL.Image.fromarray(np.ascontiguousarray(array)) for array in video]
  images[0].save(
    path,
    save_all=True,
    append_images=images[1:],
    duration=[10 * max(int(d), 1) for d in np.diff(ticks)],
    loop=0,
    comment="\n".join(f"{k}: {v}" for k, v in metadata.items()).encode() or None,
  )


def _write_image(path, array, metadata):
  image = PIL.Image.fromarray(np.ascontiguousarray(array))
  if path.suffix.lower() == ".png":
    info = PIL.PngImagePlugin.PngInfo()
    for name, text in metadata.items():
      info.add_itxt(name, text)
    image.save(path, pnginfo=info)
  else:
    image.save(path, quality=95, subsampling=0)
