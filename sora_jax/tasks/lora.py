"""A task whose params are low-rank adapters of another task's frozen params."""

import jax

from sora_jax.models import lora
from sora_jax.tasks import Task


def make(task: Task, config: lora.LoRAConfig, base) -> Task:
  """The task with adapters as params and the base as what is frozen.

  Args:
    task: without anything frozen of its own, over a model whose dense layers are
      `models.layers.Dense`.
    config: see `lora`.
    base: the params, or shapes of them, that stay as they are.
  """
  assert task.frozen is None
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)

  def init(key):
    return lora.init(key, shapes, config)

  def loss(adapters, batch, key, base):
    return task.loss(lora.attach(base, adapters, config.scale), batch, key)

  def evaluate(adapters, batch, key, base):
    return task.evaluate(lora.attach(base, adapters, config.scale), batch, key)

  return Task(init, loss, evaluate, base)
