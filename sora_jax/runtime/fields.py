"""What a change of a config's field means for a run that has begun.

Each field of a config is one of three kinds, declared where the field is:

  remakes  What a stage makes depends on it, so a stage that was made with another
           value is refused. Fields that say nothing are of this kind.
  extends  More of the same: a stage that was made with another value goes on from there
           (more train steps) or is run again because that is cheap (other prompts).
  free     How something is computed: memory, speed, rounding, what is logged or kept.
           A stage under way goes on with the new value, a complete one stays complete.

  @dataclasses.dataclass(frozen=True)
  class TrainConfig:
    steps: int = fields.extends()
    learning_rate: float = 1e-4
    log_every: int = fields.free(50)
"""

import dataclasses
from typing import Any

FREE, EXTENDS, REMAKES = "free", "extends", "remakes"
_KEY = "change"


def free(default: Any = dataclasses.MISSING) -> Any:
  """A field whose change a run takes over at any time."""
  return dataclasses.field(default=default, metadata={_KEY: FREE})


def extends(default: Any = dataclasses.MISSING) -> Any:
  """A field whose change makes more of what is there."""
  return dataclasses.field(default=default, metadata={_KEY: EXTENDS})


def lasting(config: Any) -> dict[str, Any]:
  """Values of the fields of a config, by name, that are not FREE.

  Free ones of a model change how it is computed, but not what its params mean.
  """
  return {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if change_of(field) != FREE
  }


def change_of(field: dataclasses.Field) -> str:
  """The kind of a field: FREE, EXTENDS or REMAKES."""
  return field.metadata.get(_KEY, REMAKES)
