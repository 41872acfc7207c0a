"""How close a video is to another: PSNR and SSIM."""

import numpy as np
from scipy import ndimage


def ssim(a_THWC: np.ndarray, b_THWC: np.ndarray) -> float:
  """Mean structural similarity of the frames of uint8 videos.

  Wang et al. 2004: Gaussian window, sigma 1.5, 11x11, each channel by itself; the
  border that the window reaches over is left out.

  Raises:
    ValueError: if a frame is not larger than the window.
  """
  if min(a_THWC.shape[1:3]) < 11:
    raise ValueError(f"SSIM needs frames of at least 11x11, not {a_THWC.shape[1:3]}")
  a, b = (x.astype(np.float64) for x in (a_THWC, b_THWC))
  border = 5

  def blur(x):
    return ndimage.gaussian_filter(x, (0, 1.5, 1.5, 0), truncate=3.5)

  mean_a, mean_b = blur(a), blur(b)
  var_a = blur(a * a) - mean_a**2
  var_b = blur(b * b) - mean_b**2
  cov = blur(a * b) - mean_a * mean_b
  c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
  similarity = ((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / (
    (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
  )
  return float(similarity[:, border:-border, border:-border].mean())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """Peak signal-to-noise ratio of uint8 arrays, dB; at most 100."""
  mse = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
  return float(10 * np.log10(255.0**2 / max(mse, 255.0**2 * 1e-10)))
