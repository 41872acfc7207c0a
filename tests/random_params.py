"""Params of random numbers: to compile init takes longer than all that is tested."""

import jax
import numpy as np


def random_params(init, *args, seed=0):
  """Params as init(*args) has them: none is 0, and outputs have the size of inputs."""
  rng = np.random.default_rng(seed)

  def draw(leaf):
    fan_in = max(1, int(np.prod(leaf.shape[:-1])))
    return (rng.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

  return jax.tree.map(draw, jax.eval_shape(init, *args))
