"""Speed of the train steps and the loaders of a run, on this machine.

  python launch/benchmarks/training.py --config=configs/quickstart.py

The run needs its stages data, vae and encode. For each of VAE and DiT the table has
the time of a step with the batch at hand, the time of a step of the real loop (loader
included), the loader's own speed with nothing else running, and the share of the
loop's time spent waiting for data. The figures are kept in the run's benchmarks.jsonl,
see record.py.
"""

import dataclasses
import pathlib
import time

import jax
import record
from absl import flags, logging
from ml_collections import config_flags

from sora_jax import train_dit, train_vae
from sora_jax.run import cli
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding
from sora_jax.training import loop

STEPS = flags.DEFINE_integer("steps", 30, "Steps to time.", 2)


def measure(name, setup, stage_train, mesh, seed, steps) -> dict:
  """Times one task; setup is the `Setup` of its stage."""
  built = loop.build(setup.task, stage_train, mesh, setup.rules, seed)
  device_batch = lambda b: sharding.shard_batch(  # noqa: E731
    {k: v for k, v in b.items() if not k.startswith("clip")}, mesh
  )
  row = {"task": name}
  with jax.set_mesh(mesh):
    for _ in range(4):  # what was made ahead would count as made in no time
      next(setup.data)
    begin = time.perf_counter()
    for _ in range(steps):
      batch = next(setup.data)
    row["loader_batches_per_s"] = steps / (time.perf_counter() - begin)
    row["per_batch"] = setup.units(batch)
    state = built.init()
    ready = device_batch(batch)
    begin = time.perf_counter()
    state, values = built.update(state, ready, setup.task.frozen)
    jax.block_until_ready(values)
    row["compile_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in range(steps):
      state, values = built.update(state, ready, setup.task.frozen)
      jax.block_until_ready(values)
    row["step_s"] = (time.perf_counter() - begin) / steps
    waited, begin = 0.0, time.perf_counter()
    for _ in range(steps):
      start = time.perf_counter()
      batch = next(setup.data)
      waited += time.perf_counter() - start
      # As in loop.train: a step is waited for when the next one is under way.
      previous = values
      state, values = built.update(state, device_batch(batch), setup.task.frozen)
      jax.block_until_ready(previous)
    jax.block_until_ready(values)
    elapsed = time.perf_counter() - begin
    row["loop_s"], row["wait"] = elapsed / steps, waited / elapsed
  setup.data.close()
  return row


def figures_of(name, row) -> dict[str, record.Figure]:
  """What is kept of a task's row."""
  return {
    f"{name} step": record.Figure(row["step_s"], "s"),
    f"{name} step with the loader": record.Figure(row["loop_s"], "s"),
    f"{name} loader": record.Figure(row["loader_batches_per_s"], "batches/s", "higher"),
    f"{name} compilation": record.Figure(row["compile_s"], "s"),
  }


def main(argv):
  del argv
  cli.start_logging()
  recipe = recipes.read(flags.FLAGS.config)
  workdir = pathlib.Path(cli.workdir())
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
  jobs = (
    ("vae", train_vae.setup(recipe, workdir, mesh), recipe.vae.train, "frames"),
    ("dit", train_dit.setup(recipe, workdir, mesh), recipe.dit.train, "tokens"),
  )
  figures = {}
  lines = [
    f"{'task':5} {'step s':>8} {'loop s':>8} {'wait':>6} {'TFLOP/s':>8} "
    f"{'in the loop':>18} {'loader alone':>18}"
  ]
  for name, setup, stage_train, unit in jobs:
    row = measure(name, setup, stage_train, mesh, recipe.seed, STEPS.value)
    n = row["per_batch"]
    lines.append(
      f"{name:5} {row['step_s']:8.3f} {row['loop_s']:8.3f} {row['wait']:6.1%} "
      f"{setup.flops_per_step / row['step_s'] / 1e12:8.3f} "
      f"{n / row['loop_s']:9.0f} {unit}/s "
      f"{n * row['loader_batches_per_s']:9.0f} {unit}/s"
    )
    figures |= figures_of(name, row)
  for line in lines:
    logging.info("%s", line)
  flag = flags.FLAGS["config"]
  settings = {"config": pathlib.Path(config_flags.get_config_filename(flag)).name}
  settings |= config_flags.get_override_values(flag)
  record.append("training", settings, figures, workdir)


if __name__ == "__main__":
  cli.define_flags()
  record.define_flag()
  flags.mark_flag_as_required("config")
  cli.run_app(main)
