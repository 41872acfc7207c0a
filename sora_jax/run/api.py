"""What a program of a user calls to read a config and to run its stages."""

import importlib.util
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sora_jax.run import recipe as recipes
from sora_jax.run import stages as chain


def load_config(
  name: str | os.PathLike, overrides: Mapping[str, Any] | None = None
) -> recipes.Recipe:
  """The recipe of a config file, without any flag.

  Args:
    name: path of a file with get_config, and with ":variant" behind it its argument,
      such as "configs/quickstart.py:short".
    overrides: key -> value in place of the file's, such as {"dit.train.steps": 100}.

  Raises:
    ValueError: if there is no such file or key, or the values do not go together.
  """
  path, _, variant = os.fspath(name).partition(":")
  if not (path.endswith(".py") and pathlib.Path(path).is_file()):
    raise ValueError(f"{path}: no such config file")
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  assert spec and spec.loader, path  # a path that ends in .py has a loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"{path} has no function get_config")
  config: ConfigDict = module.get_config(*([variant] if variant else []))
  config.lock()
  for key, value in (overrides or {}).items():
    if isinstance(value, Mapping):
      raise ValueError(f"{key} is a section: give its keys, as {key}.NAME")
  try:
    config.update_from_flattened_dict(dict(overrides or {}))
  except (KeyError, TypeError) as error:
    raise ValueError(f"{path}: {' '.join(str(error.args[0]).split())}") from error
  return recipes.read(config)


def run_stages(
  recipe: recipes.Recipe,
  workdir: str | os.PathLike,
  stages: Sequence[str] | None = None,
) -> None:
  """Runs stages in a folder, those of the recipe if none is named.

  Complete ones are skipped, and interrupted ones go on, as with the commands.

  Raises:
    ValueError: if a stage on disk was made with a config that it cannot go on with.
    loop.Preempted: a SystemExit, if SIGTERM, SIGINT or SIGUSR1 came; the state is
      saved.
  """
  names = recipe.stages if stages is None else stages
  if unknown := set(names) - set(recipes.STAGES):
    raise ValueError(f"stages: {sorted(unknown)} are none of {recipes.STAGES}")
  chain.run(names, recipe, workdir)
