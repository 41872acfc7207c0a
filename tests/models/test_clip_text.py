"""CLIP's text tower equals transformers' (golden/make_clip.py), from files on."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.random_weights import random_tensor
from safetensors.numpy import save_file

from sora_jax import import_weights
from sora_jax.data.clip_tokenizer import ClipTokenizer, write
from sora_jax.encoders.text_encoder import FrozenTextEncoder
from sora_jax.models.clip_text import PRESETS, CLIPTextConfig, CLIPTextEncoder
from sora_jax.models.meta import TextMeta
from sora_jax.models.t5 import T5Config
from sora_jax.runtime import sharding
from sora_jax.weights import clip_text, hf_config
from sora_jax.weights.mapping import assemble, by_leaf, leaf_shape

FOLDER = pathlib.Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "clip.json").read_text())
SMALL = CLIPTextConfig(120, 20, 24, 3, 4, 40)
LENGTHS, SIZE = [5, 2, 20, 9], 20  # as in make_clip.py


def batch():
  rng = np.random.default_rng(0)
  ids_BS = np.full((len(LENGTHS), SIZE), 119)
  for row, length in enumerate(LENGTHS):
    ids_BS[row, 0] = 118
    ids_BS[row, 1 : length - 1] = rng.integers(0, 118, length - 2)
  return ids_BS, np.arange(SIZE) < np.array(LENGTHS)[:, None]


def random_params(config):
  shapes = {entry.name: entry.shape for entry in clip_text.entries(config, "diffusers")}
  return assemble(
    clip_text.entries(config, "diffusers"),
    lambda name: random_tensor(name, shapes[name]),
  )


def features(config, ids_BS, mask_BS, dtype=jnp.float32):
  encoder = CLIPTextEncoder(config, dtype)
  made = jax.jit(encoder.apply)({"params": random_params(config)}, ids_BS, mask_BS)
  return np.asarray(made)


def relative_error(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_transformers(activation):
  config = dataclasses.replace(SMALL, activation=activation)
  ids_BS, mask_BS = batch()
  expected = np.load(FOLDER / "clip.npz")[f"{activation}/features"]
  assert relative_error(features(config, ids_BS, mask_BS)[mask_BS], expected) <= 1e-5


@pytest.mark.slow
def test_a_token_sees_none_behind_it():
  ids_BS, mask_BS = batch()
  whole = features(SMALL, ids_BS, mask_BS)[2, :6]
  alone = features(SMALL, ids_BS[2:3, :6], mask_BS[2:3, :6])[0]
  np.testing.assert_allclose(alone, whole, rtol=1e-4, atol=1e-5)


def test_names_are_those_of_transformers():
  found = {e.name: list(e.shape) for e in clip_text.entries(SMALL, "diffusers")}
  theirs = dict(GOLDEN["shapes"])
  theirs.pop("text_projection.weight")
  assert found == theirs
  assert clip_text.with_prefix(GOLDEN["bare"]) == theirs
  with pytest.raises(ValueError, match="no layout 'original'"):
    clip_text.entries(SMALL, "original")


@pytest.mark.parametrize("name", PRESETS)
def test_every_leaf_of_a_size_has_its_tensors(name):
  ids_BS = jnp.zeros((1, 1), jnp.int32)
  encoder = CLIPTextEncoder(PRESETS[name])
  params = jax.eval_shape(encoder.init, jax.random.key(0), ids_BS, ids_BS > 0)["params"]
  ours = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  leaves = by_leaf(clip_text.entries(PRESETS[name], "diffusers"))
  assert {path: leaf_shape(parts) for path, parts in leaves.items()} == ours


# --- its config.json


def test_config_json():
  published = hf_config.from_json(GOLDEN["config"], "x")
  assert published.config == dataclasses.replace(SMALL, activation="gelu")
  assert hf_config.from_json(hf_config.to_json(published), "x") == published
  # That of both towers; what it does not say has transformers' default.
  both = {"model_type": "clip", "text_config": {"hidden_size": 768, "top_k": 50,
          "num_attention_heads": 12, "intermediate_size": 3072}}  # fmt: skip
  assert hf_config.from_json(both, "x").config == PRESETS["clip-l"]
  for wrong, words in (
    ({"model_type": "clip"}, "x: it has no text_config"),
    ({**GOLDEN["config"], "layers": 3}, r"x: unknown keys \['layers'\]"),
    ({**GOLDEN["config"], "hidden_act": "relu"}, "x: activation 'relu' is none of"),
    ({**GOLDEN["config"], "hidden_size": 25}, "x: width 25 does not divide by 4"),
    ({**GOLDEN["config"], "layer_norm_eps": 1e-6}, "x: layer_norm_eps is 1e-06"),
  ):
    with pytest.raises(ValueError, match=words):
      hf_config.from_json(wrong, "x")


def test_meta_tells_it_from_t5():
  for config in (SMALL, T5Config()):
    meta = TextMeta(config, "t")
    assert TextMeta.from_json(json.loads(json.dumps(meta.to_json())), "x") == meta


# --- its tokenizer


def write_vocabulary(folder):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "vocab.json").write_text(json.dumps(GOLDEN["vocab"]))
  lines = ["#version: 0.2", *GOLDEN["merges"], ""]
  (folder / "merges.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("whole", [True, False])
def test_ids_are_those_of_transformers(whole, tmp_path):
  if whole:
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizer"]))
  else:
    write_vocabulary(tmp_path)
  write(tmp_path, tmp_path / "out" / "tokenizer.json")
  words = ClipTokenizer(str(tmp_path / "out" / "tokenizer.json"))
  assert [words.encode(text, 77) for text in GOLDEN["texts"]] == GOLDEN["ids"]
  assert words.vocab_size == 524
  cut = words.encode(GOLDEN["texts"][2] * 500, 7)
  assert cut == [*GOLDEN["ids"][2][:6], 523]


def test_bad_tokenizers(tmp_path):
  with pytest.raises(ValueError, match="vocab.json, .*merges.txt: no byte pairs"):
    write(tmp_path, tmp_path / "x")
  with pytest.raises(ValueError, match="t.json: no such tokenizer"):
    ClipTokenizer(str(tmp_path / "t.json"))
  (tmp_path / "t.json").write_text("{}")
  with pytest.raises(ValueError, match="t.json: not a tokenizer"):
    ClipTokenizer(str(tmp_path / "t.json"))
  other = {**GOLDEN["tokenizer"], "added_tokens": []}
  vocab = {k: v for k, v in GOLDEN["vocab"].items() if "startof" not in k}
  other["model"] = {**other["model"], "vocab": vocab}
  (tmp_path / "t.json").write_text(json.dumps(other))
  with pytest.raises(ValueError, match=r"it has no <\|startoftext\|> and"):
    ClipTokenizer(str(tmp_path / "t.json"))


# --- from published files to features


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  """A folder of all of CLIP as it is published, imported."""
  source, out = (tmp_path_factory.mktemp(name) for name in ("source", "out"))
  config = dataclasses.replace(SMALL, vocab_size=524)
  published = hf_config.Published("text", "diffusers", config)
  text = hf_config.to_json(published)
  both = {"model_type": "clip", "text_config": text, "vision_config": {}}
  (source / "config.json").write_text(json.dumps(both))
  tensors = {
    entry.name: random_tensor(entry.name, entry.shape) for entry in published.entries()
  }
  tensors["logit_scale"] = np.ones((1,), np.float32)
  tensors["vision_model.a.weight"] = np.ones((2, 2), np.float32)
  return source, out, config, tensors


@pytest.mark.slow
def test_from_published_files_to_features(imported, tmp_path):
  source, out, config, tensors = imported
  save_file(tensors, source / "model.safetensors")
  with pytest.raises(ValueError, match="no tokenizer.json, and no vocab.json"):
    import_weights.run(source, out)
  write_vocabulary(source)
  import_weights.run(source, out)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  encoder = FrozenTextEncoder(out, mesh)
  assert encoder.width == 24
  texts = ["a red circle", "", "the lower newest " * 30]
  made = encoder.encode(texts, 512)
  words = ClipTokenizer(str(out / "text" / "model" / "tokenizer.json"))
  for text, made_SE in zip(texts, made, strict=True):
    ids = np.array([words.encode(text.strip(), 20)])
    alone = features(config, ids, ids >= 0)[0]
    assert made_SE.dtype == np.float32 and made_SE.shape == alone.shape
    np.testing.assert_allclose(made_SE, alone, rtol=1e-4, atol=1e-5)
  sharded = FrozenTextEncoder(out, sharding.make_mesh(data=2, fsdp=2, tensor=2))
  for a, b in zip(sharded.encode(texts), made, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
