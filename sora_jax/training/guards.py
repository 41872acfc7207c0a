"""What the host knows of updates that were left out, and of clips that were not read.

The update itself decides, on the devices, whether it is taken (`step.train_step`). Here
the reason is said and counted, and the run ends where that is not the exception: after
too many updates in a row, or above a share of clips that cannot be read. All of it
comes back through the step, so that all hosts decide alike and at the same step.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from sora_jax.runtime import limits
from sora_jax.runtime.limits import UnreadableError
from sora_jax.training.config import TrainConfig

_WINDOW, _LEAST_WINDOW = 64, 16  # gradient norms that a spike is measured by
_SIGMA = 1.4826  # of a normal distribution, in median absolute deviations
_LEAST_DEVIATION = 0.05  # of the median: norms that hardly differ have no spikes
# An update is under way while the one before is looked at, so these are not known yet.
_LAG = 2
_SPIKES = 3  # losses in a row that are no chance


class NonFiniteError(ValueError):
  """Losses or gradients are NaN, infinite or spikes; names the step and its clips."""


class LossSpikeError(Exception):
  """The loss has risen since a step, and stays so: the run is to go back before it.

  Attributes:
    first: the step, after the update, that showed the first of these losses.
    count: how often the run has gone back now.
  """

  def __init__(self, first: int, count: int, reason: str):
    super().__init__(reason)
    self.first, self.count = first, count


class Guard:
  """Follows the updates of a run; its state is JSON-able and alike on all hosts."""

  def __init__(
    self,
    config: TrainConfig,
    names: Sequence[str] = (),
    max_unreadable: float = 1.0,
    state: dict[str, Any] | None = None,
  ):
    """Begins, or goes on.

    Args:
      config: max_skipped and spike_threshold.
      names: of the clips, by their index in a batch; how many there are is needed.
      max_unreadable: share of the clips that may be unreadable.
      state: what `state` gave, of the checkpoint to go on from.
    """
    self._config, self._names, self._most = config, names, max_unreadable
    state = state or {}
    self._in_a_row = int(state.get("in_a_row", 0))
    # [step, gradient norm] of the last updates.
    self._norms = [(int(step), float(norm)) for step, norm in state.get("norms", ())]
    self._losses = [float(loss) for loss in state.get("losses", ())]  # without spikes
    self._spikes = [int(step) for step in state.get("spikes", ())]  # the last, in a row
    self._rollbacks = int(state.get("rollbacks", 0))
    self._read, self._asked, self._unreadable = 0.0, 0.0, set[int]()

  def state(self) -> dict[str, Any]:
    """What is kept with a checkpoint, so that the run decides alike after a resume."""
    state = {
      "in_a_row": self._in_a_row,
      "norms": [[step, norm] for step, norm in self._norms],
    }
    if self._config.rollback_threshold:
      state |= {"losses": self._losses, "spikes": self._spikes}
      state["rollbacks"] = self._rollbacks
    return state

  def limit(self, step: int) -> float:
    """Gradient norm above which the update that makes `step` is a spike.

    Median + spike_threshold deviations of the norms before; infinite without a
    threshold or too few of them. It goes by the step alone, not by what is known when
    it is asked, so that a run which was resumed decides alike.
    """
    norms = [norm for at, norm in self._norms if at <= step - _LAG][-_WINDOW:]
    if not self._config.spike_threshold or len(norms) < _LEAST_WINDOW:
      return math.inf
    return _robust_limit(norms, self._config.spike_threshold)

  def follow_loss(self, step: int, loss: float) -> None:
    """Takes the loss of an update that was not left out.

    Raises:
      LossSpikeError: it is the third in a row far above the median of the last ones.
      NonFiniteError: likewise, after max_rollbacks of them.
    """
    threshold = self._config.rollback_threshold
    if not threshold:
      return
    limit = math.inf
    if len(self._losses) >= _LEAST_WINDOW:
      limit = _robust_limit(self._losses, threshold)
    if loss <= limit:
      self._losses, self._spikes = [*self._losses, loss][-_WINDOW:], []
      return
    self._spikes.append(step)
    if len(self._spikes) < _SPIKES:
      return
    first, count = self._spikes[0], self._rollbacks + 1
    reason = f"loss is {loss:.4g} at step {step}, above {limit:.4g} since step {first}"
    if count > self._config.max_rollbacks:
      raise NonFiniteError(
        f"{reason}; the run went back {self._rollbacks} times before "
        f"(train.max_rollbacks {self._config.max_rollbacks}). The checkpoints before "
        "it stay; lower the learning rate"
      )
    raise LossSpikeError(first, count, reason)

  def skipped(self, step: int, values: dict[str, float], clips: dict) -> bool:
    """Whether the update that made `step` was left out; logs why.

    Args:
      step: after the update.
      values: its metrics, with `skipped` (1 or 0), loss and grad_norm.
      clips: entries of this host's batch that name clips.

    Raises:
      NonFiniteError, UnreadableError: after more than max_skipped in a row.
    """
    read = values.get("read", 1.0) > 0
    if self._config.spike_threshold and read and math.isfinite(values["grad_norm"]):
      self._norms = [*self._norms, (step, values["grad_norm"])][-_WINDOW - _LAG :]
    if not values["skipped"]:
      self._in_a_row = 0
      return False
    self._in_a_row += 1
    nothing = "no clip of its batch could be read"
    reason = self._fault(step, values) if read else nothing
    named = f"; clips of its batch: {clip_names(clips, self._names)}" if read else ""
    if self._in_a_row > self._config.max_skipped:
      raise self._too_many(step, reason, named, read)
    logging.warning(
      "step %d: %s: this update is left out (%d in a row, at most max_skipped %d)%s",
      *(step, reason, self._in_a_row, self._config.max_skipped, named),
    )
    return True

  def asked(self, read: float, unreadable: np.ndarray) -> None:
    """Counts the clips of a batch of all hosts.

    Args:
      read: how many were read.
      unreadable: indices of those that could not be; negative ones are none.

    Raises:
      UnreadableError: if there are too many of them by now.
    """
    missing = unreadable[unreadable >= 0]
    self._read += read
    self._asked += read + missing.size
    self._unreadable |= {int(index) for index in missing}
    total = min(self._asked, len(self._names) or self._asked)
    if limits.too_many(len(self._unreadable), total, self._most, self._asked):
      first = self._name(min(self._unreadable))
      raise UnreadableError(
        f"{len(self._unreadable)} of {total:.0f} clips asked for so far cannot be "
        f"read, more than config.data.max_unreadable {self._most:g}; the first is "
        f"{first!r}, and bad_clips.jsonl of the stage says why. Is the disk with the "
        "files there?"
      )

  def check_saved(self, last: bool) -> None:
    """Raises UnreadableError if a model that has seen no clip would be saved.

    last: a run that ends so; before, the first few clips may be bad ones by chance.
    """
    if self._asked >= (1 if last else limits.LEAST) and not self._read:
      raise UnreadableError(
        f"none of the {self._asked:.0f} clips asked for so far can be read, so that "
        "there is nothing to save; bad_clips.jsonl of the stage says why. Is the disk "
        "with the files there?"
      )

  def _fault(self, step, values) -> str:
    for name in ("loss", "grad_norm"):
      if not math.isfinite(values[name]):
        return f"{name} is {values[name]}"
    limit = self.limit(step)
    return f"grad_norm {values['grad_norm']:.4g} is above the limit of {limit:.4g}"

  def _too_many(self, step, reason, named, read) -> ValueError:
    if not read:
      return UnreadableError(
        f"{reason} at step {step}, the {self._in_a_row}. in a row (train.max_skipped "
        f"{self._config.max_skipped}); bad_clips.jsonl of the stage says why. Is the "
        "disk with the files there?"
      )
    before = ""
    if self._in_a_row > 1:
      before = f", and the {self._in_a_row - 1} updates before were left out, too"
    return NonFiniteError(
      f"{reason} at step {step}{named}{before}. The checkpoints before it stay. Leave "
      "clips out (--config.data.leave_out='(\"ID\",)'), lower the learning rate, or "
      f"look at the step alone: --config.replay={step}"
    )

  def _name(self, index):
    return self._names[index] if self._names else index


def _robust_limit(values: Sequence[float], threshold: float) -> float:
  """Median + threshold deviations, as of a normal distribution, of values."""
  median = float(np.median(values))
  deviation = _SIGMA * float(np.median(np.abs(np.array(values) - median)))
  return median + threshold * max(deviation, _LEAST_DEVIATION * abs(median))


def clip_names(clips: dict, names: Sequence[str], most: int = 20) -> list:
  """Names, or indices without them, of up to `most` clips of a batch's entries."""
  indices = sorted({int(i) for value in clips.values() for i in np.ravel(value)})
  indices = [i for i in indices if i >= 0]
  shown = [names[i] for i in indices[:most]] if names else indices[:most]
  more = len(indices) - len(shown)
  return [*shown, f"and {more} more"] if more else shown
