"""Low-rank adapters of a param tree as pure functions (LoRA, arXiv:2106.09685).

A kernel W [..., in, out] with an adapter acts as W + alpha / rank * A B, where A is
[..., in, rank] and B [..., rank, out]; a leading axis is that of the layers under
`nn.scan`. Adapters are a tree like the params that holds `lora_a` and `lora_b` in place
of each adapted kernel, and nothing else.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

A, B, KERNEL = "lora_a", "lora_b", "kernel"


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """rank: of the adapters; 0 = none, all params are trained.

  alpha: the adapters' part counts alpha / rank times. layers: regex of the whole paths
  of the adapted kernels.
  """

  rank: int = 0
  alpha: float = 16.0
  layers: str = r"dit/blocks/.*/kernel"

  def __post_init__(self):
    if self.rank < 0 or self.alpha <= 0:
      raise ValueError(
        f"lora rank {self.rank} must be at least 0 and alpha {self.alpha} positive"
      )
    try:
      re.compile(self.layers)
    except re.error as error:
      raise ValueError(f"lora layers {self.layers!r} is no regex ({error})") from None

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def init(key: Array, shapes, config: LoRAConfig) -> dict:
  """New adapters, float32: A uniform as that of a dense layer, B zero.

  Args:
    key: of the random values.
    shapes: tree of the params that are adapted, or of their shapes.
    config: which, and of what rank.

  Raises:
    ValueError: if the regex picks nothing or what is no kernel, or the rank is above a
      picked kernel's width.
  """
  adapters = {}
  for i, (name, leaf) in enumerate(picked(shapes, config).items()):
    *layers, fan_in, fan_out = leaf.shape
    bound = math.sqrt(1 / fan_in)
    adapters[f"{name}/{A}"] = jax.random.uniform(
      jax.random.fold_in(key, i), (*layers, fan_in, config.rank), minval=-bound,
      maxval=bound,
    )  # fmt: skip
    adapters[f"{name}/{B}"] = jnp.zeros((*layers, config.rank, fan_out))
  return nest(adapters)


def picked(shapes, config: LoRAConfig) -> dict:
  """The kernels that the regex picks, by the path of their module; see `init`."""
  found = {
    name: leaf
    for name, leaf in flatten(shapes).items()
    if re.fullmatch(config.layers, name)
  }
  if not found:
    raise ValueError(f"lora layers {config.layers!r} matches no param")
  for name, leaf in found.items():
    if name.split("/")[-1] != KERNEL or len(leaf.shape) not in (2, 3):
      raise ValueError(
        f"lora layers {config.layers!r} picks {name} {leaf.shape}, which is no kernel "
        "of a dense layer"
      )
    if config.rank > min(leaf.shape[-2:]):
      raise ValueError(f"lora rank {config.rank} is above the width of {name} "
                       f"{leaf.shape}")  # fmt: skip
  return {name.removesuffix(f"/{KERNEL}"): leaf for name, leaf in found.items()}


def sharding_rules(
  shapes, rules: Sequence[tuple[str, PartitionSpec]], config: LoRAConfig
) -> list[tuple[str, PartitionSpec]]:
  """Rules for the adapters, from those of the params.

  The long side of A is cut as W's rows are, that of B as its columns, and both along
  the axes of the other side too: so all of the state is shared by all devices.
  """
  rules_of = []
  for name, leaf in picked(shapes, config).items():
    spec = next(
      spec for regex, spec in rules if re.fullmatch(regex, f"{name}/{KERNEL}")
    )
    whole = [*spec, *[None] * (len(leaf.shape) - len(spec))]
    *layers, rows, columns = whole
    rows, columns = _axes(rows), _axes(columns)
    a = PartitionSpec(*layers, rows + columns, None)
    b = PartitionSpec(*layers, None, columns + rows)
    rules_of += [(re.escape(f"{name}/{A}"), a), (re.escape(f"{name}/{B}"), b)]
  return rules_of


def _axes(entry) -> tuple[str, ...]:
  """Mesh axes of an entry of a PartitionSpec."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def attach(params, adapters, scale: float) -> dict:
  """Params with adapters beside their kernels, where the layers of models find them.

  For training: no product of A and B, nor a gradient of its size, is ever made. B is
  scaled here, in its own float32.
  """
  flat = flatten(params)
  for name, (a, b) in _pairs(flat, adapters).items():
    flat |= {f"{name}/{A}": a, f"{name}/{B}": scale * b}
  return nest(flat)


def merge(params, adapters, scale: float) -> dict:
  """Params of a model without adapters and the same output; computed in float32.

  Kernels keep their dtype: to merge into float32 params rounds nothing away.
  """
  flat = flatten(params)
  for name, (a, b) in _pairs(flat, adapters).items():
    kernel = flat[f"{name}/{KERNEL}"]
    # Accelerators round the inputs of a float32 matmul at the default precision.
    change = jnp.matmul(a, scale * b, precision=jax.lax.Precision.HIGHEST)
    flat[f"{name}/{KERNEL}"] = (kernel.astype(jnp.float32) + change).astype(
      kernel.dtype
    )
  return nest(flat)


def _pairs(flat_params, adapters) -> dict:
  """(A, B) by the path of their module. ValueError if one fits no kernel."""
  flat, pairs = flatten(adapters), {}
  for path in flat:
    name, kind = path.rsplit("/", 1)
    if kind != A:
      continue
    a, b = flat[path], flat[f"{name}/{B}"]
    kernel = flat_params.get(f"{name}/{KERNEL}")
    shape = (*a.shape[:-1], b.shape[-1])
    if kernel is None or kernel.shape != shape:
      have = "no such layer" if kernel is None else f"one of {kernel.shape}"
      raise ValueError(
        f"an adapter is for {name} with a kernel {shape}, but the model has {have}"
      )
    pairs[name] = (a, b)
  return pairs


def flatten(tree) -> dict:
  """Leaves of nested dicts by their path, 'dit/blocks/query/kernel'."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in leaves
  }


def nest(flat) -> dict:
  """Inverse of `flatten`."""
  tree: dict = {}
  for path, leaf in flat.items():
    *outer, last = path.split("/")
    node = tree
    for key in outer:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree
