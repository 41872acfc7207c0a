"""Whether a VAE's latents and reconstructions are healthy, in a few numbers.

A mean PSNR hides what spoils samples: it is the background's. The latents may repeat
few signals over many channels, so that the diffusion model has to carry noise in the
others; frames may show the grid of the blocks that they are drawn in; and what moves
may be lost.
"""

import numpy as np

# Of an eigenvalue of the correlation, whose mean is 1, to count as a channel in use.
_LEAST_EIGENVALUE = 0.1
# Levels of 255 by which a pixel has to change from frame to frame, in some channel, to
# count as moving; codecs change what stands still by less.
_LEAST_CHANGE = 16


def latent_moments(latent: np.ndarray) -> np.ndarray:
  """Number, sums and products of latent vectors [..., C], float64 [1 + C, 1 + C].

  It is x^T x of the vectors x = (1, channels), so that the moments of several clips
  are added up.
  """
  rows_NC = np.reshape(latent, (-1, latent.shape[-1])).astype(np.float64)
  rows_NX = np.concatenate([np.ones((len(rows_NC), 1)), rows_NC], axis=1)
  return rows_NX.T @ rows_NX


def correlation_eigenvalues(moments: np.ndarray) -> np.ndarray:
  """Eigenvalues [C] of the correlation of the channels, largest first.

  Their sum is C, less one for each channel that never changes.

  Args:
    moments: sum of the `latent_moments` of all clips.
  """
  mean_C = moments[0, 1:] / moments[0, 0]
  covariance_CC = moments[1:, 1:] / moments[0, 0] - np.outer(mean_C, mean_C)
  variance_C = np.diag(covariance_CC)
  # Below float32's rounding of the products there is no variance to speak of.
  alive_C = variance_C > 1e-12 * (mean_C**2 + variance_C.max())
  scale_C = alive_C / np.sqrt(np.where(alive_C, variance_C, 1.0))
  eigenvalues = np.linalg.eigvalsh(covariance_CC * np.outer(scale_C, scale_C))
  return np.maximum(eigenvalues[::-1], 0.0)


def effective_rank(eigenvalues: np.ndarray) -> float:
  """Returns exp of the entropy of the eigenvalues, as shares of their sum.

  It is C where all C channels vary on their own, and 1 where all repeat one signal
  (Roy and Vetterli 2007, "The effective rank"). 0 where nothing varies.
  """
  total = float(np.sum(eigenvalues))
  if total <= 0:
    return 0.0
  shares = eigenvalues[eigenvalues > 0] / total
  return float(np.exp(-np.sum(shares * np.log(shares))))


def channels_in_use(eigenvalues: np.ndarray) -> int:
  """Returns the number of eigenvalues of at least a tenth of a channel's share.

  That many channels, rightly turned, hold all but little of what the latents say.
  """
  return int(np.sum(eigenvalues >= _LEAST_EIGENVALUE))


def border_differences(video_THWC: np.ndarray, block: int) -> tuple[float, float]:
  """Mean absolute differences of neighbouring pixels: across borders, and inside.

  The ratio of the two is 1 for natural frames, and more where blocks of `block` x
  `block` pixels show. Both are 0 where there is no such pair.
  """
  video_THWC = np.asarray(video_THWC, np.float32)
  across, inside = [], []
  for axis in (1, 2):
    difference = np.abs(np.diff(video_THWC, axis=axis))
    # Difference i is between pixels i and i + 1.
    at_border = (np.arange(difference.shape[axis]) + 1) % block == 0
    across.append(np.compress(at_border, difference, axis=axis).ravel())
    inside.append(np.compress(~at_border, difference, axis=axis).ravel())
  return _mean(np.concatenate(across)), _mean(np.concatenate(inside))


def border_ratio(decoded: tuple[float, float], real: tuple[float, float]) -> float:
  """Returns how much more decoded frames jump at borders than the real ones do.

  Args:
    decoded, real: `border_differences` of both, or their means over several clips.

  Returns:
    The ratio across to inside of the decoded frames over that of the real ones (which
    have been through a codec of blocks themselves). A difference of less than a
    hundredth of a level counts as that much.
  """
  across, inside, real_across, real_inside = np.maximum((*decoded, *real), 0.01)
  return float(across / inside / (real_across / real_inside))


def moving_pixels(video_THWC: np.ndarray) -> np.ndarray:
  """Returns which pixels of a uint8 video move: bool [T, H, W].

  These differ from the frame before or the frame after by more than 16 of 255 levels
  in some channel. In an image nothing moves.
  """
  frames = np.asarray(video_THWC, np.int16)
  changed = np.abs(np.diff(frames, axis=0)).max(axis=-1) > _LEAST_CHANGE
  still = np.zeros_like(frames[:1, :, :, 0], bool)
  return np.concatenate([still, changed]) | np.concatenate([changed, still])


def _mean(values: np.ndarray) -> float:
  return float(values.mean()) if values.size else 0.0
