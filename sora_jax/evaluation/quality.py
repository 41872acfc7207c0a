"""How close a video is to another: PSNR and SSIM, by scikit-image."""

import numpy as np

# Wang et al. 2004: a Gaussian window of sigma 1.5 in 11x11 pixels.
_WINDOW, _SIGMA = 11, 1.5
_MOST_PSNR = 100.0


def ssim(a_THWC: np.ndarray, b_THWC: np.ndarray) -> float:
  """Mean structural similarity of the frames of uint8 videos.

  Each channel counts by itself, and the border that the window reaches over is left
  out, as in Wang et al. 2004.

  Raises:
    ValueError: if a frame is smaller than the window, or the videos differ in shape.
  """
  # Only who evaluates pays for the import.
  from skimage.metrics import structural_similarity

  if min(a_THWC.shape[1:3]) < _WINDOW:
    raise ValueError(
      f"SSIM needs frames of at least {_WINDOW}x{_WINDOW}, not {a_THWC.shape[1:3]}"
    )
  frames = [
    structural_similarity(
      a_HWC,
      b_HWC,
      channel_axis=-1,
      data_range=255,
      gaussian_weights=True,
      sigma=_SIGMA,
      use_sample_covariance=False,
    )
    for a_HWC, b_HWC in zip(a_THWC, b_THWC, strict=True)
  ]
  return float(np.mean(frames))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """Peak signal-to-noise ratio of uint8 arrays in dB; 100 for equal ones, at most."""
  from skimage.metrics import peak_signal_noise_ratio

  with np.errstate(divide="ignore"):  # equal arrays have an infinite ratio
    ratio = peak_signal_noise_ratio(a, b, data_range=255)
  return float(min(ratio, _MOST_PSNR))
