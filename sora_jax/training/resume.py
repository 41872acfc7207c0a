"""Where training goes on, also when it was begun with another number of steps."""

import dataclasses

from absl import logging

from sora_jax.runtime import checkpoint
from sora_jax.training import optim
from sora_jax.training.config import TrainConfig


def first_step(checkpoints: checkpoint.Checkpoints, config: TrainConfig) -> int:
  """Step to go on from; 0 = from the start.

  It is the newest one, unless the schedule with config.steps has other learning rates
  before it than the schedule that it was trained with. Then, with "wsd", it is the
  newest one that is right, which the loop has kept; else what differs is logged.

  Raises:
    ValueError: if the newest checkpoint is beyond config.steps.
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
