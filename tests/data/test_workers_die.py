"""Data workers that die are started again, and the order of the data stays."""

import os
import signal
import time

import numpy as np
import pytest

from sora_jax.data.batches import Batches
from sora_jax.data.endless import EndlessDataset


class Numbers(EndlessDataset):
  """0, 1, 2, ... with the process that made them; one that kills its process."""

  def __init__(self, deadly=-1):
    super().__init__(["numbers"])
    self._deadly = deadly

  def _plan(self, epoch):
    return np.arange(64)

  def _load(self, epoch, entry):
    if entry == self._deadly:
      time.sleep(0.5)  # for what was made before to be sent
      os.kill(os.getpid(), signal.SIGSEGV)
    return {"x": np.array(64 * epoch + entry), "process": np.array(os.getpid())}


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again(caplog):
  batches = Batches(Numbers(), 4, workers=2)
  got, processes = [], set()
  for i in range(20):
    batch = next(batches)
    got += batch["x"].tolist()
    processes |= set(batch["process"].tolist())
    if i == 5:
      os.kill(min(processes), signal.SIGKILL)
  assert got == list(range(80)) and len(processes) > 2
  assert batches.get_state()["global_next_index"] == 80
  batches.close()
  assert "workers begin again at element" in caplog.text


@pytest.mark.slow
def test_an_element_that_kills_its_workers_is_an_error():
  batches = Batches(Numbers(deadly=9), 4, workers=1)
  got = [next(batches)["x"].tolist() for _ in range(2)]
  assert got == [[0, 1, 2, 3], [4, 5, 6, 7]]
  message = r"exit code -11, 3 times at element 8 or soon after: .*cache"
  with pytest.raises(ValueError, match=message):
    next(batches)
  batches.close()
