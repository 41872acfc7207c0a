"""Stages replaced by ones that only note their name, and what these write."""

import dataclasses
import json
import sys
import types

import pytest

from sora_jax.run import latent_shards, stages
from sora_jax.run import recipe as recipes

BASE = recipes.read(
  {
    "data": {},
    "vae": {"train": {"steps": 10}},
    "dit": {"train": {"steps": 10}, "rows": 8},  # the tests have 8 devices
  }
)


def change(recipe, path, value):
  """The recipe with one key, "dit.train.steps", set."""
  key, _, rest = path.partition(".")
  if rest:
    value = change(getattr(recipe, key), rest, value)
  return dataclasses.replace(recipe, **{key: value})


@pytest.fixture
def runs(monkeypatch):
  """Stages replaced by ones that only note their name, in this list."""
  names = []

  def fake(name):
    def run(recipe, workdir):
      state = json.loads((workdir / name / "stage.json").read_text())
      assert state["complete"] is False
      if name in runs_that_fail:
        raise RuntimeError(f"{name} failed")
      names.append(name)
      if name == "data":
        (workdir / "data" / "manifest.jsonl").write_text(manifest["text"])
      if name == "encode":
        latent_shards.write(workdir / "encode", [])
        (workdir / "encode" / "latents.jsonl").touch()
      if name in weights:
        write_model(workdir / name, weights[name])

    return types.SimpleNamespace(run=run)

  for name, (module, *_) in stages.STAGES.items():
    monkeypatch.setitem(sys.modules, f"sora_jax.{module}", fake(name))
  runs_that_fail.clear()
  return names


def write_model(folder, weights_id):
  """A finished model's description, and a checkpoint that it could go on from."""
  (folder / "model").mkdir(parents=True, exist_ok=True)
  (folder / "checkpoints" / "8").mkdir(parents=True, exist_ok=True)
  model = {"params": "params-0", "meta": {"id": weights_id}}
  (folder / "model" / "model.json").write_text(json.dumps(model))


weights = {"vae": "vae-0", "dit": "dit-0", "expander": "expander-0"}
runs_that_fail = set()
manifest = {"text": "one clip"}
ALL = list(recipes.DEFAULT_STAGES)
