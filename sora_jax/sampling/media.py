"""A user's files and arrays as frames of one size and rate; what is lost is logged."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from absl import logging

from sora_jax.data.video import probe, reader, resizing
from sora_jax.packing import time_grid
from sora_jax.sampling.job import Job, Media


class Encode(Protocol):
  """Several videos to latents: uint8 [T, H, W, 3] of 1 + 4k frames -> [t, h, w, C]."""

  def __call__(self, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Latents of each video, in order."""


@dataclasses.dataclass(frozen=True)
class Canvas:
  """The size and the rate at which a job is made.

  Attributes:
    size: (height, width) in pixels, on the grid of the model.
    crop: (height, width) that the job wants; `size` is the next larger one.
    grid_hw: tokens of a latent frame.
    fps: frames per second.
  """

  size: tuple[int, int]
  crop: tuple[int, int]
  grid_hw: tuple[int, int]
  fps: float


def canvas(job: Job, multiple: int = 1) -> Canvas:
  """The canvas of a job: as it says, or as its first medium has it.

  multiple: of pixels, that heights and widths of the model's grid have.

  Raises:
    ValueError: for a size or rate that is not positive, a medium that cannot be read.
  """
  medium = next(
    (m for m in (job.video, job.image, job.last_image) if m is not None),
    job.key_frames[0][1] if job.key_frames else None,
  )
  info = None if medium is None else _probe(medium)
  width, height = job.size or ((info.width, info.height) if info else (64, 64))
  if min(width, height) < 1:
    raise ValueError(f"size {width}x{height}: width and height must be positive")
  rows, columns = (-(-n // multiple) for n in (height, width))
  moving = info if info and job.video is not None and not info.is_image else None
  fps = job.fps or (moving.fps if moving else 12.0)
  if not fps > 0:
    raise ValueError(f"fps {fps} is not above 0")
  size = (rows * multiple, columns * multiple)
  return Canvas(size, (height, width), (rows, columns), fps)


def read_image(job: Job, canvas: Canvas, medium: Media) -> np.ndarray:
  """uint8 [1, H, W, 3] of the canvas's size; ValueError for a video."""
  image_THWC = _read(medium, canvas.size, None, job.fit)
  if len(image_THWC) > 1:
    raise ValueError(
      f"{_name(medium)}: an image is needed, not {len(image_THWC)} frames"
    )
  return image_THWC


def read_frames(job: Job, canvas: Canvas, medium: Media) -> np.ndarray:
  """uint8 [T, H, W, 3] on the canvas, at most as many frames as the job wants."""
  return _read(medium, canvas.size, canvas.fps, job.fit)[: job.frames]


def read_video(job: Job, canvas: Canvas, medium: Media, keep="start") -> np.ndarray:
  """`read_frames` without those over 1 + 4k, at the side that is not to `keep`."""
  video_THWC = read_frames(job, canvas, medium)
  over = len(video_THWC) - time_grid.round_down(len(video_THWC))
  if over:
    logging.info(
      "%s: %d frames are not 1 + 4k, %d at its %s are left out",
      *(_name(medium), len(video_THWC), over, "start" if keep == "end" else "end"),
    )
    video_THWC = video_THWC[over:] if keep == "end" else video_THWC[:-over]
  if len(video_THWC) < job.given_frames and job.mode in ("extend", "connect", "loop"):
    logging.info(
      "%s has %d frames, fewer than the %d that a window takes over: all are taken",
      *(_name(medium), len(video_THWC), job.given_frames),
    )
  return video_THWC


def read_mask(canvas: Canvas, medium: Media) -> np.ndarray:
  """bool [H, W]: where an image is more than half white."""
  if isinstance(medium, np.ndarray) and medium.ndim == 2:
    medium = np.repeat(medium[..., None].astype(np.uint8) * 255, 3, axis=-1)
  mask_THWC = _read(medium, canvas.size, None, "crop")
  if len(mask_THWC) > 1:
    raise ValueError(
      f"{_name(medium)}: a mask is an image, not {len(mask_THWC)} frames"
    )
  return mask_THWC[0].mean(axis=-1) > 127.5


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
  """uint8 [T, H, W, 3] of a size and rate; says what is lost."""
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
