"""Noise levels of a solver's steps: our own, and those of diffusers' schedulers.

A few steps of a distilled or published model are another video with other levels, so
each schedule is named after who makes it. All are float64 numpy, and may differ from
clip to clip.
"""

from typing import NamedTuple

import numpy as np

from sora_jax.diffusion import noise_process

# "flow_match_euler" is diffusers' FlowMatchEulerDiscreteScheduler, "flow_unipc" its
# UniPCMultistepScheduler with use_flow_sigmas.
SCHEDULES = ("uniform", "flow_match_euler", "flow_unipc")

# Published flows are trained at this many levels, of which 0 is none.
_TIMESTEPS = 1000
_LEAST = 1.0 / _TIMESTEPS
# Below level 1, where the logarithm of the data's share is infinite.
_BELOW_ONE = 1e-6


class Levels(NamedTuple):
  """Levels of `steps` steps.

  Attributes:
    level [steps + 1, ...]: noise levels, the last one 0.
    time [steps, ...]: what the network is told of each but the last, in [0, 1].
  """

  level: np.ndarray
  time: np.ndarray


def levels(schedule: str, steps: int, shift=1.0, start=1.0) -> Levels:
  """Levels of a schedule from `start` to 0.

  Args:
    schedule: one of SCHEDULES.
    steps: of the solver.
    shift: towards noise, see `noise_process.shift_timesteps`; above 0, [...].
    start: level of the first step, above 0 and at most 1; [...].

  Raises:
    ValueError: for an unknown schedule.
  """
  if schedule == "uniform":
    level = uniform(steps, shift, start)
    return Levels(level, level[:-1])
  if schedule not in SCHEDULES:
    raise ValueError(f"sampling schedule {schedule!r} is not one of {SCHEDULES}")
  shift, start = np.broadcast_arrays(np.asarray(shift, np.float64), start)
  first = _before_shift(shift, start)
  if schedule == "flow_match_euler":
    # The end is shifted twice, and the last step is from there to 0.
    last = noise_process.shift_timesteps(_LEAST, shift)
    level = noise_process.shift_timesteps(np.linspace(first, last, steps), shift)
    level = _float32(level)
    return Levels(_ending(level), level)
  # One step more than there are, without the last.
  level = np.linspace(first, np.full_like(first, _LEAST), steps + 1)[:-1]
  level = noise_process.shift_timesteps(level, shift)
  level = np.where(np.abs(level - 1.0) < _BELOW_ONE, level - _BELOW_ONE, level)
  # Whole timesteps, as in the training of diffusion models with a table of them.
  time = np.floor(level * _TIMESTEPS) / _TIMESTEPS
  return Levels(_ending(_float32(level)), time)


def uniform(steps: int, shift=1.0, start=1.0) -> np.ndarray:
  """Even levels from `start` to 0, float64 [steps + 1, ...], shifted towards noise.

  shift and start, above 0, may differ from clip to clip: [...].
  """
  shift, start = np.broadcast_arrays(np.asarray(shift, np.float64), start)
  level = np.linspace(1.0, 0.0, steps + 1).reshape(-1, *np.ones(shift.ndim, int))
  return noise_process.shift_timesteps(level * _before_shift(shift, start), shift)


def _before_shift(shift, start):
  """The level that the shift takes to `start`."""
  return np.where(start == 1.0, 1.0, start / (shift - (shift - 1.0) * start))


def _float32(level):
  """Levels as a float32 holds them; near 1 that is another share of the data."""
  return level.astype(np.float32).astype(np.float64)


def _ending(level):
  return np.concatenate([level, np.zeros_like(level[:1])])
