"""Submits a run to GKE as a JobSet: TPU slices, restarts, and time to save on SIGTERM.

  python launch/gke.py --name=mine --tpu=v5p --topology=4x4x4 --slices=2 \
    --image=REGISTRY/sora_jax:1 --claim=shared-files -- \
    --config=configs/quickstart.py --workdir=/shared/run

The image holds the repository, installed with the extra "tpu", as its working
directory; the claim is a volume that all hosts may write (Filestore, or a bucket by
GCS FUSE), and is seen at /shared. --dry-run prints the filled in launch/jobset.yaml,
which `kubectl apply -f -` takes. A run that is stopped by a signal ends with a
failure on purpose: Kubernetes would take a success for the end of the run.

With --xpk_cluster, XPK submits it in place of kubectl; XPK has to have created the
cluster, too.
"""

import math
import pathlib
import re
import shlex
import subprocess
import sys

import yaml
from absl import app, flags

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
ACCELERATORS = {
  "v4": "tpu-v4-podslice",
  "v5e": "tpu-v5-lite-podslice",
  "v5p": "tpu-v5p-slice",
  "v6e": "tpu-v6e-slice",
  "tpu7x": "tpu7x",
}
PREEMPTED = 75


def hosts_of(tpu: str, topology: str) -> tuple[int, int]:
  """Returns (hosts, chips of each) of a slice.

  Raises:
    ValueError: if there is no such slice.
  """
  dims = 2 if tpu in ("v5e", "v6e") else 3
  if not re.fullmatch("x".join([r"[1-9]\d*"] * dims), topology):
    raise ValueError(f"--topology={topology}: {tpu} has {dims} numbers, such as "
                     f"{'x'.join('4' * dims)}")  # fmt: skip
  chips = math.prod(map(int, topology.split("x")))
  if dims == 2 and chips in (1, 4, 8):
    return 1, chips
  if chips % 4:
    raise ValueError(f"--topology={topology}: {chips} chips are not hosts of 4")
  return chips // 4, 4


def command(arguments) -> list[str]:
  """Returns the command that each host runs."""
  own = ["--distributed", f"--preempted_code={PREEMPTED}"]
  return ["python", "-m", "sora_jax.main", *own, *arguments]


def jobset(arguments, *, name, tpu, topology, slices, image, claim, restarts, grace):
  """Returns the JobSet, as nested dicts; `arguments` are those of sora_jax.main.

  Raises:
    ValueError: for a name or topology that cannot be.
  """
  # Pods are called <name>-slice-<number>-<host>-<5 letters>, in at most 63 letters.
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,35}[a-z0-9])?", name):
    raise ValueError(
      f"--name={name}: a letter, then at most 36 small letters, digits and dashes"
    )
  if not claim:
    raise ValueError("--claim is missing: without a shared volume no run can go on")
  hosts, chips = hosts_of(tpu, topology)
  manifest = yaml.safe_load(TEMPLATE.read_text())
  manifest["metadata"]["name"] = name
  manifest["spec"]["failurePolicy"]["maxRestarts"] = restarts
  (job,) = manifest["spec"]["replicatedJobs"]
  job["replicas"] = slices
  spec = job["template"]["spec"]
  spec["parallelism"] = spec["completions"] = hosts
  pod = spec["template"]["spec"]
  pod["terminationGracePeriodSeconds"] = grace
  pod["nodeSelector"] = {
    "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[tpu],
    "cloud.google.com/gke-tpu-topology": topology,
  }
  (container,) = pod["containers"]
  container["image"] = image
  container["command"] = command(arguments)
  container["resources"]["limits"]["google.com/tpu"] = chips
  (volume,) = pod["volumes"]
  volume["persistentVolumeClaim"]["claimName"] = claim
  return manifest


def xpk(arguments, *, name, cluster, kind, slices, image, restarts) -> list[str]:
  """Returns the command of XPK that submits a like JobSet."""
  if not kind:
    raise ValueError("--xpk_type is missing: what XPK calls the TPU, such as v5p-128")
  return [
    *("xpk", "workload", "create", f"--workload={name}", f"--cluster={cluster}"),
    *(f"--tpu-type={kind}", f"--num-slices={slices}", f"--docker-image={image}"),
    *(f"--max-restarts={restarts}", f"--command={shlex.join(command(arguments))}"),
  ]


def _define_flags():
  flags.DEFINE_string("name", None, "Of the run in the cluster.", required=True)
  flags.DEFINE_enum("tpu", "v5p", ["v4", "v5e", "v5p", "v6e", "tpu7x"], "Its kind.")
  flags.DEFINE_string("topology", None, "Such as 4x4x4.", required=True)
  flags.DEFINE_integer("slices", 1, "Number of slices.", 1)
  flags.DEFINE_string("image", None, "Container image.", required=True)
  flags.DEFINE_string("claim", None, "PersistentVolumeClaim, seen at /shared.")
  flags.DEFINE_integer("restarts", 20, "After failures, at most.", 0)
  flags.DEFINE_integer("grace", 300, "Seconds to save after SIGTERM.", 1)
  flags.DEFINE_string("xpk_cluster", None, "Submit by XPK, to this one.")
  flags.DEFINE_string("xpk_type", None, "Its name of the TPU: v5p-128.")
  flags.DEFINE_bool("dry-run", False, "Print what would be submitted.")


def main(argv):
  args = flags.FLAGS
  common = {
    "name": args.name,
    "slices": args.slices,
    "image": args.image,
    "restarts": args.restarts,
  }
  text = None
  try:
    if args.xpk_cluster:
      line = xpk(argv[1:], cluster=args.xpk_cluster, kind=args.xpk_type, **common)
    else:
      kind = {"tpu": args.tpu, "topology": args.topology, "claim": args.claim}
      manifest = jobset(argv[1:], grace=args.grace, **kind, **common)
      line, text = (
        ["kubectl", "apply", "-f", "-"],
        yaml.safe_dump(manifest, sort_keys=False),
      )
  except ValueError as error:
    sys.exit(str(error))
  if args["dry-run"].value:
    sys.stdout.write(text or f"{shlex.join(line)}\n")
    return
  sys.exit(subprocess.run(line, input=text, text=True, check=False).returncode)


if __name__ == "__main__":
  _define_flags()
  app.run(main)
