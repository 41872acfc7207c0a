"""Makes clip.npz and clip.json from transformers' text tower of CLIP.

  python tests/golden/make_clip.py

Made with torch 2.13.0 and transformers 5.24.0, float32 on CPU. The weights follow from
the names of the tensors (random_weights.py). clip.json has the ids of CLIP's tokenizer
for a small vocabulary that is written here, too.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
from random_weights import random_tensor
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
  CLIPTextConfig,
  CLIPTextModel,
  CLIPTextModelWithProjection,
  CLIPTokenizer,
)

FOLDER = pathlib.Path(__file__).parent
SMALL = dict(
  vocab_size=120,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  max_position_embeddings=20,
  projection_dim=12,
  bos_token_id=118,
  eos_token_id=119,
  pad_token_id=119,
)
LENGTHS, SIZE = [5, 2, 20, 9], 20
TEXTS = [
  "a red circle",
  "",
  "A  RED Circle's 2 edges!",
  "caf\u00e9 \u8d64\u3044",
  "it's\na red red",
  "the lower newest widest",
]
# An own vocabulary of byte pairs, in the files that CLIP is published with.
MERGES = [
  "r e",
  "re d</w>",
  "c i",
  "l o",
  "e s",
  "es t</w>",
  "ci r",
  "w i",
  "t h",
  "th e</w>",
]


def ids_of(rng):
  ids = np.full((len(LENGTHS), SIZE), SMALL["eos_token_id"])
  for row, length in enumerate(LENGTHS):
    ids[row, 0] = SMALL["bos_token_id"]
    ids[row, 1 : length - 1] = rng.integers(0, 118, length - 2)
  return ids


def vocabulary():
  """vocab.json of bytes, bytes at a word's end, and the merges."""
  letters = sorted(ByteLevel.alphabet())
  words = [*letters, *(letter + "</w>" for letter in letters)]
  words += ["".join(merge.split()) for merge in MERGES]
  words += ["<|startoftext|>", "<|endoftext|>"]
  return {word: i for i, word in enumerate(words)}


def main():
  golden = {}
  ids = ids_of(np.random.default_rng(0))
  mask = np.arange(SIZE) < np.array(LENGTHS)[:, None]
  for act in ("quick_gelu", "gelu"):
    config = CLIPTextConfig(**SMALL, hidden_act=act)
    model = CLIPTextModelWithProjection(config).eval()
    with torch.no_grad():
      for name, value in model.state_dict().items():
        if value.is_floating_point():
          value.copy_(torch.from_numpy(random_tensor(name, value.shape)))
      out = model(torch.from_numpy(ids), torch.from_numpy(mask.astype(int)))
    golden[f"{act}/features"] = out.last_hidden_state.numpy()[mask]
    names = {k: list(v.shape) for k, v in model.state_dict().items()}
  np.savez_compressed(FOLDER / "clip.npz", **golden)
  bare = {k: list(v.shape) for k, v in CLIPTextModel(config).state_dict().items()}

  vocab = vocabulary()
  with tempfile.TemporaryDirectory() as folder:
    place = pathlib.Path(folder)
    (place / "vocab.json").write_text(json.dumps(vocab))
    (place / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(place)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    tokenizer.save_pretrained(place / "saved")
    saved = json.loads((place / "saved" / "tokenizer.json").read_text())
  texts = {"vocab": vocab, "merges": MERGES, "texts": TEXTS, "ids": ids}
  config = json.loads(config.to_json_string())
  whole = {"config": config, "shapes": names, "bare": bare, **texts, "tokenizer": saved}
  (FOLDER / "clip.json").write_text(json.dumps(whole) + "\n")


if __name__ == "__main__":
  main()
