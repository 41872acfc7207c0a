"""Peak memory of import_weights beside the size of the params it imports.

  python launch/benchmarks/import_memory.py --preset=wan2.1-t2v-1.3b --folder=memory

Writes a random checkpoint in the layout of diffusers, float32 as published, imports it
in a process of its own and says that process's peak resident memory. Needs twice the
model's size on disk. Seen on two cores: 0.19 of the params (1038 of 5413 MiB, 44 s) for
the 1.3B, 0.07 (1248 of 19073 MiB) for the 5B. The figures are kept in
runs/benchmarks.jsonl, see record.py.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np  # noqa: E402
import record  # noqa: E402
from absl import app, flags  # noqa: E402

from sora_jax import import_weights  # noqa: E402
from sora_jax.runtime import safetensors_io  # noqa: E402
from sora_jax.weights import hf_config  # noqa: E402

PRESET = flags.DEFINE_string("preset", "wan2.1-t2v-1.3b", "Sizes of the model.")
FOLDER = flags.DEFINE_string("folder", None, "For the files; emptied by you.")
CHILD = flags.DEFINE_bool("child", False, "This is the process that is measured.")
flags.mark_flag_as_required("folder")
record.define_flag()
_STEMS = {"text": "model"}


def make(folder: pathlib.Path, model: hf_config.Published) -> int:
  """Writes random tensors and config.json; the bytes of the tensors."""
  rng = np.random.default_rng(0)
  plans = [
    safetensors_io.Plan(e.name, e.shape, np.dtype(np.float32)) for e in model.entries()
  ]

  def values():
    for plan in plans:
      yield rng.standard_normal(plan.shape, np.float32) * np.float32(0.02)

  stem = _STEMS.get(model.network, "diffusion_pytorch_model")
  safetensors_io.write(folder, stem, plans, values())
  (folder / "config.json").write_text(json.dumps(hf_config.to_json(model)))
  return sum(plan.nbytes for plan in plans)


def measure(source: pathlib.Path, out: pathlib.Path) -> dict:
  """Imports in this process: megabytes before, and at the peak."""

  def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

  before, begin = peak(), time.monotonic()
  import_weights.run(source, out)
  seconds = round(time.monotonic() - begin)
  return {"idle": round(before), "peak": round(peak()), "seconds": seconds}


def main(_):
  folder = pathlib.Path(FOLDER.value)
  source, out = folder / "source", folder / "checkpoint"
  if CHILD.value:
    print(json.dumps(measure(source, out)))
    return
  if out.exists() or source.exists():
    raise ValueError(f"{folder} has an earlier run's files; delete them")
  size = make(source, hf_config.preset(PRESET.value, "diffusers")) / 2**20
  child = subprocess.run(
    [sys.executable, __file__, *sys.argv[1:], "--child"],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  found = json.loads(child.stdout.splitlines()[-1])
  print("| params MB | idle MB | peak MB | peak / params | seconds |")
  print("| --: | --: | --: | --: | --: |")
  print(
    f"| {size:.0f} | {found['idle']} | {found['peak']} | {found['peak'] / size:.2f} "
    f"| {found['seconds']} |"
  )
  figures = {
    "idle memory": record.Figure(found["idle"], "MiB"),
    "peak memory": record.Figure(found["peak"], "MiB"),
    "peak / params": record.Figure(found["peak"] / size, "ratio"),
    "time": record.Figure(found["seconds"], "s"),
  }
  record.append("import_memory", {"preset": PRESET.value}, figures)


if __name__ == "__main__":
  app.run(main)
