"""Train state, one pure train step, and the host loop; knows only `tasks.Task`."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import signal
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.runtime import checkpoint, sharding
from sora_jax.tasks import Task
from sora_jax.training import metrics, optim, profiling

# Purposes of random keys: fold_in(fold_in(key(seed), step), purpose).
INIT, LOSS, EVALUATE = 0, 1, 2
_STOP = "stop_signal"  # batch entry: a signal came to this host


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """What the loop and the optimizer need; steps are updates of the params."""

  steps: int
  learning_rate: float = 1e-4
  warmup_steps: int = 0
  schedule: str = "constant"  # one of optim.SCHEDULES
  decay_steps: int = 0  # of the schedule "wsd"
  weight_decay: float = 0.0
  optimizer: str = "adamw"  # one of optim.OPTIMIZERS
  moment_dtype: str = "float32"  # of the first moment
  b1: float = 0.9
  b2: float = 0.999
  clip_norm: float = 1.0  # global norm; 0 = no clipping
  learning_rates: tuple[tuple[str, float], ...] = ()  # (path regex, own peak)
  grad_accumulation: int = 1  # microbatches of each batch
  ema_decay: float = 0.999
  log_every: int = 50  # 0 = never, as for eval_every; else also at the last step
  eval_every: int = 0
  save_every: int = 1000  # 0 = only the last step
  keep: int = 2  # checkpoints


class TrainState(NamedTuple):
  """All that an update changes; step counts finished updates."""

  step: jax.Array
  params: Any
  ema: Any
  opt_state: Any


class Setup(NamedTuple):
  """All that `train` needs of a stage beside its TrainConfig."""

  task: Task
  rules: sharding.Rules
  data: Any  # iterator of batches with get_state, set_state and close
  eval_batches: list
  names: list  # of the clips that the batches' indices point to
  flops_per_step: float
  units: Any  # batch -> number of frames or tokens in it
  captioned: bool = False  # whether any training clip has a caption
  initial: Any = None  # shardings of the params -> their first values; None = task.init


class NonFiniteError(ValueError):
  """A loss or gradient became NaN or infinite; names the step and its clips."""


class Preempted(SystemExit):
  """SIGTERM or SIGINT came and the state is saved; exits the program with code 0."""

  def __init__(self):
    super().__init__(0)


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
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update; pure. batch: dict of arrays [rows, ...] and of scalars.

  frozen: value of task.frozen, as an argument: a constant would be compiled in.
  Gradients are the mean over config.grad_accumulation microbatches, which equals the
  whole batch for a loss that is a mean over rows. Metrics: those of the task, loss,
  grad_norm (before clipping), learning_rate.
  """
  batch = {**batch, "step": state.step}
  key = step_key(seed, state.step, LOSS)
  gradients, values = _gradients(task, state.params, batch, key, frozen, config)
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  # A young EMA would be mostly the random initial params: decay less at first.
  decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
  ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
  values["grad_norm"] = optax.tree.norm(gradients)
  values["learning_rate"] = schedule(state.step)
  return TrainState(state.step + 1, params, ema, opt_state), values


def _gradients(task, params, batch, key, frozen, config):
  """(gradients, metrics with the loss), means over the microbatches."""

  def gradients_of(batch, key):
    """(pull-back to the params, metrics with the loss)."""

    def loss_of(params):
      return task.loss(params, batch, key, *_given(frozen))

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


def _given(frozen) -> tuple:
  """Arguments of a task's functions for task.frozen."""
  return () if frozen is None else (frozen,)


class Built(NamedTuple):
  """A task's jitted functions on a mesh, and the shapes and shardings of its state."""

  abstract: TrainState  # of ShapeDtypeStructs with shardings
  init: Any  # () -> TrainState
  begin: Any  # params, donated -> TrainState
  # Both take task.frozen, if there is any, as their last argument.
  update: Any  # (TrainState, batch) -> (TrainState, metrics); donates the state
  evaluate: Any  # (params, batch, step, index of the batch) -> metrics


def build(task: Task, config: TrainConfig, mesh, rules, seed: int) -> Built:
  """Places the state by the sharding rules and jits the functions; compiles nothing."""
  # No array is made: the devices of the mesh may be a description only.
  shapes = jax.eval_shape(lambda: task.init(jax.random.key(seed)))
  optimizer, schedule = optim.make(config, shapes)
  init = functools.partial(init_state, task, optimizer, seed)
  state_shapes = jax.eval_shape(init)
  placed = sharding.param_shardings(shapes, rules, mesh)
  placed = sharding.state_shardings(state_shapes, shapes, placed, mesh)
  replicated = NamedSharding(mesh, PartitionSpec())

  def update(state, batch, frozen=None):
    batch = dict(batch)
    stop = jnp.max(batch.pop(_STOP)) if _STOP in batch else jnp.zeros(())
    state, values = train_step(
      state,
      batch,
      frozen,
      task=task,
      config=config,
      optimizer=optimizer,
      schedule=schedule,
      seed=seed,
    )
    return state, {**values, _STOP: stop}

  def evaluate(params, batch, step, index, frozen=None):
    # The same keys at every step, so that the numbers of a run can be compared.
    key = step_key(seed, index, EVALUATE)
    return task.evaluate(params, {**batch, "step": step}, key, *_given(frozen))

  return Built(
    abstract=jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      state_shapes,
      placed,
    ),
    init=jax.jit(init, out_shardings=placed),
    begin=jax.jit(
      functools.partial(first_state, optimizer=optimizer),
      donate_argnums=0,
      out_shardings=placed,
    ),
    # Without out_shardings the gradients, and then the state, would lose fsdp.
    update=jax.jit(update, donate_argnums=0, out_shardings=(placed, replicated)),
    evaluate=jax.jit(evaluate, out_shardings=replicated),
  )


def train(
  task: Task,
  config: TrainConfig,
  data_iterator,
  *,
  workdir,
  seed: int,
  mesh,
  rules,
  eval_batches=None,
  describe=None,
  flops_per_step: float = 0.0,
  tokens_per_step: int = 0,
  on_eval=None,
  name: str = "dit",
  profile: profiling.Profile | None = None,
  initial=None,
) -> TrainState:
  """Trains to config.steps, going on from the newest checkpoint in workdir/name.

  data_iterator: yields dicts of numpy arrays, this host's rows (sharding.host_shard),
    and has get_state and set_state, equal on all hosts. Entries whose name begins with
    "clip" stay on the host.
  eval_batches: () -> iterable of such batches; task.evaluate on them with the EMA
    params, averaged, is written as eval/*. Then on_eval(step, ema, writer) is called.
  describe: list of clip indices -> list of names, for messages.
  initial: shardings of the params -> their values before the first step, in place of
    those of task.init.
  flops_per_step, tokens_per_step: of all devices, for the speed in the log.
  profile: which steps are traced into workdir/name/profile.

  Writes workdir/name/{checkpoints, metrics.jsonl, tensorboard}. Raises NonFiniteError,
  Preempted, and ValueError for data that ends early or a checkpoint that does not fit.
  """
  folder = pathlib.Path(workdir) / name
  built = build(task, config, mesh, rules, seed)
  checkpoints = checkpoint.Checkpoints(folder / "checkpoints", config.keep)
  with contextlib.closing(checkpoints), jax.set_mesh(mesh), _signals() as signalled:
    start = _newest(checkpoints, config.steps)
    host = {"evaluated": 0}
    if start:
      state, host = checkpoints.restore(start, built.abstract)
      # A signal at the last step leaves its evaluation to be made up for.
      owed = eval_batches and config.eval_every and host["evaluated"] != start
      if start == config.steps and not owed:
        logging.info("%s: trained to step %d already, in %s", name, start, folder)
        return state
      data_iterator.set_state(host["data"])
    elif initial:
      params = built.abstract.params
      state = built.begin(initial(jax.tree.map(lambda leaf: leaf.sharding, params)))
    else:
      state = built.init()
    _log_start(name, folder, built.abstract.params, mesh, start, config.steps)
    meter = metrics.Meter(
      config.steps,
      flops_per_step=flops_per_step,
      tokens_per_step=tokens_per_step,
      devices=mesh.devices.size,
      device_kind=mesh.devices.flat[0].device_kind,
      state=host.get("meter"),
      alive=_last_written(folder / "metrics.jsonl"),
    )
    writer = metrics.Writer(folder, start, active=jax.process_index() == 0)
    tracer = profiling.Tracer(profile or profiling.Profile(), folder / "profile")
    with contextlib.closing(writer), contextlib.closing(tracer):
      monitor = _Monitor(config, meter, writer, describe, signalled)
      evaluated, step = host["evaluated"], start
      while True:
        last = step == config.steps
        # After a signal there is no time to evaluate: the next run does it.
        if eval_batches and evaluated != step and not monitor.stop():
          if _due(step, config.eval_every, last):
            monitor.settle()
            with meter.pause("evaluate"):
              _evaluate(built, task.frozen, mesh, step, state.ema, eval_batches, writer)
              if on_eval:
                on_eval(step, state.ema, writer)
            evaluated = step
        stop = monitor.stop()
        if step > start and (stop or last or _due(step, config.save_every)):
          # First settle: a state after a non-finite loss must not be saved.
          monitor.settle()
          with meter.pause("checkpoint"):
            host = {"data": data_iterator.get_state(), "evaluated": evaluated}
            checkpoints.save(step, state, {**host, "meter": meter.state()})
        if stop or last:
          with meter.pause("checkpoint"):
            checkpoints.wait()
            sharding.sync(f"{name} saved")  # none exits before all are done
          logging.info("%s: %s", name, meter.summary())
        if stop or (last and signalled.is_set()):
          logging.info("%s: stopped by a signal; step %d is saved", name, step)
          raise Preempted
        if last:
          return state
        tracer.reached(step, monitor.settle)
        if step == start:
          meter.compile()
        begin = time.perf_counter()
        batch = _next(data_iterator, step, config.steps)
        meter.waited(time.perf_counter() - begin)
        clips = {k: v for k, v in batch.items() if k.startswith("clip")}
        batch = _to_device(batch, mesh, stop=signalled.is_set())
        with tracer.step(step):
          state, values = built.update(state, batch, task.frozen)
        step += 1
        monitor.dispatched(step, values, clips)
        if step == start + 1:
          monitor.settle()
          seconds = time.perf_counter() - begin
          logging.info("%s: first step took %.1f s, with compilation", name, seconds)
          meter.start(step)


class _Monitor:
  """Fetches the metrics of each step, one step late so that the device never waits."""

  def __init__(self, config, meter, writer, describe, signalled):
    self._config, self._meter, self._writer = config, meter, writer
    self._describe, self._signalled = describe, signalled
    self._pending = None  # (step, metrics on the device, clips) of the newest step
    self._stop = False

  def stop(self) -> bool:
    """Whether a signal came to any host; the same on all hosts."""
    return self._signalled.is_set() if jax.process_count() == 1 else self._stop

  def dispatched(self, step, values, clips) -> None:
    """Takes the metrics of a step under way and settles the one before."""
    previous, self._pending = self._pending, (step, values, clips)
    self._settle(previous)

  def settle(self) -> None:
    """Waits for the step under way."""
    previous, self._pending = self._pending, None
    self._settle(previous)

  def _settle(self, pending) -> None:
    if pending is None:
      return
    step, values, clips = pending
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    self._stop = values.pop(_STOP) > 0 or self._stop
    for name in ("loss", "grad_norm"):
      if not math.isfinite(values[name]):
        raise NonFiniteError(
          f"{name} is {values[name]} at step {step}; clips of its batch: "
          f"{_clip_names(clips, self._describe)}. The checkpoints before it stay"
        )
    self._meter.add(values)
    if _due(step, self._config.log_every, step == self._config.steps):
      row = self._meter.row(step)
      self._writer.scalars(step, row)
      logging.info("%s", metrics.format_row(step, self._config.steps, row))


def _due(step: int, every: int, last: bool = False) -> bool:
  return bool(every) and step > 0 and (last or step % every == 0)


def _newest(checkpoints, steps: int) -> int:
  """Step to go on from; 0 = from the start."""
  saved = checkpoints.steps()
  if steps in saved or not saved:
    return steps if saved else 0
  if saved[-1] > steps:
    raise ValueError(
      f"{checkpoints.folder} has a checkpoint of step {saved[-1]}, beyond the "
      f"{steps} steps of the config; raise steps or use another workdir"
    )
  return saved[-1]


def _last_written(path) -> float:
  """When a run that is gone wrote its last row; 0 if there was none."""
  return path.stat().st_mtime if path.exists() else 0.0


def _log_start(name, folder, params, mesh, start, steps) -> None:
  size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  logging.info(
    "%s: %.4g M params, mesh %s of %s, from step %d to %d, in %s",
    name,
    size / 1e6,
    dict(mesh.shape),
    mesh.devices.flat[0].device_kind,
    start,
    steps,
    folder,
  )


def _next(data_iterator, step: int, steps: int):
  try:
    return next(data_iterator)
  except StopIteration:
    raise ValueError(f"the data ended after {step} of {steps} steps") from None


def _to_device(batch, mesh, stop: bool = False):
  batch = {k: v for k, v in batch.items() if not k.startswith("clip")}
  if jax.process_count() > 1:
    # Each host may see the signal at another step; through the step they agree.
    rows = next(len(value) for value in batch.values() if np.ndim(value))
    batch[_STOP] = np.full(rows, stop, np.float32)
  return sharding.shard_batch(batch, mesh)


def _evaluate(built, frozen, mesh, step, params, eval_batches, writer) -> None:
  """Writes the mean of task.evaluate over the batches as eval/*."""
  totals, count = {}, 0
  for batch in eval_batches():
    batch = _to_device(batch, mesh)
    batch.pop(_STOP, None)
    values = built.evaluate(params, batch, step, count, frozen)
    values = jax.device_get(values)
    for name, value in values.items():
      totals[f"eval/{name}"] = totals.get(f"eval/{name}", 0.0) + float(value)
    count += 1
  if not count:
    logging.warning("step %d: eval_batches is empty, nothing evaluated", step)
    return
  row = {name: value / count for name, value in totals.items()}
  writer.scalars(step, row)
  shown = " ".join(f"{name} {value:.5g}" for name, value in row.items())
  logging.info("step %d: %s, on %d batches", step, shown, count)


def _clip_names(clips, describe) -> list:
  indices = sorted({int(i) for value in clips.values() for i in np.ravel(value)})
  indices = [i for i in indices if i >= 0]
  return list(describe(indices)) if describe else indices


@contextlib.contextmanager
def _signals():
  """Event that SIGTERM and SIGINT set; a second signal acts as without this."""
  event, before = threading.Event(), {}

  def restore():
    for number, handler in before.items():
      signal.signal(number, handler)

  def handle(number, _):
    logging.warning(
      "%s: saving after this step, then exit", signal.Signals(number).name
    )
    event.set()
    restore()

  # Python allows signal handlers in the main thread only.
  if threading.current_thread() is threading.main_thread():
    for number in (signal.SIGTERM, signal.SIGINT):
      before[number] = signal.signal(number, handle)
  try:
    yield event
  finally:
    restore()
