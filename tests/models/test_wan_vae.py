"""The VAE equals Wan's as diffusers has it (golden/make_wan_vae.py)."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.random_weights import random_tensor

from sora_jax.models.vae import LATENT_STATS, PRESETS, VAE, VAEConfig
from sora_jax.weights import vae as names
from sora_jax.weights.mapping import assemble, by_leaf, leaf_shape

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CONFIGS = {
  "2.1": dataclasses.replace(PRESETS["wan2.1"], width=8, latent_channels=4),
  "2.2": dataclasses.replace(
    PRESETS["wan2.2"], width=8, decoder_width=12, latent_channels=6
  ),
}
# As in make_wan_vae.py: config, video (T, H, W).
CASES = {
  "2.1_image": ("2.1", (1, 16, 24)),
  "2.1_tall": ("2.1", (5, 40, 8)),
  "2.1_wide": ("2.1", (9, 16, 40)),
  "2.2_image": ("2.2", (1, 32, 48)),
  "2.2_tall": ("2.2", (5, 80, 16)),
  "2.2_wide": ("2.2", (9, 16, 48)),
}
STRIDE = 3


@functools.cache
def weights(kind):
  entries = names.entries(CONFIGS[kind], "diffusers")
  shapes = {e.name: e.shape for e in entries}
  return assemble(entries, lambda name: random_tensor(name, shapes[name]))


def relative_error(a, b):
  assert a.shape == b.shape
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(name):
  kind, shape = CASES[name]
  config = CONFIGS[kind]
  rng = np.random.default_rng(list(CASES).index(name))
  video_CTHW = rng.uniform(-1, 1, (3, *shape)).astype(np.float32)
  latent_CTHW = rng.standard_normal(
    (config.latent_channels, *config.latent_shape(*shape)), np.float32
  )

  @jax.jit
  def run(params, video_BTHWC, latent_BTHWC):
    vae = functools.partial(VAE(config).apply, {"params": params})
    return (
      vae(video_BTHWC, method=VAE.encode),
      vae(latent_BTHWC, method=VAE.decode),
    )

  moments, decoded_BTHWC = run(
    weights(kind),
    video_CTHW.transpose(1, 2, 3, 0)[None],
    latent_CTHW.transpose(1, 2, 3, 0)[None],
  )
  golden = np.load(GOLDEN / "wan_vae.npz")
  moments_BCTHW = golden[f"{name}_moments"]
  for ours, theirs in zip(moments, np.split(moments_BCTHW, 2, axis=1), strict=True):
    assert relative_error(ours, theirs.transpose(0, 2, 3, 4, 1)) <= 1e-5
  theirs = golden[f"{name}_decoded"].transpose(0, 2, 3, 4, 1)
  assert relative_error(decoded_BTHWC[:, :, ::STRIDE, ::STRIDE], theirs) <= 1e-5


PUBLISHED = json.loads((GOLDEN / "wan_vae_names.json").read_text())


def abstract_params(config):
  factor = config.space_factor
  video = jnp.zeros((1, 1, factor, factor, 3))
  return jax.eval_shape(VAE(config).init, jax.random.key(0), video)["params"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", names.LAYOUTS)
@pytest.mark.parametrize("name", PRESETS)
def test_full_sizes_have_the_published_tensors(name, layout):
  found = names.entries(PRESETS[name], layout)
  shapes = {entry.name: " ".join(map(str, entry.shape)) for entry in found}
  assert len(shapes) == len(found)
  assert shapes == PUBLISHED[name][layout]
  count = sum(np.prod(entry.shape) for entry in found)
  assert count == {"wan2.1": 126_892_531, "wan2.2": 704_688_668}[name]
  leaves = jax.tree_util.tree_leaves_with_path(abstract_params(PRESETS[name]))
  ours = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in leaves
  }
  assert {p: leaf_shape(parts) for p, parts in by_leaf(found).items()} == ours


@pytest.mark.parametrize("name", PRESETS)
def test_both_layouts_mean_the_same_tensors(name):
  """Both implementations list their modules in one order, but for the attention."""

  def paths(layout, part):
    path = {e.name: e.path for e in names.entries(PRESETS[name], layout)}
    ordered = [path[n] for n in PUBLISHED[name][layout] if n.startswith(part)]
    return sorted(ordered, key=lambda path: "attention" in path)

  for part in ("encoder", "decoder"):
    assert paths("diffusers", part) == paths("original", part)


@pytest.mark.parametrize("layout", names.LAYOUTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_load_and_save_are_inverse(kind, layout):
  for entry in names.entries(CONFIGS[kind], layout):
    tensor = random_tensor(entry.name, entry.shape)
    np.testing.assert_array_equal(entry.save(entry.load(tensor)), tensor)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"patch_size": (4, 8, 8)}, r"patch_size = \(4, 8, 8\) \(it is \(1, 8, 8\)\)"),
    ({"kernel": (1, 3, 3)}, "kernel"),
    ({"middle": False}, "middle = False"),
    ({"head_width": 8}, "head_width = 8"),
    ({"downsample": ("s", "t", "st")}, "halves time alone"),
  ],
)
def test_models_that_wan_cannot_express(options, message):
  with pytest.raises(ValueError, match=message):
    names.entries(VAEConfig(**options), "original")


def test_unknown_layout():
  with pytest.raises(ValueError, match="'torch' .* is not one of"):
    names.entries(VAEConfig(), "torch")


@pytest.mark.parametrize("name", PRESETS)
def test_published_latent_statistics(name):
  mean, std = LATENT_STATS[name]
  assert len(mean) == len(std) == PRESETS[name].latent_channels
  assert min(std) > 0


def test_shortcuts_need_channels_that_divide():
  with pytest.raises(ValueError, match="7 do not divide the 3 values of a cell"):
    VAEConfig(
      width=1,
      width_multipliers=(3, 7),
      downsample=("s",),
      stage_shortcut=True,
    )
