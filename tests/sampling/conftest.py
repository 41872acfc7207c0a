"""The tiny model, for all tests of sampling."""

import jax
import numpy as np
import pytest

from sora_jax.runtime import sharding
from sora_jax.sampling.pipeline import Sampler


@pytest.fixture(scope="module", autouse=True)
def _fast(fast_compile):
  """All tests of the folder compile fast."""


@pytest.fixture(scope="module")
def sampler(tiny_run):
  """The tiny model with random params, so that every input has a say."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  made = Sampler.from_checkpoint(tiny_run.workdir, mesh)
  rng = np.random.default_rng(0)
  made.params = jax.tree.map(
    lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), made.params
  )
  return made
