"""One step of a run once more, exactly, to see what was wrong with it.

  python -m sora_jax.train_dit --config=... --config.replay=STEP

Training goes on, in memory alone, from the newest checkpoint before that step. The
update that makes it (`step` in the log and in metrics.jsonl) is the same to the bit,
and beside its metrics the gradient's norm is said for each module, and the batch's
clips. Nothing is saved. Checkpoints are opened as a run opens them, so no other process
may be training in the folder.
"""

import contextlib
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import optax
from absl import logging

from sora_jax.runtime.sharding import path_name
from sora_jax.runtime.train_checkpoints import Checkpoints
from sora_jax.training import guards, loop, signals
from sora_jax.training.config import TrainConfig
from sora_jax.training.step import LOSS, gradients, step_key


def replay(
  setup: loop.Setup,
  config: TrainConfig,
  folder: str | pathlib.Path,
  mesh: jax.sharding.Mesh,
  step: int,
  seed: int = 0,
) -> dict[str, float]:
  """Repeats the update that makes `step` and logs what it is made of.

  Args:
    setup, config, folder, mesh, seed: as of `loop.train`.

  Returns:
    its metrics, and "gradient/<module>" for the norm of each module's gradients.

  Raises:
    ValueError: if the run has no such step.
  """
  folder = pathlib.Path(folder)
  if not 1 <= step <= config.steps:
    raise ValueError(f"config.replay {step} must be from 1 to {config.steps} steps")
  built = loop.build(setup.task, config, mesh, setup.rules, seed)
  checkpoints = Checkpoints(folder / "checkpoints", config.keep)
  with contextlib.closing(checkpoints), jax.set_mesh(mesh):
    start = max((at for at in checkpoints.steps() if at < step), default=0)
    saved = checkpoints.restore(start, built.abstract) if start else (None, None)
    state, host = loop.first(setup, built, *saved)
    logging.info("%s: replays step %d from step %d on", folder.name, step, start)
    # A replay is there to look at what ends a run.
    patient = dataclasses.replace(config, max_skipped=config.steps)
    guard = guards.Guard(patient, setup.names, state=host.get("guard"))
    norms = jax.jit(_norms(setup.task, config, seed))
    for at in range(start + 1, step + 1):
      batch = loop.next_batch(setup.data, at - 1, config.steps)
      clips = signals.clips_of(batch)
      most_norm = guard.limit(at) if config.spike_threshold else None
      batch = signals.added_to(batch, stop=False, most_norm=most_norm)
      batch = signals.to_device(batch, mesh)
      by_module = norms(state, batch, setup.task.frozen) if at == step else {}
      state, values = built.update(state, batch, setup.task.frozen)
      values = jax.device_get(values)
      values.pop(signals.UNREADABLE, None)
      values = {k: float(v) for k, v in values.items() if k != signals.STOP}
      guard.skipped(at, values, clips)
    by_module = {name: float(norm) for name, norm in by_module.items()}
  _log(step, values, by_module, guards.clip_names(clips, setup.names, most=10_000))
  return values | {f"gradient/{name}": norm for name, norm in by_module.items()}


def _norms(task, config, seed):
  """(state, batch, frozen) -> norm of the gradients of each module, by its path."""

  def norms(state, batch, frozen):
    batch, _, _ = signals.taken_from(batch)
    key = step_key(seed, state.step, LOSS)
    gradient, _ = gradients(
      task, state.params, {**batch, "step": state.step}, key, frozen, config
    )
    modules: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
      modules.setdefault(path_name(path[:-1]), []).append(leaf.astype(jnp.float32))
    return {name: optax.tree.norm(leaves) for name, leaves in modules.items()}

  return norms


def _log(step, values, by_module, clips):
  width = max(map(len, by_module))
  lines = [f"{name:{width}}  {norm:.6g}" for name, norm in by_module.items()]
  logging.info("gradient norms by module:\n%s", "\n".join(lines))
  shown = " ".join(f"{name} {value:.9g}" for name, value in values.items())
  logging.info("step %d: %s; clips of its batch: %s", step, shown, clips)
