"""Adapters of a DiT in safetensors files, as PEFT and diffusers lay them out.

Of each adapted layer `transformer.blocks.0.attn1.to_q.lora_A.weight` [rank, in] and
`...lora_B.weight` [out, rank], and in the file's metadata the rank and alpha, where
diffusers' WanLoraLoaderMixin reads them. Files of others may also have Wan's own names,
`lora_down` and `lora_up`, and alpha as a tensor of each layer.
"""

import dataclasses
import json
import pathlib
import re

import numpy as np

from sora_jax.models.dit import DiTConfig
from sora_jax.runtime import safetensors_io
from sora_jax.weights import dit
from sora_jax.weights.mapping import Entry

_METADATA = "lora_adapter_metadata"
_NAME = re.compile(
  r"(?:transformer\.|diffusion_model\.|base_model\.model\.)?(?P<module>.+)\."
  r"(?P<kind>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|"
  r"(?:transformer\.|diffusion_model\.|base_model\.model\.)?(?P<scaled>.+)\.alpha"
)
_KINDS = {"lora_down": "lora_A", "lora_up": "lora_B"}


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
  safetensors_io.write_file(path, planned, iter(values), {_METADATA: text})


def read(path, config: DiTConfig) -> dict:
  """Path of a module -> (A, B) of a file, float32; B is scaled with alpha / rank.

  Layers of a scanned kernel that the file leaves out are zero, lower ranks are padded.

  Raises:
    ValueError: for a file that is not read (see `safetensors_io.read_header`), or with
      tensors that are no adapters of this model, or half of one; names them.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"{path}: no such adapter file")
  pairs, alphas = _collect(path, safetensors_io.read_header(path), config)
  default = _alpha(path)
  found: dict = {}
  for (entry, name), pair in pairs.items():
    a, b = (
      safetensors_io.read(pair[kind]).astype(np.float32)
      for kind in ("lora_A", "lora_B")
    )
    rank = len(a)
    parts = _parts(entry, rank)
    for part, value in zip(parts, (a, b), strict=True):
      if value.size != np.prod(part.shape):
        raise ValueError(
          f"{path}: {name} has an adapter of {a.shape} and {b.shape}, this model's "
          f"needs {parts[0].shape} and {parts[1].shape}"
        )
    scale = alphas.get(name, rank if default is None else default) / rank
    a, b = (part.load(value) for part, value in zip(parts, (a, b), strict=True))
    found.setdefault(entry.path.removesuffix("/kernel"), []).append(
      (entry.layer, a, np.float32(scale) * b)
    )
  return {module: _stack(parts, config.depth) for module, parts in found.items()}


def check(config: DiTConfig, modules) -> None:
  """Raises ValueError if the file's layout has no name for one of the modules."""
  known = {entry.path for entry in _kernels(config, "diffusers").values()}
  for module in modules:
    if f"{module}/kernel" not in known:
      raise ValueError(f"Wan has no layer {module}, so an adapter of it has no name")


def _kernels(config, layout) -> dict[str, Entry]:
  """Entries of the dense layers' weights, by the name of their module."""
  entries = dit.entries(
    dataclasses.replace(
      config, pooled_text=False, absolute_positions=0, rope_theta=1e4
    ),
    layout,
  )
  return {
    entry.name.removesuffix(".weight"): entry
    for entry in entries
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


def _collect(path, tensors, config):
  """Pairs of tensors by (entry, name of its module), and the modules' own alphas."""
  kernels = {}
  for layout in dit.LAYOUTS:
    kernels |= _kernels(config, layout)
  pairs, alphas, unknown = {}, {}, []
  for name, tensor in tensors.items():
    match = _NAME.fullmatch(name)
    module = match and (match["module"] or match["scaled"])
    if module not in kernels:
      unknown.append(name)
    elif match["scaled"]:
      alphas[module] = float(safetensors_io.read(tensor).reshape(-1)[0])
    else:
      kind = _KINDS.get(match["kind"], match["kind"])
      pairs.setdefault((kernels[module], module), {})[kind] = tensor
  if unknown:
    raise ValueError(
      f"{path}: tensors that are no adapters of this model: "
      f"{safetensors_io.listed(unknown)}"
    )
  incomplete = [name for (_, name), pair in pairs.items() if len(pair) < 2]
  if incomplete or not pairs:
    what = safetensors_io.listed(incomplete) or "all layers"
    raise ValueError(f"{path}: one of lora_A and lora_B is missing of {what}")
  return pairs, alphas


def _alpha(path) -> float | None:
  """Alpha of the whole file, by its metadata or adapter_config.json, or None."""
  settings = json.loads(safetensors_io.read_metadata(path).get(_METADATA, "{}"))
  settings = {k.removeprefix("transformer."): v for k, v in settings.items()}
  beside = path.with_name("adapter_config.json")
  if not settings and beside.exists():
    settings = json.loads(beside.read_text())
  for key in ("use_dora", "use_rslora", "alpha_pattern"):
    if settings.get(key):
      raise ValueError(f"{path}: adapters with {key} cannot be read")
  return settings.get("lora_alpha")


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
