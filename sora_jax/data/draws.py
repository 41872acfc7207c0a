"""Random draws of the data sets: pure functions of (seed, epoch, clip)."""

from collections.abc import Sequence

import numpy as np

# What a draw is for: keeps the random streams of one epoch apart.
ORDER, CROP, PLAN, VISIT, MIXTURE = range(5)

GIVEN_PATTERNS = ("first", "last", "ends", "frames", "gap", "box")


def draw_visits(
  seed: int,
  epoch: int,
  caption_counts: np.ndarray,
  extra_counts: np.ndarray,
  *,
  caption_dropout: float,
  extra_prob: float,
  synthetic_counts: np.ndarray | None = None,
  synthetic_share: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
  """Draws what decides the length of every clip's visit in an epoch.

  One vectorised draw for all clips: a generator for each costs 15 s a million clips.

  Args:
    seed: of the run.
    epoch: of the visits.
    caption_counts: int [N], captions of each clip.
    extra_counts: int [N], image latents kept with each clip.
    caption_dropout: probability of the empty text.
    extra_prob: probability that a clip with image latents gets 1 or more of them.
    synthetic_counts: int [N], how many of the captions, the last ones, a model wrote.
    synthetic_share: probability of one of those, for a clip that has others, too.

  Returns:
    caption_N: index of the caption, -1 for the empty text.
    extra_N: how many image latents are appended.
  """
  rng = np.random.default_rng((seed, epoch, PLAN))
  choice, dropped, with_extra, extra = rng.random((4, len(caption_counts)))
  if synthetic_counts is None or not np.any(synthetic_counts):
    first_N, count_N = 0, caption_counts
  else:
    own_counts = caption_counts - synthetic_counts
    # Drawn after all others, which stay what they are without synthetic captions.
    written = rng.random(len(caption_counts)) < synthetic_share
    written = (synthetic_counts > 0) & (written | (own_counts == 0))
    first_N = np.where(written, own_counts, 0)
    count_N = np.where(written, synthetic_counts, own_counts)
  caption_N = first_N + np.floor(choice * count_N).astype(np.int64)
  caption_N[(caption_counts == 0) | (dropped < caption_dropout)] = -1
  extra_N = 1 + np.floor(extra * extra_counts).astype(np.int64)
  extra_N[(extra_counts == 0) | (with_extra >= extra_prob)] = 0
  return caption_N, extra_N


def draw_given(
  rng: np.random.Generator,
  grid: tuple[int, int, int],
  prob: float,
  images: Sequence[int] = (),
) -> np.ndarray:
  """Draws which tokens of a clip are given: bool [t, h, w], never all of them.

  A single frame has none; neither has a share 1 - prob of the other clips.

  Args:
    rng: generator.
    grid: patches (t, h, w).
    prob: share of clips with given tokens.
    images: indices t of tokens whose last frame is given as an image. Half of the clips
      that have such lead to one of them, see `lead_mask`.
  """
  if grid[0] < 2 or rng.random() >= prob:
    return np.zeros(grid, bool)
  if images and rng.random() < 0.5:
    return lead_mask(rng, grid, images[int(rng.integers(len(images)))])
  return given_mask(rng, grid, GIVEN_PATTERNS[rng.integers(len(GIVEN_PATTERNS))])


def given_mask(
  rng: np.random.Generator, grid: tuple[int, int, int], pattern: str
) -> np.ndarray:
  """A random mask of one pattern: bool [t, h, w], some tokens given, never all.

  "first": the first frame, or more. "last": likewise at the end. "ends": both.
  "frames": some frames anywhere. "gap": all but a run of frames inside.
  "box": all but a box of the frame, through time, or only that box.
  A grid too small for its pattern has its first frame given.

  Args:
    rng: generator.
    grid: patches (t, h, w); t at least 2.
    pattern: one of GIVEN_PATTERNS.
  """
  t, h, w = grid
  assert t > 1, grid
  given = np.zeros(grid, bool)
  if pattern == "first":
    given[: _prefix(rng, t - 1)] = True
  elif pattern == "last":
    given[t - _prefix(rng, t - 1) :] = True
  elif pattern == "ends" and t > 2:
    head = _prefix(rng, t - 2)
    given[:head] = True
    given[t - _prefix(rng, t - 1 - head) :] = True
  elif pattern == "frames":
    given[rng.permutation(t)[: rng.integers(1, t)]] = True
  elif pattern == "gap" and t > 2:
    start = rng.integers(1, t - 1)
    given[:] = True
    given[start : rng.integers(start + 1, t)] = False
  elif pattern == "box" and h * w > 1:
    while True:
      top, bottom = np.sort(rng.choice(h + 1, 2, replace=False))
      left, right = np.sort(rng.choice(w + 1, 2, replace=False))
      if (bottom - top) * (right - left) < h * w:
        break
    given[:, top:bottom, left:right] = True
    if rng.random() < 0.5:
      given = ~given
  elif pattern in GIVEN_PATTERNS:
    given[0] = True
  else:
    raise ValueError(f"pattern {pattern!r} is none of {GIVEN_PATTERNS}")
  return given


def lead_mask(
  rng: np.random.Generator, grid: tuple[int, int, int], image: int
) -> np.ndarray:
  """A random mask of a clip that leads to a given end: bool [t, h, w], never all.

  All tokens behind index `image`, whose last frame is given as an image, and in half of
  the draws some of the first. Nothing comes behind the last one, so that some of the
  first are given then.
  """
  given = np.zeros(grid, bool)
  given[image + 1 :] = True
  if image > 0 and (image + 1 == grid[0] or rng.random() < 0.5):
    given[: _prefix(rng, image)] = True
  return given


def _prefix(rng, limit):
  """1 in half of the draws (the case people ask for), else up to limit."""
  return 1 if rng.random() < 0.5 else int(rng.integers(1, limit + 1))
