"""The train state and one update of it; pure, knows only `tasks.Task`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sora_jax.tasks import Task
from sora_jax.training.config import TrainConfig

# Purposes of random keys: fold_in(fold_in(key(seed), step), purpose).
INIT, LOSS, EVALUATE = 0, 1, 2


class TrainState(NamedTuple):
  """All that an update changes; step counts finished updates."""

  step: jax.Array
  params: Any
  ema: Any
  opt_state: Any


def step_key(seed: int, step, purpose: int) -> jax.Array:
  """Random key of a step and purpose; nothing random is kept in a checkpoint."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def init_state(task: Task, optimizer, seed: int) -> TrainState:
  """State before the first update; pure."""
  return first_state(task.init(step_key(seed, 0, INIT)), optimizer)


def first_state(params, optimizer) -> TrainState:
  """State of params that no update has changed; pure."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
  )


def train_step(
  state: TrainState,
  batch,
  frozen=None,
  *,
  task: Task,
  config: TrainConfig,
  optimizer,
  schedule,
  seed,
  allowed: jax.Array | bool = True,
  most_norm: jax.Array | float = jnp.inf,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update; pure. batch: dict of arrays [rows, ...] and of scalars.

  frozen: value of task.frozen, as an argument: a constant would be compiled in.
  Gradients are the mean over config.grad_accumulation microbatches, which equals the
  whole batch for a loss that is a mean over rows. Metrics: those of the task, loss,
  grad_norm (before clipping), learning_rate, and skipped, 1 for an update that is left
  out: params, EMA and optimizer stay as they were, only the step goes on, and with it
  data and keys. That is where the loss or the norm is not finite, the norm is above
  most_norm, or `allowed` is false.
  """
  batch = {**batch, "step": state.step}
  key = step_key(seed, state.step, LOSS)
  gradient, values = gradients(task, state.params, batch, key, frozen, config)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  # A young EMA would be mostly the random initial params: decay less at first.
  decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
  ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
  norm = optax.tree.norm(gradient)
  taken = jnp.isfinite(values["loss"]) & (norm <= most_norm) & (norm < jnp.inf)
  taken &= allowed
  after = TrainState(state.step + 1, params, ema, opt_state)
  # Leaf by leaf, and not by a condition around the update: compilers fuse this with
  # the update, in the same donated buffers.
  kept = jax.tree.map(lambda new, old: jnp.where(taken, new, old), after, state)
  values["grad_norm"] = norm
  values["learning_rate"] = schedule(state.step)
  values["skipped"] = 1.0 - taken
  return kept._replace(step=after.step), values


def gradients(task, params, batch, key, frozen, config):
  """(gradients, metrics with the loss), means over the microbatches."""

  def gradients_of(batch, key):
    """(pull-back to the params, metrics with the loss)."""

    def loss_of(params):
      return task.loss(params, batch, key, *given(frozen))

    loss, pull, values = jax.vjp(loss_of, params, has_aux=True)
    return pull, {"loss": loss, **values}

  parts = config.grad_accumulation
  if parts == 1:
    pull, values = gradients_of(batch, key)
    return pull(jnp.ones_like(values["loss"]))[0], values
  scalars = {name: value for name, value in batch.items() if not value.ndim}
  rows = {name: value for name, value in batch.items() if value.ndim}

  def split(value):
    if value.shape[0] % parts:
      raise ValueError(
        f"a batch of {value.shape[0]} rows does not split into {parts} microbatches"
      )
    # Microbatch i is every parts-th row, so that each device keeps its rows.
    value = value.reshape(value.shape[0] // parts, parts, *value.shape[1:])
    return jnp.moveaxis(value, 1, 0)

  # The backward pass adds to these in place: a microbatch has no gradients of its own.
  totals = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), params)

  def add(_, part):
    index, rows = part
    pull, values = gradients_of({**rows, **scalars}, jax.random.fold_in(key, index))
    pull.with_refs(totals)(jnp.ones_like(values["loss"]))
    # "x:weight" weighs "x", here as in metrics.Meter.
    return None, {k: v * values.get(f"{k}:weight", 1.0) for k, v in values.items()}

  rows = jax.tree.map(split, rows)
  _, of_parts = jax.lax.scan(add, None, (jnp.arange(parts), rows))
  sums = {name: jnp.sum(value) for name, value in of_parts.items()}
  values = {}
  for name, value in sums.items():
    weight = sums.get(f"{name}:weight")
    values[name] = value / (parts if weight is None else jnp.maximum(weight, 1e-9))
  return jax.tree.map(lambda total: jax.freeze(total) / parts, totals), values


def given(frozen: Any) -> tuple:
  """Arguments of a task's functions for task.frozen: none if it is None."""
  return () if frozen is None else (frozen,)
