"""Health of a VAE: values that can be worked out by hand."""

import numpy as np
import pytest

from sora_jax.evaluation import vae_health


def eigenvalues(latents):
  return vae_health.correlation_eigenvalues(
    sum(vae_health.latent_moments(latent) for latent in latents)
  )


def test_eigenvalues_of_two_correlated_channels():
  """Channels x and 3 (x + y) / sqrt(2) - 5 of independent x, y: 1 +- 1 / sqrt(2)."""
  x, y = np.meshgrid([-1.0, 1.0], [-1.0, 1.0])
  latent = np.stack([x, 3.0 * (x + y) / np.sqrt(2) - 5.0], axis=-1)
  expected = [1 + np.sqrt(0.5), 1 - np.sqrt(0.5)]
  np.testing.assert_allclose(eigenvalues([latent]), expected)
  # Clips of any shape count by their vectors, not each by itself.
  np.testing.assert_allclose(eigenvalues([latent[:1], latent[1:]]), expected)


def test_eigenvalues_are_those_of_the_correlation():
  rng = np.random.default_rng(0)
  latent = (rng.standard_normal((50, 4, 6)) @ rng.standard_normal((6, 6)) + 9.0).astype(
    np.float32
  )
  correlation = np.corrcoef(latent.reshape(-1, 6).astype(np.float64).T)
  expected = np.sort(np.linalg.eigvalsh(correlation))[::-1]
  np.testing.assert_allclose(eigenvalues([latent]), expected, rtol=1e-6)


def test_effective_rank():
  assert vae_health.effective_rank(np.ones(16)) == pytest.approx(16.0)
  assert vae_health.effective_rank(np.array([16.0] + 15 * [0.0])) == pytest.approx(1.0)
  # exp of the entropy of (1/2, 1/4, 1/4) is 2^1.5.
  assert vae_health.effective_rank(np.array([2.0, 1.0, 1.0, 0.0])) == pytest.approx(
    2**1.5
  )
  assert vae_health.effective_rank(np.zeros(4)) == 0.0


def test_channels_that_repeat_or_never_change_are_not_in_use():
  rng = np.random.default_rng(0)
  signal = rng.standard_normal((2000, 3))
  fives = np.full((2000, 1), 5.0)
  found = eigenvalues([np.concatenate([signal, 2.0 * signal[:, :1], fives], axis=1)])
  assert vae_health.channels_in_use(found) == 3
  assert found.sum() == pytest.approx(4.0)  # the constant one has no correlation
  # Eigenvalues 2, 1, 1, 0, 0, but for the chance correlation of 2000 vectors.
  assert vae_health.effective_rank(found) == pytest.approx(2**1.5, rel=0.01)
  assert vae_health.channels_in_use(eigenvalues([fives])) == 0


def test_border_differences():
  """A ramp of 1 a pixel along x, with a jump of 6 more every 8 pixels."""
  x = np.arange(24) + 6 * (np.arange(24) // 8)
  video = np.broadcast_to(x[None, None, :, None], (2, 24, 24, 3)).astype(np.uint8)
  across, inside = vae_health.border_differences(video, 8)
  # Along y, which counts as much, nothing differs.
  assert (across, inside) == pytest.approx((7 / 2, 1 / 2))
  smooth = vae_health.border_differences(video % 2, 24)
  assert smooth[0] == 0.0 and smooth[1] > 0.0
  assert vae_health.border_ratio((3.5, 0.5), (1.0, 0.5)) == pytest.approx(3.5)
  assert vae_health.border_ratio((0.0, 0.0), (0.0, 0.0)) == 1.0


def test_moving_pixels():
  """A pixel that lights up in frame 2 of 5 moves there, before and behind."""
  video = np.full((5, 4, 4, 3), 90, np.uint8)
  video[2, 1, 2, 0] += 17
  video[:, 3, 3] += np.arange(0, 80, 16, dtype=np.uint8)[:, None]  # slowly enough
  moving = vae_health.moving_pixels(video)
  assert moving.shape == (5, 4, 4) and moving.sum() == 3
  assert moving[1:4, 1, 2].all()
  # Darker counts as well: differences are not taken in uint8.
  np.testing.assert_array_equal(vae_health.moving_pixels(255 - video), moving)
  assert not vae_health.moving_pixels(video[:1]).any()
