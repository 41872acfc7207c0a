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
    keep: number of checkpoints.
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
