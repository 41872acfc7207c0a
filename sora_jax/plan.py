"""Says whether a recipe fits a slice of TPUs, and how fast it is, before paying for it.

  python -m sora_jax.plan --config=configs/pod.py:14b --topology=v5p:4x4x4 \
    [--slices=N] [--stages=dit,vae,sample] [--price=4.2] [--manifest=...] [--search]

Compiles the real programs for the topology on this host, through libtpu (pip install
'sora_jax[plan]'); needs no TPU and no checkpoint. For GPUs (h100:64, h200:8, b200:64)
there is only an estimate by analysis. Writes a JSON and a picture to --out.
"""

import dataclasses
import os
import pathlib
import sys

import jax
import numpy as np
from absl import app, flags, logging

from sora_jax.models import dit
from sora_jax.planning import (
  cost_model,
  hardware,
  hlo,
  lowering,
  report,
  search,
  workload,
)
from sora_jax.run import build, cli
from sora_jax.run import recipe as recipes
from sora_jax.runtime import files, sharding
from sora_jax.training import loop

STAGES = ("dit", "vae", "sample")
TRAIN_STEP = "train step"


def plan(
  recipe: recipes.Recipe,
  topology: hardware.Topology,
  load: cost_model.Load,
  names=("dit",),
) -> dict:
  """All that is known of the recipe's programs on a topology, for JSON.

  load: what its rows hold. names: of STAGES.

  Raises:
    ValueError: without libtpu, for a shape that no slice has, and for a mesh that the
      chips, or the rows of a batch, do not divide by.
  """
  recipe = lowering.on_accelerator(recipe)
  if not topology.chip.axes and not lowering.compiles_for_gpus():
    return gpu_plan(recipe, topology, load)
  made = _header(recipe, topology, load)
  devices, options = lowering.devices(topology), lowering.compiler_options(topology)
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh), devices=devices)
  made["mesh"] = dict(mesh.shape)
  if "dit" in names:
    lowered = lowering.dit_step(recipe, mesh)
    program = lowering.compile_program(TRAIN_STEP, lowered, options)
    step = measure(program, recipe, topology, mesh, load)
    if program.text is None:  # the compiler only says how much all is
      step["arguments"] = state_size(recipe, mesh)[0] * topology.chip.devices
      step["temporaries"] = step["peak"] - step["arguments"]
    made["programs"] = [step]
    made["speed"] = speed(step, recipe, topology, load)
  host = topology.one_host()  # as these stages do: each host by itself

  def add(name, lower, local):
    program = lowering.compile_program(name, lower(recipe, local), options)
    made["programs"].append(measure(program, recipe, host, local, load))

  if "vae" in names:
    local = build.clip_mesh(recipe.encode, lowering.devices(host))
    add("vae", lowering.vae_encode, local)
  if "sample" in names:
    local = sharding.sampling_mesh(recipe.sample.rows, lowering.devices(host))
    add("sample", lowering.sampling, local)
  made["advice"] = report.advice(made, recipe)
  return made


def _header(recipe, topology, load):
  stage = recipe.dit
  return {
    "topology": topology.name,
    "slices": topology.slices,
    "chips": topology.chips,
    "remat": stage.model.remat,
    "rows": stage.rows,
    "tokens": stage.tokens,
    "load": load._asdict(),
    "chip": dataclasses.asdict(topology.chip),
    "assumptions": cost_model.assumptions(topology.chip),
    # init, update and evaluate; packing leaves one shape.
    "executables": len(loop.Built._fields) - 1,
    "model_flops": model_flops(recipe, load),
    "programs": [],
  }


def model_flops(recipe: recipes.Recipe, load: cost_model.Load) -> float:
  """FLOPs of one step that the model needs: of real tokens, and nothing twice."""
  forward = dit.num_flops(recipe.dit.model, load.tokens, load.text_tokens, load.pairs)
  return 3.0 * recipe.dit.rows * forward


def executed_flops(recipe: recipes.Recipe) -> float:
  """Matmul FLOPs of one step outside of attention, by analysis: of all tokens.

  With remat, the blocks' forward pass runs twice, but for what is kept of matmuls.
  """
  stage = recipe.dit
  model = stage.model
  sizes = stage.tokens, stage.text_tokens, 0
  ends = dit.num_flops(dataclasses.replace(model, depth=0), *sizes)
  blocks = dit.num_flops(model, *sizes) - ends
  again = 0.0 if model.remat in ("none", "matmuls_saved") else blocks
  if model.remat == "attention_mlp_saved":
    again -= 2.0 * stage.tokens * model.depth * model.width * model.mlp_width
  return stage.rows * (3.0 * (ends + blocks) + again)


def measure(program: lowering.Program, recipe, topology, mesh, load) -> dict:
  """Memory, work and time of a compiled program: numbers of one chip."""
  chip, count = topology.chip, topology.chip.devices
  made = {
    "name": program.name,
    "compile_seconds": program.compile_seconds,
    "fits": program.text is not None and program.peak * count <= chip.hbm,
    "arguments": program.arguments * count,
    "temporaries": program.temporaries * count,
    "peak": program.peak * count,
    "hbm": program.limit * count or chip.hbm,
  }
  if program.text is None:
    return made
  stage = recipe.dit
  kernel_flops = cost_model.kernel_flops(load, stage.text_tokens)
  analysis = hlo.analyze(program.text, mesh.devices.size, kernel_flops)
  units = None
  if program.name == TRAIN_STEP and chip.axes:
    units = cost_model.attention_units(program.text, mesh.devices.size, stage)
  made |= {
    "matmul_flops": analysis.matmul_flops * count,
    "attention_flops": sum(k.flops for k in analysis.kernels.values()) * count,
    "attention_units": units,
    "kernels": {name: kernel.launches for name, kernel in analysis.kernels.items()},
    "collectives": {
      kind: {
        "runs": traffic.runs,
        "wire": traffic.wire * count,
        "hidden": traffic.hidden * count,
        "groups": sorted(traffic.groups),
      }
      for kind, traffic in analysis.collectives.items()
    },
  }
  if chip.axes:
    seconds = cost_model.seconds(analysis, lowering.places(mesh, topology), topology)
    made["seconds"] = seconds._asdict() | {"total": seconds.total}
  return made


def gpu_speed(recipe, topology, load) -> dict:
  """What a train step makes at published utilisation."""
  flops = model_flops(recipe, load)
  fast, slow = cost_model.gpu_seconds(flops, topology.chips, topology.chip)
  return _rates(slow, recipe, topology, load) | {"fastest_seconds": fast}


def speed(step: dict, recipe, topology, load) -> dict:
  """What a train step of so many seconds makes; empty where it does not fit."""
  if not topology.chip.axes:
    return gpu_speed(recipe, topology, load)
  if "seconds" not in step:
    return {}
  seconds, chips = step["seconds"]["total"], topology.chips
  analytic = executed_flops(recipe) / chips
  return _rates(seconds, recipe, topology, load) | {
    "analytic_matmul_flops": analytic,
    "matmul_over_analytic": step["matmul_flops"] / analytic,
  }


def _rates(seconds, recipe, topology, load):
  rows, chips = recipe.dit.rows, topology.chips
  return {
    "step_seconds": seconds,
    "mfu": model_flops(recipe, load) / (seconds * chips * topology.chip.flops),
    "tokens_per_day": rows * load.tokens / seconds * 86400,
    "clips_per_day": rows * load.clips / seconds * 86400,
  }


def gpu_plan(recipe: recipes.Recipe, topology: hardware.Topology, load) -> dict:
  """An estimate for GPUs, by analysis alone: nothing is compiled."""
  sizes = sharding.axis_sizes(topology.chips, **dataclasses.asdict(recipe.mesh))
  mesh = jax.sharding.AbstractMesh(tuple(sizes), sharding.AXES)
  build.check_rows("config.dit.rows", recipe.dit.rows, recipe.dit.train, mesh)
  chip, stage = topology.chip, recipe.dit
  arguments, params = state_size(recipe, mesh)
  tokens = stage.rows * stage.tokens / stage.train.grad_accumulation / topology.chips
  peak = cost_model.gpu_bytes(arguments, params, stage.model, tokens, stage.model.remat)
  made = _header(recipe, topology, load)
  made["mesh"] = dict(mesh.shape)
  made["programs"] = [
    {
      "name": f"{TRAIN_STEP}, ESTIMATE by analysis",
      "fits": peak <= chip.hbm,
      "arguments": arguments,
      "temporaries": peak - arguments,
      "peak": peak,
      "hbm": chip.hbm,
    }
  ]
  made["speed"] = gpu_speed(recipe, topology, load)
  made["advice"] = report.advice(made, recipe)
  return made


def state_size(recipe: recipes.Recipe, mesh) -> tuple[int, int]:
  """(bytes of the train state, number of params) on one device of a mesh."""
  state = lowering.dit_state(recipe, mesh).abstract

  def shards(tree):
    return [
      (int(np.prod(leaf.sharding.shard_shape(leaf.shape))), leaf.dtype.itemsize)
      for leaf in jax.tree.leaves(tree)
    ]

  size = sum(count * width for count, width in shards(state))
  return size, sum(count for count, _ in shards(state.params))


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
  made = plan(recipe, topology, load, args.stages)
  if made.get("speed"):
    steps = args.steps or recipe.dit.train.steps
    seconds = made["speed"]["step_seconds"]
    made["run"] = cost_model.cost(steps, seconds, topology.chips, args.price)
  for line in report.table(made):
    logging.info("%s", line)
  name = search.file_name(topology)
  files.write_json(folder / f"{name}.json", made)
  report.picture(made).save(folder / f"{name}.png")
  logging.info("%s.json and .png are in %s", name, folder)


if __name__ == "__main__":
  cli.define_flags()
  flags.mark_flag_as_required("config")
  _define_flags()
  cli.run_app(_main)
