"""The encoders equal transformers' T5 and UMT5 (golden/make_t5.py)."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.random_weights import random_tensor

from sora_jax.models.t5 import PRESETS, T5Config, T5Encoder
from sora_jax.weights import text as names
from sora_jax.weights.mapping import assemble, by_leaf, leaf_shape

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SMALL = T5Config(vocab_size=120, width=24, depth=3, heads=4, head_dim=10, mlp_width=40)
CONFIGS = {"t5": SMALL, "umt5": dataclasses.replace(SMALL, bias_per_layer=True)}
# As in make_t5.py: lengths of the captions, what they are padded to.
BATCHES = {"short": ([5, 2, 7], 7), "padded": ([1, 11], 16), "long": ([200, 150], 200)}


def run(kind, batch, dtype=jnp.float32, padding=0):
  lengths, size = BATCHES[batch]
  rng = np.random.default_rng(size)
  ids = rng.integers(2, SMALL.vocab_size, (len(lengths), size))
  mask = np.arange(size) < np.array(lengths)[:, None]
  ids, mask = (np.pad(x, ((0, 0), (0, padding))) for x in (ids, mask))
  found = names.entries(CONFIGS[kind], "diffusers")
  shapes = {entry.name: entry.shape for entry in found}
  params = assemble(found, lambda name: random_tensor(name, shapes[name]))
  encoder = T5Encoder(CONFIGS[kind], dtype)
  features = jax.jit(encoder.apply)({"params": params}, ids, mask)
  assert np.all(np.isfinite(features))
  return np.asarray(features)[mask][:: 1 if size < 100 else 25]


def relative_error(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_transformers(kind, batch):
  expected = np.load(GOLDEN / "t5.npz")[f"{kind}/{batch}"]
  assert relative_error(run(kind, batch), expected) <= 1e-5


def test_padding_changes_nothing():
  expected = np.load(GOLDEN / "t5.npz")["umt5/short"]
  assert relative_error(run("umt5", "short", padding=9), expected) <= 1e-5


def test_bfloat16_is_near():
  expected = np.load(GOLDEN / "t5.npz")["umt5/short"]
  assert 1e-5 < relative_error(run("umt5", "short", jnp.bfloat16), expected) < 0.03


PUBLISHED = json.loads((GOLDEN / "t5_shapes.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_sizes_have_the_published_tensors(name):
  published = PUBLISHED[name]
  found = names.entries(PRESETS[name], "diffusers")
  shapes = {entry.name: list(entry.shape) for entry in found}
  aliases = [n for n in published["shapes"] if n not in shapes]
  assert aliases == ["encoder.embed_tokens.weight"]
  assert all(any(re.fullmatch(r, n) for r in names.IGNORED) for n in aliases)
  assert len(shapes) == len(found) == published["tensors"] - 1
  assert sum(np.prod(s) for s in shapes.values()) == published["params"]
  for name, shape in published["shapes"].items():
    assert name in aliases or shapes[name] == shape


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_leaf_of_a_size_has_its_tensors(name):
  ids_BS = jnp.zeros((1, 1), jnp.int32)
  params = jax.eval_shape(
    T5Encoder(PRESETS[name]).init, jax.random.key(0), ids_BS, ids_BS > 0
  )["params"]
  ours = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  layouts = names.LAYOUTS if "umt5" in name else names.LAYOUTS[:1]
  for layout in layouts:
    found = names.entries(PRESETS[name], layout)
    assert {p: leaf_shape(parts) for p, parts in by_leaf(found).items()} == ours


def test_original_names():
  # As published with Wan 2.1 (wan/modules/t5.py).
  found = {e.name: e.shape for e in names.entries(PRESETS["umt5-xxl"], "original")}
  assert len(found) == 242
  for name, shape in {
    "token_embedding.weight": (256384, 4096),
    "blocks.23.norm1.weight": (4096,),
    "blocks.23.attn.o.weight": (4096, 4096),
    "blocks.0.norm2.weight": (4096,),
    "blocks.0.ffn.gate.0.weight": (10240, 4096),
    "blocks.0.ffn.fc2.weight": (4096, 10240),
    "blocks.7.pos_embedding.embedding.weight": (32, 64),
    "norm.weight": (4096,),
  }.items():
    assert found[name] == shape
  with pytest.raises(ValueError, match="T5 shares"):
    names.entries(PRESETS["t5-v1.1-xxl"], "original")
