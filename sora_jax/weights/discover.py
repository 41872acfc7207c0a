"""Where the networks of a published model are in its folder."""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from sora_jax.runtime import safetensors_io
from sora_jax.weights import mapping, text
from sora_jax.weights.hf_config import IGNORED, Published, from_json, preset

NETWORKS = ("vae", "text", "dit")
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


class _Candidate(NamedTuple):
  """A network that seems to be there: a file, or the files of a folder with a stem."""

  published: Published
  source: pathlib.Path
  stem: str | None


def find(
  folder, presets: Sequence[str] = (), networks: Sequence[str] = ()
) -> list[Component]:
  """Finds the networks of a folder, in the order of NETWORKS, each checked.

  The folder is a diffusers pipeline, Wan's own release, or that of one network.

  Args:
    folder: to look into.
    presets: sizes of networks that have no config.json, by name.
    networks: the ones to look for; all if empty.

  Raises:
    ValueError: if there is none; if a network's files are pickles, damaged or
      incomplete, or have other tensors than its sizes say; for unused presets.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise ValueError(f"{folder}: no such folder")
  if not networks or "dit" in networks:
    _check_one_transformer(folder)
  found = _with_config(folder) + _original(folder)
  found += _with_preset(folder, presets, {one.published.network for one in found})
  chosen = [one for one in found if not networks or one.published.network in networks]
  if not chosen:
    what = " or ".join(networks) or "network"
    raise ValueError(
      f"{folder}: no {what} here; known are a diffusers pipeline, Wan's own release, "
      "and a folder with config.json and *.safetensors, or without config.json if "
      "--preset says the sizes"
    )
  chosen.sort(key=lambda one: NETWORKS.index(one.published.network))
  names = [one.published.network for one in chosen]
  if len(set(names)) < len(names):
    sources = ", ".join(str(one.source) for one in chosen)
    raise ValueError(f"{folder}: several networks of one kind: {sources}")
  return [_open(*one) for one in chosen]


def _check_one_transformer(folder):
  for name in ("transformer_2", "low_noise_model"):
    if (folder / name).is_dir():
      raise ValueError(
        f"{folder} has a second transformer, {name}/, for a part of the noise levels "
        "(Wan 2.2 A14B); only models of one transformer are supported"
      )


def _with_config(folder):
  """Networks whose config.json says what they are, as diffusers writes it."""
  places = (folder / part for part in (".", "vae", "text_encoder", "transformer"))
  return [_of_config(place) for place in places if (place / "config.json").is_file()]


def _original(folder):
  """Networks of Wan's own release, which the names of their files tell."""
  found, kinds = [], (".safetensors", *safetensors_io.PICKLES)
  for stem, name in ORIGINAL_FILES.items():
    there = [f for f in (folder / f"{stem}{kind}" for kind in kinds) if f.is_file()]
    if there:
      found.append(_Candidate(preset(name, "original"), there[0], None))
  return found


def _with_preset(folder, presets, known):
  """Networks whose sizes only a preset says. ValueError for presets without use."""
  found, unused = [], []
  for name in presets:
    published = preset(name, "diffusers")
    if published.network in known or (folder / "config.json").exists():
      unused.append(name)
    else:
      found.append(_Candidate(published, folder, _stem(folder)))
  if unused:
    raise ValueError(
      f"--preset={','.join(unused)} is not needed: the files of {folder} say the sizes"
    )
  return found


def _of_config(place):
  """The network of a folder with a config.json."""
  path = place / "config.json"
  try:
    config = dict(json.loads(path.read_text()))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path}: no JSON object ({error})") from error
  published = from_json(config, str(path))
  return _Candidate(published, place, _STEMS[published.network == "text"])


def _stem(folder):
  """Stem of the files of weights that have no config.json beside them."""
  for stem in _STEMS:
    if any(folder.glob(f"{stem}*")):
      return stem
  return _STEMS[0]


def _open(published, source, stem):
  """The network with its tensors' places, which must be those that its sizes say."""
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
  """The network in the layout that most of the tensors' names belong to."""

  def matches(layout):
    try:
      entries = published._replace(layout=layout).entries()
    except ValueError:  # a layout that cannot express the config
      return -1
    return sum(entry.name in tensors for entry in entries)

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
