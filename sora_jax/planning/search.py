"""Search for the fastest way to lay a recipe out over a topology, by planning each."""

import json
import pathlib
import subprocess
import sys

from absl import logging

from sora_jax.models import dit
from sora_jax.planning import hardware, report
from sora_jax.run import recipe as recipes
from sora_jax.runtime import files, sharding

# Remat policies: those that keep most and repeat least come first.
_KEEPING = (
  "none",
  "matmuls_saved",
  "attention_mlp_saved",
  "attention_saved",
  "full",
  "offload",
)
# They are tried from the middle on: to keep more may not fit, to keep less is slower.
_TRIED = (*_KEEPING[2:], *_KEEPING[1::-1])


def candidates(recipe: recipes.Recipe, topology: hardware.Topology) -> list[dict]:
  """Returns overrides of a config to try: meshes x remat x row length, likely first.

  A step keeps its tokens: rows of twice the length are half as many. Only what divides.
  """
  stage, longest = recipe.dit, recipes.longest_clip(recipe)
  found = []
  for scale in (1, 0.5, 2):
    tokens, rows = int(stage.tokens * scale), int(stage.rows / scale)
    if tokens < longest or rows * tokens != stage.rows * stage.tokens:
      continue
    for context in (1, 2, 4, 8, 16):
      for tensor in (1, 2, 4):
        batch_shards, rest = divmod(topology.devices, context * tensor)
        divides = (
          not rest
          and batch_shards % topology.slices == 0
          and rows % (batch_shards * stage.train.grad_accumulation) == 0
          and tokens % (128 * context) == 0
          and stage.model.heads % tensor == 0
        )
        for remat in dit.REMAT_POLICIES if divides else ():
          mesh = (topology.slices, batch_shards // topology.slices, context, tensor)
          found.append(
            {f"mesh.{axis}": n for axis, n in zip(sharding.AXES, mesh, strict=True)}
            | {"dit.model.remat": remat, "dit.rows": rows, "dit.tokens": tokens}
          )
  # Less model parallelism is less communication.
  return sorted(
    found,
    key=lambda c: (
      c["mesh.tensor"],
      abs(c["dit.tokens"] - stage.tokens),
      c["mesh.context"],
      _TRIED.index(c["dit.model.remat"]),
    ),
  )


def needless(overrides: dict, trials: list[dict]) -> bool:
  """Returns whether trials of other remat policies make this one needless.

  What keeps more than one that does not fit does not fit either; what keeps less than
  one that fits is slower.
  """
  key = "dit.model.remat"
  keeps = _KEEPING.index(overrides[key])
  for trial in trials:
    other = trial["overrides"]
    if "result" in trial and {**other, key: overrides[key]} == overrides:
      fits = report.trial_fits(trial)
      distance = keeps - _KEEPING.index(other[key])
      if (fits and distance > 0) or (not fits and distance < 0):
        return True
  return False


def search(
  recipe,
  topology,
  folder: pathlib.Path,
  arguments: list[str],
  trials: int = 24,
  minutes: float = 20.0,
) -> list[dict]:
  """Plans candidates, each in a process of its own; resumes; the best first.

  arguments: of the command, without those of the search. trials: most of them, of at
  most so many minutes. Those that are `needless` are left out.
  """
  path, done = folder / "search.json", []
  if path.exists():
    done = json.loads(path.read_text())
  tried = {json.dumps([t["topology"], t["overrides"]]): t for t in done}
  wanted = candidates(recipe, topology)
  if not wanted:
    raise ValueError(
      f"no mesh of {topology.devices} devices divides config.dit.rows "
      f"{recipe.dit.rows} of {recipe.dit.tokens} tokens"
    )
  where = f"{topology.slices}x{topology.name}"
  chosen: list = []
  for number, overrides in enumerate(wanted):
    if len(chosen) == trials:
      break
    if needless(overrides, chosen):
      continue
    if before := tried.get(json.dumps([where, overrides])):
      chosen.append(before)
      continue
    logging.info(
      "trial %d of at most %d: %s",
      len(chosen) + 1,
      min(trials, len(wanted)),
      report.line(overrides),
    )
    trial = folder / "trials" / f"{number:03d}"
    changed = [f"--config.{key}={value}" for key, value in overrides.items()]
    command = [sys.executable, "-m", "sora_jax.plan", *arguments, *changed]
    row = {"topology": where, "overrides": overrides}
    try:
      ran = subprocess.run(
        [*command, f"--out={trial}"],
        capture_output=True,
        text=True,
        timeout=60 * minutes,
      )
    except subprocess.TimeoutExpired:
      row["error"] = f"longer than {minutes} minutes"
    else:
      if ran.returncode:
        row["error"] = report.error_line(ran.stderr)
      else:
        result = trial / f"{file_name(topology)}.json"
        row["result"] = json.loads(result.read_text())
    done.append(row)
    chosen.append(row)
    files.write_json(path, done)
    logging.info("  %s", report.trial_line(row))
  return sorted(chosen, key=report.trial_rank)


def file_name(topology: hardware.Topology) -> str:
  """Returns the name of a plan's files, without ending."""
  return f"{topology.name.replace(':', '-')}-{topology.slices}"
