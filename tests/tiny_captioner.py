"""Config of a tiny captioner of generated clips: it learns nothing, in seconds."""

import tiny
from ml_collections import ConfigDict

SIZES = {
  "width": 32,
  "depth": 1,
  "heads": 2,
  "mlp_width": 64,
  "text_depth": 1,
  "caption_depth": 1,
  "embed_width": 8,
  "vocab_size": 300,
  "summary_tokens": 3,
  "stem_pieces": 2,
  "absolute_positions": 2,
}


def get_config(variant: str = "", **captioner) -> ConfigDict:
  """The recipe; further arguments are keys of its section captioner."""
  del variant
  config = tiny.get_config().to_dict()
  config["stages"] = ("data", "captioner")
  config["captioner"] = {
    "train": {"steps": 3, "eval_every": 3, "log_every": 1, "save_every": 2},
    "model": SIZES,
    "rows": 8,
    "tokens": 80,
    "text_tokens": 96,
    "segments": 4,
    "max_text_tokens": 48,
    "eval_batches": 1,
    **captioner,
  }
  return ConfigDict(config)
