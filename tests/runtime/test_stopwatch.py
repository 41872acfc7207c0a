"""Seconds of work are those without compilation."""

import time

import jax
import jax.numpy as jnp

from sora_jax.runtime.stopwatch import Stopwatch


def test_compilation_is_not_counted():
  @jax.jit
  def compute(x):
    return jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y) @ y, x)

  x = jnp.ones((8, 8))
  begin = time.monotonic()
  with Stopwatch() as first:
    compute(x).block_until_ready()
    time.sleep(0.05)
  whole = time.monotonic() - begin
  assert first.compiling > 0 and 0.05 <= first.seconds <= whole - first.compiling
  with Stopwatch() as second:
    compute(x).block_until_ready()
  assert second.compiling == 0
  # Outside of it, nothing is heard.
  jax.jit(lambda x: x + 1)(x).block_until_ready()
  assert second.compiling == 0
