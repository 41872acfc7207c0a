"""Where the networks of a published model are in its folder."""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from sora_jax.weights import mapping, safetensors_io, text
from sora_jax.weights.hf_config import IGNORED, Published, from_json, preset

# Wan's release: a file for each network but the DiT, as .pth or converted. The dots of
# their stems are no suffixes.
ORIGINAL_FILES = {
  "Wan2.1_VAE": "wan2.1",
  "Wan2.2_VAE": "wan2.2",
  "models_t5_umt5-xxl-enc-bf16": "umt5-xxl",
}
_STEMS = ("diffusion_pytorch_model", "model")
_TOKENIZERS = (".", "../tokenizer", "google/umt5-xxl")


class Component(NamedTuple):
  """A network that was found: what it is, its tensors' places, its tokenizer."""

  published: Published
  source: pathlib.Path
  tensors: dict[str, safetensors_io.Tensor]
  tokenizer: pathlib.Path | None = None


def find(
  folder, presets: Sequence[str] = (), networks: Sequence[str] = ()
) -> list[Component]:
  """The networks of a folder, in the order VAE, text encoder, DiT, each checked.

  The folder is a diffusers pipeline, Wan's own release, or that of one network.

  Args:
    folder: to look into.
    presets: sizes of networks that have no config.json, by name.
    networks: the ones to look for; all if empty.

  Raises:
    ValueError: if there is none; if a network's files are pickles, damaged or
      incomplete, or have other tensors than its sizes say; for unused presets.
  """
  folder, unused = pathlib.Path(folder), list(presets)
  if not folder.is_dir():
    raise ValueError(f"{folder}: no such folder")
  two = [
    name for name in ("transformer_2", "low_noise_model") if (folder / name).is_dir()
  ]
  if two and (not networks or "dit" in networks):
    raise ValueError(
      f"{folder} has a second transformer, {two[0]}/, for a part of the noise levels "
      "(Wan 2.2 A14B); only models of one transformer are supported"
    )
  found = []
  for part in (".", "vae", "text_encoder", "transformer"):
    place = folder / part
    if (place / "config.json").is_file():
      found.append(_of_config(place))
  for stem, name in ORIGINAL_FILES.items():
    kinds = (".safetensors", *safetensors_io.PICKLES)
    there = [f for f in (folder / f"{stem}{kind}" for kind in kinds) if f.is_file()]
    if there:
      published = preset(name, "original")
      found.append((published, there[0], None))
  known = {published.network for published, _, _ in found}
  for name in presets:
    published = preset(name, "diffusers")
    if published.network not in known and not (folder / "config.json").exists():
      found.append((published, folder, _stem(folder)))
      unused.remove(name)
  if unused:
    raise ValueError(
      f"--preset={','.join(unused)} is not needed: the files of {folder} say the sizes"
    )
  chosen = [one for one in found if not networks or one[0].network in networks]
  if not chosen:
    what = " or ".join(networks) or "network"
    raise ValueError(
      f"{folder}: no {what} here; known are a diffusers pipeline, Wan's own release, "
      "and a folder with config.json and *.safetensors, or without config.json if "
      "--preset says the sizes"
    )
  order = ("vae", "text", "dit")
  chosen.sort(key=lambda one: order.index(one[0].network))
  names = [published.network for published, _, _ in chosen]
  if len(set(names)) < len(names):
    sources = ", ".join(str(source) for _, source, _ in chosen)
    raise ValueError(f"{folder}: several networks of one kind: {sources}")
  return [_open(*one) for one in chosen]


def _of_config(place):
  path = place / "config.json"
  try:
    config = dict(json.loads(path.read_text()))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path}: no JSON object ({error})") from error
  published = from_json(config, str(path))
  return published, place, _STEMS[published.network == "text"]


def _stem(folder):
  """Of weights without a config.json."""
  for stem in _STEMS:
    if any(folder.glob(f"{stem}*")):
      return stem
  return _STEMS[0]


def _open(published, source, stem):
  if stem is not None:
    tensors = safetensors_io.read_headers(source, stem)
  elif source.suffix == ".safetensors":
    tensors = safetensors_io.read_header(source)
  else:
    raise ValueError(safetensors_io.pickle_message(source))
  if published.network == "text":
    for name, alias in text.ALIASES.items():
      if name not in tensors and alias in tensors:
        tensors[name] = tensors.pop(alias)
  if not (source / "config.json").is_file():
    published = _of_names(published, tensors)
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  wrong = mapping.differences(published.entries(), shapes, IGNORED[published.network])
  if wrong:
    raise ValueError(
      f"{source}: {len(wrong)} tensors are wrong: {safetensors_io.listed(wrong)}"
    )
  tokenizer = None
  if published.network == "text":
    tokenizer = _tokenizer(source if source.is_dir() else source.parent)
  return Component(published, source, tensors, tokenizer)


def _of_names(published, tensors):
  """In the layout that most of the names belong to."""

  def matches(layout):
    try:
      made = published._replace(layout=layout).entries()
    except ValueError:  # a layout that cannot express the config
      return -1
    return sum(entry.name in tensors for entry in made)

  return published._replace(layout=max(("diffusers", "original"), key=matches))


def _tokenizer(folder):
  places = [folder / other / "spiece.model" for other in _TOKENIZERS]
  for place in places:
    if place.is_file():
      return place
  raise ValueError(
    f"{folder}: the text encoder has no tokenizer: no spiece.model in "
    f"{', '.join(str(place.parent) for place in places)}"
  )


NETWORKS = ("vae", "text", "dit")
