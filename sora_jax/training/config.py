"""What the train loop and the optimizer are told."""

import dataclasses

from sora_jax.runtime.fields import extends, free


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """What the loop and the optimizer need; steps are updates of the params.

  Attributes:
    steps: of the whole training. More of them go on from a checkpoint, see `loop.train`
      for what that is with each schedule.
    schedule: one of optim.SCHEDULES. decay_steps: of the schedule "wsd".
    optimizer: one of optim.OPTIMIZERS. moment_dtype: of its first moment.
    clip_norm: most that the global norm of the gradients may be; 0 = no clipping.
    learning_rates: (path regex, peak) of params with an optimizer of their own.
    grad_accumulation: microbatches that each batch is computed in, one after the other.
      They take less memory and have noise of their own, but the same expectation.
    log_every, eval_every: 0 = never; otherwise also at the last step.
    save_every: 0 = only the last step, and with "wsd" the one before the decay.
    keep: number of newest checkpoints that stay. keep_every: those of multiples of it
      stay, too; 0 = none. keep_best: the one with the lowest value of this metric of
      the evaluation stays, such as "eval/loss"; "-eval/psnr": the one with the highest.
    save_failures: so many saves in a row may fail before the run ends.
    max_skipped: updates in a row that may be left out, because their loss or gradients
      are not finite or nothing could be read; one more ends the run. 0 = the first.
    spike_threshold: updates whose gradient norm is so many (robust) deviations above
      the median of the last 64 are left out, too; 0 = none. 6 to 10 spare what is
      usual.
    rollback_threshold: a loss that stays so many (robust) deviations above the median
      of the last 64 for three updates takes the run back to the newest checkpoint
      before it, and the data since then are passed over; 0 = never. 10 or more is wise.
    max_rollbacks: so often; once more ends the run.
    deadline: seconds in which a step must end, else all stacks are written and the
      process ends with an error, as another host may hang; 0 = no limit. First steps,
      evaluations and saves have ten times as long.
  """

  steps: int = extends()
  learning_rate: float = 1e-4
  warmup_steps: int = 0
  schedule: str = "constant"
  decay_steps: int = 0
  weight_decay: float = 0.0
  optimizer: str = "adamw"
  moment_dtype: str = "float32"
  b1: float = 0.9
  b2: float = 0.999
  clip_norm: float = 1.0
  learning_rates: tuple[tuple[str, float], ...] = ()
  grad_accumulation: int = free(1)
  ema_decay: float = 0.999
  log_every: int = free(50)
  eval_every: int = free(0)
  save_every: int = free(1000)
  keep: int = free(2)
  keep_every: int = free(0)
  keep_best: str = free("")
  save_failures: int = free(3)
  max_skipped: int = free(5)
  spike_threshold: float = free(0.0)
  rollback_threshold: float = free(0.0)
  max_rollbacks: int = free(3)
  deadline: float = free(0.0)

  def __post_init__(self):
    names = ("max_skipped", "spike_threshold", "rollback_threshold", "max_rollbacks")
    for name in (*names, "deadline"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name} {getattr(self, name)} must be at least 0")
    if self.keep < 1 or self.save_failures < 1:
      raise ValueError(
        f"keep is {self.keep}, save_failures {self.save_failures}: both are 1 at least"
      )
    if self.keep_every < 0 or (
      self.keep_every and (not self.save_every or self.keep_every % self.save_every)
    ):
      raise ValueError(
        f"keep_every {self.keep_every} is no multiple of save_every {self.save_every}, "
        "so that there would be nothing to keep"
      )
    if self.keep_best and not self._evaluates_what_it_saves():
      raise ValueError(
        f"keep_best is {self.keep_best!r}: one of eval_every {self.eval_every} and "
        f"save_every {self.save_every} must be a multiple of the other, so that "
        "checkpoints have a value of it"
      )

  def _evaluates_what_it_saves(self) -> bool:
    few, many = sorted((self.eval_every, self.save_every))
    return few > 0 and many % few == 0
