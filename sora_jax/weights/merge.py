"""Adapters merged into the params of a model."""

import jax
import numpy as np

from sora_jax.models import lora
from sora_jax.models.dit import DiTConfig
from sora_jax.weights import lora as lora_files


def merge_file(params, path, config: DiTConfig, mesh, strength: float = 1.0):
  """Params of a DiT with the adapters of a safetensors file merged in.

  Raises:
    ValueError: naming the file, for one that is not of this model.
  """
  adapters: dict = {}
  for module, (a, b) in lora_files.read(path, config).items():
    adapters |= {f"dit/{module}/{lora.A}": a, f"dit/{module}/{lora.B}": b}
  return merge(params, lora.nest(adapters), strength, mesh)


def merge(params, adapters, scale, mesh):
  """Params with adapters added, `scale` times; the params are donated.

  adapters: a nested dict like the params, with leaves `lora.A` and `lora.B`.
  """
  # B is scaled on the host, as in a file that is read: the same bits both ways.
  adapters = lora.nest(
    {
      path: np.float32(scale) * value if path.endswith(lora.B) else value
      for path, value in lora.flatten(adapters).items()
    }
  )
  places = jax.tree.map(lambda leaf: leaf.sharding, params)
  with jax.set_mesh(mesh):
    merge = jax.jit(
      lambda params, adapters: lora.merge(params, adapters, 1.0),
      out_shardings=places,
      donate_argnums=0,
    )
    return merge(params, adapters)
