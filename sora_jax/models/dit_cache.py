"""What calls of the DiT share while sampling: the texts' states, outputs of blocks."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from sora_jax.models import image_embed, layers, partition


class Reuse(NamedTuple):
  """What the steps of sampling hand on, so that blocks need not run in each of them.

  After TeaCache (arXiv:2411.19108), without its rescaling: the blocks run again once
  what enters them has changed by a share `limit` since, and what they added last is
  added again otherwise. Padding has no say, but all clips of a batch have.

  Attributes:
    seen_BLD: modulated tokens as the first block got them in the call before.
    added_BLD: what the blocks added when they ran last.
    change: sum of the relative changes since then; infinite before the first call.
    limit: of change, below which they do not run.
  """

  seen_BLD: Array
  added_BLD: Array
  change: Array
  limit: Array

  @classmethod
  def start(cls, rows: int, tokens: int, width: int, dtype) -> "Reuse":
    """Before the first call, which runs."""
    zeros_BLD = jnp.zeros((rows, tokens, width), dtype)
    return cls(zeros_BLD, zeros_BLD, jnp.array(jnp.inf), jnp.array(0.0))


def run_or_reuse(
  module: nn.Module,
  blocks: Callable[[nn.Module, Array], Array],
  x_BLD: Array,
  seen_BLD: Array,
  reuse: Reuse,
) -> tuple[Array, Reuse]:
  """What the blocks make of the tokens, or what they added last; and the next `Reuse`.

  Args:
    module: that the blocks are part of.
    blocks: (module, tokens) -> tokens.
    x_BLD: tokens.
    seen_BLD: the same, modulated, with 0 for padding; what decides.
    reuse: from the call before.
  """
  moved = jnp.sum(jnp.abs(seen_BLD - reuse.seen_BLD))
  size = jnp.sum(jnp.abs(reuse.seen_BLD))
  change = reuse.change + moved / jnp.maximum(size, 1e-6)
  fresh = change >= reuse.limit
  added_BLD = nn.cond(
    fresh,
    lambda module, x_BLD: blocks(module, x_BLD) - x_BLD,
    lambda _, x_BLD: reuse.added_BLD,
    *(module, x_BLD),
  )
  change = jnp.where(fresh, 0.0, change)
  reuse = Reuse(seen_BLD.astype(x_BLD.dtype), added_BLD, change, reuse.limit)
  return x_BLD + added_BLD, reuse


def text_states(
  width: int,
  params,
  text_BSE: Array,
  dtype=jnp.float32,
  image_BNJV: Array | None = None,
) -> tuple[Array, ...]:
  """Keys and values of the text in all blocks [depth, B, S, D]; steps share them.

  With features of images, their keys and values follow.

  width, params: of the DiT.
  """

  def dense(params, name, x):
    layer = layers.Dense(width, dtype=dtype)
    return layer.apply({"params": params[name]}, x)

  def of_block(block):
    k_BSD = dense(block, "cross_key", text_BSD)
    k_BSD = layers.RMSNorm().apply({"params": block["cross_key_norm"]}, k_BSD)
    states = (k_BSD, dense(block, "cross_value", text_BSD))
    if image_BKD is None:
      return states
    k_BKD = dense(block, "image_key", image_BKD)
    k_BKD = layers.RMSNorm().apply({"params": block["image_key_norm"]}, k_BKD)
    return *states, k_BKD, dense(block, "image_value", image_BKD)

  text_BSE = partition.constrain(text_BSE, partition.ROWS, "context")
  text_BSD = dense(params, "text_embed_1", text_BSE.astype(dtype))
  text_BSD = dense(params, "text_embed_2", nn.gelu(text_BSD))
  names = ["cross_key", "cross_key_norm", "cross_value"]
  image_BKD = None
  if image_BNJV is not None:
    own = params["image_embed"]
    embed = image_embed.ImageEmbed(width, "positions" in own, dtype)
    image_BKD = embed.apply({"params": own}, image_BNJV)
    names += ["image_key", "image_key_norm", "image_value"]
  # Block by block, as their params are gathered.
  return jax.lax.map(of_block, {name: params["blocks"][name] for name in names})
