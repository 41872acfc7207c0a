"""Names of T5's and UMT5's encoders, in transformers' and in Wan's own checkpoints."""

from sora_jax.models.t5 import T5Config
from sora_jax.weights.mapping import Entry, linear, plain

LAYOUTS = ("diffusers", "original")
# The second name of the embedding in transformers' files, and what only a decoder has.
IGNORED = (r"encoder\.embed_tokens\.weight", r"decoder\..*", r"lm_head\.weight")
# Files of some versions have the embedding under its second name only.
ALIASES = {"shared.weight": "encoder.embed_tokens.weight"}

_DENSE = {
  "query": ("layer.0.SelfAttention.q", "attn.q"),
  "key": ("layer.0.SelfAttention.k", "attn.k"),
  "value": ("layer.0.SelfAttention.v", "attn.v"),
  "attention_out": ("layer.0.SelfAttention.o", "attn.o"),
  "mlp_gate": ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
  "mlp_up": ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
  "mlp_down": ("layer.1.DenseReluDense.wo", "ffn.fc2"),
}
_NORMS = {
  "attention_norm": ("layer.0.layer_norm", "norm1"),
  "mlp_norm": ("layer.1.layer_norm", "norm2"),
}
_BIAS = ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding")
_BLOCK = ("encoder.block", "blocks")


def entries(config: T5Config, layout: str) -> list[Entry]:
  """Every tensor of a checkpoint of `models.t5.T5Encoder`.

  Args:
    config: of the model.
    layout: "diffusers" has transformers' names, "original" those of Wan's UMT5.

  Raises:
    ValueError: for another layout, or T5 in Wan's, which has a bias in each layer.
  """
  if layout not in LAYOUTS:
    raise ValueError(f"text encoder layout {layout!r} is none of {LAYOUTS}")
  if layout == "original" and not config.bias_per_layer:
    raise ValueError("the original layout is that of UMT5: T5 shares its position bias")
  which, D, inner = LAYOUTS.index(layout), config.width, config.heads * config.head_dim
  widths = {
    "attention_out": (inner, D),
    "mlp_gate": (D, config.mlp_width),
    "mlp_up": (D, config.mlp_width),
    "mlp_down": (config.mlp_width, D),
  }
  embedding = ("shared.weight", "token_embedding.weight")[which]
  norm = ("encoder.final_layer_norm.weight", "norm.weight")[which]
  found = [
    plain(embedding, (config.vocab_size, D), "token_embed/embedding"),
    plain(norm, (D,), "final_norm/scale"),
  ]

  def bias(layer, path, ours=None):
    name = f"{_BLOCK[which]}.{layer}.{_BIAS[which]}.weight"
    shape = (config.buckets, config.heads)
    return Entry(name, shape, path, shape, ours)  # also of one head

  if not config.bias_per_layer:
    found.append(bias(0, "position_bias/embedding"))
  for layer in range(config.depth):
    block = f"{_BLOCK[which]}.{layer}"
    if config.bias_per_layer:
      found.append(bias(layer, "blocks/position_bias/embedding", layer))
    for ours, names in _DENSE.items():
      name, sizes = f"{block}.{names[which]}.weight", widths.get(ours, (D, inner))
      found.append(linear(name, *sizes, f"blocks/{ours}/kernel", layer))
    for ours, names in _NORMS.items():
      name = f"{block}.{names[which]}.weight"
      found.append(plain(name, (D,), f"blocks/{ours}/scale", layer))
  return found
