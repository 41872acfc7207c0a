"""Lays a job out on the grid of latents: reads its media, encodes, checks times.

The result is a `conditioning.Timeline`. What is lost on the way (frames off the grid,
the sides of an image of another shape) is logged.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from absl import logging

from sora_jax.data.video import probe, reader, resizing
from sora_jax.sampling import conditioning
from sora_jax.sampling.conditioning import Request, Timeline
from sora_jax.sampling.job import Job


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A job on the grid.

  Attributes:
    timeline: what is known, and the whole video's request.
    size: (height, width) to cut frames to. frames: how many of them.
    backwards: latent frames that come before, made window by window towards the start.
    closes: the end leads to the start: what is given there is what it began with.
  """

  timeline: Timeline
  size: tuple[int, int]
  frames: int
  backwards: int = 0
  closes: bool = False


def plan(job: Job, encode: Callable[[np.ndarray], np.ndarray], multiple: int) -> Plan:
  """Lays a job out.

  Args:
    job: what to make.
    encode: uint8 [T, H, W, 3] of 1 + 4k frames -> latents [t, h, w, C].
    multiple: of pixels, that heights and widths of the grid have.

  Raises:
    ValueError: for media that cannot be used, times outside the video, and so on.
  """
  return _Planner(job, encode, multiple).plan()


def rate(job: Job) -> float:
  """Frames a second of what a job makes."""
  return _Planner(job, None, 1).fps * job.interpolate


def still(encode: Callable[[np.ndarray], np.ndarray], image_THWC) -> np.ndarray:
  """Latent [h, w, C] of four times the first frame, in the middle of a video."""
  return encode(np.repeat(image_THWC[:1], 5, axis=0))[1]


class _Planner:
  """Holds what all modes need: sizes, rates and how to encode."""

  def __init__(self, job, encode, multiple):
    self.job, self.encode = job, encode
    medium = next(
      (m for m in (job.video, job.image, job.last_image) if m is not None),
      job.key_frames[0][1] if job.key_frames else None,
    )
    info = None if medium is None else _probe(medium)
    width, height = job.size or ((info.width, info.height) if info else (64, 64))
    if min(width, height) < 1:
      raise ValueError(f"size {width}x{height}: width and height must be positive")
    self.cut = (height, width)
    self.size = tuple(-(-n // multiple) * multiple for n in self.cut)
    self.grid_hw = tuple(n // multiple for n in self.size)
    if self.size != self.cut:
      logging.info(
        "%dx%d is off the model's grid of %d pixels: made at %dx%d and cut",
        *(width, height, multiple, *self.size[::-1]),
      )
    moving = info if info and job.video is not None and not info.is_image else None
    self.fps = job.fps or (moving.fps if moving else 12.0)
    if not self.fps > 0:
      raise ValueError(f"fps {self.fps} is not above 0")

  def plan(self) -> Plan:
    """By mode."""
    mode = self.job.mode
    if mode == "connect" and self.job.strength is not None:
      mode = "edit"
    return getattr(self, f"_{mode}")()

  # --- modes

  def _text(self):
    return self._made(self._frames())

  def _image(self):
    frames = self._frames()
    images = [(0, self.job.image)] if self.job.image is not None else []
    images += self._key_frames(frames)
    if self.job.last_image is not None:
      images.append((frames - 1, self.job.last_image))
    self._check_key_frames(images, frames)
    if frames == 1:
      raise ValueError("an image to a video needs 2 frames or more, not 1")
    images = {at: self._image_of(image) for at, image in images}
    before = [self.encode(images.pop(0))[0]] if 0 in images else []
    stills = [(at // 4, still(self.encode, images[at])) for at in images if at % 4 == 0]
    extras = [(at / 4, self.encode(images[at])[0]) for at in images if at % 4]
    made = self._made(frames, np.array(before, np.float32), extras=tuple(extras))
    timeline = dataclasses.replace(made.timeline, stills=tuple(stills))
    return dataclasses.replace(made, timeline=timeline)

  def _extend(self):
    job = self.job
    video_THWC = self._video(job.video, keep="end" if job.extend_after else "start")
    before = self.encode(video_THWC)
    first, last = (
      4 * -(-round(seconds * self.fps) // 4)
      for seconds in (job.extend_before, job.extend_after)
    )
    if not first + last:
      raise ValueError(
        f"extend_before {job.extend_before} and extend_after {job.extend_after} s are "
        f"less than a frame at {self.fps:g} fps"
      )
    frames = first + len(video_THWC) + last
    made = self._made(frames - first, before, total=frames)
    return dataclasses.replace(made, frames=frames, backwards=first // 4)

  def _connect(self):
    first_THWC = self._video(self.job.video, keep="end")
    second_THWC = self._video(self.job.connect)
    a = self.encode(first_THWC)
    b = self._after(second_THWC, self.encode(second_THWC))
    # The second's first frame is the last one of its latent frame.
    gap = self._gap(1.0)
    # Either goes on backwards, while it turns from the first into the second.
    away = np.arange(1 + 4 * gap)
    turned_T = 0.5 - 0.5 * np.cos(np.pi * away / away[-1])[:, None, None, None]
    from_THWC = first_THWC[np.maximum(len(first_THWC) - 1 - away, 0)]
    to_THWC = second_THWC[np.minimum(away[::-1], len(second_THWC) - 1)]
    between = (1.0 - turned_T) * from_THWC + turned_T * to_THWC
    return self._bridged(a, between.round().astype(np.uint8), b)

  def _loop(self):
    if self.job.video is None:
      frames = max(8, 4 * round((self.job.frames or 16) / 4))
      if self.job.frames not in (None, frames):
        logging.info("a loop has a multiple of 4 frames, 8 or more: %d", frames)
      timeline = Timeline(self._request(frames), (frames // 4, *self.grid_hw),
                          np.zeros((0,)), loop=True)  # fmt: skip
      return Plan(timeline, self.cut, frames)
    video_THWC = self._video(self.job.video)
    a = self.encode(video_THWC)
    seconds = (len(video_THWC) - 1) / self.fps
    gap, given = self._gap(seconds), min(len(a), self.job.windows.given)
    back = np.linspace(len(video_THWC) - 1, 0, 1 + 4 * gap).round().astype(int)
    made = self._bridged(a, video_THWC[back], self._after(video_THWC, a[:given]))
    # The last frame made is the first one again.
    return dataclasses.replace(made, frames=4 * (len(a) + gap - 1), closes=True)

  def _edit(self):
    job = self.job
    start, frames = self._whole(job.video)
    strength = 1.0 if job.strength is None else job.strength
    if job.connect is not None:
      other, others = self._whole(job.connect)
      frames, count = min(frames, others), min(len(start), len(other))
      turned_T = np.linspace(0.0, 1.0, count, dtype=np.float32)[:, None, None, None]
      start = (1.0 - turned_T) * start[:count] + turned_T * other[:count]
    kept = None
    if job.mask is not None:
      mask_HW = _read_mask(job.mask, self.size)
      kept = conditioning.kept(mask_HW, (len(start), *self.grid_hw))
    images = self._key_frames(frames)
    images += [(0, job.image)] if job.image is not None else []
    images += [(frames - 1, job.last_image)] if job.last_image is not None else []
    self._check_key_frames(images, frames)
    encoded = {at: self.encode(self._image_of(image))[0] for at, image in images}
    before = np.array([encoded.pop(0)] if 0 in encoded else [], np.float32)
    extras = tuple((at / 4, latent) for at, latent in sorted(encoded.items()))
    return self._made(
      frames, before, extras=extras, start=start, strength=strength, kept=kept
    )

  def _infill(self):
    video_THWC = self._video(self.job.video)
    frames = len(video_THWC)
    begin, end = (round(seconds * self.fps) for seconds in self.job.infill)
    if not 0 <= begin < end <= frames:
      raise ValueError(
        f"infill from {self.job.infill[0]} to {self.job.infill[1]} s is not inside the "
        f"video of {frames} frames, {frames / self.fps:.2f} s"
      )
    # Frames that share a latent frame with missing ones are made anew with them.
    before = self.encode(video_THWC[: 1 + 4 * ((begin - 1) // 4)]) if begin else None
    end = 4 * -(-end // 4)
    after, extras = None, ()
    if end < frames:
      # The first one's latent is that of a missing one, too: it guides as an image.
      image_HWC, *later = self.encode(video_THWC[end:])
      after = np.array(later) if later else None
      extras = ((end / 4, image_HWC),)
    if before is None and end >= frames:
      raise ValueError(
        f"infill from {self.job.infill[0]} to {self.job.infill[1]} s leaves nothing of "
        "the video: that is a video from text"
      )
    return self._made(frames, before, after, extras)

  def _interpolate(self):
    times = self.job.interpolate
    video_THWC = self._video(self.job.video)
    if len(video_THWC) < 2:
      raise ValueError("interpolate needs a video of 2 frames or more")
    frames = 1 + times * (len(video_THWC) - 1)
    if (frames - 1) % 4:
      raise AssertionError(frames)
    at_T = np.arange(frames) / times
    low_T = np.minimum(at_T.astype(int), len(video_THWC) - 2)
    share_T = (at_T - low_T).astype(np.float32)[:, None, None, None]
    between = (1 - share_T) * video_THWC[low_T] + share_T * video_THWC[low_T + 1]
    strength = 0.8 if self.job.strength is None else self.job.strength
    latents = [self.encode(video_THWC[i : i + 1])[0] for i in range(len(video_THWC))]
    extras = [(i * times / 4, latents[i]) for i in range(1, len(latents))]
    self.fps *= times
    return self._made(
      frames,
      np.array(latents[:1]),
      extras=tuple(extras),
      start=self.encode(np.round(between).astype(np.uint8)),
      strength=strength,
    )

  # --- parts

  def _made(self, frames, before=None, after=None, extras=(), start=None, strength=1.0,
            kept=None, total=None, level_T=None):  # fmt: skip
    grid = (1 + -(-(frames - 1) // 4), *self.grid_hw)
    if level_T is not None:
      level_T = np.broadcast_to(level_T[:, None, None], grid)
    timeline = Timeline(
      self._request(total or frames),
      grid,
      np.zeros((0,)) if before is None else before,
      after,
      extras,
      start,
      strength,
      kept,
      strength_THW=level_T,
    )
    return Plan(timeline, self.cut, frames)

  def _request(self, frames):
    job, (height, width) = self.job, self.size
    made = Request(
      *(job.prompt, width, height, frames, self.fps, job.seed, job.negative_prompt),
      *(job.guidance_scale, tuple(job.shots), job.blend),
    )
    made.check()
    if not (job.prompt.strip() or job.shots):
      logging.warning("an empty prompt: whatever the model makes of none")
    return made

  def _frames(self):
    frames = 17 if self.job.frames is None else self.job.frames
    if frames < 1:
      raise ValueError(f"frames {frames}: at least 1 is needed")
    if (frames - 1) % 4:
      logging.info(
        "%d frames are not 1 + 4k: cut from %d", frames, 4 * -(-frames // 4) + 1
      )
    return frames

  def _gap(self, seconds):
    # Latent frames up to the next video's first frame, which has one for itself.
    seconds = seconds if self.job.gap is None else self.job.gap
    return max(2, round((seconds * self.fps + 1) / 4))

  def _bridged(self, a, between_THWC, b):
    """From latents to others, by way of frames that begin and end where those meet."""
    gap, strength = len(between_THWC) // 4, self.job.gap_strength
    frames = 1 + 4 * (len(a) + gap + len(b) - 2)
    if strength == 1.0:
      return self._made(frames, a, b)
    middle = self.encode(between_THWC)[1:gap]
    level_T = np.zeros(len(a) + len(middle) + len(b))
    # Least where it meets what is given.
    share_T = np.sin(np.pi * np.arange(1, gap) / gap) ** 2
    level_T[len(a) : -len(b)] = strength * share_T
    start = np.concatenate([a, middle, b])
    return self._made(frames, a, b, start=start, strength=strength, level_T=level_T)

  def _key_frames(self, frames):
    return [(round(time * self.fps), image) for time, image in self.job.key_frames]

  def _check_key_frames(self, images, frames):
    places = [at for at, _ in images]
    for at in places:
      if not 0 <= at < frames:
        raise ValueError(
          f"a key frame at {at / self.fps:g} s is outside the {frames} frames, "
          f"{frames / self.fps:.2f} s"
        )
      if places.count(at) > 1:
        raise ValueError(f"two images for frame {at}, at {at / self.fps:g} s")

  def _after(self, video_THWC, latent_THWC):
    """Its latents where something leads to it: the first of them is a still."""
    return np.concatenate([still(self.encode, video_THWC)[None], latent_THWC[1:]])

  def _image_of(self, medium):
    image = _read(medium, self.size, None, self.job.fit)
    if len(image) > 1:
      raise ValueError(f"{_name(medium)}: an image is needed, not {len(image)} frames")
    return image

  def _frames_of(self, medium):
    """Frames at the job's size and rate, not more than it wants."""
    return _read(medium, self.size, self.fps, self.job.fit)[: self.job.frames]

  def _whole(self, medium):
    """Latents of all frames, the last one repeated up to 1 + 4k; how many it has."""
    video_THWC = self._frames_of(medium)
    over = -(len(video_THWC) - 1) % 4
    padded = np.pad(video_THWC, ((0, over), (0, 0), (0, 0), (0, 0)), mode="edge")
    return self.encode(padded), len(video_THWC)

  def _video(self, medium, keep="start"):
    """The same, without those that are over 1 + 4k."""
    video_THWC = self._frames_of(medium)
    over = (len(video_THWC) - 1) % 4
    if over:
      logging.info(
        "%s: %d frames are not 1 + 4k, %d at its %s are left out",
        *(_name(medium), len(video_THWC), over, "start" if keep == "end" else "end"),
      )
      video_THWC = video_THWC[over:] if keep == "end" else video_THWC[:-over]
    window = self.job.given
    if len(video_THWC) < window and self.job.mode in ("extend", "connect", "loop"):
      logging.info(
        "%s has %d frames, fewer than the %d that a window takes over: all are taken",
        *(_name(medium), len(video_THWC), window),
      )
    return video_THWC


def _name(medium):
  return "the array" if isinstance(medium, np.ndarray) else str(medium)


def _as_video(medium):
  array = medium[None] if medium.ndim == 3 else medium
  if (
    array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not len(array)
  ):
    raise ValueError(
      f"a medium must be uint8 [T, H, W, 3] or [H, W, 3], not {medium.dtype} "
      f"{medium.shape}"
    )
  return array


def _probe(medium):
  if not isinstance(medium, np.ndarray):
    return probe.probe(medium)
  frames, height, width, _ = _as_video(medium).shape
  return probe.Info(frames, 12.0, width, height, frames / 12.0, frames == 1)


def _read(medium, size, fps, fit):
  """uint8 [T, H, W, 3] of a size, saying what is lost."""
  info = _probe(medium)
  height, width = size
  if abs(np.log(info.width * height / (info.height * width))) > 0.02:
    how = "cropped at the centre" if fit == "crop" else "padded with black"
    logging.warning(
      "%s is %dx%d, another aspect ratio than %dx%d: %s (see fit)",
      *(_name(medium), info.width, info.height, width, height, how),
    )
  if isinstance(medium, np.ndarray):
    return resizing.resize(_as_video(medium), size, fit)
  fps = None if info.is_image or fps is None or abs(fps / info.fps - 1) < 1e-3 else fps
  return reader.read(medium, fps=fps, size=size, fit=fit)


def _read_mask(medium, size):
  """bool [H, W]: where an image is more than half white."""
  if isinstance(medium, np.ndarray) and medium.ndim == 2:
    medium = np.repeat(medium[..., None].astype(np.uint8) * 255, 3, axis=-1)
  mask = _read(medium, size, None, "crop")
  if len(mask) > 1:
    raise ValueError(f"{_name(medium)}: a mask is an image, not {len(mask)} frames")
  return mask[0].mean(axis=-1) > 127.5
