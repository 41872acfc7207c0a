"""A run of all stages in seconds: its config, and the commands as a user types them.

It learns nothing; sizes are the least that still hold several clips a row, several
rows a batch, resolutions, cut videos, images, extras and checkpoints.
"""

import dataclasses
import json
import os
import pathlib
import signal
import time
from typing import NamedTuple

from ml_collections import ConfigDict

from sora_jax.run import recipe

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 8


def get_config() -> ConfigDict:
  train = {
    "steps": STEPS,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "ema_decay": 0.9,
    "log_every": 1,
    "eval_every": 5,
    "save_every": 3,
  }
  config = {
    "seed": 3,
    "precision": "float32",
    "stages": ("data", "vae", "encode", "dit", "sample", "evaluate"),
    "data": {
      "source": "shapes",
      "train_clips": 6,
      "heldout_clips": 2,
      "max_frames": 17,
      "max_pixels": 64 * 64,
      "size_multiple": 16,
      "heldout_share": 0.05,
      "workers": 0,
    },
    "vae": {
      "train": dict(train),
      "model": {
        "width": 8,
        "width_multipliers": (1,),
        "downsample": (),
        "blocks": 1,
        "latent_channels": 4,
        "patch_size": (4, 8, 8),
        "middle": False,
      },
      "batch_size": 2,
      "crop": (9, 32, 32),
      "eval_batches": 1,
    },
    "encode": {
      "batch_size": 2,
      "clips_per_shard": 4,
      "extras": 1,
      "max_sizes": 1,
      "frame_buckets": (17,),
    },
    "dit": {
      "train": dict(train),
      "model": {
        "width": 32,
        "depth": 2,
        "heads": 2,
        "mlp_width": 64,
        "frequency_width": 16,
      },
      "text": {"vocab_size": 300, "width": 16, "depth": 1, "heads": 2},
      "rows": 2,
      "tokens": 96,
      "text_tokens": 96,
      "segments": 4,
      "max_text_tokens": 40,
      "eval_batches": 1,
    },
    "sample": {
      "prompts": (
        ("a red circle moves right", (64, 64), 17, 12.0),
        ("a cyan triangle", (64, 64), 1, 0.0),
      ),
      "steps": 2,
    },
    "evaluate": {"clips": 2},
    "mesh": {"tensor": 1},
  }
  return recipe.complete(ConfigDict(config))


class Run(NamedTuple):
  """A finished run and what it logged."""

  workdir: pathlib.Path
  log: str


@dataclasses.dataclass
class Commands:
  """Runs `python -m sora_jax...` in processes of one device.

  compilations: a folder that they share.
  """

  folder: pathlib.Path
  compilations: pathlib.Path

  def start(self, module: str, *flags: str):
    """Starts a command, a `warm.Process`; what it writes to stderr is kept."""
    return self._start(f"sora_jax.{module}", flags)

  def environment(self) -> dict[str, str]:
    """Of a process whose programs are tiny: nearly all of its time is compilation."""
    return {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
      "JAX_COMPILATION_CACHE_DIR": str(self.compilations),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

  def _start(self, module, flags):
    import warm  # this file is also a config, of commands that do not see tests/

    self.folder.mkdir(parents=True, exist_ok=True)
    return warm.Process(module, flags, self.environment())

  def run(self, module: str, *flags: str, returncode: int = 0) -> str:
    """Runs a command to its end and returns its log."""
    return self._finish(self.start(module, *flags), returncode)

  def launch(self, script: str, *flags: str, returncode: int = 0) -> str:
    """Runs a script of launch/ to its end and returns its log."""
    process = self._start(ROOT / "launch" / script, flags)
    return self._finish(process, returncode)

  def start_hosts(self, processes: int, workdir, *flags: str):
    """Starts the stages of the tiny config on several processes of one device each."""
    arguments = [str(processes), *tiny_flags(workdir), *flags]
    return self._start(ROOT / "tests" / "forked_hosts.py", arguments)

  def hosts(self, processes: int, workdir, *flags: str, returncode: int = 0) -> str:
    """Runs `start_hosts` to the end and returns the log of all."""
    return self._finish(self.start_hosts(processes, workdir, *flags), returncode)

  def _finish(self, process, returncode) -> str:
    _, log = process.communicate(timeout=300)
    assert process.returncode == returncode, log
    return log

  def main(self, workdir, *flags: str, **kwargs) -> str:
    """Runs all stages of the tiny config."""
    return self.run("main", *tiny_flags(workdir), *flags, **kwargs)

  def interrupt(
    self, workdir, stage: str, step: int, number: signal.Signals, *flags: str
  ) -> tuple[int, str]:
    """Sends a signal once the stage has logged a step; (exit code, log)."""
    process = self.start("main", *tiny_flags(workdir), *flags)
    return self.interrupt_process(process, workdir, stage, step, number)

  def interrupt_process(
    self, process, workdir, stage: str, step: int, number: signal.Signals
  ) -> tuple[int, str]:
    """Likewise of a command that was started."""
    path = pathlib.Path(workdir) / stage / "metrics.jsonl"
    while process.poll() is None and not any(row["step"] >= step for row in rows(path)):
      time.sleep(0.01)
    process.send_signal(number)
    _, log = process.communicate(timeout=300)
    return process.returncode, log


def tiny_flags(workdir) -> list[str]:
  return [f"--config={__file__}", f"--workdir={workdir}"]


def rows(path) -> list[dict]:
  """Complete rows of a metrics.jsonl that may be written right now."""
  if not path.exists():
    return []
  lines = path.read_text().split("\n")[:-1]
  return [json.loads(line) for line in lines]
