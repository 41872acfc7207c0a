"""The noise process: t = 0 is data, t = 1 is noise, x_t = alpha(t) x0 + sigma(t) eps.

A process is any (alpha, sigma); a target is any a x0 + b eps that a network predicts.
Everything else, training weights and samplers alike, follows from these four numbers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

PROCESSES = ("flow", "ddpm_linear", "ddpm_cosine")
TARGETS = ("velocity", "eps", "x0", "v")
TIMESTEPS = ("uniform", "logit_normal", "mode", "discrete")
DDPM_STEPS = 1000


def _log_alpha_bar(betas) -> np.ndarray:
  return np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])


def _cosine_betas() -> np.ndarray:
  # arXiv:2102.09672, eq. 17, with its offset 0.008 and its limit of 0.999.
  t = np.arange(DDPM_STEPS + 1) / DDPM_STEPS
  alpha_bar = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
  return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


_LOG_ALPHA_BAR = {
  # arXiv:2006.11239, section 4.
  "ddpm_linear": _log_alpha_bar(np.linspace(1e-4, 0.02, DDPM_STEPS)),
  "ddpm_cosine": _log_alpha_bar(_cosine_betas()),
}


def alpha_sigma(process: str, t, xp=jnp):
  """Scales of the data and of the noise at level t, like t.

  "flow" is rectified flow (arXiv:2209.03003): 1 - t and t. "ddpm_linear" and
  "ddpm_cosine" are variance preserving, alpha^2 + sigma^2 = 1: step i of the published
  1000 is t = i / 1000, log(alpha^2) is linear in between, and t = 0 is clean data.

  Args:
    process: one of PROCESSES.
    t: levels in [0, 1], any shape.
    xp: jnp, or numpy for float64 tables.
  """
  if process == "flow":
    return 1.0 - t, t
  table = _LOG_ALPHA_BAR[process]
  log_alpha_bar = xp.interp(t * DDPM_STEPS, xp.arange(len(table)), xp.asarray(table))
  return xp.exp(0.5 * log_alpha_bar), xp.sqrt(-xp.expm1(log_alpha_bar))


def target_weights(target: str, alpha, sigma):
  """(a, b) of the target a x0 + b eps.

  "velocity" is eps - x0, the derivative of a rectified flow; "v" is alpha eps - sigma
  x0 (arXiv:2202.00512).
  """
  ones, zeros = 1.0 + 0.0 * alpha, 0.0 * alpha
  return {
    "velocity": (-ones, ones),
    "eps": (zeros, ones),
    "x0": (ones, zeros),
    "v": (-sigma, alpha),
  }[target]


def add_noise(x0: Array, eps: Array, t: Array, process: str = "flow") -> Array:
  """x_t of data x0 and standard normal eps; t broadcasts against them."""
  alpha, sigma = alpha_sigma(process, t)
  return alpha * x0 + sigma * eps


def make_target(
  x0: Array, eps: Array, t: Array, target: str = "velocity", process: str = "flow"
) -> Array:
  """What the network is to predict from x_t; t broadcasts against x0 and eps."""
  a, b = target_weights(target, *alpha_sigma(process, t))
  return a * x0 + b * eps


def to_x0(
  predicted: Array,
  x: Array,
  t: Array,
  target: str = "velocity",
  process: str = "flow",
) -> Array:
  """Data that a prediction at x = x_t stands for.

  x0 = (b x - sigma predicted) / (alpha b - sigma a). Velocity and v have no singular
  level, x0 needs no division; eps says nothing about data where alpha is 0.
  """
  alpha, sigma = alpha_sigma(process, t)
  a, b = target_weights(target, alpha, sigma)
  if target == "x0":
    return predicted
  return (b * x - sigma * predicted) / (alpha * b - sigma * a)


def loss_weight(
  t: Array, gamma: float, target: str = "velocity", process: str = "flow"
) -> Array:
  """Min-SNR weight of a squared error in the target (arXiv:2303.09556, eq. 8).

  min(SNR, gamma) is the weight of an error in x0; an error in the target is
  |alpha b - sigma a| / sigma times that one, which gives the paper's factors for eps
  and v, and one for the velocity.
  """
  alpha, sigma = alpha_sigma(process, t)
  a, b = target_weights(target, alpha, sigma)
  scale = jnp.maximum(jnp.square(alpha * b - sigma * a), 1e-12)
  return jnp.minimum(jnp.square(alpha), gamma * jnp.square(sigma)) / scale


def sample_timesteps(
  key: Array,
  shape,
  kind: str = "logit_normal",
  *,
  mean: float = 0.0,
  std: float = 1.0,
  mode_scale: float = 1.29,
) -> Array:
  """Noise levels in [0, 1] to train at.

  Args:
    key, shape: of the draw.
    kind: "uniform"; "logit_normal" with mean and std, and "mode" with its scale, as in
      arXiv:2403.03206, section 3.1; "discrete", uniform over 1/1000 .. 1 (DDPM).
    mean, std, mode_scale: of the kinds that have them.
  """
  if kind == "logit_normal":
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))
  if kind == "discrete":
    steps = jax.random.randint(key, shape, 1, DDPM_STEPS + 1)
    return steps.astype(jnp.float32) / DDPM_STEPS
  u = jax.random.uniform(key, shape)
  if kind == "uniform":
    return u
  bend = jnp.square(jnp.cos(0.5 * math.pi * u)) - 1.0 + u
  return jnp.clip(1.0 - u - mode_scale * bend, 0.0, 1.0)


def shift_timesteps(t, shift):
  """Moves levels towards noise: t' = s t / (1 + (s - 1) t), arXiv:2403.03206 eq. 23."""
  return shift * t / (1.0 + (shift - 1.0) * t)


def resolution_shift(shift: float, tokens, base_tokens: int):
  """Shift of a clip of that many tokens: more of them need more noise to be hidden.

  shift * sqrt(tokens / base_tokens), arXiv:2403.03206 section 5.3.2; base_tokens 0 is
  the same shift for all.
  """
  return shift * (tokens / base_tokens) ** 0.5 if base_tokens else shift


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
