"""config.replay: one step of a stage's training once more, see `training.replay`."""

import dataclasses
import importlib
import pathlib
from collections.abc import Sequence

from sora_jax.run import recipe as recipes
from sora_jax.run import stages
from sora_jax.runtime import sharding
from sora_jax.training import replay


def run(names: Sequence[str], recipe: recipes.Recipe, workdir) -> None:
  """Repeats step config.replay of the one stage; what is on disk stays as it is.

  Raises:
    ValueError: if it is not one stage, and one that trains; as `training.replay`.
  """
  if len(names) != 1 or names[0] not in ("vae", "dit"):
    raise ValueError(
      f"config.replay {recipe.replay} repeats a step of one stage: python -m "
      "sora_jax.train_vae, or sora_jax.train_dit"
    )
  (name,) = names
  if name == "vae" and recipe.vae.folder:
    raise ValueError("config.replay: nothing is trained with config.vae.folder")
  workdir = pathlib.Path(workdir)
  if not (workdir / name / "checkpoints").is_dir():
    raise ValueError(f"config.replay: {workdir / name} has no checkpoints")
  stage = getattr(recipe, name)
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
  module = importlib.import_module(f"sora_jax.{stages.STAGES[name].module}")
  with recipe.matmuls():
    setup = module.setup(recipe, workdir, mesh)
    replay.replay(setup, stage.train, workdir / name, mesh, recipe.replay, recipe.seed)
    setup.data.close()
