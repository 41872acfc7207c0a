"""Packed rows of noise to packed rows of data, in one compiled program; pure.

One program serves every mode of `conditioning` and every length of a bucket: what is
given, where clips begin, loops, shots and blends are arrays of the batch.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.diffusion import noise_process, schedules, solvers
from sora_jax.models.caption_encoder import TextEncoderConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.models.dit_cache import Reuse
from sora_jax.sampling import network
from sora_jax.sampling.sample_batch import SampleBatch, SolverSlots
from sora_jax.tasks import dit as dit_task


class Networks(NamedTuple):
  """What is sampled from; static.

  Attributes:
    model: sizes of the DiT.
    text: of the encoder that was trained with it; None: texts are features.
    dtype: of the computation.
    process, target: of the noise in training.
  """

  model: DiTConfig
  text: TextEncoderConfig | None
  dtype: jnp.dtype
  process: str = "flow"
  target: str = "velocity"


def integrate(
  networks: Networks,
  params,
  batch: SampleBatch,
  table: solvers.Table,
  options: solvers.Options,
  state: solvers.State | None = None,
  first: Array | int = 0,
  ends: bool = True,
) -> Array | solvers.State:
  """Noise to latents of packed rows: patches [B, L, P].

  Some of the calls of a solver are a part of it, which ends with a state instead, and
  the next part begins with that. So each expert of a model has a part of its own.

  Args:
    networks: static.
    params: of the DiT and of its text encoder.
    batch: rows, their negative texts, and what else sampling needs of them.
    table: of the solver, by slot: [calls, ..., B, N].
    options: static, from `static_options`; their guidance_scale is 0 for no guidance,
      and otherwise that of the batch is meant.
    state: of the part before; None begins with the batch.
    first: index of the table's first call in those of the whole solver.
    ends: static, whether this is the last part.
  """
  packed, sampling = batch.packed, batch.sampling
  predict, memory = _guided_network(networks, params, batch, options, table, first)
  if options.cfg_zero:
    predict = network.rests_at_first(predict, options)
  data = network.predicts_data(predict, packed, networks.process, networks.target)
  data = network.blends(data, sampling)
  data = network.follows_known(data, packed, sampling["follow_L"])

  given_BL1 = packed["group_L"][..., None] % 2 == 1
  expand = functools.partial(network.per_token, packed)

  def call(carry, row, index):
    (state, memory), index = carry, first + index
    data_BLP, memory = data(state.x, row.level, index, memory)
    noise_BLP = token_noise(batch, index) if options.stochastic else None
    following = solvers.step(state, row, data_BLP, noise_BLP, expand)
    # Given tokens stay exactly as they are.
    x_BLP = jnp.where(given_BL1, state.x, following.x)
    return following._replace(x=x_BLP), memory

  state = state or solvers.start(sampling["start_LP"])
  state, _ = solvers.scan(call, (state, memory), table)
  return state.x if ends else state


def _guided_network(networks, params, batch, options, table, first):
  """The network with guidance, if any, and its memory before the first call."""
  model, dtype = networks.model, networks.dtype
  time_BNR = jnp.moveaxis(jnp.asarray(table.time), 0, -1)

  def rows_of(texts):
    text_BSE = dit_task.encode_text(networks.text, params, texts, dtype)
    packed = {**batch.packed, **texts}
    return network.Rows.of_batch(packed, batch.sampling, text_BSE, time_BNR)

  def network_of(rows, states):
    return network.dit_network(model, params, rows.with_states(states), dtype, first)

  rows = whole = rows_of(batch.packed)
  if options.guidance_scale:
    # Both in one call of twice the rows.
    whole = rows.followed_by(rows_of(batch.negative))
  # The texts' keys and values are computed once for all calls.
  context = whole.context
  states = dit_task.text_states(
    model, params, context.text_BSE, dtype, context.image_BNJV
  )
  predict, memory = network_of(whole, states), None
  if options.reuse:
    shape = whole.context.segment_BL.shape
    memory = Reuse.start(*shape, model.width, dtype)
    predict = network.reuses(predict, options.reuse, first + len(table.level))
  if options.guidance_scale:
    scale_BN = batch.sampling["guidance_scale_N"]
    guided = network.guides(predict, batch.packed, scale_BN, options)
    own = jax.tree.map(lambda x: x[:, : len(scale_BN)], states)
    predict = network.guides_inside(guided, network_of(rows, own), options)
  return predict, memory


def token_noise(batch: SampleBatch, index: Array) -> Array:
  """Noise of a call: by each clip's seed, so that it does not depend on the row."""
  width = batch.packed["patch_LP"].shape[-1]

  def draw(seed, token):
    key = jax.random.fold_in(jax.random.key(seed), index)
    return jax.random.normal(jax.random.fold_in(key, token), (width,))

  draws = jax.vmap(jax.vmap(draw))
  return draws(batch.sampling["seed_L"], batch.sampling["token_L"])


def program(networks: Networks, mesh):
  """`integrate` of these networks, jitted: (params, batch, table, options) -> patches.

  Its result is whole on every host, which each then decodes.
  """
  return jax.jit(
    functools.partial(integrate, networks),
    static_argnames=("options", "ends"),
    out_shardings=NamedSharding(mesh, PartitionSpec()),
  )


def static_options(options: solvers.Options) -> solvers.Options:
  """The options that are compiled in: arrays must not make another program."""
  # Of the others without noise, the table says all.
  is_seen = options.stochastic or options.method == "heun"
  return dataclasses.replace(
    options,
    steps=1,
    method=options.method if is_seen else "euler",
    schedule="uniform",
    shift=1.0,
    shift_tokens=0,
    guidance_scale=float(options.guidance_scale != 1.0),
    guidance_scale_2=0.0,
  )


def solver_table(
  slots: SolverSlots, options: solvers.Options, process: str
) -> solvers.Table:
  """The solver's coefficients for each slot: [calls, ..., B, N]."""
  shift_BN = noise_process.resolution_shift(
    options.shift, np.maximum(slots.tokens_BN, 1.0), options.shift_tokens
  )
  shift_BN = np.broadcast_to(shift_BN, slots.tokens_BN.shape)
  levels = schedules.levels(options.schedule, options.steps, shift_BN, slots.start_BN)
  return solvers.make_table(
    options.method, levels.level, process, options.eta, levels.time
  )
