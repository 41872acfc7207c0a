"""Compares exported weights with the published ones that were imported, in torch.

  python tests/golden/check_export.py --source=PIPELINE --exported=DIR

Both are folders of diffusers' layout, loaded by the `from_pretrained` of diffusers and
transformers (which need torch and accelerate), and every tensor must be the same bit
for bit. Seen to pass with diffusers 0.42.1 and transformers 5.23.0, for
small random models of Wan 2.1 and 2.2 and UMT5.
"""

import argparse
import pathlib

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

CLASSES = {
  "vae": AutoencoderKLWan,
  "text_encoder": UMT5EncoderModel,
  "transformer": WanTransformer3DModel,
}
TEXT = "a red circle moves to the right"


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--source", type=pathlib.Path, required=True)
  parser.add_argument("--exported", type=pathlib.Path, required=True)
  args = parser.parse_args()
  for place, kind in CLASSES.items():
    if not (args.exported / place).is_dir():
      print(f"{place}: not exported")
      continue
    # Types as in the files; diffusers has no such choice and makes all float32.
    options = {"torch_dtype": "auto"} if place == "text_encoder" else {}
    ours, theirs = (
      kind.from_pretrained(folder / place, **options).state_dict()
      for folder in (args.exported, args.source)
    )
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, value in theirs.items():
      assert ours[name].dtype == value.dtype, name
      assert torch.equal(ours[name], value), name
    print(f"{place}: {len(ours)} tensors are equal")
  if (args.exported / "tokenizer").is_dir():
    ours, theirs = (
      AutoTokenizer.from_pretrained(folder / "tokenizer")(TEXT).input_ids
      for folder in (args.exported, args.source)
    )
    assert ours == theirs, (ours, theirs)
    print("tokenizer: equal")


if __name__ == "__main__":
  main()
