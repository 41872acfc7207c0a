"""Each mode of prompting as one function: a job and its media -> a `Timeline`.

All of them go the same way: read frames on the canvas, encode everything in one call,
and say which latents are given, which are begun from, and what is to be made.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from sora_jax.packing import time_grid
from sora_jax.sampling import conditioning, media
from sora_jax.sampling.conditioning import Request, Timeline
from sora_jax.sampling.job import Job
from sora_jax.sampling.media import Canvas, Encode


def plan(job: Job, encode: Encode, multiple: int) -> Timeline:
  """What is known of a job's video, on the grid of latents.

  Args:
    job: what to make.
    encode: its media to latents; called once at most.
    multiple: of pixels, that heights and widths of the grid have.

  Raises:
    ValueError: for media that cannot be used, times outside the video, and so on.
  """
  return MODES[job.mode](job, canvas(job, multiple), encode)


def canvas(job: Job, multiple: int) -> Canvas:
  """The grid of a job, or the next larger one; says what is cut from it."""
  canvas = media.canvas(job, multiple)
  if canvas.size != canvas.crop:
    (height, width), (crop_height, crop_width) = canvas.size, canvas.crop
    logging.info(
      "%dx%d is off the model's grid of %d pixels: made at %dx%d and cut",
      *(crop_width, crop_height, multiple, width, height),
    )
  return canvas


def rate(job: Job) -> float:
  """Frames a second of what a job makes."""
  return media.canvas(job).fps * job.interpolate


# --- the modes


def text(job: Job, canvas: Canvas, encode: Encode) -> Timeline:
  """A video, or an image, of the prompt alone."""
  del encode
  return timeline(job, canvas, frames_of(job))


def image(job: Job, canvas: Canvas, encode: Encode) -> Timeline:
  """A video with given first, last or other frames.

  The first one has a latent of its own, which is given; others guide as extra tokens.
  """
  frames = frames_of(job)
  images = images_of(job, canvas, frames)
  if frames == 1:
    raise ValueError("an image to a video needs 2 frames or more, not 1")
  latents = dict(zip(images, encode(list(images.values())), strict=True))
  return timeline(
    job,
    canvas,
    frames,
    before_THWC=_first(latents),
    extras=_extras(latents),
  )


def extend(job: Job, canvas: Canvas, encode: Encode) -> Timeline:
  """A video that goes on after its end, begins before its start, or both."""
  keep = "end" if job.extend_after else "start"
  video_THWC = media.read_video(job, canvas, job.video, keep)
  # Whole latent frames, since the video's own are on the grid already.
  first, last = (
    time_grid.frame_at(time_grid.latent_of(round(seconds * canvas.fps)))
    for seconds in (job.extend_before, job.extend_after)
  )
  if not first + last:
    asked = " and ".join(
      f"{name} {seconds} s"
      for name in ("extend_before", "extend_after")
      if (seconds := getattr(job, name))
    )
    raise ValueError(
      f"{asked}: less than a frame, {1 / canvas.fps:.3f} s at {canvas.fps:g} fps"
    )
  (before_THWC,) = encode([video_THWC])
  made = timeline(job, canvas, first + len(video_THWC) + last, before_THWC=before_THWC)
  backwards, (t, *hw) = time_grid.latent_of(first), made.grid
  return dataclasses.replace(made, grid=(t - backwards, *hw), backwards=backwards)


def connect(job: Job, canvas: Canvas, encode: Encode) -> Timeline:
  """Two videos with a gap that leads from one to the other, or one turning into it."""
  if job.strength is not None:
    return edit(job, canvas, encode)
  first_THWC = media.read_video(job, canvas, job.video, "end")
  second_THWC = media.read_video(job, canvas, job.connect)
  # The second's first frame is the last one of its latent frame.
  gap = _gap(job, canvas, 1.0)
  # Either goes on backwards, while it turns from the first into the second.
  away = np.arange(time_grid.video_frames(1 + gap))
  turned_T = 0.5 - 0.5 * np.cos(np.pi * away / away[-1])[:, None, None, None]
  from_THWC = first_THWC[np.maximum(len(first_THWC) - 1 - away, 0)]
  to_THWC = second_THWC[np.minimum(away[::-1], len(second_THWC) - 1)]
  between_THWC = ((1.0 - turned_T) * from_THWC + turned_T * to_THWC).round()
  between = [between_THWC.astype(np.uint8)] if job.gap_strength < 1.0 else []
  return _bridged(job, canvas, gap, *encode([first_THWC, second_THWC, *between]))


def loop(job: Job, canvas: Canvas, encode: Encode) -> Timeline:
  """A video whose end leads to its start."""
  if job.video is None:
    latents = max(2, round(time_grid.time_of(job.frames or 16)))
    frames = time_grid.frame_at(latents)
    if job.frames not in (None, frames):
      logging.info("a loop has a multiple of 4 frames, 8 or more: %d", frames)
    made = timeline(job, canvas, frames)
    return dataclasses.replace(made, grid=(latents, *canvas.grid_hw), loop=True)
  video_THWC = media.read_video(job, canvas, job.video)
  gap = _gap(job, canvas, (len(video_THWC) - 1) / canvas.fps)
  # It goes back the way it came.
  steps = time_grid.video_frames(1 + gap)
  back = np.linspace(len(video_THWC) - 1, 0, steps).round().astype(int)
  between = [video_THWC[back]] if job.gap_strength < 1.0 else []
  before_THWC, *middle = encode([video_THWC, *between])
  after_THWC = before_THWC[: 1 + job.windows.given]
  made = _bridged(job, canvas, gap, before_THWC, after_THWC, *middle)
  return dataclasses.replace(made, closes=True)


def edit(job: Job, canvas: Canvas, encode: Encode) -> Timeline:
  """A video made anew with some strength, in a region of it, or turned into another."""
  videos = [media.read_frames(job, canvas, job.video)]
  if job.connect is not None:
    videos.append(media.read_frames(job, canvas, job.connect))
  frames = min(map(len, videos))
  images = images_of(job, canvas, frames)
  latents = encode([*map(_padded, videos), *images.values()])
  start_THWC, *others = latents[: len(videos)]
  if others:
    count = min(len(start_THWC), len(others[0]))
    turned_T = np.linspace(0.0, 1.0, count, dtype=np.float32)[:, None, None, None]
    start_THWC = (1.0 - turned_T) * start_THWC[:count] + turned_T * others[0][:count]
  kept_THW = None
  if job.mask is not None:
    mask_HW = media.read_mask(canvas, job.mask)
    kept_THW = conditioning.kept(mask_HW, (len(start_THWC), *canvas.grid_hw))
  encoded = dict(zip(images, latents[len(videos) :], strict=True))
  return timeline(
    job,
    canvas,
    frames,
    before_THWC=_first(encoded),
    extras=_extras({at: encoded[at] for at in sorted(encoded)}),
    start_THWC=start_THWC,
    strength=1.0 if job.strength is None else job.strength,
    kept_THW=kept_THW,
  )


def infill(job: Job, canvas: Canvas, encode: Encode) -> Timeline:
  """A video with some of its frames made anew."""
  video_THWC = media.read_video(job, canvas, job.video)
  frames, (from_s, to_s) = len(video_THWC), job.infill or (0.0, 0.0)
  begin, end = round(from_s * canvas.fps), round(to_s * canvas.fps)
  if not 0 <= begin < end <= frames:
    raise ValueError(
      f"infill from {from_s} to {to_s} s is not inside the video of {frames} frames, "
      f"{frames / canvas.fps:.2f} s"
    )
  # Frames that share a latent frame with missing ones are made anew with them.
  end = time_grid.frame_at(time_grid.latent_of(end))
  parts = {}
  if begin:
    parts["before"] = video_THWC[: time_grid.round_down(begin)]
  if end < frames:
    parts["after"] = video_THWC[end:]
  if not parts:
    raise ValueError(
      f"infill from {from_s} to {to_s} s leaves nothing of the video: that is a video "
      "from text"
    )
  latents = dict(zip(parts, encode(list(parts.values())), strict=True))
  known: dict[str, Any] = {"before_THWC": latents.get("before")}
  if "after" in latents:
    known |= conditioning.leads_to(latents["after"], time_grid.latent_of(end))
  return timeline(job, canvas, frames, **known)


def interpolate(job: Job, canvas: Canvas, encode: Encode) -> Timeline:
  """More frames a second; its own frames guide, mixtures of them are begun from."""
  times = job.interpolate
  video_THWC = media.read_video(job, canvas, job.video)
  if len(video_THWC) < 2:
    raise ValueError("interpolate needs a video of 2 frames or more")
  frames = 1 + times * (len(video_THWC) - 1)
  at_T = np.arange(frames) / times
  low_T = np.minimum(at_T.astype(int), len(video_THWC) - 2)
  share_T = (at_T - low_T).astype(np.float32)[:, None, None, None]
  between = (1 - share_T) * video_THWC[low_T] + share_T * video_THWC[low_T + 1]
  start_THWC, *images = encode(
    [np.round(between).astype(np.uint8), *(frame[None] for frame in video_THWC)]
  )
  return timeline(
    job,
    dataclasses.replace(canvas, fps=canvas.fps * times),
    frames,
    before_THWC=images[0],
    extras=_extras({i * times: x for i, x in enumerate(images)}),
    start_THWC=start_THWC,
    strength=0.8 if job.strength is None else job.strength,
  )


MODES: dict[str, Callable[[Job, Canvas, Encode], Timeline]] = {
  "text": text,
  "image": image,
  "extend": extend,
  "connect": connect,
  "loop": loop,
  "edit": edit,
  "infill": infill,
  "interpolate": interpolate,
}

# --- parts of them


def timeline(job: Job, canvas: Canvas, frames: int, before_THWC=None, **known):
  """A timeline of so many frames, with what is known of it."""
  height, width = canvas.size
  request = Request(
    *(job.prompt, width, height, frames, canvas.fps, job.seed),
    *(job.negative_prompt or "", job.guidance_scale, tuple(job.shots), job.blend),
  )
  request.check()
  if not (job.prompt.strip() or job.shots):
    logging.warning("an empty prompt: whatever the model makes of none")
  return Timeline(
    request,
    (time_grid.latent_frames(frames), *canvas.grid_hw),
    np.zeros((0,), np.float32) if before_THWC is None else before_THWC,
    crop_hw=canvas.crop,
    **known,
  )


def frames_of(job: Job) -> int:
  """Frames of what a job makes; says where the grid has others."""
  frames = 17 if job.frames is None else job.frames
  if frames < 1:
    raise ValueError(f"frames {frames}: at least 1 is needed")
  if not time_grid.is_on_grid(frames):
    whole = time_grid.round_up(frames)
    logging.info("%d frames are not 1 + 4k: cut from %d", frames, whole)
  return frames


def _gap(job: Job, canvas: Canvas, seconds: float) -> int:
  """Latent frames up to the one that ends with the next video's first frame."""
  seconds = seconds if job.gap is None else job.gap
  return max(2, round(time_grid.time_of(seconds * canvas.fps + 1)))


def images_of(job: Job, canvas: Canvas, frames: int) -> dict[int, np.ndarray]:
  """Given images by the index of their frame; ValueError if it is not in the video."""
  places = [(0, job.image)] if job.image is not None else []
  places += [(round(time * canvas.fps), image) for time, image in job.key_frames]
  places += [(frames - 1, job.last_image)] if job.last_image is not None else []
  images = {}
  for at, medium in places:
    if not 0 <= at < frames:
      raise ValueError(
        f"a key frame at {at / canvas.fps:g} s is outside the {frames} frames, "
        f"{frames / canvas.fps:.2f} s"
      )
    if at in images:
      raise ValueError(f"two images for frame {at}, at {at / canvas.fps:g} s")
    images[at] = media.read_image(job, canvas, medium)
  return images


def _first(latents: dict[int, np.ndarray]) -> np.ndarray | None:
  return latents[0] if 0 in latents else None


def _extras(latents: dict[int, np.ndarray]) -> tuple[tuple[float, np.ndarray], ...]:
  """Extra tokens of one-frame latents by the index of their frame; frame 0 is none."""
  return tuple(
    (time_grid.time_of(at), x_THWC[0]) for at, x_THWC in latents.items() if at
  )


def _padded(video_THWC: np.ndarray) -> np.ndarray:
  """The video with its last frame repeated up to 1 + 4k frames."""
  over = time_grid.round_up(len(video_THWC)) - len(video_THWC)
  return np.pad(video_THWC, ((0, over), (0, 0), (0, 0), (0, 0)), mode="edge")


def _bridged(job, canvas, gap, before_THWC, after_THWC, between_THWC=None) -> Timeline:
  """A timeline from given latents to others.

  between_THWC: latents of frames that begin and end where those meet. The gap begins as
  these with noise on them, or else as noise alone.
  """
  known: dict[str, Any] = {"before_THWC": before_THWC}
  known |= conditioning.leads_to(after_THWC, len(before_THWC) + gap - 1)
  if between_THWC is not None:
    start_THWC = np.concatenate([before_THWC, between_THWC[1:], after_THWC[1:]])
    level_T = np.zeros(len(start_THWC))
    # Least where it meets what is given.
    share_T = np.sin(np.pi * np.arange(1, gap + 1) / (gap + 1)) ** 2
    level_T[len(before_THWC) :][:gap] = job.gap_strength * share_T / share_T.max()
    shape = (len(level_T), *canvas.grid_hw)
    known |= {
      "start_THWC": start_THWC,
      "strength": job.gap_strength,
      "strength_THW": np.broadcast_to(level_T[:, None, None], shape),
    }
  frames = time_grid.video_frames(len(before_THWC) + gap + len(after_THWC) - 1)
  return timeline(job, canvas, frames, **known)
