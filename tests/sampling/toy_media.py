"""Requests, latents and clips of the tests of sampling, at the tiny model's size."""

import numpy as np

from sora_jax.diffusion.solvers import Options
from sora_jax.sampling.conditioning import Request

OPTIONS = Options(steps=2)
C = 4


def request(**kwargs):
  return Request(**{"prompt": "a red circle", "width": 32, "height": 32, "frames": 17,
                    "fps": 12.0, "seed": 1, **kwargs})  # fmt: skip


def latents(frames, seed=0, size=4):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((frames, size, size, C)).astype(np.float32)


def clip(frames, seed=0, size=(32, 32)):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (frames, *size, 3), np.uint8)
