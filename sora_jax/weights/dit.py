"""Names of Wan's transformer (arXiv:2503.20314), in its own and diffusers' files."""

from sora_jax.models.dit import DiTConfig
from sora_jax.weights.mapping import Entry, linear, plain

LAYOUTS = ("diffusers", "original")

# Module of ours: its name in (diffusers, original).
_OUTER = {
  "text_embed_1": ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
  "text_embed_2": ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
  "time_embed_1": ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
  "time_embed_2": ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
  "time_projection": ("condition_embedder.time_proj", "time_projection.1"),
  "head": ("proj_out", "head.head"),
}
_DENSE = {
  "query": ("attn1.to_q", "self_attn.q"),
  "key": ("attn1.to_k", "self_attn.k"),
  "value": ("attn1.to_v", "self_attn.v"),
  "attention_out": ("attn1.to_out.0", "self_attn.o"),
  "cross_query": ("attn2.to_q", "cross_attn.q"),
  "cross_key": ("attn2.to_k", "cross_attn.k"),
  "cross_value": ("attn2.to_v", "cross_attn.v"),
  "cross_out": ("attn2.to_out.0", "cross_attn.o"),
  "mlp_up": ("ffn.net.0.proj", "ffn.0"),
  "mlp_down": ("ffn.net.2", "ffn.2"),
}
_NORMS = {
  "query_norm": ("attn1.norm_q", "self_attn.norm_q"),
  "key_norm": ("attn1.norm_k", "self_attn.norm_k"),
  "cross_query_norm": ("attn2.norm_q", "cross_attn.norm_q"),
  "cross_key_norm": ("attn2.norm_k", "cross_attn.norm_k"),
  "cross_norm": ("norm2", "norm3"),
}
# Of models that attend to images.
_IMAGE_DENSE = {
  "image_key": ("attn2.add_k_proj", "cross_attn.k_img"),
  "image_value": ("attn2.add_v_proj", "cross_attn.v_img"),
}
_IMAGE_NORMS = {"image_key_norm": ("attn2.norm_added_k", "cross_attn.norm_k_img")}


def entries(config: DiTConfig, layout: str) -> list[Entry]:
  """Every tensor of a checkpoint of `models.dit.DiT`.

  Args:
    config: of the model.
    layout: one of LAYOUTS; "original" is that of Wan's own release.

  Raises:
    ValueError: for another layout, or a model with parts that Wan does not have.
  """
  if layout not in LAYOUTS:
    raise ValueError(f"dit layout {layout!r} is none of {LAYOUTS}")
  if config.pooled_text:
    raise ValueError("a dit with pooled_text has parts that Wan's checkpoints lack")
  if config.absolute_positions:
    raise ValueError("a dit with absolute_positions has parts that Wan's lack")
  if config.rope_theta != 1e4:
    raise ValueError(
      f"a dit with rope_theta {config.rope_theta:g} is none of Wan's, which is 10000"
    )
  which = LAYOUTS.index(layout)
  found = _ends(config, which)
  for layer in range(config.depth):
    found += _block(config, which, layer)
  return found


def _ends(config, which):
  """Entries of what is before and behind the blocks."""
  D = config.width
  found = [
    Entry(
      "patch_embedding.weight",
      (D, config.channels + config.condition_channels, *config.patch_size),
      "patch_embed/kernel",
      (config.patch_width + config.condition_width, D),
      order=(2, 3, 4, 1, 0),  # our patches are (t, h, w, channel)
    ),
    plain("patch_embedding.bias", (D,), "patch_embed/bias"),
    Entry(
      ("scale_shift_table", "head.modulation")[which],
      (1, 2, D),
      "head_modulation",
      (2, D),
    ),
  ]
  for ours, names in _OUTER.items():
    found += _dense(config, names[which], ours, ours)
  return found + (_image(config, which) if config.image_width else [])


def _image(config, which):
  """Entries of what embeds the features of images."""
  V, D = config.image_width, config.width
  place = ("condition_embedder.image_embedder", "img_emb")[which]
  found = []
  for ours, names, width in (
    ("norm_in", ("norm1", "proj.0"), V),
    ("norm_out", ("norm2", "proj.4"), D),
  ):
    name, path = f"{place}.{names[which]}", f"image_embed/{ours}"
    found.append(plain(f"{name}.weight", (width,), f"{path}/scale"))
    found.append(plain(f"{name}.bias", (width,), f"{path}/bias"))
  for ours, names, width in (
    ("up", ("ff.net.0.proj", "proj.1"), V),
    ("down", ("ff.net.2", "proj.3"), D),
  ):
    name, path = f"{place}.{names[which]}", f"image_embed/{ours}"
    found.append(linear(f"{name}.weight", V, width, f"{path}/kernel"))
    found.append(plain(f"{name}.bias", (width,), f"{path}/bias"))
  if config.image_positions:
    name = f"{place}.{('pos_embed', 'emb_pos')[which]}"
    shape = (config.image_tokens, V)
    found.append(Entry(name, (1, *shape), "image_embed/positions", shape))
  return found


def _block(config, which, layer):
  """Entries of one block, which are a layer of our stacked params."""
  D, block = config.width, f"blocks.{layer}"
  table = ("scale_shift_table", "modulation")[which]
  found = [Entry(f"{block}.{table}", (1, 6, D), "blocks/modulation", (6, D), layer)]
  dense, norms = _DENSE, _NORMS
  if config.image_width:
    dense, norms = _DENSE | _IMAGE_DENSE, _NORMS | _IMAGE_NORMS
  for ours, names in dense.items():
    name = f"{block}.{names[which]}"
    found += _dense(config, name, ours, f"blocks/{ours}", layer)
  for ours, names in norms.items():
    name = f"{block}.{names[which]}"
    found.append(plain(f"{name}.weight", (D,), f"blocks/{ours}/scale", layer))
    if ours == "cross_norm":
      found.append(plain(f"{name}.bias", (D,), f"blocks/{ours}/bias", layer))
  return found


def _dense(config, name, ours, path, layer=None):
  """Kernel and bias of the dense layer that is called `ours` here."""
  D = config.width
  widths = {
    "text_embed_1": (config.text_width, D),
    "text_embed_2": (D, D),
    "time_embed_1": (config.frequency_width, D),
    "time_embed_2": (D, D),
    "time_projection": (D, 6 * D),
    "head": (D, config.patch_width),
    "mlp_up": (D, config.mlp_width),
    "mlp_down": (config.mlp_width, D),
  }
  fan_in, fan_out = widths.get(ours, (D, D))
  return [
    linear(f"{name}.weight", fan_in, fan_out, f"{path}/kernel", layer),
    plain(f"{name}.bias", (fan_out,), f"{path}/bias", layer),
  ]
