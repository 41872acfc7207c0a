"""Makes wan_dit.npz and wan_dit_shapes.json from diffusers' WanTransformer3DModel.

  python tests/golden/make_wan_dit.py

Made with torch 2.13.0 and diffusers 0.42.1, float32 on CPU. The weights follow from the
names of the tensors (random_weights.py), so only inputs' seeds and outputs are stored.
"""

import json
import pathlib

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from random_weights import random_tensor

FOLDER = pathlib.Path(__file__).parent
CONFIGS = {
  "2.1": dict(
    num_attention_heads=3,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=24,
    freq_dim=32,
    ffn_dim=80,
    num_layers=3,
  ),
  "2.2": dict(
    num_attention_heads=2,
    attention_head_dim=32,
    in_channels=6,
    out_channels=6,
    text_dim=24,
    freq_dim=32,
    ffn_dim=96,
    num_layers=2,
  ),
}
# name: config, latent (T, H, W), text tokens, timesteps: one for all or (given, noisy)
# with the first frame given.
CASES = {
  "image": ("2.1", (1, 8, 6), 5, 500.0),
  "video": ("2.1", (3, 4, 10), 7, 37.0),
  "tall": ("2.1", (5, 12, 2), 12, 999.0),
  "given_first_frame": ("2.2", (4, 6, 4), 6, (0.0, 750.0)),
  "given_wide": ("2.2", (3, 2, 14), 9, (0.0, 12.5)),
  "one_level": ("2.2", (2, 4, 4), 3, 250.0),
}
FULL = {
  "wan2.1-t2v-1.3b": dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
  "wan2.1-t2v-14b": dict(num_attention_heads=40, ffn_dim=13824, num_layers=40),
  "wan2.2-ti2v-5b": dict(
    num_attention_heads=24,
    ffn_dim=14336,
    num_layers=30,
    in_channels=48,
    out_channels=48,
  ),
}


def main():
  golden = {}
  for number, (name, (kind, shape, tokens, timestep)) in enumerate(CASES.items()):
    model = WanTransformer3DModel(**CONFIGS[kind]).eval()
    with torch.no_grad():
      for key, value in model.state_dict().items():
        value.copy_(torch.from_numpy(random_tensor(key, value.shape)))
    rng = np.random.default_rng(number)
    latent = rng.standard_normal((1, CONFIGS[kind]["in_channels"], *shape), np.float32)
    text = rng.standard_normal((1, tokens, CONFIGS[kind]["text_dim"]), np.float32)
    if isinstance(timestep, tuple):
      frames, height, width = shape
      levels = np.full((frames, height // 2 * width // 2), timestep[1], np.float32)
      levels[0] = timestep[0]
      timestep = levels.reshape(1, -1)
    else:
      timestep = np.array([timestep], np.float32)
    with torch.no_grad():
      out = model(*(torch.from_numpy(x) for x in (latent, timestep, text))).sample
    golden[name] = out.numpy()
  np.savez_compressed(FOLDER / "wan_dit.npz", **golden)

  published = {}
  for name, config in FULL.items():
    with torch.device("meta"):
      model = WanTransformer3DModel(**config)
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    # The blocks are alike: the last one stands for all.
    last = config["num_layers"] - 1
    published[name] = {
      "params": sum(p.numel() for p in model.parameters()),
      "tensors": len(shapes),
      "shapes": {
        k: v
        for k, v in shapes.items()
        if not k.startswith("blocks.") or k.startswith(f"blocks.{last}.")
      },
    }
  path = FOLDER / "wan_dit_shapes.json"
  path.write_text(json.dumps(published, indent=0) + "\n")


if __name__ == "__main__":
  main()
