"""What the solver asks at each of its calls: small functions around the DiT; pure.

A *network* is `network(x_BLP, level_BN, index, memory) -> (output_BLP, memory)`: packed
rows at noise levels, one for each slot (see `packing.packed_row`), in the call `index`
of the solver. `memory` is what one call hands to the next; None without. Each function
here takes a network and gives one that does more: `dit_network` is the innermost, its
output the model's target; `predicts_data` turns that into data, which `blends` and
`follows_known` change.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sora_jax.diffusion import guidance, noise_process, solvers
from sora_jax.models.dit import Context, DiTConfig
from sora_jax.packing.packed_row import PackedBatch
from sora_jax.sampling.sample_batch import SamplingBatch
from sora_jax.tasks import dit as dit_task

Network = Callable[[Array, Array, Array, Any], tuple[Array, Any]]


# --- numbers of a slot or of a clip, for its tokens


def per_token(packed: PackedBatch, c_BN: Array) -> Array:
  """Numbers of each slot, for its tokens: [B, L, 1]; padding has 0."""
  return _at(packed, c_BN, packed["group_L"] // 2)


def clip_mean(packed: PackedBatch, x_BL: Array, slots: int) -> Array:
  """Mean over the noisy tokens of each token's clip: [B, L]; padding has 0."""
  segment_BL, noisy_BL = packed["segment_L"], packed["group_L"] % 2 == 0
  counts_BLN = segment_BL[:, :, None] == 1 + jnp.arange(slots)
  counts_BLN &= noisy_BL[:, :, None]
  total_BN = jnp.sum(jnp.where(counts_BLN, x_BL[:, :, None], 0.0), axis=1)
  mean_BN = total_BN / jnp.maximum(counts_BLN.sum(axis=1), 1)
  return _at(packed, mean_BN, jnp.maximum(segment_BL - 1, 0))[..., 0]


def _at(packed, c_BN, index_BL):
  # No matmul with a one-hot: accelerators round a float32 matmul's inputs.
  c_BL = jnp.take_along_axis(c_BN, index_BL, axis=1)
  return jnp.where(packed["segment_L"] > 0, c_BL, 0.0)[..., None]


# --- the DiT itself


class Rows(NamedTuple):
  """What the DiT sees of rows in all calls.

  Attributes:
    context: tokens and texts.
    given_level_BN, turn_BL2, turn_step_BL: as in `sample_batch.SamplingRow`.
    time_BNR: level of each slot's noisy tokens that the DiT is told in each call.
  """

  context: Context
  given_level_BN: Array
  turn_BL2: Array
  turn_step_BL: Array
  time_BNR: Array

  @classmethod
  def of_batch(
    cls, packed: PackedBatch, sampling: SamplingBatch, text_BSE, time_BNR
  ) -> "Rows":
    """Rows with the texts of `packed`, of these features."""
    return cls(
      Context.of_batch(packed, text_BSE),
      sampling["given_level_N"],
      sampling["turn_L2"],
      sampling["turn_step_L"],
      time_BNR,
    )

  def followed_by(self, other: "Rows") -> "Rows":
    """Both in one batch."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), self, other)

  def with_states(self, states: tuple[Array, Array]) -> "Rows":
    """Takes over the states of the texts; see `dit_cache.text_states`."""
    return self._replace(context=self.context._replace(text_states=states))


def turned(position_BL3: Array, rows: Rows, index: Array) -> Array:
  """Positions in a call: those of loops have turned by one frame with each."""
  frame_BL, frames_BL = rows.turn_BL2[..., 0], rows.turn_BL2[..., 1]
  turned_BL = (frame_BL + index) % jnp.maximum(frames_BL, 1)
  time_BL, *place = jnp.moveaxis(position_BL3, -1, 0)
  time_BL = jnp.where(frames_BL > 0, turned_BL * rows.turn_step_BL, time_BL)
  return jnp.stack([time_BL, *place], -1)


def dit_network(
  model: DiTConfig, params, rows: Rows, dtype, first: Array | int = 0
) -> Network:
  """The DiT on these rows; memory is its `dit_cache.Reuse`, or None to run always.

  first: index of the call that `rows.time_BNR` begins with.
  """

  def network(x_BLP, level_BN, index, memory):
    del level_BN  # the DiT knows it as time_BNR
    # Each slot has two groups: noisy tokens, and given ones.
    t_BG = jnp.stack([rows.time_BNR[..., index - first], rows.given_level_BN], -1)
    t_BG = t_BG.reshape(len(x_BLP), -1)
    position_BL3 = turned(rows.context.position_BL3, rows, index)
    # A frame of a loop goes on being itself, wherever the loop begins for attention.
    context = rows.context._replace(
      position_BL3=position_BL3, absolute_BL3=rows.context.position_BL3
    )
    out = dit_task.predict(model, params, x_BLP, t_BG, context, dtype, memory)
    return (out, None) if memory is None else out

  return network


def reuses(network: Network, limit: float, calls: Array | int) -> Network:
  """Skips the blocks while their input changes by less than a share `limit`.

  calls: of the solver; the last one draws what is finest, and runs.
  """

  def reusing(x_BLP, level_BN, index, memory):
    here = jnp.where(index < calls - 1, limit, 0.0)
    return network(x_BLP, level_BN, index, memory._replace(limit=here))

  return reusing


# --- guidance


def guides(
  network: Network, packed: PackedBatch, scale_BN: Array, options: solvers.Options
) -> Network:
  """Leads each clip away from what the network says without its text.

  Args:
    network: of twice the rows: those with their texts, then those with the other ones.
    packed: the rows, once.
    scale_BN: guidance scale of each slot, inside of the options' guidance_interval.
    options: static.
  """

  def guided(x_BLP, level_BN, index, memory):
    both_BLP, both_BN = (jnp.concatenate([x, x]) for x in (x_BLP, level_BN))
    predicted_BLP, memory = network(both_BLP, both_BN, index, memory)
    inside_BN = _inside(level_BN, options)
    scale_BL1 = per_token(packed, jnp.where(inside_BN, scale_BN, 1.0))

    def mean(x_BL):
      return clip_mean(packed, x_BL, level_BN.shape[-1])

    parts = jnp.split(predicted_BLP, 2)
    return guidance.guide(*parts, scale_BL1, options, mean), memory

  return guided


def guides_inside(guided: Network, plain: Network, options: solvers.Options) -> Network:
  """Asks `plain` in calls where no slot is inside of the guidance_interval."""
  if options.guidance_interval == (0.0, 1.0):
    return guided

  def network(x_BLP, level_BN, index, memory):
    inside = jnp.any(_inside(level_BN, options))
    return jax.lax.cond(inside, guided, plain, x_BLP, level_BN, index, memory)

  return network


def _inside(level_BN, options):
  low, high = options.guidance_interval
  return (level_BN >= low) & (level_BN <= high)


def rests_at_first(network: Network, options: solvers.Options) -> Network:
  """A velocity of zero for the first `zero_steps` steps (CFG-Zero*)."""

  def resting(x_BLP, level_BN, index, memory):
    predicted_BLP, memory = network(x_BLP, level_BN, index, memory)
    # Heun asks twice a step.
    step = index // 2 if options.method == "heun" else index
    return jnp.where(step < options.zero_steps, 0.0, predicted_BLP), memory

  return resting


# --- data


def predicts_data(
  network: Network, packed: PackedBatch, process: str, target: str
) -> Network:
  """The data that a prediction of the target stands for."""

  def data(x_BLP, level_BN, index, memory):
    predicted_BLP, memory = network(x_BLP, level_BN, index, memory)
    level_BL1 = per_token(packed, level_BN)
    return noise_process.to_x0(predicted_BLP, x_BLP, level_BL1, target, process), memory

  return data


def blends(data: Network, sampling: SamplingBatch) -> Network:
  """Mixes what is predicted of each token with what is predicted of its twin."""

  def blended(x_BLP, level_BN, index, memory):
    own_BLP, memory = data(x_BLP, level_BN, index, memory)
    twin_BLP = jnp.take_along_axis(own_BLP, sampling["twin_L"][..., None], axis=1)
    # The weight of a token without a twin is 0: it keeps its value exactly.
    own_BLP += sampling["twin_weight_L"][..., None] * (twin_BLP - own_BLP)
    return own_BLP, memory

  return blended


def follows_known(data: Network, packed: PackedBatch, follow_BL: Array) -> Network:
  """What is known of tokens, while their level is above `follow_BL`."""

  def following(x_BLP, level_BN, index, memory):
    own_BLP, memory = data(x_BLP, level_BN, index, memory)
    follows_BL1 = per_token(packed, level_BN) > follow_BL[..., None]
    return jnp.where(follows_BL1, packed["patch_LP"], own_BLP), memory

  return following
