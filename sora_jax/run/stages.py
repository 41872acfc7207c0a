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
import os
import pathlib
import sys
import time
from collections.abc import Callable

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import sora_jax
from sora_jax.run import init_from
from sora_jax.run import recipe as recipes
from sora_jax.runtime import checkpoint, hosts, sharding
from sora_jax.training import loop, metrics
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

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Recipe, such as configs/quickstart.py.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; runs/<name of the config> by default."
)
DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Run on several hosts: this command on each of them."
)
# Where jax finds out itself (TPU, GKE, Slurm), none of these is needed.
COORDINATOR = flags.DEFINE_string("coordinator", None, "Address:port of process 0.")
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.", 1)
PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.", 0)
PREEMPTED_CODE = flags.DEFINE_integer(
  "preempted_code", 0, "Exit code once a signal came and the state is saved."
)


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
    seconds = metrics.format_seconds(time.monotonic() - begin)
    logging.info("stage %s: complete after %s", name, seconds)


def _check_mesh(recipe):
  """Batches must divide by the devices; better known now than after hours."""
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
  if not recipe.vae.folder:
    check_rows("config.vae.batch_size", recipe.vae.batch_size, recipe.vae.train, mesh)
  check_dit(recipe.dit, mesh)


def clip_mesh(config: recipes.Encode, devices=None) -> jax.sharding.Mesh:
  """A host's devices, or others, as the VAE lies on them outside of its training.

  Raises:
    ValueError: if the devices do not divide by config.devices_per_clip.
  """
  devices = jax.local_devices() if devices is None else devices
  share = config.devices_per_clip
  if share < 1 or len(devices) % share:
    raise ValueError(
      f"config.encode.devices_per_clip {share} must divide the {len(devices)} devices "
      "of a host"
    )
  return sharding.make_mesh(context=share, devices=devices)


def check_dit(stage: recipes.DiTStage, mesh) -> None:
  """Raises ValueError if the stage's sizes do not divide by the mesh; names the key."""
  check_rows("config.dit.rows", stage.rows, stage.train, mesh)
  for axis, key, size in (
    ("context", "tokens", stage.tokens),
    ("context", "text_tokens", stage.text_tokens),
    ("tensor", "model.heads", stage.model.heads),
  ):
    if size % mesh.shape[axis]:
      raise ValueError(
        f"config.dit.{key} {size} must be a multiple of {mesh.shape[axis]}, the "
        f"devices along {axis}; set it, or config.mesh.{axis}"
      )


def check_rows(key: str, rows: int, config, mesh) -> None:
  """Raises ValueError if a batch of that many rows does not divide by the mesh.

  config: a loop.TrainConfig.
  """
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % (ways * config.grad_accumulation):
    raise ValueError(
      f"{key} {rows} must be a multiple of {ways} (devices along data and fsdp) x "
      f"{config.grad_accumulation} (grad_accumulation); set it, or config.mesh"
    )


def _check_text(recipe):
  """Likewise: the text encoder must be there, and have the width of the config."""
  if recipe.text.folder:
    folder = pathlib.Path(recipe.text.folder) / "text" / "model"
    width = checkpoint.load_meta(folder)["model"]["width"]
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
  path = workdir / name / "stage.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(stage, indent=2, sort_keys=True) + "\n")
  os.replace(temporary, path)


# --- commands


def start_logging() -> None:
  """Shows our own lines at level INFO, and only warnings of the libraries."""
  logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
  own = (os.path.dirname(sora_jax.__file__), os.path.abspath(sys.argv[0]))
  logging.get_absl_logger().addFilter(
    lambda record: (
      record.levelno >= 30 or os.path.abspath(record.pathname).startswith(own)
    )
  )


def command(*names: str) -> None:
  """Runs stages (those of config.stages if none is named) as a program with flags."""

  flags.mark_flag_as_required("config")
  run_app(lambda argv: run_stages(argv, *names))


def run_stages(argv: list[str], *names: str) -> None:
  """Runs the stages of the flags' config; what `command` does once they are parsed."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  start_logging()
  if DISTRIBUTED.value:
    hosts.start(COORDINATOR.value, PROCESSES.value, PROCESS.value)
  recipe = recipes.read(CONFIG.value)
  hosts.check_alike({**dataclasses.asdict(recipe), "workdir": workdir()})
  run(names or recipe.stages, recipe, workdir())


def workdir() -> str:
  """The flag, or runs/<name of the config file>[-<variant>]."""
  if WORKDIR.value:
    return WORKDIR.value
  file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(
    ":"
  )
  name = pathlib.Path(file).stem
  return os.path.join("runs", f"{name}-{variant}" if variant else name)


def run_app(main: Callable) -> None:
  """app.run, with a user's errors as one line and not as a stack trace."""

  def guarded(argv):
    try:
      return main(argv)
    except loop.Preempted:
      sys.exit(PREEMPTED_CODE.value)
    except ValueError as error:
      if logging.level_debug():
        raise
      logging.error("%s (--verbosity=1 shows where)", error)
      sys.exit(1)

  with hosts.leave_on_error():
    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv):
  """Parses flags; wrong keys and files of a config are one line, too."""
  try:
    rest = app.parse_flags_with_usage(argv)
    getattr(CONFIG.value, "keys", None)  # raises if the file could not be loaded
    return rest
  # config_flags lets these through; the first two hold no more than the wrong key.
  except (AttributeError, KeyError) as error:
    while isinstance(error.args[0], Exception):
      error = error.args[0]
    reason = "; ".join(str(error.args[0]).splitlines())
    names = [arg.lstrip("-").split("=")[0] for arg in argv]
    key = reason.split("'")[1] if "'" in reason else ""
    name = next((name for name in names if key in name.split(".")), "config")
    sys.exit(f"FATAL Flags parsing error: --{name}: the config has no key {reason}")
  except OSError as error:
    sys.exit(f"FATAL Flags parsing error: {' '.join(str(error).split())}")
