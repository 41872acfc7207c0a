"""Makes wan_vae.npz and wan_vae_names.json from diffusers' AutoencoderKLWan.

  python tests/golden/make_wan_vae.py [folder of Wan's vae2_1.py and vae2_2.py]

Made with torch 2.13.0 and diffusers 0.42.1, float32 on CPU. The weights follow from the
names of the tensors (random_weights.py), so only outputs are stored, of the decoder
every third pixel. The folder is wan/modules of github.com/Wan-Video/Wan2.2 (42bf4cf;
needs einops); without it the names of the original layout stay as they are.
"""

import importlib
import json
import pathlib
import sys

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from random_weights import random_tensor

FOLDER = pathlib.Path(__file__).parent
RESIDUAL = dict(is_residual=True, in_channels=12, out_channels=12, patch_size=2)
CONFIGS = {
  "2.1": dict(base_dim=8, z_dim=4),
  "2.2": dict(
    base_dim=8, decoder_base_dim=12, z_dim=6, scale_factor_spatial=16, **RESIDUAL
  ),
}
# name: config, video (T, H, W).
CASES = {
  "2.1_image": ("2.1", (1, 16, 24)),
  "2.1_tall": ("2.1", (5, 40, 8)),
  "2.1_wide": ("2.1", (9, 16, 40)),
  "2.2_image": ("2.2", (1, 32, 48)),
  "2.2_tall": ("2.2", (5, 80, 16)),
  "2.2_wide": ("2.2", (9, 16, 48)),
}
FULL = {
  "wan2.1": dict(),
  "wan2.2": dict(base_dim=160, decoder_base_dim=256, z_dim=48, **RESIDUAL),
}
STRIDE = 3


def main(wan_folder=None):
  golden = {}
  # Without clamping: what the decoder gives before it is clipped says more.
  torch.clamp = lambda x, *_, **__: x
  for number, (name, (kind, (T, H, W))) in enumerate(CASES.items()):
    config = CONFIGS[kind]
    model = AutoencoderKLWan(**config).eval()
    rng = np.random.default_rng(number)
    factor = config.get("scale_factor_spatial", 8)
    latent_shape = (config["z_dim"], 1 + (T - 1) // 4, H // factor, W // factor)
    video = rng.uniform(-1, 1, (1, 3, T, H, W)).astype(np.float32)
    latent = rng.standard_normal((1, *latent_shape), np.float32)
    with torch.no_grad():
      for key, value in model.state_dict().items():
        value.copy_(torch.from_numpy(random_tensor(key, value.shape)))
      moments = model.encode(torch.from_numpy(video)).latent_dist.parameters
      decoded = model.decode(torch.from_numpy(latent)).sample
    golden[f"{name}_moments"] = moments.numpy()
    golden[f"{name}_decoded"] = decoded.numpy()[..., ::STRIDE, ::STRIDE]
  np.savez_compressed(FOLDER / "wan_vae.npz", **golden)

  path = FOLDER / "wan_vae_names.json"
  names = json.loads(path.read_text()) if path.exists() else {}
  for name, config in FULL.items():
    with torch.device("meta"):
      model = AutoencoderKLWan(**config)
    names.setdefault(name, {})["diffusers"] = shapes_of(model)
  if wan_folder:
    sys.path.append(wan_folder)
    options = dict(dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True])
    with torch.device("meta"):
      originals = {
        "wan2.1": importlib.import_module("vae2_1").WanVAE_(96, 16, **options),
        "wan2.2": importlib.import_module("vae2_2").WanVAE_(160, 256, 48, **options),
      }
    for name, model in originals.items():
      names[name]["original"] = shapes_of(model)
  path.write_text(json.dumps(names, indent=0) + "\n")


def shapes_of(model) -> dict[str, str]:
  """Shape of each tensor as "96 3 3 3 3", in the order of the model's modules."""
  return {k: " ".join(map(str, v.shape)) for k, v in model.state_dict().items()}


if __name__ == "__main__":
  main(*sys.argv[1:])
