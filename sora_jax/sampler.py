"""ODE solvers and guidance, as pure functions of a velocity function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from sora_jax import diffusion

METHODS = ("euler", "heun")


def schedule(steps: int, shift: float = 1.0) -> Array:
  """Noise levels from 1 to 0, float32 [steps + 1], shifted towards noise."""
  return diffusion.shift_timesteps(jnp.linspace(1.0, 0.0, steps + 1), shift)


def integrate(
  velocity: Callable[[Array, Array], Array],
  x: Array,
  levels: Array,
  method: str = "euler",
) -> Array:
  """Solves dx/dt = velocity(x, t) from levels[0] to levels[-1].

  Args:
    velocity: (x, scalar t) -> array like x.
    x: state at levels[0].
    levels: decreasing noise levels [steps + 1].
    method: "euler", one call a step; "heun", two (but one in the last step, where the
      second would ask the network about clean data).

  Raises:
    ValueError: for an unknown method.
  """
  if method not in METHODS:
    raise ValueError(f"sampling method {method!r} is not one of {METHODS}")

  def euler(x, pair):
    t, t_next = pair
    return x + (t_next - t) * velocity(x, t), None

  def heun(x, pair):
    t, t_next = pair
    v = velocity(x, t)
    v_next = velocity(x + (t_next - t) * v, t_next)
    return x + (t_next - t) * 0.5 * (v + v_next), None

  pairs = (levels[:-1], levels[1:])
  if method == "euler":
    return jax.lax.scan(euler, x, pairs)[0]
  body, last = jax.tree.map(lambda p: p[:-1], pairs), tuple(p[-1] for p in pairs)
  x, _ = jax.lax.scan(heun, x, body)
  return euler(x, last)[0]


def guide(conditional: Array, unconditional: Array, scale: float) -> Array:
  """Classifier-free guidance (arXiv:2207.12598); scale 1 is no guidance."""
  return unconditional + scale * (conditional - unconditional)
