"""The DiT equals Wan's transformer as diffusers has it (golden/make_wan_dit.py)."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.random_weights import random_tensor

from sora_jax.models import dit
from sora_jax.models.dit import PRESETS, DiT, DiTConfig
from sora_jax.packing import patches
from sora_jax.weights import dit as names
from sora_jax.weights.mapping import assemble, by_leaf, leaf_shape

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SMALL = DiTConfig(text_width=24, frequency_width=32, remat="full")
CONFIGS = {
  "2.1": dataclasses.replace(
    SMALL, width=48, depth=3, heads=3, mlp_width=80, channels=4
  ),
  "2.2": dataclasses.replace(
    SMALL, width=64, depth=2, heads=2, mlp_width=96, channels=6
  ),
}
# As in make_wan_dit.py: config, latent (T, H, W), text tokens, (given, noisy) level.
CASES = {
  "image": ("2.1", (1, 8, 6), 5, (500.0, 500.0)),
  "video": ("2.1", (3, 4, 10), 7, (37.0, 37.0)),
  "tall": ("2.1", (5, 12, 2), 12, (999.0, 999.0)),
  "given_first_frame": ("2.2", (4, 6, 4), 6, (0.0, 750.0)),
  "given_wide": ("2.2", (3, 2, 14), 9, (0.0, 12.5)),
  "one_level": ("2.2", (2, 4, 4), 3, (250.0, 250.0)),
}


def weights(config):
  return assemble(
    names.entries(config, "diffusers"),
    lambda name: random_tensor(name, SHAPES[config][name]),
  )


SHAPES = {
  config: {e.name: e.shape for e in names.entries(config, "diffusers")}
  for config in CONFIGS.values()
}


def clip(name):
  """Inputs of a case: patches [L, P], levels, groups, positions, text [S, E], grid."""
  kind, shape, tokens, levels = CASES[name]
  config = CONFIGS[kind]
  rng = np.random.default_rng(list(CASES).index(name))
  latent_CTHW = rng.standard_normal((config.channels, *shape), np.float32)
  text_SE = rng.standard_normal((tokens, config.text_width), np.float32)
  patch_LP = patches.patchify(latent_CTHW.transpose(1, 2, 3, 0), config.patch_size)
  grid = patches.grid_shape(shape, config.patch_size)
  position_L3 = patches.grid_positions(grid)
  given_L = position_L3[:, 0] == 0
  return config, patch_LP, levels, given_L, position_L3, text_SE, grid


def run(config, clips, padding=0):
  """The model on one packed row of clips of one config: their outputs [L, P]."""
  rows = {k: [] for k in ("x", "group", "segment", "position", "text", "text_segment")}
  levels = []
  for n, (_, patch_LP, (given, noisy), given_L, position_L3, text_SE, _) in enumerate(
    clips
  ):
    levels += [noisy / 1000, given / 1000]
    rows["x"].append(patch_LP)
    rows["group"].append(2 * n + given_L.astype(np.int32))
    rows["segment"].append(np.full(len(patch_LP), n + 1, np.int32))
    rows["position"].append(position_L3)
    rows["text"].append(text_SE)
    rows["text_segment"].append(np.full(len(text_SE), n + 1, np.int32))
  packed = {}
  for name, parts in rows.items():
    value = np.concatenate(parts)
    pad = [(0, padding)] + [(0, 0)] * (value.ndim - 1)
    packed[name] = jnp.asarray(np.pad(value, pad))[None]
  out_BLP = jax.jit(DiT(config).apply)(
    {"params": weights(config)},
    packed["x"],
    jnp.asarray(levels, jnp.float32)[None],
    packed["group"],
    packed["segment"],
    packed["position"],
    packed["text"],
    packed["text_segment"],
  )
  ends = np.cumsum([len(parts) for parts in rows["x"]])
  return np.split(np.asarray(out_BLP[0]), ends)[:-1]


def expected(name):
  latent_CTHW = np.load(GOLDEN / "wan_dit.npz")[name][0]
  config = CONFIGS[CASES[name][0]]
  return patches.patchify(latent_CTHW.transpose(1, 2, 3, 0), config.patch_size)


def relative_error(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(name):
  [out_LP] = run(clip(name)[0], [clip(name)])
  assert relative_error(out_LP, expected(name)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_each_clip_of_a_packed_row_equals_diffusers(kind):
  chosen = [name for name, case in CASES.items() if case[0] == kind]
  outs = run(CONFIGS[kind], [clip(name) for name in chosen], padding=11)
  for name, out_LP in zip(chosen, outs, strict=True):
    assert relative_error(out_LP, expected(name)) <= 1e-5, name


PUBLISHED = json.loads((GOLDEN / "wan_dit_shapes.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_sizes_have_the_published_tensors(name):
  found, published = names.entries(PRESETS[name], "diffusers"), PUBLISHED[name]
  shapes = {entry.name: list(entry.shape) for entry in found}
  assert len(found) == len(shapes) == published["tensors"]
  assert {k: shapes.get(k) for k in published["shapes"]} == published["shapes"]
  assert sum(np.prod(e.shape) for e in found) == published["params"]


def abstract_params(config):
  ids_BL = jnp.zeros((1, 1), jnp.int32)
  context = dit.Context(
    group_BL=ids_BL,
    segment_BL=ids_BL,
    position_BL3=jnp.zeros((1, 1, 3)),
    text_BSE=jnp.zeros((1, 1, config.text_width)),
    text_segment_BS=ids_BL,
    condition_BLQ=jnp.zeros((1, 1, config.condition_width)),
    image_BNJV=jnp.zeros((1, 1, config.image_tokens, config.image_width)),
  )
  x_BLP, t_BG = jnp.zeros((1, 1, config.patch_width)), jnp.zeros((1, 2))
  init = DiT(config).init
  return jax.eval_shape(init, jax.random.key(0), x_BLP, t_BG, *context)["params"]


@pytest.mark.parametrize("layout", names.LAYOUTS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_leaf_of_a_size_has_its_tensors(name, layout):
  leaves = jax.tree_util.tree_leaves_with_path(abstract_params(PRESETS[name]))
  ours = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in leaves
  }
  found = names.entries(PRESETS[name], layout)
  assert {p: leaf_shape(parts) for p, parts in by_leaf(found).items()} == ours


def test_original_names():
  # As published with Wan 2.1 (wan/modules/model.py).
  found = {e.name: e for e in names.entries(PRESETS["wan2.1-t2v-1.3b"], "original")}
  for name, shape in {
    "patch_embedding.weight": (1536, 16, 1, 2, 2),
    "text_embedding.0.weight": (1536, 4096),
    "text_embedding.2.bias": (1536,),
    "time_embedding.0.weight": (1536, 256),
    "time_projection.1.weight": (9216, 1536),
    "blocks.29.self_attn.norm_q.weight": (1536,),
    "blocks.29.cross_attn.o.bias": (1536,),
    "blocks.0.norm3.weight": (1536,),
    "blocks.0.ffn.0.weight": (8960, 1536),
    "blocks.0.ffn.2.weight": (1536, 8960),
    "blocks.0.modulation": (1, 6, 1536),
    "head.head.weight": (64, 1536),
    "head.modulation": (1, 2, 1536),
  }.items():
    assert found[name].shape == shape
  assert len(found) == 825


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_load_and_save_are_inverse(layout):
  for entry in names.entries(CONFIGS["2.1"], layout):
    tensor = random_tensor(entry.name, entry.shape)
    np.testing.assert_array_equal(entry.save(entry.load(tensor)), tensor)


def test_models_that_wan_cannot_express():
  with pytest.raises(ValueError, match="pooled_text"):
    names.entries(DiTConfig(pooled_text=True), "diffusers")
  with pytest.raises(ValueError, match="absolute_positions"):
    names.entries(DiTConfig(absolute_positions=8), "diffusers")
  with pytest.raises(ValueError, match="rope_theta 100 is none of Wan's"):
    names.entries(DiTConfig(rope_theta=100.0), "diffusers")
  with pytest.raises(ValueError, match="'torch' is none of"):
    names.entries(DiTConfig(), "torch")
