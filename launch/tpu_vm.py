"""TPU VMs as queued resources: creates them, installs the code, runs, shows, deletes.

  tpu="python launch/tpu_vm.py --name=mine --zone=us-east5-a"
  $tpu --accelerator=v5p-128 --runtime=v2-alpha-tpuv5 create
  $tpu wait
  $tpu install
  $tpu run -- --config=configs/quickstart.py --workdir=/mnt/shared/run
  $tpu logs
  $tpu stop
  $tpu delete

With --slices=N the steps address all slices (give it to each). `run` starts all workers
in the background, restarts them when they fail, and returns; `stop` lets the run save.
--workdir is on a file system that all workers share, such as Filestore or a mounted
bucket. TPU7x is there with GKE only: launch/gke.py.
"""

import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from absl import app, flags, logging

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = "sora_jax"  # in the home of each worker
ACTIONS = ("create", "wait", "install", "run", "logs", "stop", "delete")
_RESOURCES = ["gcloud", "compute", "tpus", "queued-resources"]
_VM = ["gcloud", "compute", "tpus", "tpu-vm"]


def nodes(name: str, slices: int) -> list[str]:
  """Returns the names of the TPU VMs of a queued resource, one for each slice."""
  return [name] if slices == 1 else [f"{name}-{i}" for i in range(slices)]


def create(name, place, accelerator, runtime, slices=1, spot=False, options=()):
  """Returns the command that asks for the TPUs."""
  if not accelerator or not runtime:
    raise ValueError("create needs --accelerator and --runtime")
  ids = ["--node-id", name]
  if slices > 1:
    ids = ["--node-count", str(slices), "--node-prefix", name]
  kind = ["--accelerator-type", accelerator, "--runtime-version", runtime]
  return [
    *_RESOURCES,
    "create",
    name,
    *place,
    *ids,
    *kind,
    *["--spot"] * spot,
    *options,
  ]


def describe(name, place) -> list[str]:
  """Returns the command that says the state of the request."""
  return [*_RESOURCES, "describe", name, *place, "--format=value(state.state)"]


def delete(name, place) -> list[str]:
  """Returns the command that gives the TPUs back."""
  return [*_RESOURCES, "delete", name, *place, "--force", "--quiet"]


def ssh(node, place, command: str, worker="all") -> list[str]:
  """Runs a line of shell on one worker of a slice, or on all."""
  return [*_VM, "ssh", node, *place, f"--worker={worker}", f"--command={command}"]


def install(node, place, archive) -> Iterator[list[str]]:
  """Returns the commands that bring the code to all workers and install it."""
  script = str(ROOT / "launch" / "tpu_vm_install.sh")
  yield [
    *(*_VM, "scp", str(archive), script, f"{node}:"),
    *(*place, "--worker=all"),
  ]
  name = pathlib.Path(archive).name
  yield ssh(node, place, f"bash tpu_vm_install.sh {FOLDER} {name}")


def run(node, place, restarts: int, arguments) -> list[str]:
  """Returns the command that starts the run on all workers of a slice."""
  line = ["bash", f"{FOLDER}/launch/tpu_vm_run.sh", FOLDER, str(restarts), *arguments]
  return ssh(node, place, shlex.join(line))


def wait(state, sleep=time.sleep) -> None:
  """Waits until the request is ACTIVE; `state` is a function that asks.

  Raises:
    ValueError: if it never will be.
  """
  before = None
  while (now := state()) != "ACTIVE":
    if now in ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING"):
      raise ValueError(f"the queued resource is {now}; delete it, and create it again")
    if now != before:
      logging.info("state %s", now)
    before = now
    sleep(30)
  logging.info("the TPUs are there")


def _call(command):
  args = flags.FLAGS
  if args["dry-run"].value:
    sys.stdout.write(f"{shlex.join(map(str, command))}\n")
  else:
    subprocess.run(command, check=True)


def _together(commands):
  args = flags.FLAGS
  """Slices meet in jax.distributed: all must be started, none waited for before."""
  if args["dry-run"].value:
    return [_call(command) for command in commands]
  started = [subprocess.Popen(command) for command in commands]
  if any([process.wait() for process in started]):
    raise ValueError("not all slices could be started; see above")


def _install(names, place):
  with tempfile.TemporaryDirectory() as folder:
    archive = pathlib.Path(folder) / "sora_jax.tar.gz"
    _call(["git", "-C", str(ROOT), "archive", f"--output={archive}", "HEAD"])
    for node in names:
      for command in install(node, place, archive):
        _call(command)


def _act(action, arguments):
  args = flags.FLAGS
  name = args.name
  place = ["--zone", args.zone, *["--project", args.project] * bool(args.project)]
  names = nodes(name, args.slices)
  if action == "create":
    kind = (args.accelerator, args.runtime, args.slices, args.spot, args.option)
    _call(create(name, place, *kind))
  elif action == "wait":
    asked = describe(name, place)
    if args["dry-run"].value:
      return _call(asked)
    wait(
      lambda: subprocess.run(
        asked, check=True, capture_output=True, text=True
      ).stdout.strip()
    )
  elif action == "install":
    _install(names, place)
  elif action == "run":
    _together([run(node, place, args.restarts, arguments) for node in names])
  elif action == "logs":
    _call(ssh(names[0], place, f"tail -n 50 -F {FOLDER}/run.log", worker="0"))
  elif action == "stop":
    line = f"kill -TERM $(cat {FOLDER}/run.pid)"
    _together([ssh(node, place, line) for node in names])
  elif action == "delete":
    _call(delete(name, place))


def _define_flags():
  flags.DEFINE_string("name", None, "Of the queued resource.", required=True)
  flags.DEFINE_string("zone", None, "Such as us-east5-a.", required=True)
  flags.DEFINE_string("project", None, "That of gcloud's config by default.")
  flags.DEFINE_string("accelerator", None, "create: such as v5p-128.")
  flags.DEFINE_string("runtime", None, "create: such as v2-alpha-tpuv5.")
  flags.DEFINE_integer("slices", 1, "Number of slices.", 1)
  flags.DEFINE_bool("spot", False, "create: spot VMs.")
  flags.DEFINE_multi_string("option", [], "create: another option, whole.")
  flags.DEFINE_integer("restarts", 20, "run: after failures, at most.", 0)
  flags.DEFINE_bool("dry-run", False, "Print the commands, run none.")


def main(argv):
  action, arguments = argv[1:2], argv[2:]
  if arguments[:1] == ["--"]:
    arguments = arguments[1:]
  if len(action) != 1 or action[0] not in ACTIONS:
    raise app.UsageError(f"say what to do: one of {', '.join(ACTIONS)}")
  if arguments and action[0] != "run":
    raise app.UsageError(f"{action[0]} takes no arguments: {arguments}")
  try:
    _act(action[0], arguments)
  except (ValueError, subprocess.CalledProcessError) as error:
    sys.exit(f"{action[0]}: {error}")


if __name__ == "__main__":
  _define_flags()
  app.run(main)
