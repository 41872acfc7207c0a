"""A differentiable attention of its forward and its backward pass."""

from collections.abc import Callable

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name


def differentiable(
  forward: Callable, backward: Callable, alone: Callable | None = None
) -> Callable[..., Array]:
  """`attention` of (q, k, v, segments_q, segments_k), by its two passes.

  The output, and what is kept beside it for the backward pass, are named "attention"
  for remat policies.

  Args:
    forward: of those five -> (output, log-sum-exp).
    backward: of those five, output, log-sum-exp and the output's gradient ->
      gradients of q, k and v.
    alone: of those five -> (output,), for when there is no backward pass.
  """

  @jax.custom_vjp
  def attend(*inputs):
    return (alone or forward)(*inputs)[0]

  def keep(*inputs):
    kept = tuple(checkpoint_name(x, "attention") for x in forward(*inputs))
    return kept[0], (*inputs, *kept)

  def gradients(residuals, dout):
    return (*backward(*residuals, dout), None, None)

  attend.defvjp(keep, gradients)
  return attend
