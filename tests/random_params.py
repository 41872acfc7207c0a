"""Params of random numbers: to compile init takes longer than all that is tested."""

import jax
import numpy as np


def random_params(init, *args, seed=0, scale=None):
  """`random_like` the params that init(*args) has."""
  return random_like(jax.eval_shape(init, *args), seed, scale)


def random_like(shapes, seed=0, scale=None):
  """Params of these shapes, none 0: at init some outputs are 0 and hide the rest.

  scale: their deviation; by default outputs have the size of inputs.
  """
  rng = np.random.default_rng(seed)

  def draw(leaf):
    fan_in = max(1, np.prod(leaf.shape[:-1]))
    deviation = 1 / np.sqrt(fan_in) if scale is None else scale
    return (deviation * rng.standard_normal(leaf.shape)).astype(np.float32)

  return jax.tree.map(draw, shapes)
