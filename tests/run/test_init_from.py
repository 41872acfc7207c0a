"""A DiT that a run begins with needs the VAE whose latents it was trained on."""

import json
import re

import pytest
from run import fake_stages
from run.fake_stages import ALL, BASE, change, weights

from sora_jax.models.meta import DiTMeta, Noise, VAEMeta
from sora_jax.run import stages

OWN = "this run would train a VAE of its own"


def vae_meta(weights_id):
  C = BASE.vae.model.latent_channels
  return VAEMeta(BASE.vae.model, (0.0,) * C, (1.0,) * C, id=weights_id)


def dit_meta(vae_id):
  dit = BASE.dit
  return DiTMeta(
    model=dit.model,
    text=dit.text,
    max_text_tokens=dit.max_text_tokens,
    tokens=dit.tokens,
    text_tokens=dit.text_tokens,
    segments=dit.segments,
    reference_fps=dit.reference_fps,
    conditional=True,
    vae=vae_id,
    noise=Noise(dit.loss.process, dit.loss.target),
  )


META = {"vae": vae_meta, "dit": dit_meta}


def write_models(folder, ids):
  """Descriptions of models: network -> id of the VAE."""
  for network, vae_id in ids.items():
    path = folder / network / "model"
    path.mkdir(parents=True, exist_ok=True)
    model = {"params": "params-0", "meta": META[network](vae_id).to_json()}
    (path / "model.json").write_text(json.dumps(model))
  return str(folder)


@pytest.fixture
def noted(runs, monkeypatch):  # noqa: F811
  """Stages that only note their names, in this list; their VAEs say what they are."""
  write = fake_stages.write_model

  def write_model(folder, weights_id):
    write(folder, weights_id)
    if folder.name == "vae":
      write_models(folder.parent, {"vae": weights_id})

  monkeypatch.setattr(fake_stages, "write_model", write_model)
  return runs


@pytest.mark.parametrize("names", [ALL, ["data", "vae"], ["encode"]])
@pytest.mark.parametrize(
  "ids, folder, message",
  [
    ({"vae": "a", "dit": "a"}, "", f"of the VAE 'a', but {OWN}: .*vae.folder=BASE$"),
    ({"vae": "b", "dit": "a"}, "", f"{OWN}: .* that VAE is; BASE does not have it"),
    ({"dit": "a"}, "", f"{OWN}: set .* to where that VAE is; BASE does not have it"),
    ({"dit": ""}, "", f"not imported with it, but {OWN}: import it to BASE, too, and"),
    ({"vae": "b", "dit": "a"}, "BASE", "that of BASE is 'b': set .* where that VAE is"),
    ({"dit": "a"}, "BASE", "config.vae.folder: BASE/vae/model: no complete model here"),
  ],
)
def test_without_its_vae(noted, tmp_path, names, ids, folder, message):
  base = write_models(tmp_path / "base", ids)
  recipe = change(BASE, "dit.init_from", base)
  recipe = change(recipe, "vae.folder", folder.replace("BASE", base))
  with pytest.raises(ValueError) as error:
    stages.run(names, recipe, tmp_path / "run")
  assert re.search(message, str(error.value).replace(base, "BASE"))
  assert not noted and not (tmp_path / "run").exists()


def test_a_damaged_vae_is_said_to_be_damaged(noted, tmp_path):
  base = write_models(tmp_path / "base", {"vae": "a", "dit": "a"})
  (tmp_path / "base" / "vae" / "model" / "model.json").write_text("{}")
  recipe = change(BASE, "dit.init_from", base)
  with pytest.raises(ValueError, match=r"base/vae/model"):
    stages.run(ALL, recipe, tmp_path / "run")
  assert not noted


def test_with_its_vae(noted, tmp_path):
  base = write_models(tmp_path / "base", {"vae": "a", "dit": "a"})
  recipe = change(change(BASE, "dit.init_from", base), "vae.folder", base)
  stages.run(ALL, recipe, tmp_path / "run")
  assert noted == ALL


def test_the_run_has_its_vae(noted, tmp_path, monkeypatch):
  base, workdir = write_models(tmp_path / "base", {"dit": "vae-0"}), tmp_path / "run"
  recipe = change(BASE, "dit.init_from", base)
  with pytest.raises(ValueError, match=OWN):
    stages.run(ALL, recipe, workdir)
  stages.run(["data", "vae"], BASE, workdir)
  # A VAE that would be trained longer does not stay the one that it is.
  with pytest.raises(ValueError, match=OWN):
    stages.run(ALL, change(recipe, "vae.train.steps", 20), workdir)
  for _ in range(2):
    stages.run(ALL, recipe, workdir)
  assert noted == ALL
  monkeypatch.setitem(weights, "vae", "vae-1")
  stages.run(["data", "vae"], BASE, tmp_path / "other")
  message = "but that of .*/other is 'vae-1': .*, with another --workdir"
  with pytest.raises(ValueError, match=message):
    stages.run(ALL, recipe, tmp_path / "other")
  assert noted == [*ALL, "data", "vae"]
