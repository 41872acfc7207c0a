"""The programs that a recipe runs, compiled for TPUs or GPUs without having any.

libtpu, and JAX's plugin for CUDA, compile on a CPU host for any topology. Nothing is
initialised: all arguments are shapes with shardings, as the stages themselves place
them.
"""

import dataclasses
import glob
import importlib.util
import math
import os
import re
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.data import buckets
from sora_jax.encoders import autoencoder
from sora_jax.planning import gpu_target
from sora_jax.planning.hardware import Topology
from sora_jax.run import build, init_from
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding
from sora_jax.sampling import integrate, sample_batch
from sora_jax.tasks import dit as dit_task
from sora_jax.tasks import vae as vae_task
from sora_jax.training import loop

# Without these libtpu looks for the TPU that it believes to be on.
_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
_TOO_LARGE = re.compile(
  r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"
)
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def devices(topology: Topology) -> list:
  """Returns devices of a topology to compile for; they cannot run anything.

  Raises:
    ValueError: without libtpu, and for a shape that no slice has.
  """
  if not topology.chip.axes:
    return _gpus(topology)
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      f"compiling for {topology.chip.name} needs libtpu: pip install 'sora_jax[plan]'"
    )
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    described = topologies.get_topology_desc(
      platform="tpu",
      topology_name=topology.name,
      # By default there are no rings, which makes another program.
      wrap=topology.wrap,
      num_slices=topology.slices,
      chips_per_host_bounds=(2, 2, 1) if min(topology.shape[:2]) > 1 else (1, 1, 1),
    )
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"--topology={topology.name}: {error}") from error
  return list(described.devices)


def compiles_for_gpus() -> bool:
  """Returns whether JAX's plugin for CUDA is installed."""
  return importlib.util.find_spec("jax_cuda13_plugin") is not None


def _gpus(topology: Topology) -> list:
  """Returns the GPUs of a topology, up to 8 of them a host."""
  each = math.gcd(topology.chips, 8)
  described = topologies.get_topology_desc(
    platform="cuda",
    target_config=gpu_target.describe(topology.chip),
    topology=f"1x{topology.chips // each}x{each}",
  )
  return list(described.devices)


def compiler_options(topology: Topology) -> dict:
  """Returns what the compiler needs to be told.

  No GPU is there to be asked which of its kernels is quickest, so nothing is tuned.
  """
  if topology.chip.axes:
    return {}
  options: dict[str, int | str] = {"xla_gpu_autotune_level": 0}
  toolkit = importlib.util.find_spec("nvidia.cu13")
  if toolkit and toolkit.submodule_search_locations:
    (options["xla_gpu_cuda_data_dir"],) = toolkit.submodule_search_locations
  return options


def places(mesh, topology: Topology) -> np.ndarray:
  """Returns (slice, x, y, z, core) of each partition of a program: int [D, 5]."""
  rows = []
  for index, device in enumerate(mesh.devices.flat):
    if hasattr(device, "coords"):
      slice_index = getattr(device, "slice_index", 0)
      rows.append([slice_index, *device.coords, device.core_on_chip])
    else:  # simulated devices, in the order of the topology
      sizes = (topology.slices, *topology.shape, topology.chip.devices)
      where = np.unravel_index(index, sizes)
      rows.append([*where[:-1], *[0] * (5 - len(where)), where[-1]])
  return np.array(rows)


class Program(NamedTuple):
  """A compiled program: bytes of a device, and its text, None where it does not fit.

  arguments count what is donated once; peak is all that is there at one time. limit:
  what the compiler says there is, 0 where it does not.
  """

  name: str
  compile_seconds: float
  arguments: float
  temporaries: float
  peak: float
  limit: float
  text: str | None


def compile_program(name: str, lowered, options=None) -> Program:
  """Compiles a program; that the memory does not suffice is a result, not an error.

  Args:
    name: of the program, for reports.
    lowered: what `jit(...).lower` returned.
    options: of the compiler.
  """
  begin = time.monotonic()
  # The text of a compiled object cannot be read where parts run on SparseCores.
  with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, **(options or {})}
    try:
      compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      short = _TOO_LARGE.search(str(error))
      if not short:
        raise
      used, limit = (float(short[i]) * _UNITS[short[i + 1]] for i in (1, 3))
      seconds = time.monotonic() - begin
      return Program(name, seconds, 0.0, 0.0, used, limit, None)
    seconds = time.monotonic() - begin
    # A TPU's estimates of cycles come with its code.
    names = glob.glob(f"{glob.escape(folder)}/*.jit_*after_codegen.txt")
    names = names or glob.glob(f"{glob.escape(folder)}/*.jit_*after_optimizations.txt")
    with open(max(names, key=os.path.getsize)) as file:
      text = file.read()
  memory = compiled.memory_analysis()
  return Program(
    name,
    seconds,
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
    # What is compiled for a CPU has no peak; a TPU's counts what is offloaded as well.
    memory.peak_memory_in_bytes - memory.host_temp_size_in_bytes
    or memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes,
    0.0,
    text,
  )


def _placed(shapes, shardings):
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    shapes,
    shardings,
  )


def _batch(row, rows, mesh):
  """Returns the shapes of a batch of such rows, where the train loop puts them."""
  shapes = {
    name: jax.ShapeDtypeStruct((rows, *value.shape), value.dtype)
    for name, value in row.items()
    if not name.startswith("clip")
  }
  return _placed(shapes, sharding.batch_shardings(shapes, mesh))


def dit_batch(recipe: recipes.Recipe, mesh) -> dict:
  """Returns the shapes of the batches of the stage "dit"."""
  return _batch(build.empty_row(recipe), recipe.dit.rows, mesh)


def dit_state(recipe: recipes.Recipe, mesh) -> tuple[loop.Built, Any]:
  """Returns the stage's functions with the shapes and shardings of its state, and of
  what is frozen: the model that adapters are trained beside, None without them.
  """
  task, rules = build.make_task(recipe)
  if recipe.dit.lora.rank:
    base = init_from.frozen_shapes(recipe, task, rules, mesh)
    task, rules = init_from.adapt(recipe.dit.lora, task, rules, base)
  built = loop.build(task, recipe.dit.train, mesh, rules, recipe.seed)
  return built, task.frozen


def dit_step(recipe: recipes.Recipe, mesh):
  """Lowers the train step of the stage "dit".

  Raises:
    ValueError: if its sizes do not divide by the mesh.
  """
  build.check_dit(recipe.dit, mesh)
  built, frozen = dit_state(recipe, mesh)
  batch = dit_batch(recipe, mesh)
  with jax.set_mesh(mesh):
    return built.update.lower(built.abstract, batch, frozen)


def vae_encode(recipe: recipes.Recipe, mesh):
  """Lowers the encoding of `config.encode.batch_size` of the longest, largest clips.

  The stage runs on each host by itself.
  """
  data, config = recipe.data, recipe.vae.model
  edge = data.size_multiple
  height = max(edge, int((data.max_pixels * 9 / 16) ** 0.5) // edge * edge)
  width = max(edge, data.max_pixels // height // edge * edge)
  size = sharding.whole_batch(recipe.encode.batch_size, mesh)
  frames = buckets.frame_bucket(data.max_frames, recipe.encode.frame_buckets)
  shape = (frames, height, width, 3)
  video = _batch({"x": jax.ShapeDtypeStruct(shape, jnp.uint8)}, size, mesh)["x"]
  task = vae_task.make(config, recipe.vae.loss)
  shapes = jax.eval_shape(task.init, jax.random.key(0))["vae"]
  everywhere = NamedSharding(mesh, PartitionSpec())
  params = _placed(shapes, jax.tree.map(lambda _: everywhere, shapes))
  ones = np.ones(config.latent_channels, np.float32)
  program, _ = autoencoder.programs(config, ones, ones, mesh, recipe.dtype)
  with jax.set_mesh(mesh):
    return program.lower(params, video)


def sampling(recipe: recipes.Recipe, mesh):
  """Lowers the program that samples `config.sample.rows` rows of latents.

  All steps of the solver are inside. It runs on each host by itself.
  """
  stage, options = recipe.dit, recipe.sample
  frozen = bool(recipe.text.folder)
  text = None if frozen else stage.text
  task, rules = build.make_task(recipe)
  shapes = jax.eval_shape(
    lambda key: dit_task.stored(task.init(key), options.weights), jax.random.key(0)
  )
  params = _placed(shapes, sharding.param_shardings(shapes, rules, mesh))
  rows = sharding.whole_batch(options.rows, mesh)
  text_width = recipe.text.width if frozen else None
  size = build.row_size(stage, text_width)
  batch = sample_batch.empty_batch(1, size).row(0)
  batch = sample_batch.SampleBatch(*(_batch(part, rows, mesh) for part in batch))
  shape = (rows, stage.segments)
  slots = sample_batch.SolverSlots(
    np.full(shape, stage.tokens // stage.segments), np.ones(shape)
  )
  table = integrate.solver_table(slots, options, stage.loss.process)
  networks = integrate.Networks(
    stage.model, text, recipe.dtype, stage.loss.process, stage.loss.target
  )
  with jax.set_mesh(mesh):
    return integrate.program(networks, mesh).lower(
      params, batch, table, options=integrate.static_options(options)
    )


def on_accelerator(recipe: recipes.Recipe) -> recipes.Recipe:
  """Returns the recipe with the precision of an accelerator, which this host is not."""
  precision = "bfloat16" if recipe.precision == "auto" else recipe.precision
  return dataclasses.replace(recipe, precision=precision)
