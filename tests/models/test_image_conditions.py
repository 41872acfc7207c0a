"""Wan's models with images equal diffusers' (golden/make_wan_models.py)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.random_weights import random_tensor

from sora_jax.models import clip_vision
from sora_jax.models.dit import PRESETS, DiT
from sora_jax.packing import patches
from sora_jax.weights import hf_config
from sora_jax.weights.mapping import assemble

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SAID = json.loads((GOLDEN / "wan_models.json").read_text())

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def golden():
  return dict(np.load(GOLDEN / "wan_models.npz"))


def relative_error(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def params_of(published, prefix=""):
  names = {entry.name: entry.shape for entry in published.entries()}

  def tensor(name):
    # As transformers 5 calls it, which has made the golden values.
    return random_tensor(prefix + name.removeprefix("vision_model."), names[name])

  return assemble(published.entries(), tensor)


def noise(config):
  t, h, w = 3, 2, 3
  rng = np.random.default_rng(5)
  return rng.standard_normal((t * h * w, config.patch_width), np.float32), (t, h, w)


# The other two have no parts of their own.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["i2v-2.1", "flf2v-2.1"])
def test_a_call_equals_diffusers(golden, kind):
  published = hf_config.from_json(SAID["configs"][kind]["transformer"], kind)
  config = published.config
  patch_LP, grid = noise(config)
  ones_BL = jnp.ones((1, len(patch_LP)), jnp.int32)
  text_BSE = np.random.default_rng(1).standard_normal((1, 512, 24), np.float32)
  more = {}
  if config.condition_channels:
    condition_THWC = golden[f"{kind}/condition"]
    more["condition_BLQ"] = patches.patchify(condition_THWC, config.patch_size)[None]
  if config.image_width:
    image_JV = golden[f"{kind}/image"].reshape(-1, config.image_width)
    more["image_BNJV"] = image_JV[None, None]
  out_BLP = jax.jit(DiT(config).apply)(
    {"params": params_of(published)},
    patch_LP[None],
    jnp.full((1, 2), 0.637),
    ones_BL - 1,
    ones_BL,
    patches.grid_positions(grid)[None],
    text_BSE,
    jnp.ones((1, 512), jnp.int32),
    **more,
  )
  expected = patches.patchify(golden[f"{kind}/call"], config.patch_size)
  assert relative_error(np.asarray(out_BLP[0]), expected) <= 1e-5


@pytest.mark.parametrize("name", SAID["published"])
def test_full_sizes_have_the_published_tensors(name):
  published = hf_config.preset(name, "diffusers")
  wanted, found = SAID["published"][name], published.entries()
  shapes = {e.name.removeprefix("vision_model."): list(e.shape) for e in found}
  assert len(found) == len(shapes) == wanted["tensors"]
  assert {k: shapes.get(k) for k in wanted["shapes"]} == wanted["shapes"]
  assert sum(np.prod(e.shape) for e in found) == wanted["params"]


def test_presets_are_as_their_configs_say():
  for name in ("wan2.2-i2v-a14b", "wan2.1-i2v-14b", "wan2.1-flf2v-14b"):
    published = hf_config.Published("dit", "diffusers", PRESETS[name])
    assert hf_config.from_json(hf_config.to_json(published), name) == published
  tower = hf_config.preset("clip-vit-h", "diffusers")
  assert hf_config.from_json(hf_config.to_json(tower), "tower") == tower
  assert tower.config.tokens == 257 == clip_vision.CLIPVisionConfig().tokens
