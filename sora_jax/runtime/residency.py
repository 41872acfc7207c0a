"""Which networks' params are on the devices: all of them, or the one in use."""

from collections.abc import Callable
from typing import Any


class Residency:
  """Params by the name of their network, with how they are loaded.

  One at a time is for devices that do not hold all of them: what is asked for takes the
  place of what was there, which is loaded again when it is asked for again. Whoever
  asks must keep no reference to params longer than it uses them.
  """

  def __init__(self, one_at_a_time: bool = False):
    self._one_at_a_time = one_at_a_time
    self._loads: dict[str, Callable[[], Any]] = {}
    self._held: dict[str, Any] = {}

  def put(self, name: str, load: Callable[[], Any]) -> None:
    """Adds or replaces a network; loads it now if all are held."""
    self._held.pop(name, None)
    self._loads[name] = load
    if not self._one_at_a_time:
      self.get(name)

  def get(self, name: str) -> Any:
    """The params of a network."""
    if name not in self._held:
      if self._one_at_a_time:
        self._held.clear()
      self._held[name] = self._loads[name]()
    return self._held[name]

  @property
  def held(self) -> list[str]:
    """Names of the networks that are on the devices."""
    return list(self._held)
