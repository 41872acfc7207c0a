"""The ways of prompting that the suite measures, each on a held-out clip.

What a case is given, and what of it the result has to show, stand side by side here;
prompting_suite.py runs them and measures.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sora_jax.data.clips import Clip
from sora_jax.data.video import reader
from sora_jax.packing import time_grid
from sora_jax.sampling.job import Job
from sora_jax.sampling.pipeline import Sampler

FRAMES = 17
SIZE = (64, 64)


@dataclasses.dataclass(frozen=True)
class Case:
  """A mode as it is measured.

  Attributes:
    job: what to sample.
    truth: what the result should show, or None.
    kept: (slice of the result, frames that it should show).
    soft: whether the kept frames were given as images in time, which guide the video
      but are not copied.
    seams: indices of frames that begin something new; 0 is the seam of a loop.
    place: index of a frame whose place among the four of a latent is that of the seam,
      where it is not the seam's own index.
    region: (rows, columns) that the kept frames are compared in.
  """

  job: Job
  truth: dict | None
  kept: tuple[tuple[slice, np.ndarray], ...] = ()
  soft: bool = False
  seams: tuple[int, ...] = ()
  place: int = 0
  region: tuple[slice, slice] = (slice(None), slice(None))


class _Held(NamedTuple):
  """What the cases of one clip are put together from.

  Attributes:
    job: the clip's prompt, seed, size and frame rate -> a Job with other fields.
    fps: frames a second.
    truth: what the clip shows.
    own, second: its first FRAMES frames, and those of another clip.
    rebuilt, rebuilt_second: what the VAE makes of them, the most that can be kept.
    first_image, last_image: what the VAE makes of single frames, as images.
  """

  job: Callable[..., Job]
  fps: float
  truth: dict
  own: np.ndarray
  second: np.ndarray
  rebuilt: np.ndarray
  rebuilt_second: np.ndarray
  first_image: np.ndarray
  last_image: np.ndarray

  @property
  def seconds(self) -> float:
    """A quarter of the clip, in whole latent frames."""
    return time_grid.frame_at(time_grid.latent_frames(FRAMES) - 1) / self.fps

  @property
  def gap(self) -> int:
    """Frames that are sampled where two videos are connected by so many seconds."""
    gap = max(2, round(time_grid.time_of(self.seconds * self.fps + 1)))
    return time_grid.frame_at(gap) - 1

  @property
  def whole(self):
    """The clip is kept at the beginning of the result."""
    return ((slice(0, FRAMES), self.rebuilt),)


def _hold(model, clip, other, seed) -> _Held:
  own, second = (first_frames(c) for c in (clip, other))
  copies = model.autoencoder.batch_size(1)

  def rebuild(video_THWC):
    latent_BTHWC = np.repeat(model.encode(video_THWC)[None], copies, 0)
    return model.autoencoder.decode(latent_BTHWC)[0]

  return _Held(
    functools.partial(Job, clip.captions[0], seed=seed, fps=clip.fps),
    clip.fps,
    {**clip.truth, "occluder": False},
    own,
    second,
    *(rebuild(v) for v in (own, second, own[:1], own[-1:])),
  )


def first_frames(clip: Clip) -> np.ndarray:
  """Returns FRAMES frames of a clip from its beginning: uint8 [T, H, W, 3]."""
  return reader.read(
    clip.path, start=clip.start, frames=FRAMES, fps=clip.fps, size=SIZE
  )


def cases_of(model: Sampler, clip: Clip, other: Clip, seed: int) -> dict[str, Case]:
  """Returns all modes on a clip, and another one where a mode takes two.

  Frames are counted as latents hold them: 1 + 4k frames, so that what is new after
  FRAMES of a video begins at FRAMES, and what is new before k latents ends at 4k - 3.
  """
  held = _hold(model, clip, other, seed)
  return {
    **_cases_of_text(held),
    **_cases_of_images(held),
    **_cases_of_time(held),
    **_cases_of_parts(held),
    **_cases_of_loops(held),
  }


def _cases_of_text(held: _Held) -> dict[str, Case]:
  """Returns the clip itself, as what is perfect, and what a prompt alone gives."""
  job, truth = functools.partial(held.job, size=SIZE), held.truth
  preview = held.job(size=(96, 96), frames=FRAMES, preview=0.6)
  return {
    "real": Case(job(video=held.own, strength=0.0), truth, held.whole, seams=(5,)),
    "text": Case(job(frames=FRAMES), truth),
    "text, as a loop": Case(job(frames=FRAMES), truth, seams=(0,), place=1),
    "preview 0.6": Case(preview, truth),
  }


def _cases_of_images(held: _Held) -> dict[str, Case]:
  """Returns the modes that are given the first or the last image, or both."""
  job = functools.partial(held.job, size=SIZE, frames=FRAMES)
  first, last = held.own[0], held.own[-1]
  start = ((slice(0, 1), held.first_image),)
  end = ((slice(-1, None), held.last_image),)
  before_end = FRAMES - 4
  return {
    "first image": Case(job(image=first), held.truth, start, seams=(1,)),
    "last image": Case(job(last_image=last), held.truth, end, seams=(before_end,)),
    "both images": Case(
      job(image=first, last_image=last),
      held.truth,
      (*start, *end),
      seams=(1, before_end),
    ),
  }


def _cases_of_time(held: _Held) -> dict[str, Case]:
  """Returns the modes that sample what comes after, before or between videos."""
  job = functools.partial(held.job, size=SIZE, video=held.own)
  at_end = slice(-FRAMES, None)
  return {
    "extend after": Case(
      job(extend_after=held.seconds), held.truth, held.whole, seams=(FRAMES,)
    ),
    "extend before": Case(
      job(extend_before=held.seconds),
      held.truth,
      ((at_end, held.rebuilt),),
      # Where the last latent frame before the video begins.
      seams=(time_grid.frame_at(time_grid.latent_frames(FRAMES) - 2) + 1,),
    ),
    "connect": Case(
      job(connect=held.second, gap=held.seconds),
      None,  # two clips have no truth in common
      (*held.whole, (at_end, held.rebuilt_second)),
      seams=(FRAMES, FRAMES + held.gap - 3),
    ),
  }


def _cases_of_parts(held: _Held) -> dict[str, Case]:
  """Returns the modes that sample a part of a video's frames, pixels or noise."""
  job = functools.partial(held.job, size=SIZE)
  right_half = np.zeros(SIZE, bool)
  right_half[:, SIZE[1] // 2 :] = True
  left_half = (slice(None), slice(0, SIZE[1] // 2))
  first, last = 5, 8  # frames that are sampled, one latent frame
  return {
    "infill frames": Case(
      job(video=held.own, infill=(first / held.fps, last / held.fps)),
      held.truth,
      (
        (slice(0, first), held.rebuilt[:first]),
        (slice(last + 1, None), held.rebuilt[last + 1 :]),
      ),
      seams=(first, last + 1),
    ),
    "infill region": Case(
      job(video=held.own, mask=right_half), held.truth, held.whole, region=left_half
    ),
    "edit 0.6": Case(job(video=held.second, strength=0.6), held.truth),
    "interpolate": Case(
      job(video=held.own, interpolate=2),
      held.truth,
      ((slice(0, None, 2), held.rebuilt),),
      soft=True,
    ),
  }


def _cases_of_loops(held: _Held) -> dict[str, Case]:
  """Returns the modes whose last frame goes on with the first one."""
  job = functools.partial(held.job, size=SIZE, loop=True)
  seams = (FRAMES, FRAMES + held.gap - 3, 0)
  of_video = functools.partial(Case, truth=held.truth, kept=held.whole, seams=seams)
  return {
    "loop of video": of_video(job(video=held.own)),
    "loop, gap anew": of_video(job(video=held.own, gap_strength=1.0)),
    "loop of text": Case(job(frames=16), held.truth, seams=(0,)),
  }
