"""Goodput: the share of a run's wall time that went to training, and the rest by cause.

Counted across restarts: what a run knows of itself is kept in its checkpoints. So steps
that were lost with a crash, and the time until the run was started again, count too.
"""

import time

# What time goes to. restart: from the start of the loop to its first step. compile: the
# first step. lost: steps after the newest checkpoint, when they had to be done again.
# idle: no process was there.
CAUSES = (
  "train", "compile", "data", "evaluate", "checkpoint", "restart", "lost", "idle",
)  # fmt: skip


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
