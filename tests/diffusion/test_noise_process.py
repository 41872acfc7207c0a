"""Noise process: interpolation, target, noise levels, and the loss by noise level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sora_jax.diffusion import noise_process


def draw(*shape):
  return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def test_ends_are_data_and_noise():
  x0, eps = draw(2, 3, 4), draw(3, 4)
  np.testing.assert_array_equal(noise_process.add_noise(x0, eps, 0.0), x0)
  np.testing.assert_array_equal(
    noise_process.add_noise(x0, eps, 1.0), np.broadcast_to(eps, x0.shape)
  )


def test_velocity_is_the_derivative_and_leads_to_both_ends():
  x0, eps = draw(5, 4), draw(1, 5, 4)[0]
  t = np.float32(0.3)
  x, derivative = jax.jvp(
    lambda t: noise_process.add_noise(x0, eps, t), (t,), (jnp.ones(()),)
  )
  v = noise_process.make_target(x0, eps, t)
  np.testing.assert_allclose(derivative, v, rtol=1e-6)
  np.testing.assert_allclose(x - t * v, x0, atol=1e-6)
  np.testing.assert_allclose(x + (1 - t) * v, eps, atol=1e-6)


def test_level_of_each_token():
  x0, eps, t_L = draw(3, 4), draw(1, 3, 4)[0], np.array([0.0, 0.5, 1.0], np.float32)
  x = noise_process.add_noise(x0, eps, t_L[:, None])
  np.testing.assert_allclose(x, [x0[0], (x0[1] + eps[1]) / 2, eps[2]], atol=1e-6)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 1.4)])
def test_levels_are_logit_normal(mean, std):
  t = noise_process.sample_timesteps(jax.random.key(1), (200, 100), mean=mean, std=std)
  t = np.asarray(t, np.float64)
  assert t.shape == (200, 100) and 0 < t.min() and t.max() < 1
  logit = np.log(t / (1 - t)).ravel()
  assert abs(logit.mean() - mean) < 4 * std / np.sqrt(logit.size)
  assert abs(logit.std() - std) < 4 * std / np.sqrt(2 * logit.size)
  normal = scipy.stats.norm(mean, std)
  assert scipy.stats.kstest(logit, normal.cdf).pvalue > 1e-3
  # Moments of t itself, by quadrature over the normal.
  grid = np.linspace(-8, 8, 4001)
  density = scipy.stats.norm.pdf(grid) * (grid[1] - grid[0])
  level = 1 / (1 + np.exp(-(mean + std * grid)))
  first, second = (density * level).sum(), (density * level**2).sum()
  assert abs(t.mean() - first) < 4 * np.sqrt((second - first**2) / t.size)
  assert abs((t**2).mean() - second) < 4 / np.sqrt(t.size)


def test_levels_follow_the_key():
  def draws(seed):
    return noise_process.sample_timesteps(
      jax.random.key(seed), (64,), mean=0.0, std=1.0
    )

  np.testing.assert_array_equal(draws(0), draws(0))
  assert not np.any(draws(0) == draws(1))


def test_shift():
  t = np.linspace(0, 1, 11, dtype=np.float32)
  np.testing.assert_array_equal(noise_process.shift_timesteps(t, 1.0), t)
  for shift in (0.5, 3.0):
    moved = np.asarray(noise_process.shift_timesteps(t, shift))
    np.testing.assert_allclose(moved[[0, -1]], [0, 1], atol=1e-7)
    assert np.all(np.diff(moved) > 0)
    assert np.all((moved > t)[1:-1] == (shift > 1))
    # The ratio of noise to data grows by the shift, which is what it is for.
    inner = slice(1, -1)
    ratio = moved[inner] / (1 - moved[inner])
    np.testing.assert_allclose(ratio, shift * t[inner] / (1 - t[inner]), rtol=1e-5)
  there_and_back = noise_process.shift_timesteps(
    noise_process.shift_timesteps(t, 3.0), 1 / 3
  )
  np.testing.assert_allclose(there_and_back, t, atol=1e-6)


def alpha_bar(process):
  """alpha^2 of steps 1 to 1000, as the papers define it."""
  if process == "ddpm_linear":
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
  return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


@pytest.mark.slow
@pytest.mark.parametrize("process", ["ddpm_linear", "ddpm_cosine"])
def test_published_noise_schedules(process):
  t = np.arange(1001, dtype=np.float32) / 1000
  alpha, sigma = (np.asarray(x) for x in noise_process.alpha_sigma(process, t))
  assert (alpha[0], sigma[0]) == (1.0, 0.0)
  np.testing.assert_allclose(alpha[1:] ** 2, alpha_bar(process), rtol=2e-4, atol=1e-8)
  np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=1e-6)
  between = np.linspace(0, 1, 777, dtype=np.float32)
  assert np.all(np.diff(noise_process.alpha_sigma(process, between)[0]) < 0)


@pytest.mark.parametrize("target", noise_process.TARGETS)
@pytest.mark.parametrize("process", noise_process.PROCESSES)
def test_every_target_leads_back_to_the_data(process, target):
  x0, eps = draw(5, 4), draw(1, 5, 4)[0]
  for t in np.array([0.0, 1e-3, 0.3, 0.7, 0.9], np.float32):
    x = noise_process.add_noise(x0, eps, t, process)
    if not t:
      np.testing.assert_array_equal(x, x0)
    predicted = noise_process.make_target(x0, eps, t, target, process)
    back = noise_process.to_x0(predicted, x, t, target, process)
    np.testing.assert_allclose(back, x0, atol=2e-5)


@pytest.mark.parametrize("process", ["ddpm_linear", "ddpm_cosine"])
def test_min_snr_weights_of_the_paper(process):
  t = np.linspace(0.01, 0.9, 30, dtype=np.float32)
  alpha, sigma = (
    np.asarray(x, np.float64) for x in noise_process.alpha_sigma(process, t)
  )
  snr = alpha**2 / sigma**2
  clipped = np.minimum(snr, 5.0)
  for target, expected in {
    "x0": clipped,
    "eps": clipped / snr,
    "v": clipped / (snr + 1),
    "velocity": clipped / (alpha / sigma + 1) ** 2,
  }.items():
    weight = noise_process.loss_weight(t, 5.0, target, process)
    np.testing.assert_allclose(weight, expected, rtol=1e-3)


def test_kinds_of_timesteps():
  def draws(kind, **kwargs):
    t = noise_process.sample_timesteps(jax.random.key(2), (20000,), kind, **kwargs)
    return np.asarray(t, np.float64)

  assert scipy.stats.kstest(draws("uniform"), "uniform").pvalue > 1e-3
  discrete = draws("discrete") * 1000
  np.testing.assert_allclose(discrete, np.round(discrete), atol=1e-3)
  assert np.round(discrete.min()) == 1 and np.round(discrete.max()) == 1000
  # Quantiles, t being a decreasing function of a uniform u.
  for scale in (0.0, 0.81, 1.29):
    u = np.linspace(0.05, 0.95, 19)
    expected = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    found = np.quantile(draws("mode", mode_scale=scale), 1 - u)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_resolution_shift():
  assert noise_process.resolution_shift(3.0, 4096, 0) == 3.0
  assert noise_process.resolution_shift(3.0, 1024, 256) == 6.0


def test_loss_bins():
  rng = np.random.default_rng(0)
  error, weight, t = rng.random((3, 4, 50)).astype(np.float32)
  t *= 0.5  # the last two bins stay empty
  t[0, 0] = 1.0 / 4  # on an edge: the upper bin
  values = {
    k: float(v) for k, v in noise_process.loss_bins(error, weight, t, 4).items()
  }
  assert values.keys() == {f"loss_t/{i}{s}" for i in range(4) for s in ("", ":weight")}
  for i in range(4):
    inside = (t >= i / 4) & (t < (i + 1) / 4)
    np.testing.assert_allclose(
      values[f"loss_t/{i}:weight"], weight[inside].sum(), rtol=1e-5
    )
    expected = np.average(error[inside], weights=weight[inside]) if i < 2 else 0.0
    np.testing.assert_allclose(values[f"loss_t/{i}"], expected, rtol=1e-5)
  # The ends of the range belong to a bin each.
  ones = jnp.ones(2)
  values = noise_process.loss_bins(ones, ones, jnp.array([0.0, 1.0]), 3)
  assert [float(values[f"loss_t/{i}:weight"]) for i in range(3)] == [1, 0, 1]
