"""Weights that both sides of a comparison make from the names of their tensors."""

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
