"""What is learnt: a `Task` is all that the train loop knows of a model."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Params = dict[str, Any]
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class Task(NamedTuple):
  """Three pure functions; batch["step"] holds the number of finished updates.

  init: key -> nested dict of float32 arrays.
  loss: (params, batch, key) -> (scalar mean over the batch, dict of scalars).
  evaluate: (params, batch, key) -> dict of scalars.
  frozen: tree of arrays on the mesh that no step changes and no checkpoint holds.
    Where it is not None, loss and evaluate take it as a fourth argument.
  """

  init: Callable[[jax.Array], Params]
  loss: Callable[..., tuple[jax.Array, Metrics]]
  evaluate: Callable[..., Metrics]
  frozen: Any = None
