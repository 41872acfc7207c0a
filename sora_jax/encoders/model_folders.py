"""Where the networks of a DiT are: in its own folder, or where its training began.

An imported checkpoint has all: dit/model, of two experts also dit_low/model, text/model
and image/model. A run has trained one DiT, which is its dit/model, also where it is the
second of two experts; the others are found by what that says of itself.
"""

import pathlib

from sora_jax.models.meta import METAS, DiTMeta, ImageMeta, LowNoiseDiTMeta, TextMeta
from sora_jax.runtime import checkpoint, fields

HIGH, LOW = DiTMeta.network, LowNoiseDiTMeta.network


def read_meta(model: pathlib.Path) -> DiTMeta:
  """Meta of a folder dit/model or dit_low/model. Raises as `DiTMeta.from_json`."""
  return METAS[model.parent.name].from_json(checkpoint.load_meta(model), model)


def of_text(folder) -> pathlib.Path:
  """text/model of a folder, or of the checkpoint whose features its DiT has read."""

  def before(meta):
    return meta.frozen_text.folder if meta.frozen_text else ""

  return _first_with(TextMeta.network, folder, before)


def of_images(folder) -> pathlib.Path:
  """image/model of a folder, or of the checkpoint that its DiT began with."""
  return _first_with(ImageMeta.network, folder, lambda meta: meta.init_from)


def _first_with(network, folder, before) -> pathlib.Path:
  """Folder of a network's model, which is not there if no place has it."""
  place, seen = pathlib.Path(folder), []
  while not (place / network / "model").is_dir() and place not in seen:
    seen.append(place)
    model = place / HIGH / "model"
    if _is_there(model):
      place = pathlib.Path(before(read_meta(model)) or place)
  return place / network / "model"


def of_dit(folder, whole: bool = True) -> dict[str, pathlib.Path]:
  """HIGH, and LOW of two experts -> folder of its model, in the order of sampling.

  Of a run that began with another run each expert is that of the last one to train it.

  Args:
    folder: of a checkpoint, or of a run.
    whole: whether one of two experts alone is an error.

  Raises:
    ValueError: if there is no DiT, or one of two experts alone.
  """
  found, missing = _find_dit(folder)
  if whole and missing:
    raise ValueError(
      f"{missing}: put it there, or sample a whole model with the adapter of this run "
      "(--lora; --lora_low of the expert for low noise)"
    )
  return found


def of_expert(folder, network: str) -> pathlib.Path:
  """Folder of one of `of_dit`, HIGH or LOW. ValueError if there is none."""
  found, missing = _find_dit(folder)
  if network not in found:
    raise ValueError(missing or f"{folder} is one network for all noise levels")
  return found[network]


def _find_dit(folder) -> tuple[dict[str, pathlib.Path], str]:
  """(what `of_dit` gives, which expert is missing and where it was looked for)."""
  place, seen = pathlib.Path(folder), []
  high, low = (place / name / "model" for name in (HIGH, LOW))
  alone = _is_there(low) and not _is_there(high)
  if not read_meta(low if alone else high).boundary:
    return {HIGH: high}, ""
  found: dict[str, pathlib.Path] = {}
  while place not in seen:
    seen.append(place)
    found = {**_experts(place), **found}
    if _is_there(place / HIGH / "model"):
      place = pathlib.Path(read_meta(place / HIGH / "model").init_from or place)
  missing = ""
  if len(found) < 2:
    kind = "low" if HIGH in found else "high"
    missing = f"{folder} is one of two experts and has none for {kind} noise levels"
    if places := " nor ".join(str(other.absolute()) for other in seen[1:]):
      missing += f", and neither has {places}, where it began"
  return {name: found[name] for name in (HIGH, LOW) if name in found}, missing


def check_alike(high: pathlib.Path, low: pathlib.Path) -> None:
  """Raises ValueError for folders of two experts that are not of one model."""
  ours, others = _traits(read_meta(high)), _traits(read_meta(low))
  for key, value in ours.items():
    if value != others[key]:
      raise ValueError(
        f"{high} and {low} are of different models: their {key} is {value!r} and "
        f"{others[key]!r}"
      )


def _traits(meta):
  """What both experts of a model have in common."""
  traits = {f"model.{key}": value for key, value in fields.lasting(meta.model).items()}
  if text := meta.frozen_text:  # of which a run also says where it was
    traits |= {"text.features": text.features, "text.pad_to": text.pad_to}
  return {**traits, "boundary": meta.boundary, "vae": meta.vae}


def _experts(place) -> dict[str, pathlib.Path]:
  """Those in a folder itself, which may have one of them alone, or none."""
  model, low = place / HIGH / "model", place / LOW / "model"
  found = {LOW: low} if low.is_dir() else {}
  if _is_there(model):
    found[LOW if read_meta(model).low_noise else HIGH] = model
  return found


def _is_there(model) -> bool:
  return (model / "model.json").is_file()
