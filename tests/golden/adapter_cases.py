"""Adapter files as trainers write them, made of random numbers.

make_adapters.py gives the same ones to diffusers and PEFT.
"""

import json
from typing import NamedTuple

import ml_dtypes
import numpy as np

# The tiny model that they are for, in the words of diffusers' config.
SIZES = {
  "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12,
  "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 8, "ffn_dim": 32,
  "num_layers": 2,
}  # fmt: skip
WIDTH, RANK = 24, 4
WAN, HUB = "blocks.0.self_attn.q", "blocks.0.attn1.to_q"
KOHYA, LYCORIS = ("lora_unet_blocks_0_self_attn_q", "lycoris_blocks_0_self_attn_q")
QUERY = f"{HUB}.weight"


class Case(NamedTuple):
  """A file: tensors, metadata, and what adapter_config.json beside it says.

  changes: of the model's tensors, by diffusers' names, float64.
  """

  tensors: dict
  changes: dict
  metadata: dict | None = None
  beside: dict | None = None


def _normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape, scale=0.1).astype(np.float32)


A, B = _normal(0, RANK, WIDTH), _normal(1, WIDTH, RANK)
V = _normal(2, WIDTH)


def _product(a=A, b=B, scale=1.0):
  return scale * (b.astype(np.float64) @ a.astype(np.float64))


def _pair(prefix, names=("lora_A", "lora_B"), end=".weight", a=A, b=B):
  return {f"{prefix}.{names[0]}{end}": a, f"{prefix}.{names[1]}{end}": b}


DOWN_UP = ("lora_down", "lora_up")


def _kohya(dtype=np.float32, alpha=2):
  return _pair(KOHYA, DOWN_UP) | {f"{KOHYA}.alpha": np.array(alpha, dtype)}


def _rounded(dtype, prefix=f"transformer.{HUB}"):
  a, b = A.astype(dtype), B.astype(dtype)
  return Case(_pair(prefix, a=a, b=b), {QUERY: _product(a, b)})


def _json(**settings):
  return {"lora_adapter_metadata": json.dumps(settings)}


def _kohya_of_all():
  """Every dense layer of the blocks, the only files of kohya that diffusers reads."""
  names = {"ffn_0": "ffn.net.0.proj", "ffn_2": "ffn.net.2"}
  for wan, hub in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    names |= {f"{wan}_{kind}": f"{hub}.to_{kind}" for kind in "qkv"}
    names[f"{wan}_o"] = f"{hub}.to_out.0"
  tensors, changes = {}, {}
  for block in range(SIZES["num_layers"]):
    for i, (wan, hub) in enumerate(names.items()):
      fan_in = 32 if wan == "ffn_2" else WIDTH
      fan_out = 32 if wan == "ffn_0" else WIDTH
      seed = 100 + 20 * block + i
      a, b = _normal(seed, RANK, fan_in), _normal(seed + 50, fan_out, RANK)
      name = f"lora_unet_blocks_{block}_{wan}"
      tensors |= _pair(name, DOWN_UP, a=a, b=b)
      tensors[f"{name}.alpha"] = np.array(1, np.float32)
      changes[f"blocks.{block}.{hub}.weight"] = _product(a, b, 1 / RANK)
  return Case(tensors, changes)


def read_cases() -> dict[str, Case]:
  """Files that are read, by what is special about them."""
  whole, half = {QUERY: _product()}, {QUERY: _product(scale=0.5)}
  a2, b2 = _normal(3, 2, WIDTH), _normal(4, WIDTH, 2)
  patch_a, patch_b = _normal(5, RANK, 4, 1, 2, 2), B[..., None, None, None]
  patch = _product(patch_a.reshape(RANK, -1))
  w1, w2 = _normal(6, 4, 6), _normal(7, 6, 4)
  w2_a, w2_b = _normal(8, 6, 2), _normal(9, 2, 4)
  mlp_a = _normal(10, RANK, 32)
  mlp = _pair("lora_unet_blocks_1_ffn_2", DOWN_UP, a=mlp_a, b=B)
  hub, wan = f"transformer.{HUB}", f"diffusion_model.{WAN}"
  cases = {
    "diffusers": Case(_pair(hub), whole),
    "diffusers with alpha": Case(
      _pair(hub), half,
      _json(**{"transformer.r": RANK, "transformer.lora_alpha": 2,
               "transformer.target_modules": [HUB]}),
    ),
    "peft": Case(
      _pair(f"base_model.model.{HUB}"), half, None, {"r": RANK, "lora_alpha": 2}
    ),
    "peft with alpha of a layer": Case(
      _pair(f"base_model.model.{HUB}"), half, None,
      {"r": 8, "lora_alpha": 64, "rank_pattern": {"to_q": RANK},
       "alpha_pattern": {"attn1.to_q": 2}},
    ),
    "peft with rslora": Case(
      _pair(f"base_model.model.{HUB}"), {QUERY: _product(scale=1.5)}, None,
      {"r": RANK, "lora_alpha": 3, "use_rslora": True},
    ),
    "peft with a bias": Case(
      _pair(f"base_model.model.{HUB}") | {f"base_model.model.{HUB}.lora_B.bias": V},
      half | {f"{HUB}.bias": 0.5 * V.astype(np.float64)}, None,
      {"r": RANK, "lora_alpha": 2, "lora_bias": True},
    ),
    "wan": Case(_pair(wan), whole),
    "wan, down and up": Case(
      _pair(wan, DOWN_UP) | {f"{wan}.alpha": np.array(2, np.float32)}, half
    ),
    "wan without prefix, an adapter's name": Case(
      _pair(WAN, end=".default.weight"), whole
    ),
    "another adapter's name": Case(_pair(HUB, end=".mine.weight"), whole),
    "kohya": Case(_kohya(), half),
    "kohya, alpha int64": Case(_kohya(np.int64), half),
    "kohya, alpha float64": Case(_kohya(np.float64), half),
    "kohya, alpha bfloat16 [1]": Case(
      _kohya() | {f"{KOHYA}.alpha": np.ones(1, ml_dtypes.bfloat16)},
      {QUERY: _product(scale=1 / RANK)},
    ),
    "kohya, two layers": Case(
      _kohya() | mlp,
      half | {"blocks.1.ffn.net.2.weight": _product(mlp_a)},
    ),
    "kohya, all layers": _kohya_of_all(),
    "kohya's metadata says nothing": Case(_pair(wan), whole, {"ss_network_alpha": "2"}),
    "ranks of each layer": Case(
      _pair(hub) | _pair("transformer.blocks.1.attn1.to_q", a=a2, b=b2),
      whole | {"blocks.1.attn1.to_q.weight": _product(a2, b2)},
    ),
    "differences": Case(
      _pair(wan) | {
        f"{wan}.diff_b": V,
        "diffusion_model.blocks.1.norm3.diff": V,
        "diffusion_model.blocks.1.norm3.diff_b": -V,
        "diffusion_model.blocks.0.self_attn.norm_k.diff": 2 * V,
        "diffusion_model.text_embedding.0.diff": _normal(11, WIDTH, 16),
        "diffusion_model.head.head.diff_b": _normal(12, 16),
      },
      whole | {
        f"{HUB}.bias": V, "blocks.1.norm2.weight": V, "blocks.1.norm2.bias": -V,
        "blocks.0.attn1.norm_k.weight": 2 * V,
        "condition_embedder.text_embedder.linear_1.weight": _normal(11, WIDTH, 16),
        "proj_out.bias": _normal(12, 16),
      },
    ),
    "a convolution": Case(
      _pair("diffusion_model.patch_embedding", DOWN_UP, a=patch_a, b=patch_b),
      {"patch_embedding.weight": patch.reshape(WIDTH, 4, 1, 2, 2)},
    ),
    "LoKr": Case(
      {f"{LYCORIS}.lokr_w1": w1, f"{LYCORIS}.lokr_w2": w2,
       f"{LYCORIS}.alpha": np.array(1e9, np.float32)},
      {QUERY: np.kron(w1.astype(np.float64), w2)},
    ),
    "LoKr of low rank": Case(
      {f"{wan}.lokr_w1": w1, f"{wan}.lokr_w2_a": w2_a, f"{wan}.lokr_w2_b": w2_b,
       f"{wan}.alpha": np.array(1, np.float32)},
      {QUERY: 0.5 * np.kron(w1.astype(np.float64), w2_a.astype(np.float64) @ w2_b)},
    ),
    "bfloat16": _rounded(ml_dtypes.bfloat16),
    "float16": _rounded(np.float16),
    "float64": _rounded(np.float64),
    "float8_e4m3": _rounded(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": _rounded(ml_dtypes.float8_e5m2, wan),
  }  # fmt: skip
  return cases


def refused_cases() -> dict[str, tuple[dict, str]]:
  """Files that are not read: tensors, and a regex of what is said of them."""
  hub, wan = f"transformer.{HUB}", f"diffusion_model.{WAN}"
  good, nan = _pair(hub), A.copy()
  nan[1, 2] = np.nan
  wide = _pair(hub, a=_normal(0, RANK, 32), b=_normal(1, 32, RANK))
  return {
    "NaN": (good | {f"{hub}.lora_A.weight": nan}, rf"{HUB}.lora_A.weight has NaN or"),
    "infinite alpha": (_kohya(alpha=np.inf), r"attn_q.alpha has NaN or infinite"),
    "NaN in a bias": (good | {f"{wan}.diff_b": V * np.nan}, r"q.diff_b has NaN or inf"),
    "large scale": (
      _kohya(alpha=3e38) | {f"{KOHYA}.lora_up.weight": B * 1e20},
      "self_attn.q has NaN .* scale 7.5e",
    ),
    "half of a pair": (_kohya_half(), r"lora_A and lora_B is missing of .*attn.q$"),
    "another width": (wide, r"\(4, 32\) and \(32, 4\), .* needs \(4, 24\) and"),
    "more blocks": (
      _pair("lora_unet_blocks_39_ffn_0", DOWN_UP), "at least 40 blocks, .* 2",
    ),
    "whole numbers": (_pair(hub, a=A.astype(np.int8)), "of type int8"),
    "DoRA": (good | {f"{hub}.lora_magnitude_vector": V}, "is DoRA"),
    "kohya's DoRA": (_kohya() | {f"{KOHYA}.dora_scale": V}, "is DoRA"),
    "LoHa": ({f"{KOHYA}.hada_w1_a": A, f"{KOHYA}.alpha": V[:1]}, "is LoHa"),
    "text encoder": (good | _pair("text_encoder.layer.0.q"), "of a text encoder"),
    "kohya's text encoder": (_pair("lora_te1_text_model_q", DOWN_UP), "a text encoder"),
    "SDXL": (_pair("lora_unet_down_blocks_1_attentions_0_to_q", DOWN_UP), "U-Net"),
    "Flux": (_pair("transformer.single_transformer_blocks.0.attn.to_q"), "of Flux"),
    "HunyuanVideo": (_pair("diffusion_model.double_blocks.0.img_attn_qkv"), "Hunyuan"),
    "LTX": (_pair("transformer.transformer_blocks.0.attn1.to_q"), "LTX-Video"),
    "image to video": (
      good | _pair("diffusion_model.blocks.0.cross_attn.k_img"), "image-to-video",
    ),
    "VACE": (_pair("diffusion_model.vace_blocks.0.self_attn.q"), "of VACE"),
    "second transformer": (_pair(f"transformer_2.{HUB}"), "a second transformer"),
    "a model": ({f"model.diffusion_model.{WAN}.weight": A}, "a model and no adapter"),
    "two adapters": (
      _pair(hub, end=".a.weight") | _pair(hub, end=".b.weight"), r"several .* \(a, b\)",
    ),
    "one layer twice": (good | _pair(wan), "are the same layer"),
    "nothing": ({}, "without tensors"),
  }  # fmt: skip


def _kohya_half():
  return {k: v for k, v in _kohya().items() if "lora_up" not in k}
