"""What the tensors of an adapter file are: by the names that its trainers give them.

The same layer is `transformer.blocks.0.attn1.to_q` of diffusers and PEFT,
`diffusion_model.blocks.0.self_attn.q` of what trains Wan's own code, and
`lora_unet_blocks_0_self_attn_q` of kohya's and musubi's scripts; its tensors are
`lora_A[.adapter].weight` or `lora_down.weight`, and so on.
"""

import dataclasses
import re
from typing import NamedTuple

from sora_jax.models.dit import DiTConfig
from sora_jax.runtime import safetensors_io
from sora_jax.weights import dit
from sora_jax.weights.mapping import Entry

_PREFIX = re.compile(
  r"(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|"
  r"pipe\.dit\.|dit\.|model\.|lora_unet_|lora_transformer_|lycoris_)"
)
_TAIL = re.compile(
  r"(?P<module>.+?)\.(?:"
  r"(?P<pair>lora_A|lora_B|lora_down|lora_up)(?:\.(?P<adapter>[^.]+))?\.weight|"
  r"(?P<bias>lora_B|lora_up)(?:\.(?P<owner>[^.]+))?\.bias|"
  r"(?P<other>alpha|diff|diff_b|lokr_w[12](?:_[ab])?))"
)
_SAME = {"lora_down": "lora_A", "lora_up": "lora_B"}
# What files are that cannot be read, by a regex of any of their names that fit nothing
# here: the first that is found is told.
_FOREIGN = (
  (r"(down|up)_blocks|mid_block|(input|output|middle)_blocks?",
   "an adapter of a U-Net (Stable Diffusion 1, 2, XL)"),
  (r"double_blocks|single_blocks|single_transformer_blocks",
   "an adapter of Flux or HunyuanVideo"),
  (r"transformer_blocks|joint_blocks",
   "an adapter of another transformer (as SD3, LTX-Video, CogVideoX, Qwen-Image)"),
  (r"vace_", "an adapter of VACE, whose control blocks this model does not have"),
  (r"k_img|v_img|add_[kv]_proj|norm_added|img_emb|image_embedder",
   "an adapter of Wan's image-to-video model, whose image embedding this model does "
   "not have"),
  (r"^transformer_2\.",
   "with adapters of a second transformer (Wan 2.2 A14B), which this model is not"),
  (r"^(base_model\.model\.)?(text_encoders?(_\d)?\.|lora_te\d?_|te\d?_)",
   "with adapters of a text encoder; only those of the video transformer are read"),
  (r"dora_scale|lora_magnitude_vector", "DoRA, which is not read"),
  (r"\.hada_", "LoHa, which is not read"),
  (r"oft_|\.hra_", "OFT, which is not read"),
  (r"lokr_t2|lora_mid|hada_t", "with Tucker factors, which are not read"),
  (r"lora_embedding|modules_to_save|emb_params",
   "with embeddings or whole modules beside its adapters, which are not read"),
)  # fmt: skip


class Module(NamedTuple):
  """A layer that a file changes.

  name: as the model's files have it. tensors: kind -> name in the file; kinds are
  lora_A, lora_B, bias (that of lora_B), alpha, diff, diff_b, lokr_w1, lokr_w1_a, ...
  """

  name: str
  tensors: dict[str, str]


def entries(config: DiTConfig, layout: str) -> dict[str, Entry]:
  """Tensors of the model by their names, without what Wan has no names for."""
  wan = dataclasses.replace(
    config, pooled_text=False, absolute_positions=0, rope_theta=1e4
  )
  return {entry.name: entry for entry in dit.entries(wan, layout)}


def modules(path, names, known: dict[str, Entry], depth: int) -> list[Module]:
  """The layers that a file's tensors change.

  Args:
    path: of the file, for errors.
    names: of its tensors.
    known: the model's tensors in all layouts.
    depth: blocks of the model.

  Raises:
    ValueError: for tensors that are no adapters of this model; says what they are.
  """
  layers = {re.sub(r"\.(weight|bias)$", "", name) for name in known}
  joined = {layer.replace(".", "_"): layer for layer in layers}
  found: dict[str, Module] = {}
  adapters, unknown = set(), []
  for name in names:
    match = _TAIL.fullmatch(name)
    layer = match and joined.get(_bare(match["module"]).replace(".", "_"))
    if not match or not layer:
      unknown.append(name)
      continue
    kind = _SAME.get(match["pair"], match["pair"]) or match["other"] or "bias"
    if not match["other"]:
      adapters.add(match["adapter"] or match["owner"] or "default")
    if len(adapters) > 1:
      named = ", ".join(sorted(adapters))
      raise ValueError(f"{path}: several adapters in one file ({named})")
    tensors = found.setdefault(layer, Module(layer, {})).tensors
    if kind in tensors:
      raise ValueError(f"{path}: {name} and {tensors[kind]} are the same of one layer")
    tensors[kind] = name
  if unknown or not found:
    raise ValueError(f"{path}{_what(unknown, known, depth)}")
  return list(found.values())


def _bare(name):
  """A name without what trainers put in front of it."""
  while match := _PREFIX.match(name):
    name = name[match.end() :]
  return name


def _what(unknown, known, depth) -> str:
  """What a file is that has names which fit nothing here."""
  listed = safetensors_io.listed(unknown, 5)
  if not unknown:
    return ": a file without tensors"
  if whole := [name for name in unknown if _bare(name) in known]:
    return (
      f" holds whole weights ({safetensors_io.listed(whole, 2)}): a model and no "
      "adapter of one; import_weights reads models"
    )
  for regex, what in _FOREIGN:
    if any(re.search(regex, name) for name in unknown):
      return f" is {what}: {listed}"
  found = (re.search(r"blocks[._](\d+)[._]", name) for name in unknown)
  if blocks := [int(match[1]) for match in found if match]:
    if max(blocks) >= depth:
      return (
        f" is of a model of at least {max(blocks) + 1} blocks, this one has {depth}: "
        f"{listed}"
      )
  return f": tensors that are no adapters of this model: {listed}"
