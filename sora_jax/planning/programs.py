"""Plans a recipe: compiles its programs for a topology, and says what they need.

`plan` is all that the command does but for reading a manifest and writing the result.
What a program does is counted by hlo.py, how long that takes by cost_model.py.
"""

import dataclasses

import jax
import numpy as np

from sora_jax.models import dit
from sora_jax.planning import cost_model, hardware, hlo, lowering
from sora_jax.planning.advice import advice
from sora_jax.run import build
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding
from sora_jax.training import loop

STAGES = ("dit", "vae", "sample")
TRAIN_STEP = "train step"


def plan(
  recipe: recipes.Recipe,
  topology: hardware.Topology,
  load: cost_model.Load,
  names=("dit",),
) -> dict:
  """Finds out all about a recipe's programs on a topology; the result goes to JSON.

  Args:
    recipe: that is planned.
    topology: that its programs are compiled for.
    load: what its rows hold.
    names: of STAGES.

  Raises:
    ValueError: without libtpu, for a shape that no slice has, and for a mesh that the
      chips, or the rows of a batch, do not divide by.
  """
  recipe = lowering.on_accelerator(recipe)
  if not topology.chip.axes and not lowering.compiles_for_gpus():
    return gpu_plan(recipe, topology, load)
  planned = _header(recipe, topology, load)
  devices, options = lowering.devices(topology), lowering.compiler_options(topology)
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh), devices=devices)
  planned["mesh"] = dict(mesh.shape)
  if "dit" in names:
    lowered = lowering.dit_step(recipe, mesh)
    program = lowering.compile_program(TRAIN_STEP, lowered, options)
    step = measure(program, recipe, topology, mesh, load)
    if program.text is None:  # the compiler only says how much all is
      step["arguments"] = state_size(recipe, mesh)[0] * topology.chip.devices
      step["temporaries"] = step["peak"] - step["arguments"]
    planned["programs"] = [step]
    planned["speed"] = speed(step, recipe, topology, load)
  host = topology.one_host()  # as these stages do: each host by itself

  def add(name, lower, local):
    program = lowering.compile_program(name, lower(recipe, local), options)
    planned["programs"].append(measure(program, recipe, host, local, load))

  if "vae" in names:
    local = build.clip_mesh(recipe.encode, lowering.devices(host))
    add("vae", lowering.vae_encode, local)
  if "sample" in names:
    local = sharding.sampling_mesh(recipe.sample.rows, lowering.devices(host))
    add("sample", lowering.sampling, local)
  planned["advice"] = advice(planned, recipe)
  return planned


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
  """Returns the FLOPs that one step needs: those of real tokens, and nothing twice.

  Those of adapters are few, and are not counted.
  """
  forward = dit.num_flops(recipe.dit.model, load.tokens, load.text_tokens, load.pairs)
  return build.passes(recipe.dit) * recipe.dit.rows * forward


def executed_flops(recipe: recipes.Recipe) -> float:
  """Returns the matmul FLOPs of one step outside of attention, with padding.

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
  return stage.rows * (build.passes(stage) * (ends + blocks) + again)


def measure(program: lowering.Program, recipe, topology, mesh, load) -> dict:
  """Returns memory, work and time of a compiled program: numbers of one chip."""
  chip, count = topology.chip, topology.chip.devices
  measured = {
    "name": program.name,
    "compile_seconds": program.compile_seconds,
    "fits": program.text is not None and program.peak * count <= chip.hbm,
    "arguments": program.arguments * count,
    "temporaries": program.temporaries * count,
    "peak": program.peak * count,
    "hbm": program.limit * count or chip.hbm,
  }
  if program.text is None:
    return measured
  stage = recipe.dit
  kernel_flops = cost_model.kernel_flops(load, stage.text_tokens)
  analysis = hlo.analyze(program.text, mesh.devices.size, kernel_flops)
  units = None
  if program.name == TRAIN_STEP and chip.axes:
    units = cost_model.attention_units(program.text, mesh.devices.size, stage)
  measured |= {
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
    measured["seconds"] = seconds._asdict() | {"total": seconds.total}
  return measured


def gpu_speed(recipe, topology, load) -> dict:
  """Returns the rates of a train step at published utilisation."""
  flops = model_flops(recipe, load)
  fast, slow = cost_model.gpu_seconds(flops, topology.chips, topology.chip)
  return _rates(slow, recipe, topology, load) | {"fastest_seconds": fast}


def speed(step: dict, recipe, topology, load) -> dict:
  """Returns the rates of a measured train step; nothing where it does not fit."""
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
  planned = _header(recipe, topology, load)
  planned["mesh"] = dict(mesh.shape)
  planned["programs"] = [
    {
      "name": f"{TRAIN_STEP}, ESTIMATE by analysis",
      "fits": peak <= chip.hbm,
      "arguments": arguments,
      "temporaries": peak - arguments,
      "peak": peak,
      "hbm": chip.hbm,
    }
  ]
  planned["speed"] = gpu_speed(recipe, topology, load)
  planned["advice"] = advice(planned, recipe)
  return planned


def state_size(recipe: recipes.Recipe, mesh) -> tuple[int, int]:
  """Returns (bytes of the train state, trained params) on one device of a mesh.

  The frozen model of a run of adapters counts to the bytes.
  """
  built, frozen = lowering.dit_state(recipe, mesh)
  state = built.abstract

  def shards(tree):
    return [
      (int(np.prod(leaf.sharding.shard_shape(leaf.shape))), leaf.dtype.itemsize)
      for leaf in jax.tree.leaves(tree)
    ]

  size = sum(count * width for count, width in shards((state, frozen)))
  return size, sum(count for count, _ in shards(state.params))
