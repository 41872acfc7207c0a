"""A tiny pipeline of published weights, and what is imported of it."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from golden.random_weights import random_tensor
from safetensors.numpy import save_file

from sora_jax import import_weights
from sora_jax.data import tokenizer
from sora_jax.models.dit import DiTConfig
from sora_jax.models.t5 import T5Config
from sora_jax.models.vae_config import VAEConfig
from sora_jax.runtime import checkpoint
from sora_jax.weights import hf_config, mapping

VAE = VAEConfig(
  width=4,
  width_multipliers=(1, 2),
  downsample=("st",),
  blocks=1,
  latent_channels=4,
  decoder_width=8,
)
DIT = DiTConfig(
  channels=4,
  width=24,
  depth=2,
  heads=2,
  mlp_width=32,
  text_width=16,
  frequency_width=8,
)
TEXT = T5Config(
  vocab_size=320,
  width=16,
  depth=2,
  heads=2,
  head_dim=8,
  mlp_width=24,
  bias_per_layer=True,
)
STATS = ((0.5, -1.0, 0.25, 0.0), (1.5, 2.0, 0.5, 1.0))
CONFIGS = {"vae": VAE, "text": TEXT, "dit": DIT}
PLACES = {"vae": "vae", "text": "text_encoder", "dit": "transformer"}
STEMS = {"vae": "diffusion_pytorch_model", "text": "model"}
STEMS["dit"] = STEMS["vae"]


def model_of(network, layout="diffusers"):
  stats = STATS if network == "vae" else None
  return hf_config.Published(network, layout, CONFIGS[network], stats)


def tensors_of(network, layout="diffusers"):
  """Random tensors that are the same params in both layouts."""
  made = {}
  for entry in model_of(network, layout).entries():
    ours = random_tensor(f"{entry.path}.{entry.layer}.weight", entry.our_shape)
    dtype = ml_dtypes.bfloat16 if network == "text" else np.float32
    made[entry.name] = np.ascontiguousarray(entry.save(ours).astype(dtype))
  return made


def params_of(network):
  tensors = tensors_of(network)
  params = mapping.assemble(model_of(network).entries(), tensors.__getitem__)
  return {"dit": params} if network == "dit" else params


def write_component(folder, network):
  folder.mkdir(parents=True)
  config, tensors = hf_config.to_json(model_of(network)), tensors_of(network)
  (folder / "config.json").write_text(json.dumps(config))
  stem = STEMS[network]
  if network != "dit":
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
    return
  names = {}
  for part in (0, 1):
    shard = f"{stem}-{part + 1:05d}-of-00002.safetensors"
    some = {k: tensors[k] for i, k in enumerate(sorted(tensors)) if i % 2 == part}
    save_file(some, folder / shard, {"format": "pt"})
    names |= dict.fromkeys(some, shard)
  index = {"metadata": {}, "weight_map": names}
  (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_pipeline(folder):
  for network, place in PLACES.items():
    write_component(folder / place, network)
  write_tokenizer(folder / "tokenizer")
  return folder


def write_tokenizer(folder):
  tokenizer.train(["a red circle", "b"], str(folder / "spiece.model"), 300)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  return write_pipeline(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def imported(pipeline, tmp_path_factory):
  out = tmp_path_factory.mktemp("imported") / "wan"
  import_weights.run(pipeline, out)
  return out


@pytest.fixture
def source(pipeline, tmp_path):
  """A pipeline for a test to break."""
  return shutil.copytree(pipeline, tmp_path / "source")


def load(out, network):
  params, meta = checkpoint.load_model(out / network / "model")
  return jax.tree.map(np.asarray, params), meta


def assert_same(a, b, **kwargs):
  jax.tree.map_with_path(
    lambda path, x, y: np.testing.assert_array_equal(x, y, str(path), **kwargs), a, b
  )
