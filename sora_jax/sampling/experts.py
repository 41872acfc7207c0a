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
    folder: with dit/model, and dit_low/model of a model with two experts.
    mesh: that params are sharded over.
    loras: files of adapters that are merged in, and how strongly.
    loras_low: the same of the second expert.
    weights: that kernels are held in, a key of `tasks.dit.WEIGHTS`.

  Raises:
    ValueError: if a model is missing, if the experts are not of one model, or for
      adapters of an expert that there is not.
  """
  meta = _meta(DiTMeta, folder)
  files = {DiTMeta.network: loras}
  if meta.boundary:
    _check_both(folder, meta)
    low = _meta(LowNoiseDiTMeta, folder)
    for key in ("model", "text", "boundary", "vae"):
      ours, other = getattr(meta, key), getattr(low, key)
      if ours != other:
        raise ValueError(
          f"{folder}: dit/model and dit_low/model are of different models: their {key} "
          f"is {ours!r} and {other!r}"
        )
    files[LowNoiseDiTMeta.network] = loras_low
  elif loras_low:
    raise ValueError(f"{folder}: its DiT is one network for all levels, no experts")

  def loader(name, own):
    return lambda: _load(folder / name / "model", meta, mesh, own, weights)

  return meta, [loader(name, own) for name, own in files.items()]


def _check_both(folder, meta):
  """Raises ValueError for a run, which has trained one expert alone."""
  if meta.init_from and not (folder / LowNoiseDiTMeta.network).is_dir():
    raise ValueError(
      f"{folder} has one of two experts: sample the model that it began with, "
      f"--checkpoint={meta.init_from}, with the adapters of this run, --lora="
      f"{folder}/dit/adapter.safetensors, or --lora_low if it was trained for the low "
      "noise levels"
    )


def _meta(kind, folder):
  model = folder / kind.network / "model"
  return kind.from_json(checkpoint.load_meta(model), model)


def _load(model, meta, mesh, loras, weights):
  """Params with adapters merged in, stored as `weights` says."""
  rules = dit_task.DIT_RULES if meta.frozen_text else dit_task.SHARDING_RULES
  params, _ = checkpoint.load_model(
    model, lambda shapes: sharding.param_shardings(shapes, rules, mesh)
  )
  for path, strength in loras:
    params = merge.merge_file(params, path, meta.model, mesh, strength)
  return dit_task.stored(params, weights)
