"""Stages of a run: what is done, what changed, and one command for each.

A stage writes into workdir/<stage>/ and leaves stage.json there: its part of the
config, the fingerprints of the stages that it was made from, and whether it is
complete. So a finished stage is skipped, an unfinished one goes on, and a config that
no longer fits what is on disk is an error instead of a silent mixture.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import pathlib
import time

import jax
from absl import logging

from sora_jax.models.meta import TextMeta
from sora_jax.run import init_from
from sora_jax.run import recipe as recipes
from sora_jax.run.build import check_dit, check_rows
from sora_jax.runtime import checkpoint, files, hosts, sharding, text
from sora_jax.weights import lpips

# Stage -> (module with run(recipe, workdir), sections of the config, stages it reads).
STAGES = {
  "data": ("prepare", ("data",), ()),
  "vae": ("train_vae", ("vae",), ("data",)),
  "encode": ("encode", ("encode", "text"), ("data", "vae")),
  "dit": ("train_dit", ("dit",), ("encode",)),
  "sample": ("sample", ("sample",), ("vae", "dit")),
  "evaluate": ("evaluate", ("evaluate", "sample"), ("data", "vae", "dit")),
}
# Keys that change how a stage runs but not what it makes.
_FREE = {"log_every", "eval_every", "save_every", "keep", "workers", "eval_batches"}
_FREE |= {"devices_per_clip"}


def run(names, recipe: recipes.Recipe, workdir) -> None:
  """Runs stages in order, skipping complete ones.

  Raises:
    ValueError: if a stage on disk was made with another config, or from a stage that
      is missing or was made anew since; says which key and what to do.
  """
  if {"vae", "dit"} & set(names):
    _check_mesh(recipe)
  if {"vae", "encode", "dit"} & set(names):
    _check_text(recipe)
    init_from.check(recipe)
  if "vae" in names and recipe.vae.loss.lpips_weight and not recipe.vae.folder:
    lpips.check(recipe.vae.loss.lpips_file)
  if "://" in str(workdir):
    raise ValueError(f"--workdir={workdir} must be a path of a (shared) file system")
  workdir = pathlib.Path(workdir)
  for name in recipes.STAGES:
    if name not in names:
      continue
    stage = _describe(name, recipe, workdir)
    _check(name, stage, workdir, recipe)
    if _load(name, workdir).get("complete"):
      logging.info("stage %s: complete already, in %s", name, workdir / name)
      continue
    _store(name, {**stage, "complete": False}, workdir)
    logging.info("stage %s: begins, in %s", name, workdir / name)
    begin = time.monotonic()
    module = importlib.import_module(f"sora_jax.{STAGES[name][0]}")
    if name != "data" or jax.process_index() == 0:
      module.run(recipe, workdir)
    sharding.sync(f"stage {name} ran")
    if name == "data":
      # The config says which folder, the manifest what was in it.
      manifest = (workdir / "data" / "manifest.jsonl").read_bytes()
      stage["made"] = hashlib.sha256(manifest).hexdigest()[:16]
    _store(name, {**stage, "complete": True}, workdir)
    sharding.sync(f"stage {name}")
    seconds = text.format_seconds(time.monotonic() - begin)
    logging.info("stage %s: complete after %s", name, seconds)


def _check_mesh(recipe):
  """Batches must divide by the devices; better known now than after hours."""
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
  if not recipe.vae.folder:
    check_rows("config.vae.batch_size", recipe.vae.batch_size, recipe.vae.train, mesh)
  check_dit(recipe.dit, mesh)


def _check_text(recipe):
  """Likewise: the text encoder must be there, and have the width of the config."""
  if recipe.text.folder:
    folder = pathlib.Path(recipe.text.folder) / "text" / "model"
    width = TextMeta.from_json(checkpoint.load_meta(folder), folder).model.width
    if width != recipe.text.width:
      raise ValueError(
        f"config.text.width is {recipe.text.width}, but the features of {folder} have "
        f"{width}"
      )


def fingerprint(name: str, workdir) -> str:
  """Identifies what a stage was made from; '' if there is no such stage."""
  stage = _load(name, pathlib.Path(workdir))
  if not stage:
    return ""
  parts = [stage["config"], stage["inputs"], stage.get("made")]
  text = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _describe(name, recipe, workdir):
  _, sections, inputs = STAGES[name]
  config = {"seed": recipe.seed}
  if recipe.precision != "auto":
    config["precision"] = recipe.precision
  for section in sections:
    config[section] = _chosen(getattr(recipe, section))
  if name == "vae" and recipe.vae.folder:
    # Nothing is trained: how has no effect.
    config["vae"] = {key: config["vae"][key] for key in ("folder", "model")}
  # Through JSON, so that it compares equal to what is read back.
  config = json.loads(json.dumps(config))
  for other in inputs:
    if not _load(other, workdir).get("complete"):
      raise ValueError(
        f"stage {name} needs stage {other}, which is not complete in {workdir}; run it "
        f"first (config.stages, or python -m sora_jax.{STAGES[other][0]})"
      )
  made_from = {i: fingerprint(i, workdir) for i in inputs}
  for other, folder in _models(name, recipe).items():
    made_from[other] = checkpoint.digest(checkpoint.load_meta(folder))
  return {"config": config, "inputs": made_from}


def _models(name, recipe) -> dict:
  """Models of other runs that a stage begins with: key of the config -> folder."""
  folders = {
    "vae": {"config.vae.folder": recipe.vae.folder},
    "dit": {"config.dit.init_from": recipe.dit.init_from},
  }
  return {
    key: pathlib.Path(folder) / name / "model"
    for key, folder in folders.get(name, {}).items()
    if folder
  }


def _chosen(section) -> dict:
  """Keys that change the result and are not at their default.

  So a key that a later version adds, with a default, leaves old runs as they are.
  """
  chosen = {}
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if dataclasses.is_dataclass(value):
      chosen[field.name] = _chosen(value)
    elif field.name not in _FREE and value != field.default:
      chosen[field.name] = value
  return chosen


def _check(name, stage, workdir, recipe):
  old = _load(name, workdir)
  if not old:
    return
  folder = workdir / name
  changed = list(hosts.differences(old["config"], stage["config"]))
  if changed:
    key, before, after = changed[0]
    default = _default(recipe, key)
    before, after = (default if x is None else x for x in (before, after))
    more = f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
    raise ValueError(
      f"{key} is {after!r}, but stage {name} in {folder} was made with "
      f"{before!r}{more}. Put it back, choose another --workdir, or delete "
      f"{folder} to make the stage again"
    )
  for other, value in stage["inputs"].items():
    if old["inputs"].get(other) != value:
      place = _models(name, recipe).get(other, workdir / other)
      raise ValueError(
        f"stage {name} in {folder} was made from another {other} than the one in "
        f"{place} now; delete {folder} to make it again"
      )


def _default(recipe, key):
  """Default of a key such as config.vae.model.width, as JSON has it."""
  *path, last = key.split(".")[1:]
  section = functools.reduce(getattr, path, recipe)
  for field in dataclasses.fields(section):
    if field.name == last and field.default is not dataclasses.MISSING:
      return json.loads(json.dumps(field.default))
  return None


def _load(name, workdir):
  path = workdir / name / "stage.json"
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}); delete {path.parent}") from error


def _store(name, stage, workdir):
  if jax.process_index():
    return
  files.write_json(workdir / name / "stage.json", stage, sort_keys=True)


# --- commands
