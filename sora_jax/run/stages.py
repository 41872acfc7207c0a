"""Stages of a run: what is done, what changed, and one command for each.

A stage writes into workdir/<stage>/ and leaves stage.json there: its part of the
config, the fingerprints of the stages that it was made from, and whether it is
complete. So a finished stage is skipped, an unfinished one goes on, and what a changed
config means for it is decided by `changes`: never is there a silent mixture.
"""

import dataclasses
import hashlib
import importlib
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
from absl import logging

from sora_jax.data.clips import recaption_summary
from sora_jax.encoders import model_folders
from sora_jax.models.meta import TextMeta
from sora_jax.run import changes, init_from, latent_shards, stage_file
from sora_jax.run import recipe as recipes
from sora_jax.run.build import check_captioner, check_dit, check_rows
from sora_jax.runtime import checkpoint, fields, sharding, text
from sora_jax.weights import lpips


class Stage(NamedTuple):
  """A part of the chain.

  Attributes:
    module: of sora_jax, with run(recipe, workdir).
    sections: of the config that it is made from. inputs: stages that it reads.
    cheap: made in minutes and nothing is lost with it, so that it is run again by
      itself when what it was made from has changed.
  """

  module: str
  sections: tuple[str, ...]
  inputs: tuple[str, ...]
  cheap: bool = False


STAGES = {
  "data": Stage("prepare", ("data",), ()),
  "vae": Stage("train_vae", ("vae",), ("data",)),
  "encode": Stage("encode", ("encode", "text"), ("data", "vae")),
  "captioner": Stage("train_captioner", ("captioner",), ("data",)),
  "dit": Stage("train_dit", ("dit",), ("encode",)),
  "expander": Stage("train_expander", ("expander",), ("data",)),
  "sample": Stage("sample", ("sample",), ("vae", "dit"), cheap=True),
  "evaluate": Stage(
    "evaluate", ("evaluate", "sample"), ("data", "vae", "dit"), cheap=True
  ),
}


# What a stage was made from beside other stages.
_RECAPTION = "data/recaption.json"


def run(names, recipe: recipes.Recipe, workdir) -> None:
  """Runs stages in order, skipping complete ones that the config still fits.

  Raises:
    ValueError: if a stage on disk was made with another config that it cannot go on
      with, or from a stage that is missing or was made anew since; says which key and
      what to do.
  """
  if "://" in str(workdir):
    raise ValueError(f"--workdir={workdir} must be a path of a (shared) file system")
  workdir = pathlib.Path(workdir)
  if "captioner" in names:
    recipes.check_captioner(recipe)
    check_captioner(recipe.captioner, _mesh(recipe))
  if {"vae", "dit"} & set(names):
    _check_mesh(recipe)
  if {"vae", "encode", "dit"} & set(names):
    _check_text(recipe)
    _check_place(recipe, workdir)
    stays = recipe.dit.init_from and _vae_stays(names, recipe, workdir)
    init_from.check(recipe, workdir if stays else None)
  if "vae" in names and recipe.vae.loss.lpips_weight and not recipe.vae.folder:
    lpips.check(recipe.vae.loss.lpips_file)
  for name in _in_order(names):
    stage, reason = _look_at(name, recipe, workdir)
    if reason is None:
      logging.info("stage %s: complete already, in %s", name, workdir / name)
      continue
    _store(name, {**stage, "complete": False}, workdir)
    logging.info("stage %s: %s, in %s", name, reason, workdir / name)
    begin = time.monotonic()
    module = importlib.import_module(f"sora_jax.{STAGES[name].module}")
    with recipe.matmuls():
      if name != "data" or jax.process_index() == 0:
        module.run(recipe, workdir)
    sharding.sync(f"stage {name} ran")
    if made := identity(name, workdir):
      stage["made"] = made
    _store(name, {**stage, "complete": True}, workdir)
    sharding.sync(f"stage {name}")
    seconds = text.format_seconds(time.monotonic() - begin)
    logging.info("stage %s: complete after %s", name, seconds)


def left_to_do(names, recipe: recipes.Recipe, workdir) -> str | None:
  """Why `run` would run the first stage that it would; None if all are complete.

  It changes nothing on disk.

  Raises:
    ValueError: as `run`, for a complete stage that the config does not fit.
  """
  workdir = pathlib.Path(workdir)
  for name in _in_order(names):
    if not is_complete(name, workdir):
      return f"stage {name} is not complete"
    _, reason = _look_at(name, recipe, workdir)
    if reason is not None:
      return f"stage {name}: {reason}"
  return None


def is_complete(name: str, workdir) -> bool:
  """Whether a stage is complete, for the config that it was made with."""
  return bool(_load(name, pathlib.Path(workdir)).get("complete"))


def _vae_stays(names, recipe, workdir) -> bool:
  """Whether the VAE of a run is complete, and `run` leaves it as it is."""
  if not is_complete("vae", workdir):
    return False
  # Whether it fits clips that are yet to be made, is seen when they are.
  if "vae" not in names or not is_complete("data", workdir):
    return True
  return left_to_do(["vae"], recipe, workdir) is None


def _in_order(names) -> list[str]:
  return [name for name in recipes.STAGES if name in names]


def _check_mesh(recipe):
  """Raises ValueError for batches that do not divide by the devices.

  That is better known now than after hours.
  """
  mesh = _mesh(recipe)
  if not recipe.vae.folder:
    check_rows("config.vae.batch_size", recipe.vae.batch_size, recipe.vae.train, mesh)
  check_dit(recipe.dit, mesh)


def _mesh(recipe):
  return sharding.make_mesh(**dataclasses.asdict(recipe.mesh))


def _check_place(recipe, workdir):
  """Raises ValueError for a run in the folder of the model that it begins with."""
  begin = recipe.dit.init_from
  if begin and pathlib.Path(begin).resolve() == workdir.resolve():
    raise ValueError(
      f"config.dit.init_from={begin} is the folder of the run itself, whose dit/model "
      "would be replaced: choose another --workdir"
    )


def _check_text(recipe):
  """Raises ValueError unless the text encoder is there, as wide as the config says."""
  if recipe.text.folder:
    folder = model_folders.of_text(recipe.text.folder)
    width = TextMeta.from_json(checkpoint.load_meta(folder), folder).model.width
    if width != recipe.text.width:
      raise ValueError(
        f"config.text.width is {recipe.text.width}, but the features of {folder} have "
        f"{width}"
      )


def identity(name: str, workdir: pathlib.Path) -> str | None:
  """Identifies what a stage has made, where its config alone does not; else None.

  Raises:
    ValueError: if there is no complete model where one is to be.
    OSError: if there is no manifest of clips.
  """
  if name == "data":
    # The config says which folder, the manifest what was in it.
    manifest = (workdir / "data" / "manifest.jsonl").read_bytes()
    return hashlib.sha256(manifest).hexdigest()[:16]
  if name in ("vae", "captioner", "dit", "expander"):
    # The config does not say which weights: free keys change their last bits, too.
    return checkpoint.load_meta(workdir / name / "model").get("id")
  return None


def _ancestors(name) -> set[str]:
  """Stages that a stage was made from, and those that these were made from."""
  inputs = STAGES[name].inputs
  return {*inputs}.union(*map(_ancestors, inputs))


def _check_made(name, workdir) -> None:
  """Raises ValueError if a complete stage's model was replaced since."""
  made = _load(name, workdir).get("made")
  if name not in ("vae", "dit") or made is None:
    return
  if (there := identity(name, workdir)) != made:
    raise ValueError(
      f"{workdir / name / 'model'} is not the one that the stage {name} made ({there} "
      f"in place of {made}): put that back, or delete {workdir / name} to make it again"
    )


def _recaptioned(workdir) -> str | None:
  """Identifies the captions that `recaption` has written; None if there are none."""
  path = recaption_summary(workdir / "data" / "manifest.jsonl")
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text())["captions"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is damaged ({error!r}); run recaption again") from error


def fingerprint(name: str, workdir) -> str:
  """Identifies what a stage was made from; '' if there is no such stage."""
  stage = _load(name, pathlib.Path(workdir))
  if not stage:
    return ""
  parts = [stage["config"], stage["inputs"], stage.get("made")]
  text = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _look_at(name, recipe, workdir) -> tuple[dict, str | None]:
  """(what stage.json is to say of a stage, why it is run, if it is); see `run`."""
  stage = _describe(name, recipe, workdir)
  reason = _reason_to_run(name, stage, workdir, recipe)
  if reason is not None and (workdir / name).is_symlink():
    raise ValueError(
      f"stage {name} would run ({reason}), but {workdir / name} is a link to another "
      "run's, which stays as it is: remove the link to make an own one"
    )
  return stage, reason


def _describe(name, recipe, workdir):
  sections, inputs = STAGES[name].sections, _inputs(name, recipe)
  config = {"seed": recipe.seed}
  config |= {section: _chosen(getattr(recipe, section)) for section in sections}
  # Through JSON, so that it compares equal to what is read back.
  config = changes.effective(name, json.loads(json.dumps(config)), recipe)
  for other in inputs:
    if not is_complete(other, workdir):
      raise ValueError(
        f"stage {name} needs stage {other}, which is not complete in {workdir}; run it "
        f"first (config.stages, or python -m sora_jax.{STAGES[other].module})"
      )
  for other in _ancestors(name):
    _check_made(other, workdir)
  made_from = {i: fingerprint(i, workdir) for i in inputs}
  if name in ("encode", "expander") and (digest := _recaptioned(workdir)):
    # These read captions; the VAE, which is made from the clips, too, sees none.
    made_from[_RECAPTION] = digest
  for other, folder in _models(name, recipe).items():
    made_from[other] = checkpoint.digest(checkpoint.load_meta(folder))
  return {"config": config, "inputs": made_from}


def _inputs(name, recipe) -> tuple[str, ...]:
  """Stages that a stage reads, with those that the config asks for."""
  latents = name == "captioner" and recipe.captioner.input == "latents"
  return (*STAGES[name].inputs, *(("encode",) if latents else ()))


def _models(name, recipe) -> dict:
  """Models of other runs that a stage begins with: key of the config -> folder."""
  if name == "vae" and (folder := recipe.vae.folder):
    return {"config.vae.folder": pathlib.Path(folder) / "vae" / "model"}
  if name == "dit" and recipe.dit.init_from:
    return {"config.dit.init_from": init_from.base_folder(recipe.dit)}
  return {}


def _chosen(section) -> dict:
  """Keys that change the result and are not at their default.

  So a key that a later version adds, with a default, leaves old runs as they are.
  """
  chosen = {}
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if fields.change_of(field) == fields.FREE:
      continue
    if dataclasses.is_dataclass(value):
      chosen[field.name] = _chosen(value)
    elif value != field.default:
      chosen[field.name] = value
  return chosen


def _reason_to_run(name, stage, workdir, recipe) -> str | None:
  """Why a stage is run; None if it is complete and what it was made from is the same.

  Raises:
    ValueError: if what is on disk can neither stay nor be gone on with.
  """
  old = _load(name, workdir)
  if not old:
    return "begins"
  complete, cheap = bool(old["complete"]), STAGES[name].cheap
  reason = None if complete else "goes on"
  changed = changes.of(name, old["config"], stage["config"], recipe)
  if changed:
    key, before, after = changed[0]
    reason = f"{key} is {after!r} and was {before!r}: "
    if cheap:
      reason += "runs again"
    elif changes.are_extensions(changed, recipe):
      users = _made_from(name, workdir)
      if name == "data":
        changes.check_data(changed[0], users, workdir)
      else:
        changes.check_steps(name, changed[0], complete, users, workdir)
      reason += "goes on"
    else:
      raise changes.refuse(name, changed, complete, workdir)
  for other in sorted({*stage["inputs"], *old["inputs"]}):
    if old["inputs"].get(other) == stage["inputs"].get(other):
      continue
    place = _models(name, recipe).get(other, workdir / other)
    if not cheap:
      raise ValueError(
        f"stage {name} in {workdir / name} was made from another {other} than the one "
        f"in {place} now; delete {workdir / name} to make it again"
      )
    reason = f"{place} is not what it was made from: runs again"
  if reason is None and name == "encode":
    if faults := latent_shards.lost(workdir / name):
      shard, fault = next(iter(faults.items()))
      reason = f"{workdir / name / shard} {fault}: it is made again"
  return reason


def _made_from(name, workdir) -> list[str]:
  """Stages on disk that were made from a stage and are not run again by themselves."""
  users = [
    other
    for other, stage in STAGES.items()
    if not stage.cheap and name in _load(other, workdir).get("inputs", ())
  ]
  return users + [last for user in users for last in _made_from(user, workdir)]


def _load(name, workdir) -> dict[str, Any]:
  return stage_file.load(workdir / name)


def _store(name, stage, workdir):
  if jax.process_index() == 0:
    stage_file.store(workdir / name, stage)
