"""Muon: which params are matrices to it, with NumPy's SVD as the judge."""

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.training import optim
from sora_jax.training.config import TrainConfig


@pytest.mark.slow
def test_muon_takes_kernels_of_blocks_stems_and_convolutions_as_matrices():
  """Its first update is the gradient with singular values near 1, times a scale."""
  rng = np.random.default_rng(0)
  shapes = {
    "blocks": {"up": {"kernel": (3, 8, 16), "bias": (3, 16)}},
    "conv": {"kernel": (1, 2, 2, 6, 16), "bias": (16,)},
    "embed": {"kernel": (8, 16)},
    "stem": {"patch_embed": {"kernel": (24, 16)}},
  }

  def draw(shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  def tree(make):
    return {
      outer: {
        key: make(value)
        if isinstance(value, tuple)
        else {name: make(shape) for name, shape in value.items()}
        for key, value in inner.items()
      }
      for outer, inner in shapes.items()
    }

  params, gradients = tree(jnp.zeros), tree(draw)
  config = TrainConfig(
    steps=10, optimizer="muon", learning_rate=1.0, clip_norm=0.0, weight_decay=0.0
  )
  optimizer, _ = optim.make(config, params)
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)

  def values(update, gradient):
    """Singular values of an update, which has the gradient's own directions."""
    u, _, vt = np.linalg.svd(gradient, full_matrices=False)
    inside = u.T @ -np.asarray(update, np.float64) @ vt.T
    off = inside - np.diag(np.diag(inside))
    assert np.abs(off).max() < 1e-3 * np.abs(inside).max()
    return np.diag(inside)

  for layer in range(3):
    found = values(
      updates["blocks"]["up"]["kernel"][layer],
      gradients["blocks"]["up"]["kernel"][layer],
    )
    assert found.min() > 0.6 * found.max()
  conv = (x["conv"]["kernel"].reshape(24, 16) for x in (updates, gradients))
  stem = (x["stem"]["patch_embed"]["kernel"] for x in (updates, gradients))
  for pair in (conv, stem):
    found = values(*pair)
    assert found.min() > 0.6 * found.max()
  # consistent_rms: the update is as large as one of AdamW is, 0.2 on average.
  rms = np.sqrt(np.mean(np.square(updates["conv"]["kernel"])))
  assert 0.1 < rms < 0.3
  # All else is AdamW's, whose first update knows only the sign of the gradient.
  for name in (("embed", "kernel"), ("conv", "bias")):
    update, gradient = (np.asarray(x[name[0]][name[1]]) for x in (updates, gradients))
    np.testing.assert_array_equal(np.sign(update), -np.sign(gradient))
    np.testing.assert_allclose(np.abs(update), np.abs(update).mean(), rtol=1e-3)
