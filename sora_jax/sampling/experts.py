"""Models of two networks, each of which makes its part of the noise levels.

Wan 2.2 A14B has one for the levels down to a boundary, which decide what a video shows,
and one for those below it. The solver does not know: its calls are cut at the boundary,
and its state goes from one part to the next.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sora_jax.diffusion import solvers
from sora_jax.encoders import model_folders
from sora_jax.models.meta import DiTMeta, LowNoiseDiTMeta
from sora_jax.runtime import checkpoint, sharding
from sora_jax.runtime.residency import Residency
from sora_jax.tasks import dit as dit_task
from sora_jax.weights import merge

Loras = Sequence[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Experts:
  """The networks of a model, in the order in which they are asked.

  Attributes:
    loaders: of each, what gives its params, on the devices. They are dropped after its
      part, so that the next may take their place (see `runtime.residency`).
    boundary: noise level below which the second one is asked.
  """

  loaders: tuple[Callable[[], Any], ...]
  boundary: float = 0.0

  def __len__(self) -> int:
    return len(self.loaders)

  def switch(self, time: np.ndarray) -> list[int]:
    """Index of the first call below the boundary.

    time: levels that the networks are told, which may be rounded: [calls, units].
    """
    if len(self) == 1:
      return [len(time)] * time.shape[1]
    return (time >= np.float32(self.boundary)).sum(axis=0).tolist()

  def calls(self, switch: int, total: int) -> list[slice]:
    """Each expert's calls, of a solver with `total` of them."""
    parts = [slice(0, switch), slice(switch, total)]
    return parts[: len(self)]

  def options(self, number: int, options: solvers.Options) -> solvers.Options:
    """Options with the guidance of an expert."""
    if number == 0 or not options.guidance_scale_2:
      return options
    return dataclasses.replace(options, guidance_scale=options.guidance_scale_2)


def held_by(residency: Residency, boundary: float) -> Experts:
  """The DiT, or both of its experts, as they come to the devices."""
  names = [DiTMeta.network, *([LowNoiseDiTMeta.network] if boundary else [])]
  return Experts(tuple(functools.partial(residency.get, n) for n in names), boundary)


def load(
  folder: pathlib.Path,
  mesh,
  loras: Loras = (),
  loras_low: Loras = (),
  weights: str = "",
) -> tuple[DiTMeta, list[Callable[[], Any]]]:
  """(meta, what loads the params) of the DiT in a checkpoint's folder, or its experts.

  Args:
    folder: of a checkpoint, or of a run, see `model_folders`.
    mesh: that params are sharded over.
    loras: files of adapters that are merged in, and how strongly.
    loras_low: the same of the second expert.
    weights: that kernels are held in, a key of `tasks.dit.WEIGHTS`.

  Raises:
    ValueError: if a model is missing, if the experts are not of one model, or for
      adapters of an expert that there is not.
  """
  models = list(model_folders.of_dit(folder).values())
  meta = model_folders.read_meta(folder / DiTMeta.network / "model")
  if len(models) == 2:
    model_folders.check_alike(*models)
  elif loras_low:
    raise ValueError(f"{folder}: its DiT is one network for all levels, no experts")

  def loader(model, own):
    return lambda: _load(model, meta, mesh, own, weights)

  files = (loras, loras_low)[: len(models)]
  return meta, [loader(*both) for both in zip(models, files, strict=True)]


def ids(folder: pathlib.Path) -> list[str]:
  """Ids of the experts that `load` finds. Raises as it does."""
  models = model_folders.of_dit(folder).values()
  return [model_folders.read_meta(model).id for model in models]


def _load(model, meta, mesh, loras, weights):
  """Params with adapters merged in, stored as `weights` says."""
  rules = dit_task.DIT_RULES if meta.frozen_text else dit_task.SHARDING_RULES
  params, _ = checkpoint.load_model(
    model, lambda shapes: sharding.param_shardings(shapes, rules, mesh)
  )
  for path, strength in loras:
    params = merge.merge_file(params, path, meta.model, mesh, strength)
  return dit_task.stored(params, weights)
