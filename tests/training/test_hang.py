"""Of two processes that train together one is stopped: both end, with their stacks."""

import dataclasses
import signal
import socket
import sys
import time

import pytest
from training.test_loop import CONFIG, Batches, cache_compilations, run, start_process

from sora_jax.runtime import hosts, sharding, watchdog

DEADLINE = 6.0


def main(workdir, address, process, cache):
  """One of the processes; its rows are half of each batch."""
  cache_compilations(cache)
  hosts.start(address, 2, int(process))
  config = dataclasses.replace(
    CONFIG, steps=100_000, save_every=0, eval_every=0, deadline=DEADLINE
  )
  batches = Batches(rows=8, delay=0.02)
  with hosts.leave_on_error():
    run(workdir, config, batches=batches, mesh=sharding.make_mesh())


def wait_for(path, text):
  """Waits for a text in a file, through compilation on a machine with other work."""
  for _ in range(1200):
    if path.exists() and text in path.read_text():
      return
    time.sleep(0.1)
  raise AssertionError(f"no {text} in {path}")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_stopped_host_ends_both(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  both = [
    start_process(tmp_path, address, i, tmp_path / "cache", script=__file__)
    for i in range(2)
  ]
  try:
    wait_for(tmp_path / "toy" / "metrics.jsonl", '"step": 20,')
    both[1].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    _, log = both[0].communicate(timeout=3 * DEADLINE)
    assert both[0].returncode == watchdog.EXIT_CODE
    assert 0.5 * DEADLINE < time.monotonic() - begin < 2 * DEADLINE
    assert f"a step has not ended within {DEADLINE:g} s" in log
    assert "loop.py" in (tmp_path / "toy" / "stacks-0.txt").read_text()
    assert both[1].poll() is None
    both[1].send_signal(signal.SIGCONT)
    both[1].communicate(timeout=3 * DEADLINE)
    assert both[1].returncode not in (0, None)
  finally:
    for process in both:
      process.kill()
      process.communicate()


if __name__ == "__main__":
  main(*sys.argv[1:])
