"""The config.json of published models, and our configs of the same networks."""

from collections.abc import Callable
from typing import Any, NamedTuple

from sora_jax.models import clip_text as clip_model
from sora_jax.models import clip_vision as vision_model
from sora_jax.models import dit as dit_model
from sora_jax.models import t5 as text_model
from sora_jax.models import vae_config as vae_model
from sora_jax.weights import (
  clip_text,
  clip_vision,
  dit,
  mapping,
  supported,
  text,
  vae,
)

TextConfig = text_model.T5Config | clip_model.CLIPTextConfig
Config = (
  vae_model.VAEConfig | dit_model.DiTConfig | vision_model.CLIPVisionConfig | TextConfig
)
PRESETS = {
  "vae": vae_model.PRESETS,
  "dit": dit_model.PRESETS,
  "text": {**text_model.PRESETS, **clip_model.PRESETS},
  "image": vision_model.PRESETS,
}
_ENTRIES: dict[str, Callable] = {
  "vae": vae.entries,
  "dit": dit.entries,
  "dit_low": dit.entries,
  "text": text.entries,
  "image": clip_vision.entries,
}


class Published(NamedTuple):
  """A network as it is published.

  Attributes:
    network: "vae", "dit", "text" or "image", or "dit_low" for the expert for low noise.
    layout: of its tensors' names, "diffusers" or "original".
    config: our config of it.
    latent_stats: (mean, std) of each channel of a VAE's latents.
  """

  network: str
  layout: str
  config: Config
  latent_stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None

  def entries(self) -> list[mapping.Entry]:
    """Its tensors. ValueError if the layout cannot express the config."""
    if isinstance(self.config, clip_model.CLIPTextConfig):
      return clip_text.entries(self.config, self.layout)
    return _ENTRIES[self.network](self.config, self.layout)

  @property
  def is_clip(self) -> bool:
    """Whether it is CLIP's text tower and not T5's encoder."""
    return isinstance(self.config, clip_model.CLIPTextConfig)

  @property
  def ignored(self) -> tuple[str, ...]:
    """Regexes of other tensors that a file of the network may hold."""
    if self.network == "image":
      return clip_vision.IGNORED
    if self.network != "text":
      return ()
    return clip_text.IGNORED if self.is_clip else text.IGNORED


def preset(name: str, layout: str) -> Published:
  """A published model by our name for it. ValueError for an unknown name."""
  for network, presets in PRESETS.items():
    if name in presets:
      stats = vae_model.LATENT_STATS[name] if network == "vae" else None
      return Published(network, layout, presets[name], stats)
  known = [name for presets in PRESETS.values() for name in presets]
  raise ValueError(f"no preset {name!r}; there are {', '.join(known)}")


def from_json(config: dict[str, Any], where: str) -> Published:
  """What a config.json of diffusers, transformers or Wan's own release describes.

  Args:
    config: its content.
    where: named in errors.

  Raises:
    ValueError: for other networks, for keys that are missing or unknown, and for values
      that our networks cannot express.
  """
  kind = supported.check(config, where)
  readers = {
    "AutoencoderKLWan": _vae,
    "WanTransformer3DModel": _dit,
    "WanModel": _original_dit,
    "t5": _text,
    "umt5": _text,
    "clip": _clip,
    "clip_text_model": _clip,
    "clip_vision_model": _vision,
  }
  assert readers.keys() == supported.READ.keys()
  return readers[kind](config, where)


def to_json(published: Published, dtype: str = "float32") -> dict[str, Any]:
  """The config.json of diffusers or transformers for a network.

  dtype: of its tensors, which transformers wants to know.
  """
  makers = {
    "vae": _vae_json,
    "dit": _dit_json,
    "dit_low": _dit_json,
    "text": _text_json,
    "image": _vision_json,
  }
  return makers[published.network](published, dtype)


def _take(config, where, sizes, fixed, free):
  """Sizes of a config.json, after all of its other keys were found to be right.

  Args:
    config, where: as in `from_json`.
    sizes: key -> default, or its type if it must be there.
    fixed: key -> its only value.
    free: keys that say nothing of the network's outputs.
  """
  if unknown := set(config) - set(sizes) - set(fixed) - set(free):
    raise ValueError(f"{where}: unknown keys {sorted(unknown)}")
  for key, value in fixed.items():
    if config.get(key, value) != value:
      raise ValueError(f"{where}: {key} is {config[key]!r}, only {value!r} is known")
  taken = {key: config.get(key, default) for key, default in sizes.items()}
  for key, default in sizes.items():
    if isinstance(default, type) and type(taken[key]) is not default:
      what = repr(config[key]) if key in config else "missing"
      raise ValueError(f"{where}: {key} is {what}, not of type {default.__name__}")
  return taken


_DIFFUSERS = ("_class_name", "_diffusers_version", "_name_or_path")


def _vae(config, where):
  mean, std = vae_model.LATENT_STATS["wan2.1"]
  c = _take(
    config,
    where,
    {
      "base_dim": int,
      "decoder_base_dim": None,
      "z_dim": int,
      "dim_mult": list,
      "num_res_blocks": int,
      "temperal_downsample": list,
      "latents_mean": mean,
      "latents_std": std,
      "is_residual": False,
      "in_channels": 3,
      "out_channels": 3,
      "patch_size": None,
      "scale_factor_temporal": 4,
      "scale_factor_spatial": 8,
    },
    {"attn_scales": []},
    ("dropout", "clip_output", *_DIFFUSERS),
  )
  patch = c["patch_size"] or 1
  for key in ("in_channels", "out_channels"):
    if c[key] != 3 * patch**2:
      raise ValueError(
        f"{where}: {key} is {c[key]}, but patches of {patch}x{patch} RGB pixels have "
        f"{3 * patch**2}"
      )
  for key in ("latents_mean", "latents_std"):
    if len(c[key]) != c["z_dim"]:
      raise ValueError(
        f"{where}: {key} has {len(c[key])} of z_dim {c['z_dim']} numbers"
      )
  ours = vae_model.VAEConfig(
    width=c["base_dim"],
    width_multipliers=tuple(c["dim_mult"]),
    downsample=tuple("st" if time else "s" for time in c["temperal_downsample"]),
    blocks=c["num_res_blocks"],
    latent_channels=c["z_dim"],
    patch_size=(1, patch, patch),
    decoder_width=c["decoder_base_dim"] or 0,
    stage_shortcut=c["is_residual"],
  )
  for key, value in _scale_factors(ours).items():
    if c[key] != value:
      raise ValueError(f"{where}: {key} is {c[key]}, by the other keys {value}")
  stats = (tuple(c["latents_mean"]), tuple(c["latents_std"]))
  return Published("vae", "diffusers", ours, stats)


def _scale_factors(config):
  return {
    "scale_factor_temporal": config.time_factor,
    "scale_factor_spatial": config.space_factor,
  }


def _vae_json(published, dtype):
  c, (mean, std) = published.config, published.latent_stats
  patch = c.patch_size[1]
  return {
    "_class_name": "AutoencoderKLWan",
    "attn_scales": [],
    "base_dim": c.width,
    "decoder_base_dim": c.decoder_width or None,
    "dim_mult": list(c.width_multipliers),
    "dropout": 0.0,
    "in_channels": 3 * patch**2,
    "is_residual": c.stage_shortcut,
    "latents_mean": list(mean),
    "latents_std": list(std),
    "num_res_blocks": c.blocks,
    "out_channels": 3 * patch**2,
    "patch_size": patch if patch > 1 else None,
    "temperal_downsample": ["t" in kind for kind in c.downsample],
    "z_dim": c.latent_channels,
    **_scale_factors(c),
  }


def _channels(c, keys, where):
  """Our fields of what goes into a DiT, and comes out of it."""
  read, made = (c[key] for key in keys)
  # A mask of the 4 frames of a latent one, and the latents of given frames.
  if read not in (made, made + 4 + made):
    raise ValueError(
      f"{where}: {keys[0]} is {read} and {keys[1]} {made}: only models that read the "
      f"noise alone, {made}, or a mask and given frames beside it, {2 * made + 4}, are "
      "known"
    )
  return {"channels": made, "condition_channels": read - made}


def _images(width, positions):
  """Our fields of the images that a DiT attends to, from those of a config.json."""
  if not width:
    return {}
  return {
    "image_width": width,
    # Without positions no config says it; see `import_weights`.
    "image_tokens": positions or vision_model.CLIPVisionConfig().tokens,
    "image_positions": bool(positions),
  }


def _dit(config, where):
  c = _take(
    config,
    where,
    {
      "num_attention_heads": int,
      "attention_head_dim": int,
      "in_channels": int,
      "out_channels": int,
      "text_dim": int,
      "ffn_dim": int,
      "num_layers": int,
      "patch_size": (1, 2, 2),
      "freq_dim": 256,
      "image_dim": None,
      "added_kv_proj_dim": None,
      "pos_embed_seq_len": None,
    },
    {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6},
    # A table's length, of which we need none.
    ("rope_max_seq_len", *_DIFFUSERS),
  )
  for key in ("image_dim", "pos_embed_seq_len"):
    if type(c[key]) not in (int, type(None)):
      raise ValueError(f"{where}: {key} is {c[key]!r}, not a whole number")
  width = c["num_attention_heads"] * c["attention_head_dim"]
  if c["added_kv_proj_dim"] != (width if c["image_dim"] else None):
    raise ValueError(
      f"{where}: added_kv_proj_dim is {c['added_kv_proj_dim']!r}, but image_dim is "
      f"{c['image_dim']!r} and the model's width {width}"
    )
  ours = dit_model.DiTConfig(
    patch_size=tuple(c["patch_size"]),
    **_channels(c, ("in_channels", "out_channels"), where),
    **_images(c["image_dim"], c["pos_embed_seq_len"]),
    width=width,
    depth=c["num_layers"],
    heads=c["num_attention_heads"],
    mlp_width=c["ffn_dim"],
    text_width=c["text_dim"],
    frequency_width=c["freq_dim"],
  )
  return Published("dit", "diffusers", ours)


def _original_dit(config, where):
  c = _take(
    config,
    where,
    {
      "dim": int,
      "ffn_dim": int,
      "num_heads": int,
      "num_layers": int,
      "in_dim": int,
      "out_dim": int,
      "freq_dim": 256,
      "text_dim": 4096,
      "patch_size": (1, 2, 2),
    },
    {"eps": 1e-6, "qk_norm": True, "cross_attn_norm": True, "window_size": [-1, -1]},
    ("model_type", "text_len", *_DIFFUSERS),
  )
  ours = dit_model.DiTConfig(
    patch_size=tuple(c["patch_size"]),
    **_channels(c, ("in_dim", "out_dim"), where),
    width=c["dim"],
    depth=c["num_layers"],
    heads=c["num_heads"],
    mlp_width=c["ffn_dim"],
    text_width=c["text_dim"],
    frequency_width=c["freq_dim"],
  )
  return Published("dit", "original", ours)


def _dit_json(published, dtype):
  c = published.config
  return {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": c.width if c.image_width else None,
    "attention_head_dim": c.width // c.heads,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "ffn_dim": c.mlp_width,
    "freq_dim": c.frequency_width,
    "image_dim": c.image_width or None,
    "in_channels": c.channels + c.condition_channels,
    "num_attention_heads": c.heads,
    "num_layers": c.depth,
    "out_channels": c.channels,
    "patch_size": list(c.patch_size),
    "pos_embed_seq_len": c.image_tokens if c.image_positions else None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": c.text_width,
  }


# Of a transformers' config.json, what concerns training, decoders and generation.
_TEXT_FREE = """
architectures bos_token_id classifier_dropout decoder_start_token_id dropout_rate dtype
eos_token_id gradient_checkpointing initializer_factor is_decoder is_encoder_decoder
model_type n_positions num_decoder_layers output_past pad_token_id scalable_attention
scale_decoder_outputs task_specific_params tie_word_embeddings tokenizer_class
torch_dtype transformers_version use_cache _name_or_path
""".split()


def _text(config, where):
  c = _take(
    config,
    where,
    {
      "vocab_size": int,
      "d_model": int,
      "num_layers": int,
      "num_heads": int,
      "d_kv": int,
      "d_ff": int,
      "feed_forward_proj": str,
      "relative_attention_num_buckets": 32,
      "relative_attention_max_distance": 128,
    },
    {"dense_act_fn": "gelu_new", "is_gated_act": True, "layer_norm_epsilon": 1e-6},
    _TEXT_FREE,
  )
  if c["feed_forward_proj"] != "gated-gelu":
    raise ValueError(
      f"{where}: feed_forward_proj is {c['feed_forward_proj']!r}, only 'gated-gelu' "
      "(T5 v1.1, UMT5) is known"
    )
  ours = text_model.T5Config(
    vocab_size=c["vocab_size"],
    width=c["d_model"],
    depth=c["num_layers"],
    heads=c["num_heads"],
    head_dim=c["d_kv"],
    mlp_width=c["d_ff"],
    buckets=c["relative_attention_num_buckets"],
    max_distance=c["relative_attention_max_distance"],
    bias_per_layer=config["model_type"] == "umt5",
  )
  return Published("text", "diffusers", ours)


def _clip(config, where):
  if config["model_type"] == "clip":
    config = config.get("text_config")
    if not isinstance(config, dict):
      raise ValueError(f"{where}: it has no text_config")
  return Published("text", "diffusers", _tower(config, where, clip_text.SIZES))


def _vision(config, where):
  fixed = {"num_channels": 3}
  tower = _tower(config, where, clip_vision.SIZES, vision_model.CLIPVisionConfig, fixed)
  return Published("image", "diffusers", tower)


def _tower(config, where, names, kind=clip_model.CLIPTextConfig, fixed=None):
  """Our config, of a kind, of one of CLIP's towers, with `names` as its SIZES."""
  sizes = {key: default for key, (_, default) in names.items()}
  fixed = {"layer_norm_eps": 1e-5, **(fixed or {})}
  c = _take(config, where, sizes, fixed, clip_text.FREE)
  try:
    return kind(**{name: c[key] for key, (name, _) in names.items()})
  except (ValueError, TypeError) as error:
    raise ValueError(f"{where}: {error}") from error


def _clip_json(published, dtype):
  sizes = clip_text.SIZES
  return _tower_json(published, dtype, sizes, "CLIPTextModel", "clip_text_model")


def _vision_json(published, dtype):
  sizes = clip_vision.SIZES
  return _tower_json(published, dtype, sizes, "CLIPVisionModel", "clip_vision_model")


def _tower_json(published, dtype, names, architecture, model_type):
  sizes = {key: getattr(published.config, name) for key, (name, _) in names.items()}
  return {
    "architectures": [architecture],
    "layer_norm_eps": 1e-5,
    "model_type": model_type,
    "torch_dtype": dtype,
    **sizes,
  }


def _text_json(published, dtype):
  if published.is_clip:
    return _clip_json(published, dtype)
  c = published.config
  model_type = "umt5" if c.bias_per_layer else "t5"
  return {
    "architectures": [f"{model_type.upper()}EncoderModel"],
    "d_ff": c.mlp_width,
    "d_kv": c.head_dim,
    "d_model": c.width,
    "dense_act_fn": "gelu_new",
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-6,
    "model_type": model_type,
    "num_decoder_layers": c.depth,
    "num_heads": c.heads,
    "num_layers": c.depth,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "relative_attention_max_distance": c.max_distance,
    "relative_attention_num_buckets": c.buckets,
    "tie_word_embeddings": True,
    "torch_dtype": dtype,
    "vocab_size": c.vocab_size,
  }
