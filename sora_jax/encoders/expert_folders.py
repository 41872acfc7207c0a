"""Where the networks of a DiT are: one for all noise levels, or two experts.

An imported model has both experts, dit/model and dit_low/model. A run trains one of
them, which is its dit/model whichever it is; the other is where the run began.
"""

import pathlib

from sora_jax.models.meta import METAS, DiTMeta, LowNoiseDiTMeta
from sora_jax.runtime import checkpoint

HIGH, LOW = DiTMeta.network, LowNoiseDiTMeta.network


def find(folder, whole: bool = True) -> dict[str, pathlib.Path]:
  """HIGH, and LOW of two experts -> folder of its model, in the order of sampling.

  Of a run that began with another run each expert is that of the last one to train it.

  Args:
    folder: of a checkpoint, or of a run.
    whole: whether one of two experts alone is an error.

  Raises:
    ValueError: if there is no DiT, or one of two experts alone.
  """
  place, seen = pathlib.Path(folder), []
  if not read_meta(place / HIGH / "model").boundary:
    return {HIGH: place / HIGH / "model"}
  found: dict[str, pathlib.Path] = {}
  while place not in seen and (place / HIGH / "model" / "model.json").is_file():
    seen.append(place)
    found = {**_there(place), **found}
    place = pathlib.Path(read_meta(place / HIGH / "model").init_from or place)
  if whole and len(found) < 2:
    kind = "low" if HIGH in found else "high"
    began = "" if place in seen else f", and neither has {place}, where it began"
    raise ValueError(
      f"{folder} is one of two experts and has none for {kind} noise levels{began}: "
      "put it back, or sample a whole model with the adapter of this run (--lora; "
      "--lora_low of the expert for low noise)"
    )
  return {name: found[name] for name in (HIGH, LOW) if name in found}


def read_meta(model: pathlib.Path) -> DiTMeta:
  """Meta of a folder dit/model or dit_low/model. Raises as `DiTMeta.from_json`."""
  return METAS[model.parent.name].from_json(checkpoint.load_meta(model), model)


def _there(place) -> dict[str, pathlib.Path]:
  """The experts in a folder itself."""
  model, low = place / HIGH / "model", place / LOW / "model"
  if read_meta(model).low_noise:
    return {LOW: model}
  return {HIGH: model, LOW: low} if low.is_dir() else {HIGH: model}
