"""Spacetime patches: pure reshapes between a latent grid and a sequence of tokens.

Functions take numpy and jax arrays alike, but for `fold_time` and positions: numpy. A
grid of (t, h, w) patches is laid out as L = t * h * w tokens, w fastest; a patch is
laid out as (pt, ph, pw, c), c fastest. This is the order of
`Conv3d(kernel=stride=patch)` weights read as a matrix, and the one that NaViT
(arXiv:2307.06304) packing and Wan share.
"""

import math

import numpy as np


def grid_shape(latent_shape, patch_size):
  """Patches along (t, h, w) of a latent (T, H, W) shape.

  Raises:
    ValueError: if the patch size does not divide the latent's.
  """
  if any(n % p for n, p in zip(latent_shape, patch_size, strict=True)):
    raise ValueError(
      f"a latent of (T, H, W) = {tuple(latent_shape)} does not divide into patches "
      f"of {tuple(patch_size)}"
    )
  return tuple(n // p for n, p in zip(latent_shape, patch_size, strict=True))


def num_tokens(latent_shape, patch_size):
  """Tokens of a latent (T, H, W) shape."""
  return math.prod(grid_shape(latent_shape, patch_size))


def patchify(latent_THWC, patch_size):
  """Cuts [..., T, H, W, C] into tokens [..., L, pt*ph*pw*C]."""
  *lead, T, H, W, C = latent_THWC.shape
  pt, ph, pw = patch_size
  t, h, w = grid_shape((T, H, W), patch_size)
  x = latent_THWC.reshape(*lead, t, pt, h, ph, w, pw, C)
  n = len(lead)
  x = x.transpose(*range(n), n, n + 2, n + 4, n + 1, n + 3, n + 5, n + 6)
  return x.reshape(*lead, t * h * w, pt * ph * pw * C)


def unpatchify(patch_LP, grid, patch_size):
  """Inverse of `patchify`: [..., L, P] tokens of a (t, h, w) grid -> [..., T, H, W, C].

  Tokens behind the first t*h*w are ignored, so a padded row can be passed whole.
  """
  *lead, _, P = patch_LP.shape
  t, h, w = grid
  pt, ph, pw = patch_size
  C = P // (pt * ph * pw)
  x = patch_LP[..., : t * h * w, :].reshape(*lead, t, h, w, pt, ph, pw, C)
  n = len(lead)
  x = x.transpose(*range(n), n, n + 3, n + 1, n + 4, n + 2, n + 5, n + 6)
  return x.reshape(*lead, t * pt, h * ph, w * pw, C)


def fold_time(video_THWC, factor):
  """Folds frames into channels: [1 + factor * k, H, W, C] -> [1 + k, H, W, factor * C].

  Frame 0 fills the first place alone, `factor` times, and each other place holds the
  next `factor` frames: the grid of time that the causal VAE's latents have.

  Raises:
    ValueError: if there are not 1 + factor * k frames.
  """
  T, H, W, C = video_THWC.shape
  if (T - 1) % factor:
    raise ValueError(f"a video of {T} frames does not have 1 + {factor}k")
  x = np.concatenate([np.repeat(video_THWC[:1], factor - 1, axis=0), video_THWC])
  x = x.reshape(-1, factor, H, W, C).transpose(0, 2, 3, 1, 4)
  return x.reshape(-1, H, W, factor * C)


def grid_positions(grid):
  """Positions (t, h, w) of each token of a grid, in patches: float32 [L, 3]."""
  axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in grid), indexing="ij")
  return np.stack(axes, -1).reshape(-1, 3)


def clip_positions(grid, step, extra_times=()):
  """Positions of a clip's tokens, then of those of extra images: float32 [L, 3].

  Args:
    grid: patches (t, h, w) of the clip; an image has (1, h, w).
    step: time from one patch to the next.
    extra_times: when each image is shown, in the same unit.
  """
  position_L3 = grid_positions(grid)
  position_L3[:, 0] *= step
  extra_L3 = np.tile(grid_positions((1, *grid[1:])), (len(extra_times), 1))
  extra_L3[:, 0] = np.repeat(np.asarray(extra_times, np.float32), grid[1] * grid[2])
  return np.concatenate([position_L3, extra_L3])
