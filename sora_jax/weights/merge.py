"""Adapters merged into the params of a model."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.models import lora
from sora_jax.models.dit import DiTConfig
from sora_jax.weights import lora as lora_files


def with_strength(text: str, strength: float) -> tuple[str, float]:
  """(path, strength) of "a.safetensors:0.8", or of a path alone with the default.

  Raises:
    ValueError: for a strength that is no finite number.
  """
  path, colon, number = text.rpartition(":")
  if colon and not pathlib.Path(text).exists() and "/" not in number:
    try:
      text, strength = path, float(number)
    except ValueError:
      raise ValueError(f"--lora={text}: {number!r} is no strength") from None
  if not math.isfinite(strength):
    raise ValueError(f"--lora={text}: its strength is {strength}")
  return text, strength


def merge_file(params, path, config: DiTConfig, mesh, strength: float = 1.0):
  """Params of a DiT with the adapters of a safetensors file merged in.

  The params are donated.

  Raises:
    ValueError: naming the file, for one that is not of this model.
  """
  found = lora_files.read(path, config)
  adapters: dict = {}
  for module, (a, b) in found.pairs.items():
    adapters |= {f"dit/{module}/{lora.A}": a, f"dit/{module}/{lora.B}": b}
  if adapters:
    params = merge(params, lora.nest(adapters), strength, mesh)
  flat = lora.flatten(params)
  with jax.set_mesh(mesh):
    for change in found.dense:
      leaf = flat[f"dit/{change.path}"]
      add = jax.jit(_add, donate_argnums=0, out_shardings=leaf.sharding)
      value = np.float32(strength) * change.make()
      flat[f"dit/{change.path}"] = add(leaf, value, change.layer)
  return lora.nest(flat)


def _add(leaf, change, layer):
  """A leaf, or a layer of it, with a change; computed in float32 as `lora.merge`."""
  part = leaf if layer is None else leaf[layer]
  part = (part.astype(jnp.float32) + change).astype(leaf.dtype)
  return part if layer is None else leaf.at[layer].set(part)


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
