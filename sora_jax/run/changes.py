"""What a config that was changed means for a stage that is on disk already.

Each field says what a change of it does, see `runtime.fields`. A stage that holds
nothing precious (samples, numbers) is simply run again when anything that it was made
from has changed. One that took hours is gone on with, left as it is, or the change is
refused with all that can be done instead; nothing is ever deleted or mixed.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

from sora_jax.run import recipe as recipes
from sora_jax.runtime import fields, hosts, train_checkpoints

# Keys of a DiT that its weights fit to; see `init_from.check`.
_OF_THE_WEIGHTS = (
  "config.dit.model", "config.dit.text", "config.dit.reference_fps",
  "config.dit.loss.process", "config.dit.loss.target",
)  # fmt: skip


class Change(NamedTuple):
  """A key of the config, its value when the stage was made, and its value now."""

  key: str
  before: Any
  after: Any


def effective(name: str, config: dict, recipe: recipes.Recipe) -> dict:
  """The part of a stage's config, as stage.json has it, that changes what it makes."""
  config = without_free(recipe, config)
  if name == "vae" and config["vae"].get("folder"):
    # Nothing is trained: how has no effect.
    config["vae"] = {k: v for k, v in config["vae"].items() if k in ("folder", "model")}
  if name == "evaluate":
    # It samples the captions of held-out clips.
    config["sample"] = {k: v for k, v in config["sample"].items() if k != "prompts"}
  return config


def without_free(section, values: dict) -> dict:
  """Nested values of a section (a dataclass) without those of its free fields."""
  free = {
    field.name
    for field in dataclasses.fields(section)
    if fields.change_of(field) == fields.FREE
  }
  kept = {}
  for key, value in values.items():
    inner = getattr(section, key, None)
    if key in free:
      continue
    if isinstance(value, dict) and dataclasses.is_dataclass(inner):
      value = without_free(inner, value)
    kept[key] = value
  return kept


def of(name: str, old: dict, new: dict, recipe: recipes.Recipe) -> list[Change]:
  """The keys in which a stage's config differs; free ones do not count."""
  before_all, after_all = (effective(name, c, recipe) for c in (old, new))
  changes = []
  for key, before, after in hosts.differences(before_all, after_all):
    default = _default(recipe, key)
    changes.append(
      Change(key, *(default if value is None else value for value in (before, after)))
    )
  return changes


def are_extensions(changes: list[Change], recipe: recipes.Recipe) -> bool:
  """Whether the changes only make more of what is there."""
  found = (_field(recipe, change.key) for change in changes)
  return all(field and fields.change_of(field) == fields.EXTENDS for field in found)


def refuse(
  name: str, changes: list[Change], complete: bool, workdir: pathlib.Path
) -> ValueError:
  """The error for changes that the stage cannot take over: what a user can do now."""
  key, before, after = changes[0]
  folder = workdir / name
  more = f" (and {len(changes) - 1} more keys)" if len(changes) > 1 else ""
  message = (
    f"{key} is {after!r}, but stage {name} in {folder} was made with {before!r}{more}. "
    f"Put it back, choose another --workdir, or delete {folder} to make the stage again"
  )
  if name in ("vae", "captioner", "dit", "expander"):
    message += f"; to train what is there longer, raise config.{name}.train.steps alone"
  if name == "dit" and complete:
    if any(change.key.startswith(_OF_THE_WEIGHTS) for change in changes):
      message += "; config.dit.init_from cannot help: these weights do not fit"
    else:
      message += (
        "; to begin a new run with these weights, add --workdir=NEW "
        f"--config.vae.folder={workdir} --config.dit.init_from={workdir}"
      )
  return ValueError(message)


def check_data(change: Change, made_from_it: list[str], workdir: pathlib.Path) -> None:
  """Raises ValueError if clips cannot be chosen anew: stages were made of the old ones.

  Nothing is measured again for it, so without such stages that is a matter of seconds.
  """
  if made_from_it:
    others = " and ".join(str(workdir / other) for other in made_from_it)
    raise ValueError(
      f"{change.key} is {change.after!r}, but {others} was made of clips that were "
      f"chosen with {change.before!r}. Put it back, choose another --workdir, or "
      f"delete {others} to make them again"
    )


def check_steps(
  name: str,
  change: Change,
  complete: bool,
  made_from_it: list[str],
  workdir: pathlib.Path,
) -> None:
  """Raises ValueError if a stage cannot be trained to other steps.

  complete: whether the stage is. An unfinished one takes any steps that it has not yet
    trained beyond.
  made_from_it: stages on disk that a longer training would make stale, and which are
    not run again by themselves.
  """
  key, before, after = change
  trained = train_checkpoints.steps_in(workdir / name / "checkpoints")
  most = max([*trained, before if complete else 0])
  if after < most:
    raise ValueError(
      f"{key} is {after}, but stage {name} in {workdir / name} has trained {most} "
      "steps already. Put it back, raise it, or choose another --workdir"
    )
  if not complete:
    return
  if made_from_it:
    others = " and ".join(str(workdir / other) for other in made_from_it)
    raise ValueError(
      f"{key} is {after}, but stage {name} in {workdir / name} was made with {before}, "
      f"and {others} of it: training it longer would make them worthless. Put it back, "
      f"choose another --workdir, or delete {others} to make them again"
    )
  if not trained:
    begin = {"vae": "config.vae.folder", "dit": "config.dit.init_from"}.get(name)
    other = f"another run with its model ({begin})" if begin else "another run"
    raise ValueError(
      f"{key} is {after}, but {workdir / name} has no checkpoint to go on from: "
      f"put {before} back, or begin {other}"
    )


def _field(recipe, key) -> dataclasses.Field | None:
  """The field of a key such as config.vae.model.width; None if there is none now."""
  *path, last = key.split(".")[1:]
  section = functools.reduce(lambda part, name: getattr(part, name, None), path, recipe)
  known = dataclasses.fields(section) if dataclasses.is_dataclass(section) else ()
  return next((field for field in known if field.name == last), None)


def _default(recipe, key):
  """Default of a key, as JSON has it."""
  field = _field(recipe, key)
  if field is None or field.default is dataclasses.MISSING:
    return None
  return json.loads(json.dumps(field.default))
