"""Learning rates are those of optax's schedules, but for the last digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sora_jax.training import optim
from sora_jax.training.config import TrainConfig

STEPS, WARMUP, DECAY, PEAK = 400, 50, 120, 2e-3


def reference(kind):
  """Warm-up that begins at PEAK / WARMUP, then the named schedule, by optax."""
  tails = {
    "constant": optax.constant_schedule(PEAK),
    "cosine": optax.cosine_decay_schedule(PEAK, STEPS - WARMUP),
    "wsd": optax.join_schedules(
      [optax.constant_schedule(PEAK), optax.linear_schedule(PEAK, 0.0, DECAY)],
      [STEPS - DECAY - WARMUP],
    ),
  }
  warm_up = optax.linear_schedule(PEAK / WARMUP, PEAK, WARMUP - 1)
  return optax.join_schedules([warm_up, tails[kind]], [WARMUP])


@pytest.mark.parametrize("kind", optim.SCHEDULES)
def test_schedules_are_those_of_optax(kind):
  config = TrainConfig(
    steps=STEPS,
    learning_rate=PEAK,
    warmup_steps=WARMUP,
    schedule=kind,
    decay_steps=DECAY,
  )
  steps = jnp.arange(STEPS)
  ours = jax.vmap(optim.make_schedule(config, PEAK))(steps)
  np.testing.assert_allclose(
    ours, jax.vmap(reference(kind))(steps), rtol=1e-5, atol=1e-7 * PEAK
  )
