"""What model.json says: written and read back, old files too, wrong ones refused."""

import dataclasses
import json

import pytest

from sora_jax.models.caption_encoder import TextEncoderConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.models.meta import (
  METAS,
  VERSION,
  DiTMeta,
  FrozenText,
  Noise,
  TextMeta,
  VAEMeta,
)
from sora_jax.models.t5 import T5Config
from sora_jax.models.vae_config import VAEConfig

VAE = VAEMeta(
  VAEConfig(latent_channels=2, patch_size=(1, 2, 2)), (0.5, -1.0), (1.0, 2.0), "v", 7
)
TEXT = TextMeta(T5Config(width=64), "t")
FROZEN = DiTMeta(
  model=DiTConfig(patch_size=(1, 4, 4)),
  text=FrozenText("t", 24, "runs/t5"),
  max_text_tokens=24,
  tokens=128,
  text_tokens=96,
  segments=4,
  reference_fps=16.0,
  conditional=True,
  vae="v",
  steps=7,
  noise=Noise("ddpm_linear", "eps"),
  init_from="runs/base",
)
OWN = dataclasses.replace(
  FROZEN, text=TextEncoderConfig(width=64), init_from="", noise=Noise()
)
ALL = {"vae": VAE, "text": TEXT, "frozen": FROZEN, "own": OWN}

# As train_vae, import_weights and train_dit wrote it before there were versions.
OLD_VAE = {
  "model": {"width": 32, "width_multipliers": [1, 2, 4, 4], "latent_channels": 2},
  "latent_mean": [0.5, -1.0],
  "latent_std": [1.0, 2.0],
  "id": "v",
}
OLD_TEXT = {"model": {"width": 64, "bias_per_layer": True}, "id": "t"}
OLD_DIT = {
  "model": {"patch_size": [1, 4, 4]},
  "text": {"vocab_size": 300, "width": 64, "depth": 1, "heads": 4},
  "max_text_tokens": 24,
  "tokens": 128,
  "text_tokens": 96,
  "segments": 4,
  "reference_fps": 16.0,
  "conditional": True,
  "noise": {"process": "flow", "target": "x0"},
  "vae": "v",
  "steps": 7,
}


def through_a_file(meta):
  return json.loads(json.dumps(meta.to_json()))


@pytest.mark.parametrize("name", ALL)
def test_what_is_written_is_read_back(name):
  meta = ALL[name]
  values = through_a_file(meta)
  assert (values["version"], values["network"]) == (VERSION, meta.network)
  assert METAS[meta.network].from_json(values, "x") == meta
  # Also before it was in a file.
  assert type(meta).from_json(meta.to_json(), "x") == meta


def test_one_of_two_kinds_of_text_encoder():
  assert (FROZEN.frozen_text, FROZEN.text_encoder) == (FROZEN.text, None)
  assert (OWN.frozen_text, OWN.text_encoder) == (None, OWN.text)


def test_files_without_a_version():
  vae = VAEMeta.from_json(OLD_VAE, "x")
  assert vae.model == VAEConfig(width=32, latent_channels=2)
  assert (vae.latent_mean, vae.id, vae.steps) == ((0.5, -1.0), "v", 0)
  assert TextMeta.from_json(OLD_TEXT, "x").model.bias_per_layer
  dit = DiTMeta.from_json(OLD_DIT, "x")
  assert dit.model == DiTConfig(patch_size=(1, 4, 4))
  assert dit.text_encoder == TextEncoderConfig(300, 64, 1, 4)
  assert dit.noise == Noise("flow", "x0") and dit.init_from == dit.id == ""
  frozen = {"features": "", "pad_to": 512}
  dit = DiTMeta.from_json({**OLD_DIT, "text": frozen, "of old": 1}, "x")
  assert dit.frozen_text == FrozenText("", 512, "")
  # Before there was a choice of it.
  del (values := dict(OLD_DIT))["noise"]
  assert DiTMeta.from_json(values, "x").noise == Noise("flow", "velocity")


def test_facts_are_those_that_old_files_say():
  """A model stays the same model, whatever version its file is of."""
  dit = DiTMeta.from_json(OLD_DIT, "x")
  assert dit.facts().keys() == OLD_DIT.keys()
  assert {**through_a_file(dit), "model": 0} == {
    **OLD_DIT, "version": VERSION, "network": "dit", "model": 0,
  }  # fmt: skip


@pytest.mark.parametrize(
  "kind, values, message",
  [
    (VAEMeta, OLD_DIT, "x: not a VAE"),
    (VAEMeta, {**OWN.to_json()}, r"x: not a VAE \(model.json: that of a dit\)"),
    (TextMeta, OLD_VAE, "x: not a text encoder"),
    (TextMeta, {"model": {}}, "x: not a text encoder"),
    (DiTMeta, OLD_TEXT, "x: not a DiT"),
    (DiTMeta, {}, "x: not a DiT"),
    (DiTMeta, VAE.to_json(), r"x: not a DiT \(model.json: that of a vae\)"),
  ],
)
def test_another_network(kind, values, message):
  with pytest.raises(ValueError, match=message):
    kind.from_json(values, "x")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"version": 2}, r"x/model.json: meta.version is 2, .* reads 1 at most"),
    ({"version": "1"}, r"meta.version is '1'"),
    ({"new": 1}, r"x/model.json: meta.new is unknown"),
    ({"tokens": None}, r"x/model.json: meta.tokens is None, not of type int"),
    ({"tokens": True}, r"meta.tokens is True, not of type int"),
    ({"reference_fps": "16"}, r"meta.reference_fps is '16', not of type float"),
    ({"conditional": 1}, r"meta.conditional is 1, not of type bool"),
    ({"vae": 3}, r"meta.vae is 3, not of type str"),
    ({"model": []}, r"x/model.json: meta.model is \[\], not a JSON object"),
    ({"model": {"witdh": 8}}, r"x/model.json: meta.model.witdh is unknown"),
    ({"model": {"patch_size": 2}}, r"meta.model.patch_size is 2, not of type tuple"),
    ({"model": {"width": 7}}, r"x/model.json: meta.model: .*7"),
    ({"text": {"features": "t"}}, r"x/model.json: meta.text.pad_to is missing"),
    ({"text": {"features": 1, "pad_to": 2}}, r"meta.text.features is 1"),
    ({"noise": {"proces": ""}}, r"meta.noise.proces is unknown"),
  ],
)
def test_wrong_values_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    DiTMeta.from_json({**through_a_file(FROZEN), **changes}, "x")


@pytest.mark.parametrize("version", [0, VERSION])
def test_missing_keys_are_named(version):
  values = through_a_file(OWN) if version else dict(OLD_DIT)
  del values["reference_fps"]
  with pytest.raises(ValueError, match=r"x/model.json: meta.reference_fps is missing"):
    DiTMeta.from_json(values, "x")


def test_statistics_are_of_each_channel():
  values = {**OLD_VAE, "latent_std": [1.0]}
  message = "x/model.json: meta: latent_std has 1 values for 2 latent channels"
  with pytest.raises(ValueError, match=message):
    VAEMeta.from_json(values, "x")
