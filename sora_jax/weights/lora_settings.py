"""Alpha of an adapter file, in its metadata or beside it, as PEFT has it."""

import json
import math
import pathlib
import re
from typing import NamedTuple

from sora_jax.runtime import safetensors_io

METADATA = "lora_adapter_metadata"


class Settings(NamedTuple):
  """alpha: None = as the rank. patterns: regex of a layer's end -> its own alpha.

  rslora: alpha counts by the root of the rank (arXiv:2312.03732).
  """

  alpha: float | None = None
  patterns: tuple[tuple[str, float], ...] = ()
  rslora: bool = False

  def scale(self, module: str, rank: int) -> float:
    """How much B A counts for a layer of that rank."""
    alpha = rank if self.alpha is None else self.alpha
    for pattern, own in self.patterns:
      if re.match(rf"(.*\.)?({pattern})$", module):
        alpha = own
        break
    return alpha / (math.sqrt(rank) if self.rslora else rank)


def read(path) -> Settings:
  """Settings of a file, by its metadata or adapter_config.json.

  What kohya's scripts keep in metadata (ss_network_alpha) is no setting: their alpha is
  a tensor, and what converts their files multiplies it into the weights.

  Raises:
    ValueError: if they cannot be read, or are of adapters that cannot be.
  """
  path = pathlib.Path(path)
  beside = path.with_name("adapter_config.json")
  try:
    settings = json.loads(safetensors_io.read_metadata(path).get(METADATA, "{}"))
    settings = {k.removeprefix("transformer."): v for k, v in settings.items()}
    if not settings and beside.exists():
      settings = dict(json.loads(beside.read_text()))
    alpha = settings.get("lora_alpha")
    patterns = tuple((settings.get("alpha_pattern") or {}).items())
    for value in (alpha, *(value for _, value in patterns)):
      if value is not None and not math.isfinite(value):
        raise ValueError(f"lora_alpha is {value}")
    for pattern, _ in patterns:
      re.compile(pattern)
  # A number may be too large for a float.
  except (
    ValueError, TypeError, AttributeError, RecursionError, OverflowError, re.error
  ) as error:  # fmt: skip
    raise ValueError(f"{path}: damaged settings of its adapters ({error})") from error
  if settings.get("use_dora"):
    raise ValueError(f"{path}: adapters with use_dora (DoRA) cannot be read")
  if (kind := settings.get("peft_type") or "LORA") not in ("LORA", "LOKR"):
    raise ValueError(f"{path}: adapters of peft_type {kind} cannot be read")
  return Settings(alpha, patterns, bool(settings.get("use_rslora")))
