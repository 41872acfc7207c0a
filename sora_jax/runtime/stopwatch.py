"""Seconds of work, without those in which JAX compiled its programs."""

import time

import jax


class Stopwatch:
  """Measures a block, which has to wait for its results.

    with Stopwatch() as watch:
      videos = model.sample(requests)
    watch.seconds

  Attributes:
    seconds: of the block, without compilation: what it takes the next time.
    compiling: seconds of tracing, lowering and compilation in it.
  """

  def __init__(self):
    self.seconds = self.compiling = 0.0

  def __enter__(self) -> "Stopwatch":
    jax.monitoring.register_event_duration_secs_listener(self._hear)
    self._begin = time.monotonic()
    return self

  def __exit__(self, *error) -> None:
    taken = time.monotonic() - self._begin
    jax.monitoring.unregister_event_duration_listener(self._hear)
    self.seconds = max(0.0, taken - self.compiling)

  def _hear(self, event: str, duration_secs: float, **_) -> None:
    if event.startswith("/jax/core/compile/"):
      self.compiling += duration_secs
