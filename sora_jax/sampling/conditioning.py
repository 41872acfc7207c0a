"""Each way of prompting a video, as data for one sampler: pure numpy.

A prompt says what is known of a grid of latents. Tokens that are *given* keep their
value exactly; others begin as noise, or as known latents with some noise on them
(SDEdit, arXiv:2108.01073); images at any time are *extra* tokens. Training draws all of
these at random, in the same layout, so that every mode here is a few lines:

  image to video        bridge(before=its latent)       last frame: bridge(extras=...)
  extend forwards       bridge(before=end of the video)
  extend backwards      bridge(after=start of the video, extras=its first frame)
  connect, infill       bridge(before, after, extras)
  loop of a video       bridge(before=its end, after, extras=its start)
  loop of a text        Prompt(loop=True)
  video to video        Prompt(latent, strength=...); of a region: `kept` ones given

The causal VAE lays time out as 1 + 4k frames: latent i > 0 holds frames 4i - 3 .. 4i,
so that frame f is at time f / 4 and a one-frame latent at the time of its frame.
A latent is given on the grid if all of its frames are known. Where only some are, as
the first one of a given end, these are extra tokens: they guide what is made there.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from sora_jax.packing import time_grid


@dataclasses.dataclass(frozen=True)
class Request:
  """One video to make; frames 1 is an image. Equal requests give equal videos.

  Attributes:
    prompt, negative_prompt: what to make, and what guidance leads away from, instead
      of from no caption at all.
    width, height, frames, fps, seed: of the video; with shots, in seconds.
    guidance_scale: instead of that of the options, which must not be 1.
    shots: (seconds, text) of later shots: from there on, that is what the video shows.
    blend: text that the video gradually turns to; both run at once, and the weight of
      their predictions moves from one to the other.
  """

  prompt: str
  width: int
  height: int
  frames: int
  fps: float
  seed: int = 0
  negative_prompt: str = ""
  guidance_scale: float | None = None
  shots: tuple[tuple[float, str], ...] = ()
  blend: str = ""

  def check(self) -> None:
    """Raises ValueError for values that no model can make."""
    if min(self.width, self.height, self.frames) < 1 or not self.fps > 0:
      raise ValueError(
        f"a video of {self.frames} frames of {self.width}x{self.height} at {self.fps} "
        "frames a second cannot be made: all must be positive"
      )
    times = [0.0, *(time for time, _ in self.shots)]
    if any(b <= a for a, b in zip(times, times[1:], strict=False)):
      raise ValueError(f"shots begin at {times[1:]} s: times must grow, from above 0")
    if times[-1] >= self.frames / self.fps:
      raise ValueError(
        f"a shot begins at {times[-1]} s, but the video has {self.frames} frames, "
        f"{self.frames / self.fps:.2f} s"
      )
    if self.shots and self.blend:
      raise ValueError("shots and blend exclude each other")


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """A request and what is known of its latents.

  Attributes:
    request: what to make. grid: tokens (t, h, w).
    latent_THWC: known latents, or None. given_THW: bool by token; those stay exactly
      as they are. Other tokens begin from theirs if `strength` is below 1.
    strength: noise level where those begin; 1 is noise alone.
    strength_THW: a smaller level of some tokens, or None: above it they follow their
      latent, as in Differential Diffusion (arXiv:2306.00950).
    extras: (time in latent frames, latent_HWC) of images anywhere in time.
    given_noise: level of noise that the network sees on given tokens and extras.
    loop: positions turn by a latent frame with each call of the network, so that no
      frame is the first one (after arXiv:2502.20307).
    start: latent frames of a longer video before the first one of this window.
    condition_THWC, image_JV: of models that read given frames beside the noise, see
      `given_frames`.
  """

  request: Request
  grid: tuple[int, int, int]
  latent_THWC: np.ndarray | None = None
  given_THW: np.ndarray | None = None
  strength: float = 1.0
  strength_THW: np.ndarray | None = None
  extras: tuple[tuple[float, np.ndarray], ...] = ()
  given_noise: float = 0.0
  loop: bool = False
  start: int = 0
  condition_THWC: np.ndarray | None = None
  image_JV: np.ndarray | None = None


def check_level(name: str, value: float) -> float:
  """The value; ValueError if it is no noise level."""
  if not 0.0 <= value <= 1.0:
    raise ValueError(f"{name} {value} is not between 0 and 1")
  return value


# --- modes


def bridge(
  request: Request,
  grid: tuple[int, int, int],
  before_THWC: np.ndarray | None = None,
  after_THWC: np.ndarray | None = None,
  extras: tuple[tuple[float, np.ndarray], ...] = (),
) -> Prompt:
  """A video that begins with given latents, ends with given ones, or both.

  Args:
    request: what to make.
    grid: tokens (t, h, w); t in latent frames.
    before_THWC: latents of a video's last frames, the first of one frame.
    after_THWC: latents of what comes after a video's first frame; that one is an extra,
      since the latent that shows it shows three frames before it, too.
    extras: images, see `Prompt`.

  Raises:
    ValueError: if nothing is left to make, or an image is outside the video.
  """
  total = grid[0]
  begin = 0 if before_THWC is None else len(before_THWC)
  end = total if after_THWC is None else total - len(after_THWC)
  if begin >= end:
    raise ValueError(
      f"nothing to make: of {total} latent frames {begin} are given at the start and "
      f"{total - end} at the end"
    )
  check_times([time for time, _ in extras], total)
  shown = [] if before_THWC is None else list(before_THWC)
  shown += [] if after_THWC is None else list(after_THWC)
  if not shown:
    return Prompt(request, grid, extras=extras)
  places = [*range(begin), *range(end, total)]
  latent_THWC = np.zeros((total, *shown[0].shape), np.float32)
  given_THW = np.zeros(grid, bool)
  latent_THWC[places], given_THW[places] = shown, True
  return Prompt(request, grid, latent_THWC, given_THW, extras=tuple(extras))


def leads_to(latent_THWC: np.ndarray, last: int) -> dict[str, Any]:
  """What `bridge`, or a `Timeline`, knows where something leads to a video.

  Args:
    latent_THWC: of the video, the first of one frame: that guides, as an image.
    last: latent frame that ends with it, and shows three frames before it.
  """
  image_HWC, *later = latent_THWC
  return {
    "extras": ((float(last), image_HWC),),
    "after_THWC": np.array(later) if later else None,
  }


def kept(mask_HW: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
  """Tokens that a region leaves as they are: bool [t, h, w].

  Args:
    mask_HW: True where pixels are made anew. A token with any such pixel is.
    grid: tokens (t, h, w).

  Raises:
    ValueError: if the mask leaves all, or is of another aspect than the grid.
  """
  t, h, w = grid
  H, W = mask_HW.shape
  if H % h or W % w:
    raise ValueError(f"a mask of {W}x{H} pixels does not divide into {w}x{h} tokens")
  made_hw = mask_HW.reshape(h, H // h, w, W // w).any(axis=(1, 3))
  if not made_hw.any():
    raise ValueError("the mask is empty: it must be white where to make anew")
  return np.broadcast_to(~made_hw, grid)


def check_times(times, total: int) -> None:
  """Raises ValueError if a time in latent frames is outside, or occurs twice."""
  for time in times:
    if not 0.0 <= time <= total - 1:
      raise ValueError(
        f"a key frame at frame {time_grid.frame_at(time):g} is outside the video of "
        f"{time_grid.video_frames(total)} frames"
      )
  if twice := {time for time in times if list(times).count(time) > 1}:
    raise ValueError(f"two key frames at frame {time_grid.frame_at(min(twice)):g}")


# --- a whole video, of any length


@dataclasses.dataclass(frozen=True, eq=False)
class Timeline:
  """A video of any length, with what is known of it; it is made window by window.

  Attributes:
    request: of the whole video, its size on the grid of the model.
    grid: tokens (t, h, w); t without the latent frames of `backwards`.
    before_THWC, after_THWC, extras: as in `bridge`; before may have no frames.
    start_THWC: latents that begin with noise of level `strength` on them, or None.
    strength_THW: as in Prompt.
    kept_THW: bool by token; those of start_THWC that stay as they are.
    loop: as in Prompt; such a video is one window.
    backwards: latent frames before all of these, which are made window by window
      towards the start.
    closes: the end leads to the start: `after`, and the image that the last latent
      made leads to, is what the video began with, and is not shown again.
    crop_hw: (height, width) in pixels that frames are cut to; None = all of them.
    condition_THWC, image_JV: as in Prompt; such a video is one window.
  """

  request: Request
  grid: tuple[int, int, int]
  before_THWC: np.ndarray
  after_THWC: np.ndarray | None = None
  extras: tuple[tuple[float, np.ndarray], ...] = ()
  start_THWC: np.ndarray | None = None
  strength: float = 1.0
  kept_THW: np.ndarray | None = None
  loop: bool = False
  strength_THW: np.ndarray | None = None
  backwards: int = 0
  closes: bool = False
  crop_hw: tuple[int, int] | None = None
  condition_THWC: np.ndarray | None = None
  image_JV: np.ndarray | None = None

  def __post_init__(self):
    check_level("strength", self.strength)
    check_times([time for time, _ in self.extras], self.grid[0])

  @property
  def end(self) -> int:
    """Latent frames of `grid` before those that are given at the end."""
    return self.grid[0] - (0 if self.after_THWC is None else len(self.after_THWC))

  @property
  def frames(self) -> int:
    """Frames that are shown; a video that closes ends before its first frame."""
    return time_grid.frame_at(self.end - 1) if self.closes else self.request.frames


# --- what a prompt is, by latent frame


def texts(prompt: Prompt) -> tuple[list[tuple[str, str]], np.ndarray]:
  """(prompt, negative prompt) of each shot in a window, and the shot of each frame."""
  request = prompt.request
  starts = [0.0, *(time for time, _ in request.shots)]
  shown = [request.prompt, *(text for _, text in request.shots)]
  # A latent belongs to the shot of its last frame.
  time_T = time_grid.frame_at(prompt.start + np.arange(prompt.grid[0])) / request.fps
  index_T = np.searchsorted(starts, time_T + 1e-6, side="right") - 1
  used, shot_T = np.unique(index_T, return_inverse=True)
  return [(shown[i], request.negative_prompt) for i in used], shot_T


def blend_weights(prompt: Prompt) -> np.ndarray:
  """Share of the text that a video turns to, by latent frame: smooth, 0 to 1."""
  last = max(1.0, time_grid.time_of(prompt.request.frames - 1))
  x_T = (prompt.start + np.arange(prompt.grid[0])) / last
  return (0.5 - 0.5 * np.cos(math.pi * np.clip(x_T, 0.0, 1.0))).astype(np.float32)
