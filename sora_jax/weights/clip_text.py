"""Names of CLIP's text tower in transformers' checkpoints, and its config.json."""

from typing import Any

from sora_jax.models.clip_text import CLIPTextConfig
from sora_jax.weights.mapping import Entry, linear, plain

_PREFIX = "text_model."
# The other tower, what compares the two, and a table that files of old versions have.
IGNORED = (
  r"vision_model\..*", r"visual_projection\.weight", r"text_projection\.weight",
  r"logit_scale", r"text_model\.embeddings\.position_ids",
)  # fmt: skip

_DENSE = {
  "query": "self_attn.q_proj",
  "key": "self_attn.k_proj",
  "value": "self_attn.v_proj",
  "attention_out": "self_attn.out_proj",
  "mlp_up": "mlp.fc1",
  "mlp_down": "mlp.fc2",
}
_NORMS = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2"}

# Sizes of a config.json: theirs -> (ours, default of transformers).
SIZES = {
  "vocab_size": ("vocab_size", 49408),
  "max_position_embeddings": ("positions", 77),
  "hidden_size": ("width", 512),
  "num_hidden_layers": ("depth", 12),
  "num_attention_heads": ("heads", 8),
  "intermediate_size": ("mlp_width", 2048),
  "hidden_act": ("activation", "quick_gelu"),
}
# Keys that concern training, other towers and generation; old versions write them all.
FREE = """
add_cross_attention architectures attention_dropout bad_words_ids begin_suppress_tokens
bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
diversity_penalty do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size
eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
forced_eos_token_id gradient_checkpointing id2label initializer_factor initializer_range
is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
output_hidden_states output_scores pad_token_id prefix problem_type projection_dim
pruned_heads remove_invalid_values repetition_penalty return_dict
return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p
torch_dtype torchscript transformers_version typical_p use_bfloat16 _name_or_path
""".split()


def entries(config: CLIPTextConfig, layout: str) -> list[Entry]:
  """Every tensor of a checkpoint of `models.clip_text.CLIPTextEncoder`.

  Raises:
    ValueError: for another layout than "diffusers", which has transformers' names.
  """
  if layout != "diffusers":
    raise ValueError(f"CLIP's text tower has no layout {layout!r}, only 'diffusers'")
  D, embed = config.width, f"{_PREFIX}embeddings"
  return [
    plain(
      f"{embed}.token_embedding.weight",
      (config.vocab_size, D),
      "token_embed/embedding",
    ),
    plain(
      f"{embed}.position_embedding.weight",
      (config.positions, D),
      "position_embed/embedding",
    ),
    *norm(f"{_PREFIX}final_layer_norm", D, "final_norm"),
    *block_entries(_PREFIX, config),
  ]


def block_entries(prefix: str, config) -> list[Entry]:
  """Tensors of the blocks of a tower, of which either has its prefix."""
  D, F = config.width, config.mlp_width
  widths = {"mlp_up": (D, F), "mlp_down": (F, D)}
  found = []
  for layer in range(config.depth):
    block = f"{prefix}encoder.layers.{layer}"
    for ours, theirs in _DENSE.items():
      name, path = f"{block}.{theirs}", f"blocks/{ours}"
      fan_in, fan_out = widths.get(ours, (D, D))
      found.append(linear(f"{name}.weight", fan_in, fan_out, f"{path}/kernel", layer))
      found.append(plain(f"{name}.bias", (fan_out,), f"{path}/bias", layer))
    for ours, theirs in _NORMS.items():
      found += norm(f"{block}.{theirs}", D, f"blocks/{ours}", layer)
  return found


def with_prefix(tensors: dict[str, Any], prefix: str = _PREFIX) -> dict[str, Any]:
  """Tensors by the names of files that hold the whole of CLIP.

  Those of a tower alone begin with "embeddings" in some versions.

  prefix: of the tower.
  """
  if any(name.startswith(prefix) for name in tensors):
    return tensors
  return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def norm(name, width, path, layer=None):
  """Scale and bias of a layer norm."""
  yield plain(f"{name}.weight", (width,), f"{path}/scale", layer)
  yield plain(f"{name}.bias", (width,), f"{path}/bias", layer)
