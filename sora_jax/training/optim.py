"""Optimizers with schedules, clipping, and learning rates for parts of the params."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sora_jax.training.config import TrainConfig

OPTIMIZERS = ("adamw", "adafactor", "muon")
SCHEDULES = ("constant", "cosine", "wsd")
DECAYED = ("kernel", "embedding", "lora_a", "lora_b")


def make(
  config: TrainConfig, params: Any
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Optimizer for params (arrays or shapes), and the schedule of its learning rate.

  "adafactor" (arXiv:1804.04235) keeps second moments as rows and columns and no first
  ones. "muon" is Muon (arXiv:2502.16982) for the kernels of blocks and of 3D
  convolutions, at the learning rate of AdamW, and AdamW for the rest.
  `learning_rates`, (path regex, peak) pairs, give the matching params (the whole path)
  an optimizer of their own, with its own clipping; a GAN's discriminator needs that.

  Raises:
    ValueError: for an optimizer or schedule that does not exist or fit, or a regex
      without params.
  """
  if config.optimizer not in OPTIMIZERS:
    raise ValueError(f"optimizer {config.optimizer!r} is none of {OPTIMIZERS}")
  if config.moment_dtype not in ("float32", "bfloat16"):
    raise ValueError(
      f"moment_dtype {config.moment_dtype!r} is neither float32 nor bfloat16"
    )
  schedule = make_schedule(config, config.learning_rate)
  if not config.learning_rates:
    return _optimizer(config, schedule), schedule
  optimizers = {"rest": _optimizer(config, schedule)}
  for regex, peak in config.learning_rates:
    optimizers[regex] = _optimizer(config, make_schedule(config, peak))

  def label(path, _):
    name = _name(path)
    matches = [regex for regex, _ in config.learning_rates if re.fullmatch(regex, name)]
    return matches[0] if matches else "rest"

  labels = jax.tree_util.tree_map_with_path(label, params)
  unused = set(optimizers) - set(jax.tree.leaves(labels)) - {"rest"}
  if unused:
    raise ValueError(f"learning_rates name no param: {sorted(unused)}")
  return optax.multi_transform(optimizers, labels), schedule


def make_schedule(config: TrainConfig, peak: float) -> optax.Schedule:
  """Learning rate of update 0, 1, ...: linear warm-up, then one of SCHEDULES.

  constant: peak. cosine: to 0 at config.steps. wsd (warm-up, stable, decay): peak,
  then linearly to 0 over the last config.decay_steps (arXiv:2404.06395).
  """
  steps, warmup = config.steps, config.warmup_steps
  decay = {"constant": 0, "cosine": max(steps - warmup, 0), "wsd": config.decay_steps}
  if config.schedule not in SCHEDULES:
    raise ValueError(f"schedule {config.schedule!r} is none of {SCHEDULES}")
  if config.schedule == "wsd" and decay["wsd"] < 1:
    raise ValueError(f"schedule 'wsd' needs decay_steps > 0, not {decay['wsd']}")
  if warmup + decay[config.schedule] > steps:
    raise ValueError(
      f"warmup_steps {warmup} and decay_steps {decay[config.schedule]} "
      f"do not fit into {steps} steps"
    )

  def schedule(step):
    scale = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
    if config.schedule != "constant":
      left = jnp.clip((steps - step) / max(decay[config.schedule], 1), 0.0, 1.0)
      if config.schedule == "cosine":
        left = 0.5 - 0.5 * jnp.cos(jnp.pi * left)
      scale = scale * left
    return peak * scale

  return schedule


def decay_start(config: TrainConfig) -> int | None:
  """Updates before the decay of "wsd"; None for a schedule without such a point."""
  return config.steps - config.decay_steps if config.schedule == "wsd" else None


def common_updates(config: TrainConfig, steps: int) -> int:
  """First updates whose learning rate is the same with `steps` as with config.steps."""
  if steps == config.steps or config.schedule == "constant":
    return max(steps, config.steps)
  if config.schedule == "cosine":
    return config.warmup_steps
  return max(min(steps, config.steps) - config.decay_steps, 0)


def _optimizer(config, schedule) -> optax.GradientTransformation:
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else None
  if config.optimizer == "muon":
    update = optax.contrib.muon(
      schedule,
      weight_decay=config.weight_decay,
      adam_weight_decay=config.weight_decay,
      weight_decay_mask=_decay_mask,
      mu_dtype=config.moment_dtype,
      adam_b1=config.b1,
      adam_b2=config.b2,
      muon_weight_dimension_numbers=_matrices_of_blocks,
      consistent_rms=0.2,  # that of AdamW's updates
    )
    return optax.chain(clip or optax.identity(), update)
  if config.optimizer == "adafactor":
    scale = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
  else:
    scale = optax.scale_by_adam(
      b1=config.b1, b2=config.b2, mu_dtype=config.moment_dtype
    )
  return optax.chain(
    clip or optax.identity(),
    scale,
    optax.add_decayed_weights(config.weight_decay, mask=_decay_mask),
    optax.scale_by_learning_rate(schedule),
  )


def _matrices_of_blocks(params):
  """Muon's axes of the kernels that are matrices inside a network; None for all else.

  Those that `nn.scan` stacks, those of a stem, and those of 3D convolutions, as a
  matrix of all that an output sees by the outputs. What a stem reads, pixels of one
  patch, is nearly one number all over: AdamW moves all weights with it, Muon does not.
  """
  stacked = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
  conv = optax.contrib.MuonDimensionNumbers((0, 1, 2, 3), output_axis=4)

  def axes(path, leaf):
    *outer, last = _name(path).split("/")
    if last != "kernel":
      return None
    if len(leaf.shape) == 5:
      return conv
    if "stem" in outer:
      return optax.contrib.MuonDimensionNumbers()
    return stacked if "blocks" in outer else None

  return jax.tree_util.tree_map_with_path(axes, params)


def _decay_mask(params):
  """True for matrices, by name: nn.scan gives biases and scales a second dim too."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: _name(path).split("/")[-1] in DECAYED, params
  )


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
