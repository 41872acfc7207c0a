"""The preprocessor_config.json beside a published vision tower: how images are fed."""

import dataclasses
import pathlib
from typing import Any

from sora_jax.models.clip_vision import CLIPVisionConfig
from sora_jax.weights import json_file

NAME = "preprocessor_config.json"
_PLACES = ("image_processor", "image_encoder")
_BICUBIC = 3  # Pillow's number of it


def read(pipeline: pathlib.Path, config: CLIPVisionConfig) -> CLIPVisionConfig:
  """The config with the mean and deviation that the pipeline's folder says, if any.

  Raises:
    ValueError: for images that are fed in another way than CLIP's; names the file and
      the key.
  """
  path = next(
    (p for place in _PLACES if (p := pipeline / place / NAME).is_file()), None
  )
  if path is None:
    return config
  said = json_file.read(path)
  usual = to_json(config)
  for key in usual.keys() - {"image_mean", "image_std"}:
    value = said.get(key, usual[key])
    # Old versions say a size as one number.
    if isinstance(value, int) and isinstance(usual[key], dict):
      value = dict.fromkeys(usual[key], value)
    if value != usual[key]:
      raise ValueError(f"{path}: {key} is {value!r}, only {usual[key]!r} is known")
  mean, std = (
    tuple(map(float, said.get(key, usual[key]))) for key in ("image_mean", "image_std")
  )
  if len(mean) != 3 or len(std) != 3:
    raise ValueError(f"{path}: image_mean or image_std has not 3 numbers")
  return dataclasses.replace(config, mean=mean, std=std)


def to_json(config: CLIPVisionConfig) -> dict[str, Any]:
  """The file for transformers' CLIPImageProcessor."""
  size = config.image_size
  return {
    "crop_size": {"height": size, "width": size},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(config.mean),
    "image_processor_type": "CLIPImageProcessor",
    "image_std": list(config.std),
    "resample": _BICUBIC,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": size},
  }
