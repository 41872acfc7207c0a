"""Two processes save together, and one of them fails: both know at once, and go on."""

import resource
import socket
import time

import jax
import numpy as np
import pytest
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from training.test_loop import cache_compilations, start_process

from sora_jax.runtime import hosts, sharding, train_checkpoints


def main(folder, address, process, cache):
  """One of the processes; it says what its log says."""
  logging.set_verbosity(logging.WARNING)
  cache_compilations(cache)
  process = int(process)
  hosts.start(address, 2, process)
  place = NamedSharding(sharding.make_mesh(), PartitionSpec(("data", "fsdp")))
  value = {"x": jax.make_array_from_callback((2,), place, lambda i: np.arange(2.0)[i])}
  with hosts.leave_on_error():
    checkpoints = train_checkpoints.Checkpoints(folder, keep=9, failures=9)

    def save(step):
      begin = time.monotonic()
      checkpoints.save(step, value, {})
      checkpoints.wait()
      assert time.monotonic() - begin < 20

    save(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for failing in (0, 1):
      if process == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
      save(2 + failing)
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if process == 0:  # alone, when all is written
      finalize, checkpoints._hosts.finalize = checkpoints._hosts.finalize, broken
    save(4)
    if process == 0:
      checkpoints._hosts.finalize = finalize
    save(4)
    assert checkpoints.steps() == [1, 4]
    shape = jax.ShapeDtypeStruct((2,), np.float32, sharding=place)
    restored, _ = checkpoints.restore(4, {"x": shape})
    assert restored["x"].sharding == place
    checkpoints.close()


def broken(*_):
  raise OSError("the store is gone")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_save_that_fails_on_one_host_fails_on_both(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  folder = tmp_path / "checkpoints"
  both = [
    start_process(folder, address, i, tmp_path / "cache", script=__file__)
    for i in range(2)
  ]
  for process in both:
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    failed = [line for line in log.splitlines() if "the save at step" in line]
    assert len(failed) == 3
    for step, line in zip((2, 3), failed, strict=False):
      assert f"step {step} failed" in line and "File too large" in line
    assert "the store is gone" in failed[2]
    assert "newest checkpoint is of step 1" in failed[2]
  assert sorted(path.name for path in folder.iterdir()) == ["1", "4"]


if __name__ == "__main__":
  import sys

  main(*sys.argv[1:])
