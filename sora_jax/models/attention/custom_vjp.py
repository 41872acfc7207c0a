"""Makes a differentiable function of the forward and the backward pass of attention."""

from collections.abc import Callable

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name


def differentiable(
  forward: Callable, backward: Callable, alone: Callable | None = None
) -> Callable[..., Array]:
  """Returns a function of (q, k, v, segments_q, segments_k) with these two passes.

  The output, and what is kept beside it for the backward pass, are named "attention"
  for remat policies.

  Args:
    forward: those five arguments -> (output, log-sum-exp).
    backward: those five, the output, the log-sum-exp and the output's gradient ->
      gradients of q, k and v.
    alone: those five -> (output,), for when there is no backward pass.
  """

  @jax.custom_vjp
  def attend(*inputs):
    return (alone or forward)(*inputs)[0]

  def keep(*inputs):
    # A policy that saves these names runs no kernel twice.
    kept = tuple(checkpoint_name(x, "attention") for x in forward(*inputs))
    return kept[0], (*inputs, *kept)

  def gradients(residuals, dout):
    # Segment ids are integers and have no gradient.
    return (*backward(*residuals, dout), None, None)

  attend.defvjp(keep, gradients)
  return attend
