"""Ring attention (arXiv:2310.01889): keys and values travel, queries stay.

For clips so long that one chip cannot hold all keys: at each of n steps a chip meets
another n-th of them, and the next part arrives meanwhile.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sora_jax.models.attention import custom_vjp


class Ring(NamedTuple):
  """Who passes keys to whom, and what each computes, inside `jax.shard_map`.

  Attributes:
    axis: mesh axis.
    size: chips in a ring. stride: between neighbours; the axis holds `stride` rings.
    forward, backward: the passes of a backend (see blockwise.py), of local arrays.
  """

  axis: str
  size: int
  stride: int
  forward: Callable
  backward: Callable

  def pass_on(self, tree):
    """Sends each chip's arrays to its neighbour, and returns those that arrive."""
    rings = self.size * self.stride
    to = [(i, (i + self.stride) % rings) for i in range(rings)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, to), tree)


def ring_attention(
  q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS, ring: Ring
) -> Array:
  """Computes `attention` of local queries to the keys of all chips of the ring.

  Arrays are one chip's, inside of `jax.shard_map`; shapes are those of `attention`.
  """
  attend = custom_vjp.differentiable(
    functools.partial(_forward, ring), functools.partial(_backward, ring)
  )
  return attend(q_BLNK, k_BSNK, v_BSNK, segments_q_BL, segments_k_BS)


def _forward(ring, q, k, v, segments_q, segments_k):
  def step(state, _):
    (out, lse), here = state
    # Sent before the computation that does not need it, so that both go on together.
    following = ring.pass_on(here)
    k, v, segments_k = here
    part, part_lse = ring.forward(q, k, v, segments_q, segments_k)
    # Each part is a softmax over its own keys: weighed by its share of the sum of all.
    both = jnp.logaddexp(lse, part_lse)
    out = out * jnp.exp(lse - both)[..., None]
    out += part.astype(jnp.float32) * jnp.exp(part_lse - both)[..., None]
    return ((out, both), following), None

  nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf)
  state = (nothing, (k, v, segments_k))
  ((out, lse), _), _ = jax.lax.scan(step, state, length=ring.size)
  return out.astype(v.dtype), lse


def _backward(ring, q, k, v, segments_q, segments_k, out, lse, dout):
  def step(state, _):
    dq, here, gradients = state
    following = ring.pass_on(here)
    k, v, segments_k = here
    dq_part, *parts = ring.backward(q, k, v, segments_q, segments_k, out, lse, dout)
    # The sums travel with the keys that they are of, and end where those came from.
    gradients = ring.pass_on(
      tuple(
        total + part.astype(jnp.float32)
        for total, part in zip(gradients, parts, strict=True)
      )
    )
    return (dq + dq_part.astype(jnp.float32), following, gradients), None

  zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
  state = (zeros[0], (k, v, segments_k), tuple(zeros[1:]))
  (dq, _, (dk, dv)), _ = jax.lax.scan(step, state, length=ring.size)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
