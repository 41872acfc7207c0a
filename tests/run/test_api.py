"""The public API: lazy, without flags, and the same as the commands."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import tiny

import sora_jax
from sora_jax.run import recipe as recipes
from sora_jax.run import stages

# Flags that a process has after it has imported modules, and filters of absl's logger.
_IMPORT = """
import importlib, json, sys
from absl import flags, logging
before = set(flags.FLAGS)
filters = list(logging.get_absl_logger().filters)
# What libraries define is theirs.
import absl.app, grain, ml_collections.config_flags, tensorflow_datasets
before |= set(flags.FLAGS)
for name in sys.argv[1:]:
  module, _, attribute = name.partition(":")
  module = importlib.import_module(module)
  if attribute:
    getattr(module, attribute)
added = len(logging.get_absl_logger().filters) - len(filters)
print(json.dumps([sorted(set(flags.FLAGS) - before), added]))
"""


def import_in_a_process(*names):
  made = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", _IMPORT, *names],
    capture_output=True,
    cwd=tiny.ROOT,
    env=os.environ | {"XLA_FLAGS": ""},
    text=True,
  )
  assert not made.returncode, made.stderr
  return json.loads(made.stdout)


@pytest.mark.slow
def test_imports_define_no_flags_and_filter_no_log():
  package = tiny.ROOT / "sora_jax"
  modules = [
    ".".join(path.relative_to(tiny.ROOT).with_suffix("").parts)
    for path in sorted(package.rglob("*.py"))
    if path.name != "__init__.py"
    and (path.name != "beam_pipeline.py" or importlib.util.find_spec("apache_beam"))
  ]
  names = [f"sora_jax:{name}" for name in sora_jax.__all__]
  assert import_in_a_process(*names, *modules) == [[], 0]


def test_the_names_are_lazy_and_there():
  code = "import sora_jax, sys; sys.exit(any('jax' == m for m in sys.modules))"
  assert subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT).returncode == 0
  for name in sora_jax.__all__:
    assert getattr(sora_jax, name).__name__ == name and name in dir(sora_jax)
  with pytest.raises(AttributeError, match="no attribute 'sampler'"):
    _ = sora_jax.sampler


def test_load_config():
  assert sora_jax.load_config(tiny.__file__) == recipes.read(tiny.get_config())
  path = tiny.ROOT / "configs" / "quickstart.py"
  overrides = {"dit.train.steps": 5, "sample.prompts": ()}
  recipe = sora_jax.load_config(f"{path}:short", overrides)
  assert recipe.dit.train.steps == 5 and recipe.sample.prompts == ()
  assert recipe.dit.model.depth == 2  # of the variant
  assert sora_jax.load_config(path).dit.model.depth == 4


@pytest.mark.parametrize(
  "name, overrides, message",
  [
    ("nowhere.py", {}, "nowhere.py: no such config file"),
    (__file__, {}, "has no function get_config"),
    (tiny.__file__, {"dit.nope": 1}, "nope"),
    (tiny.__file__, {"dit.rows": "four"}, "dit.rows|int"),
    (tiny.__file__, {"dit.tokens": 50}, r"config\.dit\.tokens 50"),
  ],
)
def test_wrong_configs(name, overrides, message):
  with pytest.raises(ValueError, match=message):
    sora_jax.load_config(name, overrides)


def test_run_stages(monkeypatch, tmp_path):
  calls = []
  monkeypatch.setattr(stages, "run", lambda *args: calls.append(args))
  recipe = recipes.read(tiny.get_config())
  recipe = dataclasses.replace(recipe, stages=("data", "vae"))
  sora_jax.run_stages(recipe, tmp_path)
  sora_jax.run_stages(recipe, tmp_path, ["data"])
  assert calls == [(("data", "vae"), recipe, tmp_path), (["data"], recipe, tmp_path)]
  with pytest.raises(ValueError, match=r"\['dat'\] are none of"):
    sora_jax.run_stages(recipe, tmp_path, ["dat"])
