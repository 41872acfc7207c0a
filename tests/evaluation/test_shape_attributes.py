"""Shapes are read right off clips that are not perfect, as samples are not."""

import numpy as np
import pytest
from scipy import ndimage

from sora_jax.data import shape_worlds, shapes
from sora_jax.evaluation import shape_attributes


@pytest.mark.slow
def test_a_rough_outline_is_not_taken_for_a_square():
  # Each pixel is moved by about one, neighbours alike: corners and dents that
  # nobody would call another shape. A reader that asks which symmetry shows most
  # beside a typical one calls a tenth of these clips squares.
  rng = np.random.default_rng(1)
  world, right = shape_worlds.WORLDS["short"], []
  for index in range(100):
    truth = shapes.describe("heldout", index, 5, world)["truth"]
    still_HWC = shapes.draw(truth)[0]
    seen = shape_attributes.analyse_video(_warped(still_HWC, rng)[None])["objects"]
    right.append([item["shape"] for item in seen] == [truth["objects"][0]["shape"]])
  assert np.mean(right) >= 0.97


def _warped(image_HWC, rng):
  height, width, _ = image_HWC.shape
  shift = ndimage.gaussian_filter(rng.normal(size=(2, height, width)), (0, 3, 3))
  place = np.mgrid[:height, :width] + shift / shift.std()
  warp = [
    ndimage.map_coordinates(channel, place, order=1, mode="nearest")
    for channel in np.moveaxis(image_HWC.astype(float), -1, 0)
  ]
  return np.stack(warp, axis=-1).round().astype(np.uint8)
