"""What new captions of a training set are worth: a table of one DiT with three of them.

  python launch/recaption_gain.py --config=configs/shapes.py:short --workdir=runs/gain \
    --config.vae.folder=sora_jax/shipped/shapes --config.dit.train.steps=1250 \
    --config.dit.train.decay_steps=400 --config.data.train_clips=80000 --clips=4800 \
    --config.data.heldout_clips=256 --config.evaluate.clips=256

Generated clips get poor captions: all but --good of them, one third none, one third one
in which an attribute is wrong or missing, one third two words. On the few good ones
--captioner is trained, and an expander. Then the same DiT, with one seed and as many
steps, learns --clips of the clips from the poor captions, from what `recaption` makes
of them, and from the true ones, and is asked for held-out clips by short, long and
expanded prompts. The table has the share of samples that show what the short prompt
says, with 95 % intervals, and how much of the way from the poor captions to the true
ones the new ones go. It is in results.json.

On a CPU it takes about an hour; launch/README.md has the table. Below --workdir are the
runs `pool`, `captioner`, `poor`, `new` and `true`; typed again, what is complete stays.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from sora_jax.data import shapes
from sora_jax.data.clips import Clip, read_manifest, recaption_summary, write_lines
from sora_jax.evaluation import attributes, heldout
from sora_jax.evaluation.shares import Share, percent
from sora_jax.language.expander import TrainedExpander
from sora_jax.language.expansion import expand
from sora_jax.run import cli
from sora_jax.run import recipe as recipes
from sora_jax.runtime import files
from sora_jax.runtime.text import table_lines
from sora_jax.sampling.pipeline import Sampler
from sora_jax.sampling.requests import sample_share, sampling_mesh, write_samples

ROOT = pathlib.Path(__file__).parents[1]
ARMS = ("poor", "new", "true")
PROMPTS = ("short", "long", "expanded")
_JUDGED = ("color", "shape", "motion")


def poor_captions(clip: Clip, others: list[Clip], rng: np.random.Generator) -> list:
  """Returns none, two words, or a caption with one attribute wrong or missing.

  Args:
    clip: of one object, with a short caption and its truth.
    others: clips whose motions a wrong caption may have.
    rng: of all that is drawn.

  Raises:
    ValueError: for a clip of several objects.
  """
  color, shape, motion = _words(clip)
  kind = rng.integers(3)
  if kind == 0:
    return []
  if kind == 1:
    return [f"{color} {shape}"]
  attribute = rng.choice(["color", "shape", "motion"] if motion else ["color", "shape"])
  wrong = rng.random() < 0.5
  if attribute == "color":
    color = _other(shapes.COLORS, color, rng) if wrong else ""
  elif attribute == "shape":
    shape = _other(shapes.SHAPES, shape, rng) if wrong else "object"
  else:
    motions = sorted({words for other in others if (words := _words(other)[2])})
    motion = _other(motions, motion, rng) if wrong else ""
  text = " ".join(filter(None, (color, shape, motion)))
  return [f"{'an' if text[0] in 'aeiou' else 'a'} {text}"]


def _words(clip) -> tuple[str, str, str]:
  """(colour, shape, words of the motion) of the short caption."""
  objects = (clip.truth or {}).get("objects", ())
  if len(objects) != 1 or clip.truth["occluder"]:
    raise ValueError(
      f"{clip.id} has {len(objects)} objects, or something hides it: captions are made "
      "poor in a world of one object, such as config.data.world=short"
    )
  color, shape = objects[0]["color"], objects[0]["shape"]
  return color, shape, clip.captions[0].partition(shape)[2].strip()


def _other(words, word, rng) -> str:
  return str(rng.choice([w for w in words if w != word]))


def write_sources(
  data: pathlib.Path, folder: pathlib.Path, share: float, most: int, seed: int
) -> None:
  """Writes folder/{good,poor,true}.jsonl, manifests of a run's clips.

  Held-out clips keep their captions in all three.

  Args:
    data: folder of the run's stage "data".
    folder: is made.
    share: of the training clips that keep their captions; all of these are in "good".
    most: training clips that the other two hold, the first ones.
    seed: of what is drawn.
  """
  clips = read_manifest(data / "manifest.jsonl")
  rng = np.random.default_rng([seed, 16])
  rows: dict[str, list[str]] = {"good": [], "poor": [], "true": []}
  train = 0
  for clip in clips:
    path = os.path.relpath(clip.path, folder)
    row = {"path": path, "split": clip.split, "truth": clip.truth}
    true = {**row, "captions": list(clip.captions)}
    good = clip.split == "heldout" or rng.random() < share
    learnt = clip.split == "heldout" or (train := train + 1) <= most
    if good:
      rows["good"].append(json.dumps(true))
    if learnt:
      poor = {} if good else {"captions": poor_captions(clip, clips[:200], rng)}
      rows["poor"].append(json.dumps({**true, **poor}))
      rows["true"].append(json.dumps(true))
  folder.mkdir(parents=True, exist_ok=True)
  for name, lines in rows.items():
    write_lines(folder / f"{name}.jsonl", lines)
  logging.info("%d of %d clips keep good captions", len(rows["good"]), len(clips))


class Commands:
  """Runs commands of the package, each to its end."""

  def __init__(self, config: str, overrides: dict):
    self._config, self._overrides = config, overrides

  def stages(self, names, workdir, config: str = "", **overrides) -> None:
    """Runs stages of a config, by default the one with the user's overrides."""
    keys = overrides if config else {**self._overrides, **overrides}
    keys["stages"] = tuple(names)
    keys = [f"--config.{key.replace('__', '.')}={v}" for key, v in keys.items()]
    config = config or self._config
    self.run("main", f"--config={config}", f"--workdir={workdir}", *keys)

  def run(self, module: str, *arguments: str) -> None:
    """Runs python -m sora_jax.MODULE; SystemExit if it fails."""
    command = [sys.executable, "-m", f"sora_jax.{module}", *arguments]
    logging.info("begins: %s", " ".join(command[2:]))
    ended = subprocess.run(command, check=False, stdin=subprocess.DEVNULL)
    if ended.returncode:
      sys.exit(f"{module} failed with code {ended.returncode}")


def train(commands: Commands, workdir: pathlib.Path, args) -> None:
  """Trains the captioner, the expander and the three DiTs."""
  pool, sources, captioner = (workdir / n for n in ("pool", "sources", "captioner"))
  commands.stages(["data"], pool, data__measure=False)
  if not (sources / "true.jsonl").exists():
    write_sources(pool / "data", sources, args.good, args.clips, args.config.seed)
  # The files lie in another run's folder, are whole, and hold one scene each.
  listed = {
    "data__allow_outside": True,
    "data__measure": False,
    "data__cut_threshold": 0.0,
    "data__max_pixels": args.config.data.max_pixels,
  }
  good = {**listed, "data__source": str(sources / "good.jsonl")}
  commands.stages(["data", "captioner", "expander"], captioner, args.captioner, **good)
  for arm in ARMS:
    name = "true.jsonl" if arm == "true" else "poor.jsonl"
    own = {**listed, "data__source": str(sources / name)}
    commands.stages(["data"], workdir / arm, **own)
    manifest = workdir / arm / "data" / "manifest.jsonl"
    if arm == "new" and not recaption_summary(manifest).exists():
      recaption = f"--workdir={workdir / arm}", f"--captioner={captioner}"
      commands.run("recaption", *recaption, "--batch_size=64")
    commands.stages(["vae", "encode", "dit"], workdir / arm, **own)


def measure(workdir: pathlib.Path, recipe: recipes.Recipe) -> dict:
  """Samples the held-out prompts of all arms: arm -> prompts -> attribute -> share."""
  clips = heldout.heldout_clips(recipe, workdir / "true")
  expander = TrainedExpander(workdir / "captioner")
  short = [clip.captions[0] for clip in clips]
  made = expand(expander, short).texts
  texts = {
    "short": short,
    "long": [clip.captions[-1] for clip in clips],
    "expanded": [made[text] for text in short],
  }
  results: dict = {}
  for arm in ARMS:
    mesh = sampling_mesh(recipe.sample, len(clips))
    model = Sampler.from_checkpoint(workdir / arm, mesh, recipe.dtype)
    results[arm] = {}
    for kind in PROMPTS:
      asked = [
        dataclasses.replace(clip, captions=(text,))
        for clip, text in zip(clips, texts[kind], strict=True)
      ]
      requests = attributes.requests_of_captions(asked, 1)
      videos = sample_share(model, requests, recipe.sample)
      paths = write_samples(workdir / arm / "gain" / kind, requests, videos)
      scores = attributes.scores_of_files(paths, [clip.truth for clip in clips])
      results[arm][kind] = attributes.shares_of(scores)
  return results


def way_gone(results: dict, kind: str) -> float | None:
  """How much of the way from poor to true captions the new ones go, of 1.

  Of the mean of colour, shape and motion; None if the true ones are no better.
  """
  poor, new, true = (
    np.mean([results[arm][kind][n].value for n in _JUDGED if n in results[arm][kind]])
    for arm in ARMS
  )
  return float((new - poor) / (true - poor)) if true > poor else None


def table(results: dict) -> list[str]:
  """Returns the lines of the table, and of the way that is gone."""
  rows = []
  for kind in PROMPTS:
    for arm in ARMS:
      shares = results[arm][kind]
      cells = [percent(shares[n]) if n in shares else "-" for n in _JUDGED]
      rows.append([arm, kind, *cells])
  lines = table_lines(["captions", "prompts", *_JUDGED], rows)
  for kind in PROMPTS:
    gone = way_gone(results, kind)
    shown = "true captions are no better" if gone is None else f"{gone:.0%} of the way"
    lines.append(f"{kind} prompts: {shown}")
  return lines


def main(argv):
  if len(argv) > 1:
    raise ValueError(f"unexpected arguments {argv[1:]}")
  cli.start_logging()
  args = flags.FLAGS
  recipe = recipes.read(args.config)
  if recipe.data.source != "shapes":
    raise ValueError(f"config.data.source {recipe.data.source!r} must be 'shapes'")
  if not 0 < args.good < 1:
    raise ValueError(f"--good={args.good:g} must be between 0 and 1")
  workdir = pathlib.Path(cli.workdir()).absolute()
  flag = args["config"]
  overrides = config_flags.get_override_values(flag)
  commands = Commands(config_flags.get_config_filename(flag), overrides)
  train(commands, workdir, args)
  with recipe.matmuls():
    results = measure(workdir, recipe)
  files.write_json(workdir / "results.json", _as_dicts(results))
  for line in table(results):
    logging.info("%s", line)
  logging.info("results are in %s", workdir / "results.json")


def _as_dicts(results):
  if isinstance(results, Share):
    return results._asdict()
  return {name: _as_dicts(value) for name, value in results.items()}


if __name__ == "__main__":
  os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
  )
  flags.DEFINE_float("good", 0.15, "Share of the clips that keep good captions.")
  flags.DEFINE_integer("clips", 4800, "Most training clips that the DiTs learn.", 1)
  small = str(ROOT / "configs" / "captioner.py:small")
  flags.DEFINE_string("captioner", small, "Config of the captioner.")
  cli.define_flags()
  flags.mark_flag_as_required("config")
  cli.run_app(main)
