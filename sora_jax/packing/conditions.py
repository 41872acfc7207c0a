"""Given frames as channels beside the noise, as Wan's models for images read them."""

from collections.abc import Iterable, Mapping

import numpy as np

from sora_jax.packing import time_grid


def grey_but(images: Mapping[int, np.ndarray], frames: int) -> np.ndarray:
  """A video, float32 [T, H, W, 3] in [-1, 1], that is grey but for given frames.

  images: uint8 [H, W, 3] by the index of their frame.
  """
  shape = next(iter(images.values())).shape
  video_THWC = np.zeros((frames, *shape), np.float32)
  for at, image_HWC in images.items():
    video_THWC[at] = image_HWC / np.float32(127.5) - np.float32(1.0)
  return video_THWC


def channels(latent_THWC: np.ndarray, given: Iterable[int]) -> np.ndarray:
  """A mask of each latent frame's 4 frames, and latents: float32 [T, H, W, 4 + C].

  Args:
    latent_THWC: of a video with the given frames, grey elsewhere.
    given: indices of those frames.
  """
  T, H, W, _ = latent_THWC.shape
  # The first latent is of one frame, which counts four times.
  known_F = np.zeros(time_grid.TIME_FACTOR * T, np.float32)
  for at in given:
    known_F[at + time_grid.TIME_FACTOR - 1] = 1.0
  known_F[: time_grid.TIME_FACTOR - 1] = known_F[time_grid.TIME_FACTOR - 1]
  mask_THWF = np.broadcast_to(known_F.reshape(T, 1, 1, -1), (T, H, W, 4))
  return np.concatenate([mask_THWF, latent_THWC], axis=-1).astype(np.float32)
