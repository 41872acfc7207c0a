"""Makes t5.npz and t5_shapes.json from transformers' T5 and UMT5 encoders.

  python tests/golden/make_t5.py

Made with torch 2.13.0 and transformers 5.23.0, float32 on CPU. The weights follow from
the names of the tensors (random_weights.py).
"""

import json
import pathlib

import numpy as np
import torch
from random_weights import random_tensor
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

FOLDER = pathlib.Path(__file__).parent
SMALL = dict(
  vocab_size=120,
  d_model=24,
  d_kv=10,
  d_ff=40,
  num_layers=3,
  num_heads=4,
  feed_forward_proj="gated-gelu",
)
CLASSES = {"t5": (T5Config, T5EncoderModel), "umt5": (UMT5Config, UMT5EncoderModel)}
# Lengths of the captions of a batch, and what they are padded to.
BATCHES = {"short": ([5, 2, 7], 7), "padded": ([1, 11], 16), "long": ([200, 150], 200)}
XXL = dict(
  d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
  feed_forward_proj="gated-gelu",
)  # fmt: skip
FULL = {"t5-v1.1-xxl": ("t5", 32128), "umt5-xxl": ("umt5", 256384)}


def main():
  golden = {}
  for kind, (config_class, model_class) in CLASSES.items():
    model = model_class(config_class(**SMALL)).eval()
    with torch.no_grad():
      for name, value in model.state_dict().items():
        value.copy_(torch.from_numpy(random_tensor(name, value.shape)))
      # Tied: the copy above ended with the name that came last.
      embedding = random_tensor("shared.weight", model.shared.weight.shape)
      model.shared.weight.copy_(torch.from_numpy(embedding))
    for batch, (lengths, size) in BATCHES.items():
      rng = np.random.default_rng(size)
      ids = rng.integers(2, SMALL["vocab_size"], (len(lengths), size))
      mask = np.arange(size) < np.array(lengths)[:, None]
      with torch.no_grad():
        out = model(
          torch.from_numpy(np.where(mask, ids, 0)), torch.from_numpy(mask.astype(int))
        )
      # What stands at padding means nothing.
      features = out.last_hidden_state.numpy()[mask]
      golden[f"{kind}/{batch}"] = features[:: 1 if size < 100 else 25]
  np.savez_compressed(FOLDER / "t5.npz", **golden)

  published = {}
  for name, (kind, vocab_size) in FULL.items():
    config_class, model_class = CLASSES[kind]
    with torch.device("meta"):
      model = model_class(config_class(vocab_size=vocab_size, **XXL))
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    published[name] = {
      "params": sum(p.numel() for p in model.parameters()),
      "tensors": len(shapes),
      # The blocks are alike: the first and the last one stand for all.
      "shapes": {
        k: v
        for k, v in shapes.items()
        if ".block." not in k or ".block.0." in k or ".block.23." in k
      },
    }
  (FOLDER / "t5_shapes.json").write_text(json.dumps(published, indent=0) + "\n")


if __name__ == "__main__":
  main()
