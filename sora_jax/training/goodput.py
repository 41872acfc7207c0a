"""Goodput: the share of a run's wall time that went to training, and the rest by cause.

Counted across restarts: what a run knows of itself is kept in its checkpoints. So steps
that were lost with a crash, and the time until the run was started again, count too.
The time between the end of a training and its extension to more steps does not: nobody
was waiting. `complete` and `to_go_on_from` keep that apart, in a file of the stage.
"""

import json
import pathlib
import time

from absl import logging

from sora_jax.runtime import files

# What time goes to. restart: from the start of the loop to its first step. compile: the
# first step. lost: steps after the newest checkpoint, when they had to be done again.
# idle: no process was there, though training was not complete.
CAUSES = (
  "train", "compile", "data", "evaluate", "checkpoint", "restart", "lost", "idle",
)  # fmt: skip

_FILE = "goodput.json"


class Goodput:
  """Seconds of a run by cause; begins with the cause "restart"."""

  def __init__(self, state: dict | None = None, alive: float = 0.0):
    """Goes on from the state of a checkpoint.

    Args:
      state: what `state` returned, or None for a new run.
      alive: time.time() at which the run was last seen at work before this start.
    """
    self._seconds = dict.fromkeys(CAUSES, 0.0)
    self._cause, self._since = "restart", time.monotonic()
    if state:
      self._seconds.update(state["seconds"])
      now, saved = time.time(), state["time"]
      # Clocks of different machines may disagree a little.
      lost = min(max(alive - saved, 0.0), max(now - saved, 0.0))
      self._seconds["lost"] += lost
      self._seconds["idle"] += max(now - saved - lost, 0.0)

  def become(self, cause: str) -> None:
    """Counts the time from now on for this cause."""
    self._count()
    self._cause = cause

  def spent(self, cause: str, seconds: float) -> None:
    """Counts the last seconds before now for this cause instead."""
    self._count()
    self._seconds[cause] += seconds
    self._seconds[self._cause] -= seconds

  def seconds(self) -> dict[str, float]:
    """Seconds until now of each cause."""
    self._count()
    return dict(self._seconds)

  def shares(self) -> dict[str, float]:
    """Share of "train" as goodput, and of every other cause as goodput/<cause>."""
    seconds = self.seconds()
    total = max(sum(seconds.values()), 1e-9)
    shares = {f"goodput/{cause}": seconds[cause] / total for cause in CAUSES[1:]}
    return {"goodput": seconds["train"] / total, **shares}

  def state(self) -> dict:
    """JSON-able, for a checkpoint that is written now."""
    return {"seconds": self.seconds(), "time": time.time()}

  def _count(self):
    now = time.monotonic()
    self._seconds[self._cause] += now - self._since
    self._since = now


def complete(folder, state: dict) -> None:
  """Notes in the folder of a stage that its training is complete.

  state: what `Goodput.state` returns now.
  """
  files.write_json(pathlib.Path(folder) / _FILE, state)


def complete_late(folder, state: dict, alive: float) -> None:
  """Notes it, unless that is done, where the newest checkpoint is of the last step.

  A process that is killed between the two has not done it; until now nobody knew.
  state: of that checkpoint. alive: as for `Goodput`.
  """
  if _completion(folder, state) is None:
    complete(folder, Goodput(state, alive).state())


def to_go_on_from(folder, state: dict, active: bool = True) -> dict:
  """The state with which training goes on from a checkpoint.

  Where training was completed after that was saved, it is the state at the completion,
  as if saved when training was first begun again: the time in between is nobody's, and
  steps that are trained anew, before the decay of "wsd", were no loss. What a crash
  after that costs, before there is another checkpoint, still counts.

  Args:
    folder: of the stage.
    state: of the checkpoint.
    active: whether this process notes when training was begun again.
  """
  done = _completion(folder, state)
  if done is None:
    return state
  if "extended" not in done:
    done["extended"] = time.time()
    if active:
      complete(folder, done)
  return {"seconds": done["seconds"], "time": done["extended"]}


def _completion(folder, state):
  """What `complete` noted, if training was completed after a state was saved."""
  path = pathlib.Path(folder) / _FILE
  if not path.exists():
    return None
  try:
    done = json.loads(path.read_text())
    # One before that was of a shorter training.
    return done if done["time"] >= state["time"] and done["seconds"] else None
  except (ValueError, KeyError, TypeError) as error:
    logging.warning("%s is damaged (%r): goodput is counted without it", path, error)
    return None
