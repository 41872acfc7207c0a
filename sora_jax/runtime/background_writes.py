"""What a save writes in the background: all of it ends, and fails on all hosts or none.

Orbax says that a save failed with the first of its writes that does. The others go on
in threads of their own, and would make again what is removed under them. And where one
host of several fails, its threads pass by the barriers at which those of the others
wait, 20 minutes long. So what is started is remembered here, and a host that passes by
a barrier comes to it nevertheless, and says so.
"""

import itertools
import time

import jax
import orbax.checkpoint as ocp

# Barriers of Orbax's threads once a save is under way, in their order.
_BARRIERS = ("async_write_complete", "async_commit_complete")
_saves = itertools.count()


class ElsewhereError(Exception):
  """Another host has failed to save; it knows why."""


class BackgroundWrites:
  """The writes of one save after the other. All processes must make the same saves."""

  def __init__(self) -> None:
    self._writes: list = []
    self._left: list[str] = []  # barriers that this host has not come to
    self._place = ""

  def begin(self) -> None:
    """A save begins; the one before it has ended."""
    self._writes.clear()
    self._left.clear()
    # Barriers are there once; a step may be saved again.
    self._place = f"sora_jax/save/{next(_saves)}"

  def of(self, handler):
    """The checkpoint handler, what it starts to write being remembered."""
    start = handler.async_save

    async def async_save(*args, **kwargs):
      self._left[:] = _BARRIERS
      futures = await start(*args, **kwargs)
      for future in futures or []:
        # A chain ends with the first that fails, and leaves the others behind.
        self._writes.extend(getattr(future, "_futures", [future]))
      return futures

    handler.async_save = async_save
    return handler

  def end(self, seconds: float) -> None:
    """Waits so long for all writes; whether they failed is not asked for."""
    deadline = time.monotonic() + seconds
    for write in self._writes:
      try:
        write.result(timeout=max(deadline - time.monotonic(), 0))
      except Exception:  # noqa: BLE001, S112 (the save has failed, this is known)
        continue

  def meet(self, *, key: str, timeout_ms: int) -> None:
    """Barrier of Orbax's threads (`AsyncOptions.barrier_sync_fn`).

    Raises:
      ElsewhereError: if another host has failed before it.
    """
    if jax.process_count() == 1:
      return
    client = ocp.multihost.get_jax_distributed_client()
    name = next((name for name in _BARRIERS if name in key), None)
    while self._left and self._left[0] != name:
      place = f"{self._place}/{self._left.pop(0)}"
      client.key_value_set(f"{place}/{jax.process_index()}", "failed")
      client.wait_at_barrier(place, timeout_ms)
    if name is None:
      client.wait_at_barrier(key, timeout_ms)
      return
    place = f"{self._place}/{self._left.pop(0)}"
    client.wait_at_barrier(place, timeout_ms)
    if failed := client.key_value_dir_get(f"{place}/"):
      numbers = sorted(int(path.rsplit("/", 1)[-1]) for path, _ in failed)
      shown = ", ".join(map(str, numbers[:4]))
      raise ElsewhereError(f"process {shown} could not write its part")
