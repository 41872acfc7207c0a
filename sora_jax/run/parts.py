"""What a recipe takes in parts: sources of a mixture, budgets of a schedule."""

from typing import Any

from sora_jax.data import mixture
from sora_jax.run import convert

MIXTURE = "mixture"


def check(recipe: Any) -> None:
  """Raises ValueError, naming the key, for parts of a `Recipe` that do not fit."""
  _check_mixture(recipe.data)
  _check_budgets(recipe.data, recipe.encode.budgets)
  if (frames := recipe.encode.stream_frames) < 4 or frames % 4:
    raise ValueError(f"config.encode.stream_frames {frames} must be a multiple of 4")
  _check_schedule(recipe.dit, recipe.encode.budgets)


def _check_mixture(data):
  if (data.source == MIXTURE) != bool(data.mixture):
    raise ValueError(
      f'config.data.source "{MIXTURE}" needs config.data.mixture = ((source, share), '
      f"...), and the other way round; they are {data.source!r} and {data.mixture!r}"
    )
  with convert.naming("config.data.mixture"):
    mixture.check(data.mixture)


def _check_budgets(data, budgets):
  for pixels, frames in budgets:
    if not data.size_multiple**2 <= pixels <= data.max_pixels:
      raise ValueError(
        f"config.encode.budgets: {pixels} pixels are not between one square of "
        f"size_multiple {data.size_multiple} and config.data.max_pixels "
        f"{data.max_pixels}"
      )
    if not 1 <= frames <= data.max_frames:
      raise ValueError(
        f"config.encode.budgets: {frames} frames are not between 1 and "
        f"config.data.max_frames {data.max_frames}"
      )


def _check_schedule(dit, budgets):
  steps = dit.schedule
  if steps and (steps[0] or list(steps) != sorted(set(steps))):
    raise ValueError(f"config.dit.schedule {steps} must begin with 0 and ascend")
  if steps and len(steps) != len(budgets):
    raise ValueError(
      f"config.dit.schedule has {len(steps)} steps, config.encode.budgets "
      f"{len(budgets)} budgets: each needs the step that it begins with"
    )
  if len(dit.image_share) not in (0, max(1, len(steps))):
    raise ValueError(
      f"config.dit.image_share has {len(dit.image_share)} shares for "
      f"{max(1, len(steps))} parts of config.dit.schedule"
    )
  if not all(0 <= share <= 1 for share in dit.image_share):
    raise ValueError(f"config.dit.image_share {dit.image_share} is not from 0 to 1")
