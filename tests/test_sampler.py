"""Solvers: order of convergence, an analytic Gaussian, guidance, schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import sampler

DIM = 6


def gaussian():
  """Mean, basis and variances along it: anisotropic (condition 100) and rotated."""
  rng = np.random.default_rng(3)
  basis, _ = np.linalg.qr(rng.standard_normal((DIM, DIM)))
  return rng.standard_normal(DIM), basis, np.geomspace(0.04, 4.0, DIM)


@functools.partial(jax.jit, static_argnums=(1, 2))
def solve_gaussian(x_BD, steps, method):
  """With E[eps - x0 | x_t] for Gaussian data: the best that a network could learn."""
  mean, basis, variance = (jnp.asarray(x, jnp.float32) for x in gaussian())

  def velocity(x_BD, t):
    # x_t has variance (1 - t)^2 v + t^2 along each direction of the basis.
    y_BD = (x_BD - (1 - t) * mean) @ basis / ((1 - t) ** 2 * variance + t**2)
    x0_BD = mean + (1 - t) * (variance * y_BD) @ basis.T
    eps_BD = t * y_BD @ basis.T
    return eps_BD - x0_BD

  return sampler.integrate(velocity, x_BD, sampler.schedule(steps), method)


def whiten(covariance):
  """Identity if it is the covariance of `gaussian`, relative in every direction."""
  _, basis, variance = gaussian()
  return basis.T @ covariance @ basis / np.sqrt(variance[:, None] * variance)


@pytest.mark.parametrize("method, tolerance", [("euler", 3e-2), ("heun", 2e-3)])
def test_solves_a_gaussian(method, tolerance):
  """The flow is affine, x -> A x + b, so N(0, I) goes to exactly N(b, A A^T)."""
  corners = np.concatenate([np.zeros((1, DIM)), np.eye(DIM)]).astype(np.float32)
  out = np.asarray(solve_gaussian(corners, 200, method), np.float64)
  b, A = out[0], (out[1:] - out[0]).T
  np.testing.assert_allclose(b, gaussian()[0], atol=tolerance)
  np.testing.assert_allclose(whiten(A @ A.T), np.eye(DIM), atol=tolerance)


def test_samples_have_the_moments_of_a_gaussian():
  mean, basis, variance = gaussian()
  count = 4096
  noise = jax.random.normal(jax.random.key(0), (count, DIM))
  samples = np.asarray(solve_gaussian(noise, 64, "heun"), np.float64)
  error = (samples.mean(0) - mean) @ basis / np.sqrt(variance)
  assert np.abs(error).max() < 4 / np.sqrt(count)
  whitened = whiten(np.cov(samples.T))
  assert np.abs(whitened - np.eye(DIM)).max() < 6 * np.sqrt(2 / count)


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order):
  """dx/dt = x cos(3 t) from t = 1 to 0, whose solution is known."""
  exact = np.exp(-np.sin(3.0) / 3)

  def error(steps):
    out = sampler.integrate(
      lambda x, t: x * jnp.cos(3 * t), jnp.ones(()), sampler.schedule(steps), method
    )
    return abs(float(out) - exact)

  errors = np.array([error(steps) for steps in (32, 64, 128)])
  np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.3)


@pytest.mark.parametrize("method", sampler.METHODS)
def test_straight_paths_need_one_step(method):
  noise, data = jnp.arange(3.0), jnp.array([5.0, -1.0, 2.0])
  out = sampler.integrate(
    lambda x, t: noise - data, noise, sampler.schedule(1, 3.0), method
  )
  np.testing.assert_allclose(out, data, atol=1e-6)


@pytest.mark.parametrize("method, calls", [("euler", 4), ("heun", 7)])
def test_network_is_never_asked_about_clean_data(method, calls):
  levels = []

  def velocity(x, t):
    jax.debug.callback(lambda t: levels.append(float(t)), t)
    return jnp.zeros_like(x)

  sampler.integrate(velocity, jnp.zeros(2), sampler.schedule(4), method)
  jax.effects_barrier()
  assert len(levels) == calls
  assert min(levels) == pytest.approx(0.25) and max(levels) == 1.0


def test_unknown_method():
  with pytest.raises(ValueError, match="'rk4' is not one of"):
    sampler.integrate(lambda x, t: x, jnp.zeros(2), sampler.schedule(2), "rk4")


def test_guidance():
  conditional, unconditional = jnp.array([1.0, 2.0]), jnp.array([0.5, 4.0])
  for scale, expected in [(0, [0.5, 4.0]), (1, [1.0, 2.0]), (3, [2.0, -2.0])]:
    np.testing.assert_allclose(
      sampler.guide(conditional, unconditional, scale), expected, atol=1e-6
    )


def test_schedule():
  levels = np.asarray(sampler.schedule(8))
  np.testing.assert_allclose(levels, np.linspace(1, 0, 9), atol=1e-7)
  shifted = np.asarray(sampler.schedule(8, 3.0))
  assert shifted.dtype == np.float32 and shifted.shape == (9,)
  assert shifted[0] == 1.0 and shifted[-1] == 0.0
  assert np.all(np.diff(shifted) < 0)
  np.testing.assert_allclose(shifted, 3 * levels / (1 + 2 * levels), atol=1e-6)
