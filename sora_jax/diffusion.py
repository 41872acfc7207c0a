"""The noise process: t = 0 is data, t = 1 is noise, x_t = alpha(t) x0 + sigma(t) eps.

Rectified flow (arXiv:2209.03003, arXiv:2403.03206): alpha = 1 - t, sigma = t, and the
network predicts the velocity dx/dt = eps - x0.
"""

import jax
import jax.numpy as jnp
from jax import Array


def add_noise(x0: Array, eps: Array, t: Array) -> Array:
  """x_t of data x0 and standard normal eps; t broadcasts against them."""
  return (1.0 - t) * x0 + t * eps


def velocity(x0: Array, eps: Array) -> Array:
  """dx_t/dt, the regression target."""
  return eps - x0


def sample_timesteps(key: Array, shape, *, mean: float, std: float) -> Array:
  """Noise levels in (0, 1), logit-normal as in arXiv:2403.03206, section 3.1."""
  return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))


def shift_timesteps(t: Array, shift: float) -> Array:
  """Moves levels towards noise: t' = s t / (1 + (s - 1) t), arXiv:2403.03206 eq. 23."""
  return shift * t / (1.0 + (shift - 1.0) * t)


def loss_bins(
  error_B: Array, weight_B: Array, t_B: Array, bins: int
) -> dict[str, Array]:
  """Mean error by noise level, as weighted metrics `loss_t/i` (see metrics.Meter).

  Args:
    error_B, weight_B, t_B: error, its weight and noise level of each item, any shape.
    bins: equal parts of [0, 1].
  """
  index = jnp.clip((t_B * bins).astype(jnp.int32), 0, bins - 1)
  values = {}
  for i in range(bins):
    weight = jnp.sum(jnp.where(index == i, weight_B, 0.0))
    total = jnp.sum(jnp.where(index == i, weight_B * error_B, 0.0))
    values[f"loss_t/{i}"] = total / jnp.maximum(weight, 1.0)
    values[f"loss_t/{i}:weight"] = weight
  return values
