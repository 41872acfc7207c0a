"""What a recipe stands for: its tasks, sharding rules, rows, and the mesh they need."""

import math

import jax

from sora_jax.data.pixel_records import CHANNELS
from sora_jax.models.dit import DiTConfig
from sora_jax.packing import packed_row, planner
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding
from sora_jax.tasks import Task
from sora_jax.tasks import captioner as captioner_task
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
  _check_packed("dit", stage, mesh)


def check_captioner(stage: recipes.CaptionerStage, mesh) -> None:
  """Raises ValueError if the stage's sizes do not divide by the mesh; names the key."""
  _check_packed("captioner", stage, mesh)


def _check_packed(name, stage, mesh):
  check_rows(f"config.{name}.rows", stage.rows, stage.train, mesh)
  for axis, key, size in (
    ("context", "tokens", stage.tokens),
    ("context", "text_tokens", stage.text_tokens),
    ("tensor", "model.heads", stage.model.heads),
  ):
    if size % mesh.shape[axis]:
      raise ValueError(
        f"config.{name}.{key} {size} must be a multiple of {mesh.shape[axis]}, the "
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


def passes(stage: recipes.DiTStage) -> float:
  """FLOPs of a step, in those of a forward pass.

  A frozen base has no gradients of its own, only those of what goes through it.
  """
  return 2.0 if stage.lora.rank else 3.0


def make_captioner(recipe: recipes.Recipe) -> tuple[Task, sharding.Rules]:
  """What the captioner learns, and where its params go; needs no data."""
  stage, width = recipe.captioner, patch_width(recipe)
  task = captioner_task.make(
    stage.model, stage.loss, width, stage.segments, recipe.dtype, stage.patch_size[1]
  )
  return task, captioner_task.SHARDING_RULES


def patch_width(recipe: recipes.Recipe) -> int:
  """Numbers of a token of the captioner's clips."""
  stage = recipe.captioner
  channels = recipe.vae.model.latent_channels if stage.input == "latents" else CHANNELS
  return math.prod(stage.patch_size) * channels


def budget(stage: recipes.DiTStage | recipes.CaptionerStage) -> planner.Budget:
  """Size of a packed row."""
  return planner.Budget(stage.tokens, stage.text_tokens, stage.segments)


def empty_row(recipe: recipes.Recipe) -> packed_row.PackedRow:
  """A row of padding as the stage's data has it."""
  text_width = recipe.text.width if recipe.text.folder else None
  stage = recipe.dit
  return packed_row.empty(packed_row.PackedRow, row_size(stage, text_width))


def row_size(stage: recipes.DiTStage, text_width: int | None) -> packed_row.RowSize:
  """Sizes of a row of the DiT; text_width as in `RowSize`."""
  return packed_row.RowSize(
    budget(stage),
    stage.model.patch_width,
    text_width,
    condition_width=stage.model.condition_width,
    image=image_size(stage.model),
  )


def image_size(model: DiTConfig) -> tuple[int, int] | None:
  """(tokens, features) of the images of a clip; None for a model that sees none."""
  return (model.image_tokens, model.image_width) if model.image_width else None
