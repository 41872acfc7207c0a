"""Submits a run to Slurm, for machines with GPUs.

  python launch/slurm.py --nodes=2 --gpus=8 --time=24:00:00 -- \
    --config=configs/quickstart.py --workdir=/shared/run

One process for each GPU, as jax expects it there. The working directory must be the
repository, on a file system that all nodes share, like --workdir. launch/slurm.sh is
the job itself: it saves and requeues when its time is up.
"""

import pathlib
import shlex
import subprocess
import sys

from absl import app, flags

SCRIPT = pathlib.Path(__file__).with_name("slurm.sh")


def command(arguments, *, name, nodes, gpus, cpus, time, options=()) -> list[str]:
  """Returns the sbatch command; `arguments` are those of sora_jax.main."""
  return [
    "sbatch",
    f"--job-name={name}",
    f"--nodes={nodes}",
    f"--ntasks-per-node={gpus}",
    f"--gpus-per-node={gpus}",
    f"--cpus-per-task={cpus}",
    f"--time={time}",
    "--output=%x-%j.log",
    *options,
    str(SCRIPT),
    *arguments,
  ]


def _define_flags():
  flags.DEFINE_string("name", "sora_jax", "Name of the job.")
  flags.DEFINE_integer("nodes", 1, "Number of nodes.", 1)
  flags.DEFINE_integer("gpus", 8, "GPUs of each node.", 1)
  flags.DEFINE_integer("cpus", 8, "CPU cores for each GPU.", 1)
  flags.DEFINE_string("time", "24:00:00", "Longest time, before it is requeued.")
  flags.DEFINE_string("partition", None, "Partition of the cluster.")
  flags.DEFINE_string("account", None, "Account that pays.")
  flags.DEFINE_multi_string("option", [], "Another option of sbatch, whole.")
  flags.DEFINE_bool("dry-run", False, "Print the command, submit nothing.")


def main(argv):
  args = flags.FLAGS
  options = list(args.option)
  options += [f"--partition={args.partition}"] * bool(args.partition)
  options += [f"--account={args.account}"] * bool(args.account)
  submit = command(
    argv[1:],
    name=args.name,
    nodes=args.nodes,
    gpus=args.gpus,
    cpus=args.cpus,
    time=args.time,
    options=options,
  )
  if args["dry-run"].value:
    sys.stdout.write(f"{shlex.join(submit)}\n")
    return
  sys.exit(subprocess.run(submit, check=False).returncode)


if __name__ == "__main__":
  _define_flags()
  app.run(main)
