"""A long video in windows: pure steps from what is known to what is made next.

The state says how much is known and holds the last latents of it. `next_window` turns
it into a prompt, and `step` what was made of that prompt into the next state. Who holds
the model (`pipeline.Sampler`) makes latents of prompts and frames of latents:

  state = begin(timeline)
  while not finished(timeline, state):
    window = next_window(timeline, cut, state, anchor)
    state, fresh_THWC = step(timeline, cut, state, window, denoise(window.prompt))

What lies before a given video is made from its start to the front: `begin_backwards`,
`previous_window` and `step_back` are the same in the other direction.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from sora_jax.sampling.conditioning import (
  Prompt,
  Timeline,
  bridge,
  check_level,
  leads_to,
)


@dataclasses.dataclass(frozen=True)
class Windows:
  """How a long video is cut.

  Attributes:
    length: latent frames of a window; 0 makes the whole video at once.
    given: latent frames that a window takes over from the one before.
    noise: level of noise on them, against drift (as in arXiv:2407.01392).
  """

  length: int = 0
  given: int = 2
  noise: float = 0.0

  def __post_init__(self):
    if self.given < 1 or (self.length and self.length <= self.given):
      raise ValueError(
        f"windows of {self.length} latent frames with {self.given} of them given: "
        "1 or more must be given, and fewer than a window has"
      )
    check_level("given_noise", self.noise)


class Window(NamedTuple):
  """What is made next: a prompt, and how its latent frames fall into the video."""

  prompt: Prompt
  known: int  # latent frames at the window's edge that are known already
  new: int  # and of those beside them that it makes


# --- forwards


class State(NamedTuple):
  """How far a video is."""

  known: int  # latent frames from its start on, the backward ones included
  last_THWC: np.ndarray  # the last of them, at most as many as a window takes over

  @property
  def needs_anchor(self) -> bool:
    """Whether last_THWC begins in the middle of the video: see `next_window`."""
    return self.known > len(self.last_THWC)


def begin(timeline: Timeline) -> State:
  """The state in which nothing is known; `see` takes what is given."""
  return State(0, timeline.before_THWC[:0])


def see(timeline: Timeline, cut: Windows, state: State, latent_THWC) -> State:
  """The state after latents that were made elsewhere, or given."""
  return _appended(timeline, cut, state, latent_THWC)


def finished(timeline: Timeline, state: State) -> bool:
  """Whether nothing is left to make before what is given at the end."""
  return state.known >= timeline.backwards + timeline.end


def next_window(
  timeline: Timeline,
  cut: Windows,
  state: State,
  anchor_HWC: np.ndarray | None = None,
) -> Window:
  """The window after what is known.

  Args:
    timeline: what is made. cut: how.
    state: how far it is.
    anchor_HWC: one-frame latent of the last frame of state.last_THWC[0]; takes its
      place, because a clip begins with a latent of one frame. None: it is one.
  """
  grid_t = timeline.backwards + timeline.grid[0]
  end = timeline.backwards + timeline.end
  after, known = timeline.after_THWC, len(state.last_THWC)
  first = state.known - known
  stop = end if after is None else end + min(cut.given, len(after))
  if cut.length and not timeline.loop:
    stop = min(stop, first + cut.length)
    # The last one sees what it leads to, if it is longer by that.
    stop += after is not None and stop == end
  assert stop <= grid_t, (stop, grid_t)
  before = np.array(state.last_THWC, np.float32)
  if anchor_HWC is not None:
    before[0] = anchor_HWC
  new = slice(state.known, min(stop, end))
  prompt = bridge(
    timeline.request,
    (stop - first, *timeline.grid[1:]),
    before if known else None,
    None if after is None or stop <= end else after[: stop - end],
    # Those at the time of a frame that is made; the first of a video is one.
    tuple(
      (time - first, latent)
      for time, latent in timeline.extras
      if new.start - 1 < time <= new.stop - 1
    ),
  )
  if timeline.start_THWC is not None:
    prompt = _on_top(prompt, timeline, first)
  noise = cut.noise if first or state.known > len(timeline.before_THWC) else 0.0
  prompt = dataclasses.replace(
    prompt,
    given_noise=noise,
    loop=timeline.loop,
    start=first,
    condition_THWC=timeline.condition_THWC,
    image_JV=timeline.image_JV,
  )
  return Window(prompt, known, new.stop - new.start)


def step(
  timeline: Timeline, cut: Windows, state: State, window: Window, latent_THWC
) -> tuple[State, np.ndarray]:
  """(next state, new latents) once a window's prompt is made into latent_THWC."""
  fresh_THWC = latent_THWC[window.known : window.known + window.new]
  return _appended(timeline, cut, state, fresh_THWC), fresh_THWC


def _appended(timeline, cut, state, latent_THWC):
  # A video that is made at once sees all of what is known.
  most = cut.given if cut.length else timeline.backwards + len(timeline.before_THWC)
  last_THWC = latent_THWC
  if len(state.last_THWC):
    last_THWC = np.concatenate([state.last_THWC, latent_THWC])
  return State(state.known + len(latent_THWC), last_THWC[-max(most, 1) :])


def _on_top(prompt, timeline, first):
  """Adds start latents, and the tokens that are kept, to a window from `first` on."""
  here = slice(first, first + prompt.grid[0])
  latent_THWC = np.array(timeline.start_THWC[here], np.float32)
  # At strength 0 there is nothing to make: what is known is the result.
  given_THW = np.full(prompt.grid, timeline.strength == 0.0)
  if timeline.kept_THW is not None:
    given_THW |= timeline.kept_THW[here]
  if prompt.given_THW is not None:
    frames = prompt.given_THW.any(axis=(1, 2))
    latent_THWC[frames] = prompt.latent_THWC[frames]
    given_THW |= prompt.given_THW
  strength_THW = timeline.strength_THW
  return dataclasses.replace(
    prompt,
    latent_THWC=latent_THWC,
    given_THW=given_THW,
    strength=timeline.strength,
    strength_THW=None if strength_THW is None else strength_THW[here],
  )


# --- backwards


class BackwardState(NamedTuple):
  """How far a video is that is made from a given start to the front."""

  left: int  # latent frames to make
  head_THWC: np.ndarray  # the first of what is known, as many as a window takes over
  first_THWC: np.ndarray  # what was made last; it begins with a first frame's latent


def begin_backwards(timeline: Timeline, cut: Windows) -> BackwardState:
  """The state in which only what is given is known."""
  before_THWC = timeline.before_THWC
  return BackwardState(timeline.backwards, _head(cut, before_THWC), before_THWC)


def previous_window(timeline: Timeline, cut: Windows, state: BackwardState) -> Window:
  """The window before what is known, up to the latent that ends with its first frame.

  That latent is made, too: it shows three frames more.
  """
  known = len(state.head_THWC)
  new = state.left
  if cut.length:
    new = min(new, max(1, cut.length - known))
  prompt = bridge(
    timeline.request,
    (new + known, *timeline.grid[1:]),
    **leads_to(state.head_THWC, new),
  )
  noise = cut.noise if state.left < timeline.backwards else 0.0
  prompt = dataclasses.replace(prompt, start=state.left - new, given_noise=noise)
  return Window(prompt, known, new)


def step_back(
  cut: Windows, state: BackwardState, window: Window, latent_THWC: np.ndarray
) -> tuple[BackwardState, np.ndarray]:
  """(next state, latents that are final) once a window's prompt is latent_THWC.

  Final is what the state before held: its first latent is now one of the middle, and
  was made again.
  """
  new = window.new
  final_THWC = np.concatenate([latent_THWC[new : new + 1], state.first_THWC[1:]])
  head_THWC = np.concatenate([latent_THWC[: new + 1], state.head_THWC[1:]])
  following = BackwardState(state.left - new, _head(cut, head_THWC), latent_THWC[:new])
  return following, final_THWC


def _head(cut, latent_THWC):
  return latent_THWC[: cut.given] if cut.length else latent_THWC
