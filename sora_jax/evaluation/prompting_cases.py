"""The ways of prompting that the suite measures, each on a held-out clip.

What a case is given, and what of it the result has to show, stand side by side here;
prompting_suite.py runs them and measures.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sora_jax.evaluation.continuity import motions_of
from sora_jax.evaluation.heldout import SIZE, DrawnClip, Lengths
from sora_jax.evaluation.shape_attributes import find_objects
from sora_jax.packing import time_grid
from sora_jax.sampling.job import Job
from sora_jax.sampling.pipeline import Sampler

_LEAST_FRAMES = 4  # of a part whose motion is judged


class Part(NamedTuple):
  """Frames of a result that were sampled, and what they have to go on from.

  Attributes:
    given: its pixels, uint8 [T, H, W, 3], or which frames of the result it is.
    new: which frames of the result were sampled.
    side: 1 if these come after the given ones, -1 if before, 0 if in between them.
    motions: of objects by colour, see `continuity.judge`; None where what is sampled
      has to lead somewhere else.
  """

  given: np.ndarray | slice
  new: slice
  side: int = 1
  motions: dict[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
  """A mode as it is measured.

  Attributes:
    job: what to sample.
    truth: what the result should show, or None.
    kept: (slice of the result, frames that it should show).
    met: the same of frames that were given as images in time, which guide the video but
      are not copied, as the first one of a given end does.
    seams: indices of frames that begin something new; 0 is the seam of a text's loop.
    place: index of a frame whose place among the four of a latent is that of the seam,
      where it is not the seam's own index.
    region: (rows, columns) that the kept frames are compared in.
    parts: what was sampled beside what was given.
  """

  job: Job
  truth: dict | None
  kept: tuple[tuple[slice, np.ndarray], ...] = ()
  met: tuple[tuple[slice, np.ndarray], ...] = ()
  seams: tuple[int, ...] = ()
  place: int = 0
  region: tuple[slice, slice] = (slice(None), slice(None))
  parts: tuple[Part, ...] = ()


class _Held(NamedTuple):
  """What the cases of one clip are put together from.

  Attributes:
    job: the clip's prompt, seed, size and frame rate -> a Job with other fields.
    fps: frames a second.
    truth: what the clip shows. motions: the same, by colour.
    lengths: in frames.
    whole: its frames. sample: as many as a sample has, its first ones.
    own, end, second: its first and last given frames, and the first of another clip,
      whose caption is second_caption.
    rebuilt, rebuilt_sample, rebuilt_end, rebuilt_second: what the VAE makes of them,
      the most that can be kept.
    first_image, last_image: what the VAE makes of single frames, as images.
  """

  job: Callable[..., Job]
  fps: float
  truth: dict
  motions: dict[str, str]
  second_caption: str
  lengths: Lengths
  whole: np.ndarray
  sample: np.ndarray
  other: np.ndarray
  own: np.ndarray
  end: np.ndarray
  second: np.ndarray
  rebuilt: np.ndarray
  rebuilt_sample: np.ndarray
  rebuilt_end: np.ndarray
  rebuilt_second: np.ndarray
  first_image: np.ndarray
  last_image: np.ndarray

  @property
  def seconds(self) -> float:
    """The duration of what is given, in whole latent frames."""
    return (self.lengths.given - 1) / self.fps

  @property
  def gap_seconds(self) -> float:
    """That, or as much more as each half of a gap needs to show a motion."""
    return max(self.seconds, 3 * time_grid.TIME_FACTOR / self.fps)

  @property
  def gap(self) -> int:
    """Frames that are sampled where two videos are connected by so many seconds."""
    return round(self.gap_seconds * self.fps) - 1

  @property
  def after_gap(self) -> int:
    """Where what comes after the gap begins: with its first frame."""
    return self.lengths.given + self.gap

  @property
  def at_start(self):
    """The clip is kept at the beginning of the result."""
    return ((slice(0, self.lengths.given), self.rebuilt),)


def _hold(model, clip, other, seed, lengths) -> _Held:
  whole, given = clip.video_THWC, lengths.given
  own, end, second = whole[:given], whole[-given:], other.video_THWC[:given]
  sample = whole[: lengths.sampled]
  copies = model.autoencoder.batch_size(1)

  def rebuild(video_THWC):
    latent_BTHWC = np.repeat(model.encode(video_THWC)[None], copies, 0)
    return model.autoencoder.decode(latent_BTHWC)[0]

  return _Held(
    functools.partial(Job, prompt=clip.caption, seed=seed, fps=clip.fps),
    clip.fps,
    clip.truth,
    motions_of(clip.truth),
    other.caption,
    lengths,
    *(whole, sample, other.video_THWC[: lengths.sampled], own, end, second),
    *(rebuild(v) for v in (own, sample, end, second, sample[:1], sample[-1:])),
  )


def cases_of(
  model: Sampler, clip: DrawnClip, other: DrawnClip, seed: int, lengths: Lengths
) -> dict[str, Case]:
  """Returns all modes on a clip, and another one where a mode takes two.

  Frames are counted as latents hold them: 1 + 4k frames. What is given at an end is
  given from its second frame on; its first guides, as an image.
  """
  held = _hold(model, clip, other, seed, lengths)
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
  frames, given = held.lengths.sampled, held.lengths.given
  preview = held.job(size=(96, 96), frames=frames, preview=0.6)
  later = Part(held.own, slice(given, None), 1, held.motions)
  return {
    "real": Case(
      job(video=held.whole, strength=0.0),
      truth,
      held.at_start,
      seams=(5,),
      parts=(later,),
    ),
    "text": Case(job(frames=frames), truth),
    "text, as a loop": Case(job(frames=frames), truth, seams=(0,), place=1),
    "preview 0.6": Case(preview, truth),
  }


def _cases_of_images(held: _Held) -> dict[str, Case]:
  """Returns the modes that are given the first or the last image, or both."""
  job = functools.partial(held.job, size=SIZE, frames=held.lengths.sampled)
  first, last = held.sample[:1], held.sample[-1:]
  start = ((slice(0, 1), held.first_image),)
  end = ((slice(-1, None), held.last_image),)
  between = slice(1, -1)
  return {
    "first image": Case(
      job(image=first[0]),
      held.truth,
      start,
      seams=(1,),
      parts=(Part(first, slice(1, None), 1, held.motions),),
    ),
    "last image": Case(
      job(last_image=last[0]),
      held.truth,
      met=end,
      parts=(Part(last, slice(0, -1), -1, held.motions),),
    ),
    "both images": Case(
      job(image=first[0], last_image=last[0]),
      held.truth,
      start,
      end,
      seams=(1,),
      parts=(
        Part(first, between, 1, held.motions),
        Part(last, between, -1, held.motions),
      ),
    ),
  }


def _cases_of_time(held: _Held) -> dict[str, Case]:
  """Returns the modes that sample what comes after, before or between videos."""
  job = functools.partial(held.job, size=SIZE)
  given = held.lengths.given
  # The first frame of a given end is made, in the latent that leads to it.
  at_end, first_of_end = slice(1 - given, None), slice(-given, 1 - given)
  before = given - 1
  middle = (given + held.after_gap) // 2
  return {
    "extend after": Case(
      job(video=held.own, extend_after=held.seconds),
      held.truth,
      held.at_start,
      seams=(given,),
      parts=(Part(held.own, slice(given, None), 1, held.motions),),
    ),
    "extend before": Case(
      job(video=held.end, extend_before=held.seconds),
      held.truth,
      ((at_end, held.rebuilt_end[1:]),),
      ((first_of_end, held.rebuilt_end[:1]),),
      seams=(before + 1,),
      parts=(Part(held.end, slice(0, before), -1, held.motions),),
    ),
    "connect": Case(
      job(
        video=held.own,
        connect=held.second,
        gap=held.gap_seconds,
        blend=held.second_caption,
      ),
      None,  # two clips have no truth in common
      (*held.at_start, (at_end, held.rebuilt_second[1:])),
      ((first_of_end, held.rebuilt_second[:1]),),
      seams=(given, held.after_gap + 1),
      # Half of the gap is the first clip's, and half the second's.
      parts=(
        Part(held.own, slice(given, middle)),
        Part(held.second, slice(middle, held.after_gap), -1),
      ),
    ),
    "connect parts": _case_of_parts_connected(held),
  }


def _case_of_parts_connected(held: _Held) -> Case:
  """Returns the mode that connects videos, on the start and the end of one clip."""
  frames = len(held.whole)
  given = time_grid.round_down(held.lengths.given // 2 + 1)
  gap = frames - 2 * given
  start_THWC, end_THWC = held.whole[:given], held.whole[-given:]
  first_of_end = given + gap
  kept = ((slice(0, given), held.rebuilt[:given]),)
  if given > 1:
    kept += ((slice(first_of_end + 1, None), held.rebuilt_end[1 - given :]),)
  return Case(
    held.job(
      size=SIZE,
      video=start_THWC,
      connect=end_THWC,
      gap=gap / held.fps,
      gap_strength=1.0,
    ),
    held.truth,
    kept,
    ((slice(first_of_end, first_of_end + 1), held.rebuilt_end[-given:][:1]),),
    seams=(given, first_of_end + 1)[: len(kept)],
    parts=(
      Part(start_THWC, slice(given, first_of_end), 1, held.motions),
      Part(end_THWC, slice(given, first_of_end), -1, held.motions),
    ),
  )


def _cases_of_parts(held: _Held) -> dict[str, Case]:
  """Returns the modes that sample a part of a video's frames, pixels or noise."""
  job = functools.partial(held.job, size=SIZE)
  sample, rebuilt = held.sample, held.rebuilt_sample
  # One latent frame is sampled, the one in the middle.
  middle = time_grid.latent_frames(len(sample)) // 2
  first, last = time_grid.frame_at(middle - 1) + 1, time_grid.frame_at(middle)
  new = slice(first, last + 1)
  return {
    "infill frames": Case(
      job(video=sample, infill=(first / held.fps, last / held.fps)),
      held.truth,
      (
        (slice(0, first), rebuilt[:first]),
        (slice(last + 1, None), rebuilt[last + 1 :]),
      ),
      ((slice(last, last + 1), rebuilt[last : last + 1]),),
      seams=(first, last + 1),
      parts=(
        Part(sample[:first], new, 1, held.motions),
        Part(sample[last + 1 :], new, -1, held.motions),
      ),
    ),
    "infill region": _case_of_region(held),
    "edit 0.6": Case(job(video=held.other, strength=0.6), held.truth),
    "interpolate": Case(
      job(video=held.own, interpolate=2),
      held.truth,
      met=((slice(0, None, 2), held.rebuilt),),
      parts=(Part(held.own, slice(1, None, 2), 0, held.motions),),
    ),
  }


def _case_of_region(held: _Held) -> Case:
  """Returns the mode whose right half is sampled in all frames.

  It is the lower half for what moves up or down. Where an object comes from the given
  half or goes there, the frames that show it there are given.
  """
  vertical = set(held.motions.values()) <= {"up", "down"}
  middle = SIZE[0 if vertical else 1] // 2
  first, second = slice(0, middle), slice(middle, None)
  kept, made = (
    (half, slice(None)) if vertical else (slice(None), half) for half in (first, second)
  )
  mask = np.zeros(SIZE, bool)
  mask[made] = True
  whole = held.whole
  there_T = _is_before(whole, middle, 1 if vertical else 0)
  count, parts = int(there_T.sum()), ()
  if _LEAST_FRAMES <= count <= len(whole) - _LEAST_FRAMES:
    if there_T[:count].all():
      parts = (Part(whole[:count], slice(count, None), 1, held.motions),)
    elif there_T[-count:].all():
      parts = (Part(whole[-count:], slice(0, -count), -1, held.motions),)
  return Case(
    held.job(size=SIZE, video=whole, mask=mask),
    held.truth,
    held.at_start,
    region=kept,
    parts=parts,
  )


def _is_before(video_THWC: np.ndarray, border: int, dim: int) -> np.ndarray:
  """Returns in which frames the object's x (dim 0) or y is below a border: bool [T].

  In none of them if there is not one object, which is seen in all frames.
  """
  objects = find_objects(video_THWC)
  if len(objects) != 1 or len(objects[0].spots) != len(video_THWC):
    return np.zeros(len(video_THWC), bool)
  return np.array([spot.center[dim] < border for spot in objects[0].spots])


def _cases_of_loops(held: _Held) -> dict[str, Case]:
  """Returns the modes whose last frame goes on with the first one."""
  job = functools.partial(held.job, size=SIZE, loop=True)
  of_gap = functools.partial(job, video=held.own, gap=held.gap_seconds)
  given = held.lengths.given
  gap = slice(given, None)
  of_video = functools.partial(
    Case,
    truth=held.truth,
    kept=((slice(1, given), held.rebuilt[1:]),),
    met=((slice(0, 1), held.rebuilt[:1]),),
    seams=(given, 1),
    parts=(Part(held.own, gap), Part(held.own, gap, -1)),
  )
  frames = held.lengths.sampled - 1
  return {
    # What comes back does not do what the caption says: the video speaks for itself.
    "loop of video": of_video(of_gap(prompt="")),
    "loop, gap anew": of_video(of_gap(gap_strength=1.0)),
    "loop of text": _loop_of_text(job(frames=frames), held.truth),
  }


def case_of_endless(clip: DrawnClip, seed: int, lengths: Lengths) -> Case:
  """Returns a loop of a text whose motion comes back by itself, with time to do so."""
  frames = (lengths.sampled - 1) // 2 * 3
  job = Job(clip.caption, seed=seed, fps=clip.fps, size=SIZE, loop=True, frames=frames)
  return _loop_of_text(job, clip.truth)


def _loop_of_text(job: Job, truth: dict) -> Case:
  """Returns a loop of whole latent frames; each half goes on with the other."""
  assert job.frames
  half = job.frames // 2
  halves = (Part(slice(0, half), slice(half, None)),
            Part(slice(0, half), slice(half, None), -1))  # fmt: skip
  return Case(job, truth, seams=(0,), parts=halves)
