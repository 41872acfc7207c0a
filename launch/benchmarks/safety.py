"""What the guards cost a train step, and what checksums and saves cost a run.

  python launch/benchmarks/safety.py --config=configs/quickstart.py --steps=200

Needs no run: the DiT's batch is of random numbers. The step with its guards, as
`loop.train` makes it, and the same update without any take turns, so that other work on
the machine costs both alike; so do saves with and without checksums. Given are medians
of wall time, and of the processors' time in this process, which other work changes
less. On a CPU this process's own threads compute what an accelerator would.
"""

import dataclasses
import pathlib
import shutil
import statistics
import tempfile
import time
from unittest import mock

import jax
import numpy as np
import optax
import record
from absl import flags, logging
from ml_collections import config_flags

from sora_jax.packing import packed_row
from sora_jax.run import build, cli
from sora_jax.run import recipe as recipes
from sora_jax.runtime import checksums, sharding, train_checkpoints
from sora_jax.training import guards, loop, optim, signals, step

STEPS = flags.DEFINE_integer("steps", 200, "Steps of each kind to time.", 3)
SAVES = flags.DEFINE_integer("saves", 10, "Saves of each kind to time.", 1)


def random_batch(recipe, rng) -> dict:
  """A full batch of the stage "dit", one segment a row."""
  row = build.empty_row(recipe)
  size = build.row_size(recipe.dit, text_width=None)
  batch = packed_row.empty(packed_row.PackedRow, size, recipe.dit.rows)
  assert row.keys() == batch.keys(), "the benchmark is for the small text encoder"
  batch["patch_LP"] = rng.standard_normal(batch["patch_LP"].shape).astype(np.float32)
  for name in ("segment_L", "text_segment_S"):
    if name in batch:
      batch[name] = np.ones_like(batch[name])
  batch["clip_N"] = np.zeros_like(batch["clip_N"])
  return dict(batch)


def plain_update(task, config, seed):
  """The update of `step.train_step` without guards."""
  optimizer, schedule = optim.make(config, jax.eval_shape(task.init, jax.random.key(0)))

  def update(state, batch):
    batch = {**batch, "step": state.step}
    key = step.step_key(seed, state.step, step.LOSS)
    gradient, values = step.gradients(task, state.params, batch, key, None, config)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jax.numpy.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
    values["grad_norm"] = optax.tree.norm(gradient)
    values["learning_rate"] = schedule(state.step)
    return step.TrainState(state.step + 1, params, ema, opt_state), values

  return jax.jit(update, donate_argnums=0)


class Timer:
  """Wall and processor time of things that take turns."""

  def __init__(self):
    self.wall, self.cpu = {}, {}

  def time(self, name, call):
    """Calls, and keeps how long it took; its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    self.wall.setdefault(name, []).append(time.perf_counter() - wall)
    self.cpu.setdefault(name, []).append(time.process_time() - cpu)
    return result

  def median(self, name, kind="wall") -> float:
    return statistics.median(getattr(self, kind)[name])


def time_steps(recipe, mesh, steps) -> tuple[Timer, step.TrainState]:
  """Times updates with and without guards in turns; a state that was trained."""
  config = dataclasses.replace(
    recipe.dit.train, spike_threshold=8.0, rollback_threshold=20.0
  )
  task, rules = build.make_task(recipe)
  built = loop.build(task, config, mesh, rules, recipe.seed)
  plain, timer = plain_update(task, config, recipe.seed), Timer()
  batch = random_batch(recipe, np.random.default_rng(0))
  guard = guards.Guard(config, names=["clip"])
  states = {"guarded": built.init(), "plain": built.init()}

  def guarded_step(index):
    clips = signals.clips_of(batch)
    added = signals.added_to(batch, stop=False, most_norm=guard.limit(index))
    ready = signals.to_device(added, mesh)
    states["guarded"], values = built.update(states["guarded"], ready)
    values = jax.device_get(values)
    unreadable = values.pop(signals.UNREADABLE)
    values = {name: float(value) for name, value in values.items()}
    guard.asked(values[signals.READ], unreadable)
    if not guard.skipped(index, values, clips):
      guard.follow_loss(index, values["loss"])

  def plain_step():
    ready = signals.to_device(batch, mesh)
    states["plain"], values = plain(states["plain"], ready)
    jax.device_get(values)

  for index in range(1, steps + 3):
    if index == 3:
      timer = Timer()  # both are compiled and warm
    # Each is the first of the two in turn.
    order = (0, 1) if index % 2 else (1, 0)
    for which in order:
      if which:
        timer.time("guarded", lambda index=index: guarded_step(index))
      else:
        timer.time("plain", plain_step)
  return timer, states["guarded"]


def time_saves(state, saves) -> Timer:
  """Times saves with and without checksums in turns, and each to its end."""
  timer, folder = Timer(), pathlib.Path(tempfile.mkdtemp())
  none = mock.patch.object(checksums, "start_tree", lambda tree: dict)
  checkpoints = train_checkpoints.Checkpoints(folder / "checkpoints", keep=1)
  try:
    for index in range(2 * saves + 2):
      if index == 2:
        timer = Timer()
      name = ("save", "save without")[index % 2]
      begin = time.perf_counter()
      if index % 2:
        with none:
          timer.time(name, lambda i=index: checkpoints.save(i, state, {}))
          checkpoints.wait()
      else:
        timer.time(name, lambda i=index: checkpoints.save(i, state, {}))
        checkpoints.wait()
      timer.wall.setdefault(f"{name} to its end", []).append(
        time.perf_counter() - begin
      )
  finally:
    checkpoints.close()
    shutil.rmtree(folder)
  return timer


def main(argv):
  del argv
  cli.start_logging()
  recipe = recipes.read(flags.FLAGS.config)
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
  with jax.set_mesh(mesh):
    steps, state = time_steps(recipe, mesh, STEPS.value)
    saves = time_saves(state, SAVES.value)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  guarded, plain = steps.median("guarded"), steps.median("plain")
  cpu = steps.median("guarded", "cpu") / steps.median("plain", "cpu") - 1
  logging.info("%d steps each: %.4f s with guards, %.4f s without: %+.2f %% of wall, "
               "%+.2f %% of processor time", STEPS.value, guarded, plain,
               100 * (guarded / plain - 1), 100 * cpu)  # fmt: skip
  block, without = saves.median("save"), saves.median("save without")
  whole, every = saves.median("save to its end"), recipe.dit.train.save_every
  share = block / (every * guarded)
  logging.info("%d saves each of %.0f MB: training is blocked for %.3f s (%.3f s "
               "without checksums) of the %.3f s that a save takes; every %d steps "
               "that is %.3f %% of training", SAVES.value, size / 1e6, block, without,
               whole, every, 100 * share)  # fmt: skip
  figures = {
    "step with guards": record.Figure(guarded, "s"),
    "step without guards": record.Figure(plain, "s"),
    "guards, of processor time": record.Figure(100 * cpu, "%"),
    "save, blocking": record.Figure(block, "s"),
    "save, blocking without checksums": record.Figure(without, "s"),
    "save": record.Figure(whole, "s"),
  }
  config = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).name
  record.append("safety", {"config": config, "steps": STEPS.value}, figures)


if __name__ == "__main__":
  cli.define_flags()
  record.define_flag()
  flags.mark_flag_as_required("config")
  cli.run_app(main)
