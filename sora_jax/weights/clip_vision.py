"""Names of CLIP's vision tower in transformers' checkpoints, and its config.json."""

from sora_jax.models.clip_vision import CLIPVisionConfig
from sora_jax.weights.clip_text import block_entries, norm
from sora_jax.weights.mapping import Entry, plain

PREFIX = "vision_model."
# A table that files of old versions have, and what compares images with texts.
IGNORED = (
  r"vision_model\.embeddings\.position_ids", r"text_model\..*", r"logit_scale",
  r"(text|visual)_projection\.weight",
)  # fmt: skip
# Sizes of a config.json: theirs -> (ours, default of transformers).
SIZES = {
  "image_size": ("image_size", 224),
  "patch_size": ("patch_size", 32),
  "hidden_size": ("width", 768),
  "num_hidden_layers": ("depth", 12),
  "num_attention_heads": ("heads", 12),
  "intermediate_size": ("mlp_width", 3072),
  "hidden_act": ("activation", "quick_gelu"),
}


def entries(config: CLIPVisionConfig, layout: str) -> list[Entry]:
  """Every tensor of a checkpoint of `models.clip_vision.CLIPVisionEncoder`.

  Raises:
    ValueError: for another layout than "diffusers", which has transformers' names.
  """
  if layout != "diffusers":
    raise ValueError(f"CLIP's vision tower has no layout {layout!r}, only 'diffusers'")
  D, patch = config.width, config.patch_size
  embed = f"{PREFIX}embeddings"
  return [
    plain(f"{embed}.class_embedding", (D,), "class_embed"),
    Entry(
      f"{embed}.patch_embedding.weight",
      (D, 3, patch, patch),
      "patch_embed/kernel",
      (3 * patch * patch, D),
      order=(2, 3, 1, 0),  # our patches are (h, w, channel)
    ),
    plain(
      f"{embed}.position_embedding.weight",
      (config.tokens, D),
      "position_embed/embedding",
    ),
    *norm(f"{PREFIX}pre_layrnorm", D, "first_norm"),  # so spelt there
    *norm(f"{PREFIX}post_layernorm", D, "final_norm"),
    *block_entries(PREFIX, config),
  ]
