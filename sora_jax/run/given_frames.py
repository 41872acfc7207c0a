"""What a DiT reads of a clip's given frames beside the noise, for its record."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from sora_jax.data.clips import Clip
from sora_jax.encoders.autoencoder import Autoencoder
from sora_jax.encoders.image_encoder import FrozenImageEncoder
from sora_jax.packing import conditions, time_grid
from sora_jax.run import recipe as recipes


class GivenFrames:
  """Encodes the first frame of clips, and of some models the last one as well."""

  def __init__(self, recipe: recipes.Recipe, autoencoder: Autoencoder, mesh):
    """Loads the image encoder of config.dit.init_from, if the model has one.

    Raises:
      ValueError: if there is none, or one of other sizes than the model's.
    """
    self._model, self._autoencoder = recipe.dit.model, autoencoder
    self._images = None
    if self._model.image_width:
      folder = pathlib.Path(recipe.dit.init_from)
      self._images = FrozenImageEncoder(folder, mesh, recipe.dtype)

  def frames(self, count: int) -> set[int]:
    """Indices of those that are given, of a clip of so many; an image is both ends."""
    return {0, count - 1} if self._model.image_positions else {0}

  def encode(self, clip: Clip, frames: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """`condition_THWC` and, of a model that attends to images, `image_JV`.

    frames: uint8 [H, W, 3] of the clip, by their index: those of `frames`.
    """
    video_THWC = conditions.grey_but(frames, time_grid.round_up(clip.frames))
    latent_THWC = self._autoencoder.encode_video(video_THWC)
    found = {"condition_THWC": conditions.channels(latent_THWC, frames)}
    if self._images:
      seen = [frames[at] for at in sorted(frames)]
      seen = (seen * 2)[:2] if self._model.image_positions else seen
      features = self._images.encode(seen)
      found["image_JV"] = features.reshape(-1, features.shape[-1])
    return found
