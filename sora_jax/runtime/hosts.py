"""Many hosts: how they find each other, and whether they are to run the same."""

import collections
import contextlib
import hashlib
import json
import os
import sys
import time
import traceback

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils


def start(coordinator, processes, process, timeout: int = 300) -> None:
  """Connects the processes of a run; before anything else asks jax for devices.

  TPU pods, GKE and Slurm say themselves who is there, so that all may be None.

  Raises:
    ValueError: if it cannot be known who is there, if not all come, or if they have
      different numbers of devices.
  """
  logging.info(
    "waiting for %s processes at %s", processes or "all", coordinator or "process 0"
  )
  # It would swallow SIGTERM, which `train` handles itself and else is to end a stage.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      coordinator, processes, process, initialization_timeout=timeout
    )
  except Exception as error:  # noqa: BLE001 (jax raises what its backends raise)
    raise ValueError(
      f"--distributed: the {processes or ''} processes did not find each other at "
      f"{coordinator or 'the address that the cluster names'} ({error}). Without a "
      "cluster that jax knows, give --coordinator=host:port, --processes and --process"
    ) from error
  check_devices(jax.devices(), jax.process_count())
  logging.info(
    "process %d of %d, %d of %d devices (%s)",
    *(jax.process_index(), jax.process_count()),
    *(jax.local_device_count(), jax.device_count()),
    jax.devices()[0].device_kind,
  )


@contextlib.contextmanager
def leave_on_error():
  """An error inside ends this process at once, when it is one of several.

  Otherwise it would wait five minutes for the others before it exits, while they wait
  for it: a launcher that restarts a run would not see that anything is wrong.
  """
  try:
    yield
  except BaseException as error:
    exits = isinstance(error, SystemExit)
    if not jax.distributed.is_initialized() or (exits and not error.code):
      raise
    if not exits:
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
      time.sleep(2)  # the others are aborted with it: first they say what they found
    os._exit(error.code if exits and isinstance(error.code, int) else 1)


def check_devices(devices, processes: int) -> None:
  """All processes must have the same number of devices.

  Raises:
    ValueError: naming those that differ.
  """
  counts = collections.Counter(device.process_index for device in devices)
  counts = [counts[process] for process in range(processes)]
  if different := _different(counts):
    shown = ", ".join(f"process {i} has {counts[i]}" for i in different[:4])
    raise ValueError(
      f"processes have different numbers of devices: {shown}, the others "
      f"{_usual(counts)}; all need the same"
    )


def check_alike(config: dict) -> None:
  """All processes must run the same config (JSON-able, nested by section).

  Raises:
    ValueError: on all processes, naming those that differ and the first such key.
  """
  if jax.process_count() == 1:
    return
  text = json.dumps(config, sort_keys=True).encode()
  digests = gather(hashlib.sha256(text).hexdigest())
  different = _different(digests)
  if not different:
    return
  # Only now send the whole: most runs are alike, and have a thousand hosts.
  configs = gather(config)
  usual = next(i for i in range(len(digests)) if digests[i] == _usual(digests))
  key, theirs, ours = next(differences(configs[different[0]], configs[usual]))
  raise ValueError(
    f"process {', '.join(map(str, different))} of {len(digests)} runs another config: "
    f"{key} is {theirs!r} there and {ours!r} on process {usual}; start all of them "
    "with the same --config and flags"
  )


def gather(value) -> list:
  """The JSON-able values of all processes, in their order; all must call it."""
  if jax.process_count() == 1:
    return [value]
  text = json.dumps(value).encode()
  sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32))
  padded = np.frombuffer(text.ljust(int(sizes.max())), np.uint8)
  return [
    json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)
  ]


def differences(a, b, where: str = "config"):
  """Yields (key, value in a, value in b) for each leaf in which nested dicts differ."""
  if isinstance(a, dict) or isinstance(b, dict):
    a, b = a or {}, b or {}
    for key in sorted(a | b):
      yield from differences(a.get(key), b.get(key), f"{where}.{key}")
  elif a != b:
    yield where, a, b


def _usual(values):
  """The commonest; of equally common ones the first."""
  return collections.Counter(values).most_common(1)[0][0]


def _different(values) -> list[int]:
  usual = _usual(values)
  return [i for i, value in enumerate(values) if value != usual]
