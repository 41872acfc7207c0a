"""Batches of a data set for the train loop: threads, workers, hosts and resuming."""

import sys

import grain
import numpy as np
from absl import flags, logging

from sora_jax.data.endless import Batch, EndlessDataset
from sora_jax.data.intake.workers import cores

_MOST_WORKERS = 16
_MOST_RESTARTS = 2  # of workers that die before they have made a single batch
_DIED = "Worker process was terminated"  # begin of Grain's message


class Batches:
  """Endless batches of a data set: this host's rows of each global batch.

  State is JSON-able, the same on all hosts, and good for any number of hosts and
  workers: it is the global index of the next element. So when a worker dies, they are
  all started again and go on with the same elements.
  """

  def __init__(
    self,
    dataset: EndlessDataset,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
  ):
    """Args: batch_size is the global one. 0 workers: one thread of this process;
    -1: what the machine has, see `default_workers`.

    Raises:
      ValueError: if the hosts cannot share a batch evenly.
    """
    _check_shared(batch_size, process_count)
    self._dataset = dataset
    workers_options = None
    workers = default_workers() if workers < 0 else workers
    if workers:
      # Grain reads absl flags when it starts workers; notebooks never parse any.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      workers_options = grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=2
      )
    # Elements of the threads' buffer are whole batches: two are enough, and one thread
    # leaves the cores to the train step. Grain's defaults are 16 and 500.
    self._iterator = iter(
      grain.experimental.ElasticIterator(
        grain.MapDataset.source(dataset),
        batch_size,
        grain.sharding.ShardOptions(process_index, process_count),
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=2),
        multiprocessing_options=workers_options,
      )
    )

  def __iter__(self):
    return self

  def __next__(self) -> Batch:
    """The next batch.

    Raises:
      ValueError: workers die at the same batch again and again.
    """
    for _ in range(_MOST_RESTARTS + 1):
      try:
        return next(self._iterator)
      except RuntimeError as error:
        if not str(error).startswith(_DIED):
          raise
        died = str(error).split(". ")[0]
        state = self._iterator.get_state()
        logging.warning(
          "%s: workers begin again at element %d", died, state["global_next_index"]
        )
        self._iterator.set_state(state)  # ends those that are left
    raise ValueError(
      f"{died}, {_MOST_RESTARTS + 1} times at element {state['global_next_index']} or "
      "soon after: memory is short, or a file kills its decoder. "
      "config.data.workers 0 reads in this process; config.data.cache 'raw' finds such "
      "files, and leaves them out"
    )

  def get_state(self) -> dict:
    """State after the last batch that was returned."""
    state = self._iterator.get_state()
    starts = self._dataset.epoch_starts(state["global_next_index"])
    return {
      **state,
      "epoch_starts": starts,
      "fingerprint": self._dataset.fingerprint,
    }

  def set_state(self, state: dict) -> None:
    """Goes on after the batch that `state` was taken behind."""
    if state["fingerprint"] == self._dataset.fingerprint:
      self._dataset.set_epoch_starts(state["epoch_starts"])
    else:
      logging.warning(
        "the data set is not the one of the checkpoint (other clips, sizes or seed): "
        "going on at element %d of the new one",
        state["global_next_index"],
      )
    self._iterator.set_state({"global_next_index": int(state["global_next_index"])})

  def close(self) -> None:
    """Stops threads and workers."""
    self._iterator.close()


def default_workers() -> int:
  """Worker processes for this machine: half of the cores beyond two, at most 16.

  The train step, or what feeds the accelerator, has the rest. A worker runs the main
  script once more, up to its `if __name__ == "__main__"`; nobody knows whether a
  script of a user's own has that, so it gets none, and one thread reads for it.
  """
  main = sys.modules.get("__main__")
  name = getattr(getattr(main, "__spec__", None), "name", "")
  # A notebook has no file, and nothing to run again.
  if hasattr(main, "__file__") and name.partition(".")[0] not in ("sora_jax", "pytest"):
    logging.info("data.workers: 0 in a script of one's own; set it if it is guarded")
    return 0
  return min(_MOST_WORKERS, max(0, (cores() - 2) // 2))


def first_batches(
  dataset: EndlessDataset,
  batch_size: int,
  count: int,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> list[Batch]:
  """The first `count` batches, for evaluation: always the same ones.

  Raises:
    ValueError: if the hosts cannot share a batch evenly.
  """
  _check_shared(batch_size, process_count)
  batches = []
  for start in range(0, count * batch_size, batch_size):
    indices = range(start + process_index, start + batch_size, process_count)
    elements = [dataset[i] for i in indices]
    batches.append({k: np.stack([e[k] for e in elements]) for k in elements[0]})
  return batches


def _check_shared(batch_size, process_count):
  if batch_size % process_count:
    raise ValueError(
      f"batch_size {batch_size} is not divisible by {process_count} processes"
    )
