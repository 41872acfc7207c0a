"""sora_jax: train a Sora-like video model on TPUs, from raw videos to samples.

The public Python API; each name is imported when it is first asked for:

  import sora_jax

  recipe = sora_jax.load_config("configs/quickstart.py:short", {"dit.rows": 8})
  sora_jax.run_stages(recipe, "runs/short")
  sampler = sora_jax.Sampler.from_checkpoint("runs/short")
  request = sora_jax.Request("a red circle", 64, 64, frames=17, fps=12.0, seed=0)
  (video_THWC,) = sampler.sample([request])

Nothing here defines a flag or changes how a program logs: the commands do.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from sora_jax.encoders.autoencoder import Autoencoder
  from sora_jax.run.api import load_config, run_stages
  from sora_jax.sampling.conditioning import Request
  from sora_jax.sampling.pipeline import Sampler

__version__ = "0.2.0.dev0"
__all__ = ["Autoencoder", "Request", "Sampler", "load_config", "run_stages"]

_MODULES = {
  "Autoencoder": "sora_jax.encoders.autoencoder",
  "Request": "sora_jax.sampling.conditioning",
  "Sampler": "sora_jax.sampling.pipeline",
  "load_config": "sora_jax.run.api",
  "run_stages": "sora_jax.run.api",
}


def __getattr__(name: str) -> Any:
  """Imports a name of the API (PEP 562)."""
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
  return sorted([*__all__, "__version__"])
