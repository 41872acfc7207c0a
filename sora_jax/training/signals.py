"""What a host adds to its batch for the loop: all hosts learn it through the step.

Each host reads other rows, and may see a signal at another step. What goes through the
update comes back alike on all of them, so that they decide alike and at one step.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.runtime import sharding

STOP = "stop_signal"  # [rows]: a signal came to this host
READ = "read"  # [rows]: how many clips were read
UNREADABLE = "unreadable"  # [rows, N]: indices of clips that could not be, -1 for none
MOST_NORM = "most_norm"  # (): gradient norm above which the update is left out


def clips_of(batch: dict) -> dict:
  """Entries of a batch that name clips; they stay on the host."""
  return {name: value for name, value in batch.items() if name.startswith("clip")}


def added_to(batch: dict, *, stop: bool, most_norm: float | None = None) -> dict:
  """A host's batch with its signals; most_norm, alike on all hosts, if there is one."""
  clips, batch = clips_of(batch), dict(batch)
  rows = next(len(value) for value in batch.values() if np.ndim(value))
  if jax.process_count() > 1:
    batch[STOP] = np.full(rows, stop, np.float32)
  if most_norm is not None:
    batch[MOST_NORM] = np.float32(most_norm)
  if clips:
    read, unreadable = np.zeros(rows, np.float32), [np.full((rows, 1), -1, np.int32)]
    for name, value in clips.items():
      value_RN = np.reshape(value, (rows, -1))
      if name.startswith("clip_unreadable"):
        unreadable.append(value_RN.astype(np.int32))
      else:
        read += np.sum(value_RN >= 0, axis=1)
    batch[READ], batch[UNREADABLE] = read, np.concatenate(unreadable, axis=1)
  return batch


def taken_from(batch: dict) -> tuple[dict, dict, dict]:
  """Inside the update: (batch of the task, options of `train_step`, what comes back).

  What comes back has STOP always, and READ and UNREADABLE if the batch names clips.
  """
  batch, options = dict(batch), {}
  back = {STOP: jnp.max(batch.pop(STOP)) if STOP in batch else jnp.zeros(())}
  if MOST_NORM in batch:
    options["most_norm"] = batch.pop(MOST_NORM)
  if READ in batch:
    back[READ] = jnp.sum(batch.pop(READ))
    back[UNREADABLE] = batch.pop(UNREADABLE)
    options["allowed"] = back[READ] > 0  # a loss over nothing is no loss of 0
  return batch, options, back


def to_device(batch: dict, mesh: jax.sharding.Mesh) -> dict:
  """Global arrays of a host's batch, without what names clips."""
  host = {name: v for name, v in batch.items() if not name.startswith("clip")}
  return sharding.shard_batch(host, mesh)
