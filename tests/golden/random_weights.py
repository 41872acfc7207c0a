"""What both sides of a comparison make: weights by their names, and images."""

import zlib

import numpy as np


def random_tensor(name: str, shape) -> np.ndarray:
  """A float32 tensor of a network, always the same for a name and shape.

  Matrices keep the scale of their input, norms are near 1, biases small.
  """
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  value = rng.standard_normal(tuple(shape), np.float32)
  is_norm = "norm" in name and name.split(".")[-1] in ("weight", "gamma")
  if is_norm:
    return 1.0 + 0.1 * value
  if len(shape) < 2 or "table" in name or "modulation" in name:
    return 0.1 * value
  return value / np.float32(np.sqrt(np.prod(shape[1:])))


def smooth_images(height: int, width: int) -> list[np.ndarray]:
  """A first and a last frame of waves, uint8 [H, W, 3]."""
  y, x = np.mgrid[:height, :width]
  made = []
  for k in (1.0, 2.5):
    waves = [np.sin(0.11 * k * x + c) + np.cos(0.07 * y * (c + 1)) for c in range(3)]
    made.append(np.round(63.75 * (np.stack(waves, -1) + 2)).astype(np.uint8))
  return made
