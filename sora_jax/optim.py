"""AdamW with schedules, clipping, and own learning rates for parts of the params."""

import re

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "cosine", "wsd")
DECAYED = ("kernel", "embedding", "lora_a", "lora_b")


def make(config, params) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Optimizer for params (arrays or shapes), and the schedule of its learning rate.

  config: has the optimizer fields of train.TrainConfig. Its `learning_rates`, (path
  regex, peak) pairs, give the matching params (the whole path) an optimizer of their
  own, with its own clipping; a GAN's discriminator needs that.
  ValueError for a schedule that does not exist or fit, or a regex without params.
  """
  schedule = make_schedule(config, config.learning_rate)
  if not config.learning_rates:
    return _adamw(config, schedule), schedule
  optimizers = {"rest": _adamw(config, schedule)}
  for regex, peak in config.learning_rates:
    optimizers[regex] = _adamw(config, make_schedule(config, peak))

  def label(path, _):
    name = _name(path)
    matches = [regex for regex, _ in config.learning_rates if re.fullmatch(regex, name)]
    return matches[0] if matches else "rest"

  labels = jax.tree_util.tree_map_with_path(label, params)
  unused = set(optimizers) - set(jax.tree.leaves(labels)) - {"rest"}
  if unused:
    raise ValueError(f"learning_rates name no param: {sorted(unused)}")
  return optax.multi_transform(optimizers, labels), schedule


def make_schedule(config, peak: float) -> optax.Schedule:
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


def _adamw(config, schedule) -> optax.GradientTransformation:
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else None
  return optax.chain(
    clip or optax.identity(),
    optax.scale_by_adam(b1=config.b1, b2=config.b2),
    optax.add_decayed_weights(config.weight_decay, mask=_decay_mask),
    optax.scale_by_learning_rate(schedule),
  )


def _decay_mask(params):
  """True for matrices, by name: nn.scan gives biases and scales a second dim too."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: _name(path).split("/")[-1] in DECAYED, params
  )


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
