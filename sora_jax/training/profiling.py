"""Traces of chosen train steps, for TensorBoard's profile plugin and XProf."""

import contextlib
import dataclasses
import os

import jax
from absl import logging


@dataclasses.dataclass(frozen=True)
class Profile:
  """Which steps of a train stage are traced: `steps` of them after step `start`.

  0 steps = none. The trace is in workdir/<stage>/profile. Traces are large: a few steps
  are enough, and step 0 is mostly compilation.
  """

  start: int = 10
  steps: int = 0

  def __post_init__(self):
    if self.start < 0 or self.steps < 0:
      raise ValueError(
        f"start {self.start} and steps {self.steps} must not be negative"
      )


class Tracer:
  """Starts and stops the trace as a loop comes by."""

  def __init__(self, profile: Profile, folder):
    self._profile, self._folder = profile, os.fspath(folder)
    self._active = False

  def reached(self, step: int, settle) -> None:
    """Call it with `step` steps dispatched; `settle` waits for those under way."""
    first, count = self._profile.start, self._profile.steps
    if count and step == first:
      settle()
      jax.profiler.start_trace(self._folder)
      self._active = True
    elif self._active and step == first + count:
      settle()
      self.close()

  def step(self, step: int):
    """Context of the dispatch of a step: marks it in a trace that is under way."""
    if not self._active:
      return contextlib.nullcontext()
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def close(self) -> None:
    """Writes the trace that is under way, if one is."""
    if self._active:
      self._active = False
      jax.profiler.stop_trace()
      logging.info("the trace is in %s: tensorboard --logdir=%s", *[self._folder] * 2)
