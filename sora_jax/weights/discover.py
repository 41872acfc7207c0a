"""Where the networks of a published model are in its folder."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from sora_jax.runtime import safetensors_io
from sora_jax.weights import (
  clip_text,
  clip_vision,
  image_processor,
  json_file,
  mapping,
  supported,
  text,
)
from sora_jax.weights.hf_config import Published, from_json, preset

NETWORKS = ("vae", "text", "image", "dit", "dit_low")
# Folders of networks with a config.json, in a diffusers pipeline and in Wan's release
# of two experts; in a folder of its own, a network may be any.
_PLACES = {
  ".": "",
  "vae": "vae",
  "text_encoder": "text",
  "image_encoder": "image",
  "transformer": "dit",
  "transformer_2": "dit_low",
  "high_noise_model": "dit",
  "low_noise_model": "dit_low",
}
# Wan's release: a file for each network but the DiT, as .pth or converted. The dots of
# their stems are no suffixes.
ORIGINAL_FILES = {
  "Wan2.1_VAE": "wan2.1",
  "Wan2.2_VAE": "wan2.2",
  "models_t5_umt5-xxl-enc-bf16": "umt5-xxl",
}
_STEMS = ("diffusion_pytorch_model", "model")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")  # of T5
_TOKENIZERS = (".", "../tokenizer", "google/umt5-xxl")


class Component(NamedTuple):
  """A network that was found: what it is, its tensors' places, its tokenizer.

  tokenizer: a file of T5's, one of TOKENIZER_FILES; of CLIP the folder with its files.
  """

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
    supported.check_pipeline(folder)
  found = _with_config(folder, networks) + _original(folder)
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


def _with_config(folder, networks):
  """Networks whose config.json says what they are, as diffusers writes it.

  What is not asked for may be of a model that cannot be imported.
  """
  for part in ("transformer_2", "low_noise_model"):
    if (folder / part).is_dir() and not (folder / part / "config.json").is_file():
      raise ValueError(f"{folder / part} has no config.json: its download is not whole")
  return [
    _of_config(folder / part, network)
    for part, network in _PLACES.items()
    if (folder / part / "config.json").is_file()
    and (not networks or network in ("", *networks))
  ]


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


def _of_config(place, network):
  """The network of a folder with a config.json, which is one of that kind."""
  path = place / "config.json"
  published = from_json(json_file.read(path), str(path))
  if network == "dit_low" and published.network == "dit":
    published = published._replace(network=network)
  if published.network == "image":
    tower = image_processor.read(place.parent, published.config)
    published = published._replace(config=tower)
  if network not in ("", published.network):
    raise ValueError(f"{path}: a {published.network}, where the {network} should be")
  return _Candidate(published, place, _STEMS[published.network in ("text", "image")])


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
  if published.network == "image":
    tensors = clip_text.with_prefix(tensors, clip_vision.PREFIX)
  elif published.is_clip:
    tensors = clip_text.with_prefix(tensors)
  elif published.network == "text":
    for name, alias in text.ALIASES.items():
      if name not in tensors and alias in tensors:
        tensors[name] = tensors.pop(alias)
  if not (source / "config.json").is_file():
    published = _of_names(published, tensors)
  published = _with_images(published, tensors)
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  wrong = mapping.differences(published.entries(), shapes, published.ignored)
  if wrong:
    raise ValueError(
      f"{source}: {len(wrong)} tensors are wrong: {safetensors_io.listed(wrong)}"
    )
  names = [entry.name for entry in published.entries()]
  whole = [
    f"{n} is {tensors[n].dtype}" for n in names if tensors[n].dtype.kind in "iub"
  ]
  if whole:
    raise ValueError(
      f"{source}: weights of whole numbers (quantized), which are not read: "
      f"{safetensors_io.listed(whole, 3)}"
    )
  tokenizer = None
  if published.network == "text":
    folder = source if source.is_dir() else source.parent
    tokenizer = _clip_tokenizer(folder) if published.is_clip else _tokenizer(folder)
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


def _with_images(published, tensors):
  """A DiT of Wan's release with the images that its tensors are for."""
  if published.layout != "original" or "img_emb.proj.1.weight" not in tensors:
    return published
  positions = tensors.get("img_emb.emb_pos")
  tokens = positions.shape[1] if positions and len(positions.shape) == 3 else 257
  width = tensors["img_emb.proj.1.weight"].shape[0]
  config = dataclasses.replace(
    published.config,
    image_width=width,
    image_tokens=tokens,
    image_positions=positions is not None,
  )
  return published._replace(config=config)


def _clip_tokenizer(folder):
  """The folder with CLIP's tokenizer."""
  places = [folder / other for other in _TOKENIZERS[:2]]
  for place in places:
    pair = (place / "vocab.json", place / "merges.txt")
    if (place / "tokenizer.json").is_file() or all(file.is_file() for file in pair):
      return place
  raise ValueError(
    f"{folder}: the text encoder has no tokenizer: no tokenizer.json, and no "
    f"vocab.json with merges.txt, in {', '.join(map(str, places))}"
  )


def _tokenizer(folder):
  """T5's: transformers, too, reads tokenizer.json where there are both."""
  places = [folder / other for other in _TOKENIZERS]
  for place in places:
    for name in TOKENIZER_FILES:
      if (place / name).is_file():
        return place / name
  raise ValueError(
    f"{folder}: the text encoder has no tokenizer: no "
    f"{' and no '.join(TOKENIZER_FILES)} in {', '.join(map(str, places))}"
  )
