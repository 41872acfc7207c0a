"""Says whether a recipe fits a slice of TPUs, and how fast it is, before paying for it.

  python -m sora_jax.plan --config=configs/pod.py:14b --topology=v5p:4x4x4 \
    [--slices=N] [--stages=dit,vae,sample] [--price=4.2] [--manifest=...] [--search]

Compiles the real programs for the topology on this host, through libtpu (pip install
'sora_jax[plan]'); needs no TPU and no checkpoint. For GPUs (h100:64, h200:8, b200:64)
there is only an estimate by analysis. Writes a JSON and a picture to --out.
"""

import os
import pathlib
import sys

import jax
from absl import app, flags, logging

from sora_jax.planning import cost_model, hardware, picture, report, search, workload
from sora_jax.planning.programs import STAGES, plan
from sora_jax.run import cli
from sora_jax.run import recipe as recipes
from sora_jax.runtime import files


def _define_flags():
  flags.DEFINE_string(
    "topology",
    None,
    "Chips: v5p:4x4x4, v6e:16x16, tpu7x:2x2x4, h100:64, ...",
    required=True,
  )
  flags.DEFINE_integer("slices", 1, "Slices of that topology.")
  flags.DEFINE_list("stages", ["dit"], f"What to compile: {','.join(STAGES)}.")
  flags.DEFINE_string(
    "manifest", None, "manifest.jsonl or latents.jsonl; by default that of --workdir."
  )
  flags.DEFINE_integer(
    "clip_tokens", 0, "Without a manifest: tokens of a clip; 0 = the longest there is."
  )
  flags.DEFINE_integer("steps", 0, "Steps to price; 0 = config.dit.train.steps.")
  flags.DEFINE_float("price", 0.0, "Of one chip for an hour.")
  flags.DEFINE_string("out", None, "Folder to write to; <workdir>/plan by default.")
  flags.DEFINE_bool("search", False, "Try meshes, remat and row lengths.")
  flags.DEFINE_integer("trials", 24, "Most trials of a search.")
  flags.DEFINE_float("trial_minutes", 20.0, "Longest trial of a search.")


def _main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  cli.start_logging()
  args = flags.FLAGS
  # The host's own devices only trace; a TPU that is here stays free.
  jax.config.update("jax_platforms", "cpu")
  if unknown := set(args.stages) - set(STAGES):
    raise ValueError(f"--stages: {sorted(unknown)} are none of {STAGES}")
  topology = hardware.parse(args.topology, args.slices)
  recipe = recipes.read(flags.FLAGS.config)
  folder = pathlib.Path(args.out or os.path.join(cli.workdir(), "plan"))
  if args.search:
    own = ("search", "nosearch", "trials", "trial_minutes", "out")
    arguments = [a for a in sys.argv[1:] if a.lstrip("-").split("=")[0] not in own]
    ranked = search.search(
      recipe, topology, folder, arguments, args.trials, args.trial_minutes
    )
    for line in report.ranking(ranked):
      logging.info("%s", line)
    return
  load = workload.of_recipe(recipe, cli.workdir(), args.manifest, args.clip_tokens)
  planned = plan(recipe, topology, load, args.stages)
  if planned.get("speed"):
    steps = args.steps or recipe.dit.train.steps
    seconds = planned["speed"]["step_seconds"]
    planned["run"] = cost_model.cost(steps, seconds, topology.chips, args.price)
  for line in report.lines_of(planned):
    logging.info("%s", line)
  name = search.file_name(topology)
  files.write_json(folder / f"{name}.json", planned)
  picture.draw(planned).savefig(folder / f"{name}.png")
  logging.info("%s.json and .png are in %s", name, folder)


if __name__ == "__main__":
  cli.define_flags()
  flags.mark_flag_as_required("config")
  _define_flags()
  cli.run_app(_main)
