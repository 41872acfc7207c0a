"""Where training goes on: past damage, and with other steps than were planned."""

import dataclasses
from typing import Any

from absl import logging

from sora_jax.runtime.train_checkpoints import Checkpoints, DamagedError
from sora_jax.training import optim
from sora_jax.training.config import TrainConfig
from sora_jax.training.guards import LossSpikeError


def newest(
  checkpoints: Checkpoints, config: TrainConfig, abstract: Any
) -> tuple[int, Any, dict | None]:
  """(step, state, what the host knew) to go on from; (0, None, None) = from the start.

  Checkpoints that turn out to be damaged are moved aside, into the folder "damaged"
  beside theirs, which is said with the number of steps that are made again.

  abstract: the state as ShapeDtypeStructs with shardings.

  Raises:
    ValueError: if there are checkpoints and all are damaged: also on a later call,
      until the user has deleted the folder "damaged". If the newest one is beyond
      config.steps, or of another config.
  """
  aside: list[tuple[int, str]] = []
  while True:
    try:
      start = first_step(checkpoints, config)
      state, host = checkpoints.restore(start, abstract) if start else (None, None)
      break
    except DamagedError as error:
      checkpoints.set_aside(error.step)
      aside.append((error.step, error.reason))
  place = checkpoints.set_aside_in()
  if not start and place:
    why = "; ".join(f"step {step}: {reason}" for step, reason in aside)
    raise ValueError(
      f"{checkpoints.folder}: no checkpoint is whole; the damaged ones are in {place}"
      f"{f' ({why})' if why else ''}. Put a copy of one there back, or delete {place} "
      "to train from the start"
    )
  for step, reason in aside:
    logging.warning(
      "%s: the checkpoint of step %d is damaged (%s) and was moved to %s: training "
      "goes on from step %d, %d steps are made again",
      *(checkpoints.folder.parent.name, step, reason, place, start, step - start),
    )
  return start, state, host


def go_back(checkpoints: Checkpoints, spike: LossSpikeError) -> None:
  """Deletes the checkpoints since a loss has risen, so that `newest` is before it.

  Raises:
    ValueError: if there would be none left.
  """
  checkpoints.wait()
  saved = checkpoints.steps()
  # What shows a loss at a step are the params of the step before.
  before = [step for step in saved if step < spike.first - 1]
  if saved and not before:
    raise ValueError(
      f"{checkpoints.folder}: {spike}, and the oldest checkpoint there is of step "
      f"{saved[0]}: nothing to go back to (train.keep, train.keep_every)"
    )
  start = max(before, default=0)
  logging.warning(
    "%s: %s: goes back to step %d and passes over the data since then (%d of at most "
    "max_rollbacks)",
    *(checkpoints.folder.parent.name, spike, start, spike.count),
  )
  checkpoints.delete_after(start)


def first_step(checkpoints: Checkpoints, config: TrainConfig) -> int:
  """Step to go on from; 0 = from the start.

  It is the newest one, unless the schedule with config.steps has other learning rates
  before it than the schedule that it was trained with. Then, with "wsd", it is the
  newest one that is right, which the loop has kept; else what differs is logged.

  Raises:
    ValueError: if the newest checkpoint is beyond config.steps.
    DamagedError: if it is damaged.
  """
  saved = checkpoints.steps()
  if not saved:
    return 0
  newest, name = saved[-1], checkpoints.folder.parent.name
  if newest > config.steps:
    raise ValueError(
      f"{checkpoints.folder} has a checkpoint of step {newest}, beyond the "
      f"{config.steps} steps of the config; raise steps or use another workdir"
    )
  planned = checkpoints.host(newest).get("steps")
  if planned is None:  # written by version 0.1.0
    planned = config.steps
    if config.schedule != "constant":
      logging.warning(
        "%s: the checkpoint of step %d, of an older version, does not say for how many "
        "steps its schedule %r was. It goes on as if for %d, as in the config; if they "
        "were fewer, the rate jumps, and %d steps from the start are something else",
        *(name, newest, config.schedule, planned, planned),
      )
  same = optim.common_updates(config, planned)
  if newest <= same:
    return newest
  before = [step for step in saved if step <= same]
  if config.schedule == "wsd" and before:
    logging.info(
      "%s: from %d to %d steps: begins again at step %d, before the decay",
      *(name, planned, config.steps, before[-1]),
    )
    return before[-1]
  was, now = (
    float(_rate(dataclasses.replace(config, steps=steps), newest))
    for steps in (planned, config.steps)
  )
  logging.warning(
    "%s: from %d to %d steps changes schedule %r before step %d, which has trained "
    "already: the learning rate goes on at %.3g instead of %.3g, and this is not what "
    "%d steps from the start would be",
    *(name, planned, config.steps, config.schedule, newest, now, was, config.steps),
  )
  return newest


def _rate(config, step):
  return optim.make_schedule(config, config.learning_rate)(step)
