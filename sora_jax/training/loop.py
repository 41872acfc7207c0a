"""The host's side of training: jits one update and calls it until the last step.

It knows of what is learnt only `tasks.Task`. In `train` each step has this order:
evaluate, save, next batch, dispatch the update, fetch the metrics of the update before
(so that the device never waits for the host), stop where `guards` says so.
"""

import contextlib
import functools
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.runtime import sharding
from sora_jax.runtime.train_checkpoints import Checkpoints
from sora_jax.runtime.watchdog import Watchdog
from sora_jax.tasks import Task
from sora_jax.training import goodput, metrics, optim, profiling, resume, signals
from sora_jax.training.config import TrainConfig
from sora_jax.training.guards import Guard, LossSpikeError
from sora_jax.training.guards import NonFiniteError as NonFiniteError
from sora_jax.training.step import (
  EVALUATE,
  TrainState,
  first_state,
  given,
  init_state,
  step_key,
  train_step,
)


class Setup(NamedTuple):
  """All that `train` needs of a stage beside its TrainConfig.

  Attributes:
    task: what is learnt. rules: where its params go on the mesh.
    data: iterator of dicts of numpy arrays, this host's rows (sharding.host_shard),
      with get_state, set_state and close; the state is equal on all hosts. Entries
      whose name begins with "clip" stay on the host, as indices into `names`, -1 for
      none; where it begins with "clip_unreadable", of clips that could not be read.
    eval_batches: such batches. task.evaluate on them with the EMA params, averaged, is
      written as eval/*; then on_eval(step, EMA params, metrics.Writer) is called.
    names: of the clips, for messages.
    flops_per_step, tokens_per_step: of all devices, for the speed in the log.
    units: batch -> number of frames or tokens in it.
    captioned: whether any training clip has a caption.
    initial: shardings of the params -> their first values; None = those of task.init.
    max_unreadable: share of the clips above which unreadable ones end the run.
  """

  task: Task
  rules: sharding.Rules
  data: Any
  eval_batches: Sequence[dict] = ()
  names: Sequence[str] = ()
  flops_per_step: float = 0.0
  tokens_per_step: int = 0
  units: Callable | None = None
  captioned: bool = False
  initial: Callable | None = None
  on_eval: Callable | None = None
  max_unreadable: float = 1.0


class Preempted(SystemExit):
  """SIGTERM or SIGINT came and the state is saved; exits the program with code 0."""

  def __init__(self):
    super().__init__(0)


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
    batch, options, back = signals.taken_from(batch)
    state, values = train_step(
      state,
      batch,
      frozen,
      task=task,
      config=config,
      optimizer=optimizer,
      schedule=schedule,
      seed=seed,
      **options,
    )
    return state, {**values, **back}

  def evaluate(params, batch, step, index, frozen=None):
    # The same keys at every step, so that the numbers of a run can be compared.
    key = step_key(seed, index, EVALUATE)
    return task.evaluate(params, {**batch, "step": step}, key, *given(frozen))

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
  setup: Setup,
  config: TrainConfig,
  folder: str | pathlib.Path,
  mesh: jax.sharding.Mesh,
  seed: int = 0,
  profile: profiling.Profile | None = None,
) -> TrainState:
  """Trains to config.steps, going on from the newest checkpoint in the folder.

  So with more steps than the checkpoints were trained for, training goes on as well,
  and equals, bitwise, a run that had them from the start as far as the schedule is the
  same: always for "constant"; for "wsd" because it begins again at the checkpoint from
  before the decay, which is kept for that; not for "cosine", whose learning rate jumps
  to where the longer one is at that step. What is not the same is logged.

  Args:
    folder: workdir/<stage>; gets checkpoints/, metrics.jsonl, tensorboard/ and, of the
      steps that `profile` chooses, profile/. Its name is that of the stage in the log.

  Raises:
    NonFiniteError, UnreadableError: the checkpoints before it stay.
    Preempted: after a signal.
    ValueError: for data that ends early, a checkpoint that does not fit, fewer steps
      than were trained already, checkpoints that are all damaged, and after
      config.save_failures saves in a row that failed.
  """
  folder = pathlib.Path(folder)
  built = build(setup.task, config, mesh, setup.rules, seed)
  checkpoints = Checkpoints(
    folder / "checkpoints",
    config.keep,
    always=optim.decay_start(config),
    every=config.keep_every,
    best=bool(config.keep_best),
    failures=config.save_failures,
  )
  with contextlib.closing(checkpoints), jax.set_mesh(mesh), _signals() as signalled:
    run = _Run(setup, config, built, folder, mesh, checkpoints, signalled)
    spike, passed = None, None
    while True:
      try:
        return run.to_the_end(profile, spike, passed)
      except LossSpikeError as error:
        # Without its traceback, which would keep the state in memory.
        spike, passed = error.with_traceback(None), setup.data.get_state()
      resume.go_back(checkpoints, spike)


def first(setup: Setup, built: Built, state, host: dict | None) -> tuple:
  """(state, what the host knew) to go on from, or to begin with if host is None.

  state, host: of a checkpoint; the data are set to where it is.
  """
  if host is not None:
    setup.data.set_state(host["data"])
    return state, host
  if setup.initial is None:
    return built.init(), {"evaluated": 0}
  places = jax.tree.map(lambda leaf: leaf.sharding, built.abstract.params)
  return built.begin(setup.initial(places)), {"evaluated": 0}


def _owes_evaluation(setup: Setup, config, step: int, host) -> bool:
  """Whether a signal at the last step has left its evaluation to be made up for."""
  return bool(setup.eval_batches and config.eval_every and host["evaluated"] != step)


def _meter_state(folder: pathlib.Path, host: dict) -> dict | None:
  """State of the meter to go on from, of the host of a checkpoint."""
  state = host.get("meter")
  if not state or "goodput" not in state:
    return state
  active = jax.process_index() == 0
  counted = goodput.to_go_on_from(folder, state["goodput"], active)
  return {**state, "goodput": counted}


def _last_seen(folder: pathlib.Path) -> float:
  """time.time() at which a run that is gone wrote its last row; 0 if there is none."""
  path = folder / "metrics.jsonl"
  return path.stat().st_mtime if path.exists() else 0.0


class _Run:
  """What the steps of a run share on this host, and the parts of a step."""

  def __init__(self, setup, config, built, folder, mesh, checkpoints, signalled):
    self._setup, self._config, self._built = setup, config, built
    self._folder, self._mesh = folder, mesh
    self._checkpoints, self._signalled = checkpoints, signalled
    self._closing = contextlib.ExitStack()

  def to_the_end(self, profile, spike, passed) -> TrainState:
    """Trains from the newest checkpoint on.

    spike: that the run has gone back for; then the data go on from the state `passed`.
    """
    setup, config, built, folder = self._setup, self._config, self._built, self._folder
    start, state, host = resume.newest(self._checkpoints, config, built.abstract)
    state, host = first(setup, built, state, host)
    self._checkpoints.delete_after(start)
    if start == config.steps and not _owes_evaluation(setup, config, start, host):
      logging.info("%s: trained to step %d already, in %s", folder.name, start, folder)
      counted = (host.get("meter") or {}).get("goodput")
      if counted and jax.process_index() == 0:
        goodput.complete_late(folder, counted, _last_seen(folder))
      return state
    if spike:
      setup.data.set_state(passed)
      host = {**host, "guard": {**(host.get("guard") or {}), "rollbacks": spike.count}}
    _log_start(folder, built.abstract.params, self._mesh, start, config.steps)
    with contextlib.closing(self):
      self.begin(start, host, profile)
      for step in range(start, config.steps):
        self.evaluate(step, state)
        self.save(step, state)
        state = self.update(step, state)
      self.evaluate(config.steps, state)
      self.save(config.steps, state)
      self.complete()
      return state

  def begin(self, start: int, host: dict, profile) -> None:
    """Opens the log; host: what the checkpoint to go on from holds beside the state."""
    self._start, self._evaluated = start, host["evaluated"]
    self._score: float | None = None  # of the newest evaluation
    self._meter = metrics.Meter(
      self._config.steps,
      flops_per_step=self._setup.flops_per_step,
      tokens_per_step=self._setup.tokens_per_step,
      devices=self._mesh.devices.size,
      device_kind=self._mesh.devices.flat[0].device_kind,
      state=_meter_state(self._folder, host),
      alive=_last_seen(self._folder),
    )
    active = jax.process_index() == 0
    self._writer = metrics.Writer(self._folder, start, active=active)
    self._closing.callback(self._writer.close)
    profile = profile or profiling.Profile()
    self._tracer = profiling.Tracer(profile, self._folder / "profile")
    self._closing.callback(self._tracer.close)
    setup = self._setup
    self._guard = Guard(
      self._config, setup.names, setup.max_unreadable, host.get("guard")
    )
    stacks = self._folder / f"stacks-{jax.process_index()}.txt"
    self._watchdog = Watchdog(self._config.deadline, stacks)
    self._closing.callback(self._watchdog.close)
    self._monitor = _Monitor(
      self._config, self._meter, self._writer, self._guard, self._watchdog,
      self._signalled,
    )  # fmt: skip

  def close(self) -> None:
    """Closes what `begin` opened."""
    self._closing.close()

  def evaluate(self, step: int, state: TrainState) -> None:
    """Evaluates if it is time to, once for each step."""
    last = step == self._config.steps
    due = _due(step, self._config.eval_every, last) and self._evaluated != step
    # After a signal there is no time to evaluate: the next run does it.
    if not due or not self._setup.eval_batches or self._monitor.stop():
      return
    self._monitor.settle()
    with self._meter.pause("evaluate"), self._watchdog.pause("an evaluation"):
      row = self._write_evaluation(step, state.ema)
      self._score = _score(self._config.keep_best, row)
      if self._setup.on_eval:
        self._setup.on_eval(step, state.ema, self._writer)
    self._evaluated = step

  def save(self, step: int, state: TrainState) -> None:
    """Saves if it is time to, and at the end; raises Preempted after a signal."""
    config, name = self._config, self._folder.name
    stop, last = self._monitor.stop(), step == config.steps
    due = _due(step, config.save_every) or step == optim.decay_start(config)
    if step > self._start and (stop or last or due):
      # First settle: a state after a non-finite loss must not be saved.
      self._monitor.settle()
      self._guard.check_saved(last)
      with self._meter.pause("checkpoint"), self._watchdog.pause("a save"):
        host = {
          "data": self._setup.data.get_state(),
          "evaluated": self._evaluated,
          "steps": config.steps,
          "meter": self._meter.state(),
          "guard": self._guard.state(),
        }
        ending = stop or last
        save = self._checkpoints.save_and_wait if ending else self._checkpoints.save
        save(step, state, host, self._score if self._evaluated == step else None)
    if stop or last:
      with self._meter.pause("checkpoint"), self._watchdog.pause("a save"):
        self._checkpoints.wait()
        sharding.sync(f"{name} saved")  # none exits before all are done
      logging.info("%s: %s", name, self._meter.summary())
    if stop or (last and self._signalled.is_set()):
      logging.info("%s: stopped by a signal; step %d is saved", name, step)
      raise Preempted

  def complete(self) -> None:
    """Notes that the last step is trained, evaluated and saved."""
    if jax.process_index() == 0:
      goodput.complete(self._folder, self._meter.state()["goodput"])

  def update(self, step: int, state: TrainState) -> TrainState:
    """Dispatches one update, and settles the one before it."""
    first = step == self._start
    self._tracer.reached(step, self._monitor.settle)
    if first:
      self._meter.compile()
    begin = time.perf_counter()
    batch = next_batch(self._setup.data, step, self._config.steps)
    self._meter.waited(time.perf_counter() - begin)
    clips = signals.clips_of(batch)
    spikes = self._config.spike_threshold
    most_norm = self._guard.limit(step + 1) if spikes else None
    batch = signals.added_to(batch, stop=self._signalled.is_set(), most_norm=most_norm)
    batch = signals.to_device(batch, self._mesh)
    with self._tracer.step(step):
      state, values = self._built.update(state, batch, self._setup.task.frozen)
    self._monitor.dispatched(step + 1, values, clips)
    if first:
      self._monitor.settle()
      seconds, name = time.perf_counter() - begin, self._folder.name
      logging.info("%s: first step took %.1f s, with compilation", name, seconds)
      self._meter.start(step + 1)
    return state

  def _write_evaluation(self, step, params) -> dict[str, float]:
    """The mean of task.evaluate over the batches as eval/*, which it writes."""
    totals: dict[str, float] = {}
    frozen = self._setup.task.frozen
    for count, batch in enumerate(self._setup.eval_batches):
      batch = signals.to_device(batch, self._mesh)
      values = self._built.evaluate(params, batch, step, count, frozen)
      for name, value in jax.device_get(values).items():
        totals[f"eval/{name}"] = totals.get(f"eval/{name}", 0.0) + float(value)
    count = len(self._setup.eval_batches)
    row = {name: value / count for name, value in totals.items()}
    self._writer.scalars(step, row)
    shown = " ".join(f"{name} {value:.5g}" for name, value in row.items())
    logging.info("step %d: %s, on %d batches", step, shown, count)
    return row


class _Monitor:
  """Fetches the metrics of each step, one step late so that the device never waits."""

  def __init__(self, config, meter, writer, guard, watchdog, signalled):
    self._config, self._meter, self._writer = config, meter, writer
    self._guard, self._watchdog, self._signalled = guard, watchdog, signalled
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
    values = jax.device_get(values)
    unreadable = values.pop(signals.UNREADABLE, None)
    values = {name: float(value) for name, value in values.items()}
    self._watchdog.beat()
    self._stop = values.pop(signals.STOP) > 0 or self._stop
    if unreadable is not None:
      self._guard.asked(values[signals.READ], unreadable)
    if self._guard.skipped(step, values, clips):
      self._meter.skip()
    else:
      self._guard.follow_loss(step, values["loss"])
      own = (signals.READ, "skipped")
      self._meter.add({k: v for k, v in values.items() if k not in own})
    if _due(step, self._config.log_every, step == self._config.steps):
      row = self._meter.row(step)
      self._writer.scalars(step, row)
      logging.info("%s", metrics.format_row(step, self._config.steps, row))


def _due(step: int, every: int, last: bool = False) -> bool:
  return bool(every) and step > 0 and (last or step % every == 0)


def _score(metric: str, row: dict[str, float]) -> float | None:
  """What the best checkpoint has least of, by config.keep_best."""
  name = metric.removeprefix("-")
  if not name:
    return None
  if name not in row:
    raise ValueError(f"keep_best: {name!r} is none of the metrics {sorted(row)}")
  return -row[name] if metric.startswith("-") else row[name]


def _log_start(folder, params, mesh, start, steps) -> None:
  size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  logging.info(
    "%s: %.4g M params, mesh %s of %s, from step %d to %d, in %s",
    folder.name,
    size / 1e6,
    dict(mesh.shape),
    mesh.devices.flat[0].device_kind,
    start,
    steps,
    folder,
  )


def next_batch(data_iterator, step: int, steps: int):
  """The next batch; ValueError if the data ends after `step` of `steps` steps."""
  try:
    return next(data_iterator)
  except StopIteration:
    raise ValueError(f"the data ended after {step} of {steps} steps") from None


@contextlib.contextmanager
def _signals():
  """Event that SIGTERM, SIGINT and SIGUSR1 set; a second one acts as without this.

  SIGUSR1 is what Slurm sends before the time of a job is up (--signal=USR1@SECONDS).
  """
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
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
      before[number] = signal.signal(number, handle)
  try:
    yield event
  finally:
    restore()
