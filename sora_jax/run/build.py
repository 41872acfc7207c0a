"""What a recipe stands for: its tasks, sharding rules, rows, and the mesh they need."""

import jax

from sora_jax.packing import packed_row, planner
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding
from sora_jax.tasks import Task
from sora_jax.tasks import dit as dit_task


def clip_mesh(config: recipes.Encode, devices=None) -> jax.sharding.Mesh:
  """A host's devices, or others, as the VAE lies on them outside of its training.

  Raises:
    ValueError: if the devices do not divide by config.devices_per_clip.
  """
  devices = jax.local_devices() if devices is None else devices
  share = config.devices_per_clip
  if share < 1 or len(devices) % share:
    raise ValueError(
      f"config.encode.devices_per_clip {share} must divide the {len(devices)} devices "
      "of a host"
    )
  return sharding.make_mesh(context=share, devices=devices)


def check_dit(stage: recipes.DiTStage, mesh) -> None:
  """Raises ValueError if the stage's sizes do not divide by the mesh; names the key."""
  check_rows("config.dit.rows", stage.rows, stage.train, mesh)
  for axis, key, size in (
    ("context", "tokens", stage.tokens),
    ("context", "text_tokens", stage.text_tokens),
    ("tensor", "model.heads", stage.model.heads),
  ):
    if size % mesh.shape[axis]:
      raise ValueError(
        f"config.dit.{key} {size} must be a multiple of {mesh.shape[axis]}, the "
        f"devices along {axis}; set it, or config.mesh.{axis}"
      )


def check_rows(key: str, rows: int, config, mesh) -> None:
  """Raises ValueError if a batch of that many rows does not divide by the mesh.

  config: a loop.TrainConfig.
  """
  shards = sharding.batch_shards(mesh)
  if rows % (shards * config.grad_accumulation):
    raise ValueError(
      f"{key} {rows} must be a multiple of {shards} (devices along data and fsdp) x "
      f"{config.grad_accumulation} (grad_accumulation); set it, or config.mesh"
    )


def make_task(recipe: recipes.Recipe) -> tuple[Task, sharding.Rules]:
  """What the stage learns, and where its params go; needs no data."""
  stage, frozen = recipe.dit, bool(recipe.text.folder)
  text = None if frozen else stage.text
  task = dit_task.make(
    stage.model,
    text,
    stage.loss,
    stage.segments,
    recipe.dtype,
    accumulate_fp32=stage.train.grad_accumulation > 1,
  )
  return task, dit_task.DIT_RULES if frozen else dit_task.SHARDING_RULES


def budget(stage: recipes.DiTStage) -> planner.Budget:
  """Size of a packed row."""
  return planner.Budget(stage.tokens, stage.text_tokens, stage.segments)


def empty_row(recipe: recipes.Recipe) -> packed_row.PackedRow:
  """A row of padding as the stage's data has it."""
  text_width = recipe.text.width if recipe.text.folder else None
  stage = recipe.dit
  size = packed_row.RowSize(budget(stage), stage.model.patch_width, text_width)
  return packed_row.empty(packed_row.PackedRow, size)
