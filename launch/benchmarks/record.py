"""Keeps the figures of a measuring script: one JSON line for each run of it.

A line says when and where the figures come from, so that a change can be told from
another machine or other settings:

  {"format": 1, "time": "2026-11-28T15:04:05+00:00", "benchmark": "training",
   "settings": {"config": "quickstart.py"}, "commit": "6b1f...", "dirty": false,
   "machine": {"cpu": "...", "cores": 2, "load": 0.3,
               "platform": "cpu", "device": "cpu", "devices": 1},
   "versions": {"python": "3.12.1", "jax": "0.10.2"},
   "figures": {"dit step": {"value": 0.24, "unit": "s", "better": "lower"}}}

Runs are comparable if benchmark, settings, and the machine but for its load are equal;
report.py draws the course of each figure over such runs.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from absl import flags

ROOT = pathlib.Path(__file__).parents[2]
NAME = "benchmarks.jsonl"
FORMAT = 1
PACKAGES = ("sora_jax", "jax", "jaxlib", "numpy", "grain", "torch", "diffusers")


class Figure(NamedTuple):
  """A measured value; `better` is "lower", "higher", or "" where neither is."""

  value: float
  unit: str
  better: str = "lower"


class Device(NamedTuple):
  """What a run computed on: platform (cpu, gpu, tpu), kind and number of devices."""

  platform: str
  kind: str
  count: int


def define_flag() -> None:
  """Defines --record, which `append` reads."""
  flags.DEFINE_string(
    "record",
    None,
    f"File to append the figures to; {NAME} in the run's folder, or in runs/ where "
    "there is no run, if not given. --record= keeps none.",
  )


def jax_device() -> Device:
  """The devices of this process; starts JAX's backend."""
  import jax

  devices = jax.devices()
  return Device(devices[0].platform, devices[0].device_kind, len(devices))


def append(
  benchmark: str,
  settings: Mapping,
  figures: Mapping[str, Figure],
  folder: str | os.PathLike = "runs",
  device: Device | None = None,
) -> pathlib.Path | None:
  """Appends a run's line to the file of --record.

  Args:
    benchmark: name of the measuring script.
    settings: what the figures depend on beside code and machine, as JSON has it.
    figures: name -> figure.
    folder: of the run that was measured; the file is there unless --record says else.
    device: what was measured on; this process's JAX devices if None.

  Returns:
    The path of the file, None with --record=.
  """
  path = flags.FLAGS.record
  if path is None:
    path = pathlib.Path(folder) / NAME
  if not str(path):
    return None
  path = pathlib.Path(path)
  commit, dirty = _commit()
  line = {
    "format": FORMAT,
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "benchmark": benchmark,
    "settings": dict(settings),
    "commit": commit,
    "dirty": dirty,
    "machine": _machine(device or jax_device()),
    "versions": _versions(),
    "figures": {name: figure._asdict() for name, figure in figures.items()},
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a") as file:
    # In one write: scripts that end at the same time do not mix their lines.
    file.write(json.dumps(line) + "\n")
  return path


def _commit() -> tuple[str | None, bool | None]:
  """Commit of the checkout and whether files differ from it; None without git."""

  def git(*arguments):
    return subprocess.run(
      ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
  except (OSError, subprocess.CalledProcessError):
    return None, None


def _machine(device: Device) -> dict:
  return {
    "cpu": _cpu(),
    "cores": len(os.sched_getaffinity(0)),
    "load": round(os.getloadavg()[0], 1),
    "platform": device.platform,
    "device": device.kind,
    "devices": device.count,
  }


def _cpu() -> str:
  """Name of the processor, as the kernel has it."""
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
  return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
  versions = {"python": platform.python_version()}
  for name in PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # torch and diffusers are only for comparisons
  return versions
