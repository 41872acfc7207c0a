"""Adapters of a DiT in safetensors files, as PEFT and diffusers lay them out.

Of each adapted layer `transformer.blocks.0.attn1.to_q.lora_A.weight` [rank, in] and
`...lora_B.weight` [out, rank], and in the file's metadata the rank and alpha, where
diffusers' WanLoraLoaderMixin reads them. So they are written; files of others are read
too, by other names and of other kinds: see `lora_names`.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sora_jax.models.dit import DiTConfig
from sora_jax.runtime import safetensors_io
from sora_jax.weights import dit, lora_names, lora_settings
from sora_jax.weights.mapping import Entry


def write(path, adapters: dict, config: DiTConfig, alpha: float) -> None:
  """Writes adapters [, layers, in, rank] and [, layers, rank, out] of a DiT.

  Args:
    path: of the .safetensors file.
    adapters: path of one of the DiT's modules ("blocks/query") -> (A, B).
    config: of the DiT.
    alpha: of all of them; see `lora.LoRAConfig`.

  Raises:
    ValueError: for a module that Wan has no name for.
  """
  check(config, adapters)
  path, planned, values, targets = pathlib.Path(path), [], [], set()
  for name, entry in _kernels(config, "diffusers").items():
    module = entry.path.removesuffix("/kernel")
    if module not in adapters:
      continue
    pair = [np.asarray(value, np.float32) for value in adapters[module]]
    rank = pair[0].shape[-1]
    targets.add(re.sub(r"^blocks\.\d+\.", "", name))
    for kind, part, value in zip(("A", "B"), _parts(entry, rank), pair, strict=True):
      value = part.save(value if entry.layer is None else value[entry.layer])
      tensor = f"transformer.{name}.lora_{kind}.weight"
      planned.append(safetensors_io.Plan(tensor, value.shape, value.dtype))
      values.append(value)
  settings = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(targets)}
  settings = {f"transformer.{key}": value for key, value in settings.items()}
  text = json.dumps(settings, indent=2, sort_keys=True)
  path.parent.mkdir(parents=True, exist_ok=True)
  safetensors_io.write_file(path, planned, iter(values), {lora_settings.METADATA: text})


class Dense(NamedTuple):
  """A change of a leaf that has no low rank: what is added to it.

  path: of the leaf, "blocks/cross_norm/scale". layer: of a scanned leaf; None = all of
  it. make: gives the change, float32, in our shape; a model's do not fit in memory.
  """

  path: str
  layer: int | None
  make: Callable[[], np.ndarray]


class Adapters(NamedTuple):
  """What a file adds to a model.

  pairs: path of a module -> (A, B), float32; B is scaled with alpha / rank. Layers of a
  scanned kernel that the file leaves out are zero, lower ranks are padded.
  dense: changes of biases, norms and whole kernels.
  """

  pairs: dict[str, tuple[np.ndarray, np.ndarray]]
  dense: list[Dense]


def read(path, config: DiTConfig) -> Adapters:
  """What a file adds to a model: LoRA, LoKr, differences of weights and of biases.

  Raises:
    ValueError: for a file that is not read (see `safetensors_io.read_header`), or with
      tensors that are no adapters of this model, half of one, or not finite; names
      them and says what they are.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"{path}: no such adapter file")
  tensors = safetensors_io.read_header(path)
  known: dict[str, Entry] = {}
  for layout in dit.LAYOUTS:
    known |= lora_names.entries(config, layout)
  modules = lora_names.modules(path, tensors, known, config.depth)
  settings = lora_settings.read(path)
  pairs: dict[str, list] = {}
  dense: list[Dense] = []
  names: dict[tuple, str] = {}
  for module in modules:
    values = {
      k: _value(path, name, tensors[name]) for k, name in module.tensors.items()
    }
    made = _Layer(path, module.name, values, settings)
    entry = known.get(f"{module.name}.weight") or known[module.name]
    bias = known.get(f"{module.name}.bias")
    other = names.setdefault((entry.path, entry.layer), module.name)
    if other != module.name:
      raise ValueError(f"{path}: {module.name} and {other} are the same layer")
    if pair := made.pair(entry):
      name = entry.path.removesuffix("/kernel")
      pairs.setdefault(name, []).append((entry.layer, *pair))
    dense += made.dense(entry, bias)
  return Adapters(
    {name: _stack(parts, config.depth) for name, parts in pairs.items()}, dense
  )


def _value(path, name, tensor) -> np.ndarray:
  """A tensor in float32. ValueError if it is of whole numbers, or not finite."""
  if tensor.dtype.kind in "iub" and not name.endswith("alpha"):
    raise ValueError(f"{path}: {name} is of type {tensor.dtype}, which is no adapter's")
  with np.errstate(over="ignore", invalid="ignore"):
    value = safetensors_io.read(tensor).astype(np.float32)
  if not np.isfinite(value).all():
    raise ValueError(f"{path}: {name} has NaN or infinite values")
  if name.endswith("alpha") and value.size != 1:
    raise ValueError(f"{path}: {name} is not one number but of shape {value.shape}")
  return value


class _Layer(NamedTuple):
  """What a file has for one layer: kind -> value, see `lora_names.Module`."""

  path: pathlib.Path
  name: str
  values: dict[str, np.ndarray]
  settings: lora_settings.Settings

  def scale(self, rank: int) -> float:
    if "alpha" in self.values:
      return float(self.values["alpha"].reshape(())) / rank
    return self.settings.scale(self.name, rank)

  def pair(self, entry) -> tuple[np.ndarray, np.ndarray] | None:
    """(A, B) of a LoRA in our layout, B scaled."""
    both = [self.values[kind] for kind in ("lora_A", "lora_B") if kind in self.values]
    if not both and "bias" not in self.values and set(self.values) != {"alpha"}:
      return None
    if len(both) < 2:
      raise ValueError(
        f"{self.path}: one of lora_A and lora_B is missing of {self.name}"
      )
    self._needs_kernel(entry)
    a, b = both
    rank = len(a) if a.ndim and b.ndim else 0
    if not rank:
      raise ValueError(
        f"{self.path}: the adapter of {self.name} has shapes {a.shape} and {b.shape}"
      )
    parts = _parts(entry, rank)
    for part, value in zip(parts, both, strict=True):
      if len(value) != part.shape[0] or value.size != np.prod(part.shape):
        raise ValueError(
          f"{self.path}: {self.name} has an adapter of {a.shape} and {b.shape}, this "
          f"model's needs {parts[0].shape} and {parts[1].shape}"
        )
    a, b = (part.load(value) for part, value in zip(parts, both, strict=True))
    return a, self._finite(b, self.scale(rank))

  def dense(self, entry, bias) -> list[Dense]:
    """Changes of the layer's weight and bias, see `Dense`."""
    found = []
    if "lora_B" in self.values and "bias" in self.values:
      change = self._finite(self.values["bias"], self.scale(len(self.values["lora_A"])))
      found.append(self._added("lora_B.bias", bias, change))
    if "diff" in self.values:
      found.append(self._added("diff", entry, self.values["diff"]))
    if "diff_b" in self.values:
      found.append(self._added("diff_b", bias, self.values["diff_b"]))
    if any(kind.startswith("lokr") for kind in self.values):
      found.append(self._lokr(entry))
    return found

  def _added(self, kind, entry, value) -> Dense:
    if entry is None:
      raise ValueError(f"{self.path}: {self.name} has no weight that {kind} changes")
    if value.size != np.prod(entry.shape):
      raise ValueError(
        f"{self.path}: {kind} of {self.name} has shape {value.shape}, this model's "
        f"weight {entry.shape}"
      )
    return Dense(entry.path, entry.layer, lambda: entry.load(value))

  def _lokr(self, entry) -> Dense:
    """The Kronecker product of two matrices, or of their factors (arXiv:2309.14859)."""
    self._needs_kernel(entry)
    factors, rank = [], 0
    for kind in ("lokr_w1", "lokr_w2"):
      whole, a, b = (self.values.get(f"{kind}{end}") for end in ("", "_a", "_b"))
      if whole is not None:
        factors.append(whole)
        continue
      if a is None or b is None:
        raise ValueError(f"{self.path}: {kind} is missing of {self.name}")
      if a.ndim != 2 or b.ndim != 2 or a.shape[1] != len(b) or not len(b):
        raise ValueError(
          f"{self.path}: {kind} of {self.name} has factors {a.shape} and {b.shape}"
        )
      factors.append(a @ b)
      rank = len(b)
    one, two = factors
    made = [a * b for a, b in zip(one.shape, two.shape, strict=False)]
    if one.ndim != 2 or (*made, *two.shape[2:]) != entry.shape:
      raise ValueError(
        f"{self.path}: {self.name} has factors {one.shape} and {two.shape}, which make "
        f"no weight {entry.shape}"
      )
    # Without factors of low rank, alpha means nothing.
    one = self._finite(one, self.scale(rank) if rank else 1.0)
    one = one.reshape(*one.shape, *[1] * (two.ndim - 2))
    return Dense(entry.path, entry.layer, lambda: entry.load(np.kron(one, two)))

  def _needs_kernel(self, entry):
    if entry is None or not entry.path.endswith("/kernel"):
      raise ValueError(f"{self.path}: {self.name} is no dense layer, as adapters need")

  def _finite(self, value, scale):
    with np.errstate(over="ignore", invalid="ignore"):
      value = np.float32(scale) * value
    if not np.isfinite(value).all():
      raise ValueError(
        f"{self.path}: the adapter of {self.name} has NaN or infinite values after its "
        f"scale {scale:g}"
      )
    return value


def check(config: DiTConfig, modules) -> None:
  """Raises ValueError if the file's layout has no name for one of the modules."""
  known = {entry.path for entry in _kernels(config, "diffusers").values()}
  for module in modules:
    if f"{module}/kernel" not in known:
      raise ValueError(f"Wan has no layer {module}, so an adapter of it has no name")


def _kernels(config, layout) -> dict[str, Entry]:
  """Entries of the dense layers' weights, by the name of their module."""
  return {
    name.removesuffix(".weight"): entry
    for name, entry in lora_names.entries(config, layout).items()
    if entry.path.endswith("/kernel")
  }


def _parts(entry, rank) -> tuple[Entry, Entry]:
  """Entries of A and B of a weight [out, in, *kernel] of torch."""
  fan_out, *inner = entry.shape
  a = dataclasses.replace(
    entry, shape=(rank, *inner), our_shape=(entry.our_shape[0], rank)
  )
  b = dataclasses.replace(
    entry,
    shape=(fan_out, rank, *[1] * (len(inner) - 1)),
    our_shape=(rank, fan_out),
    split=(fan_out, rank),
    order=(1, 0),
  )
  return a, b


def _stack(parts, depth):
  """(A, B) of a leaf from those of its layers."""
  if parts[0][0] is None:
    return parts[0][1:]
  rank = max(a.shape[-1] for _, a, _ in parts)
  a_LIR = np.zeros((depth, parts[0][1].shape[0], rank), np.float32)
  b_LRO = np.zeros((depth, rank, parts[0][2].shape[1]), np.float32)
  for layer, a, b in parts:
    a_LIR[layer, :, : a.shape[1]], b_LRO[layer, : len(b)] = a, b
  return a_LIR, b_LRO
