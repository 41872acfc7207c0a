"""Makes wan_lora.safetensors and wan_lora.npz: adapters as diffusers saves them.

  python tests/golden/make_wan_lora.py

Made with torch 2.13.0, diffusers 0.42.1 and peft 0.21.2, float32 on CPU: the model of
the case "image" of make_wan_dit.py with adapters, and its output.
"""

import pathlib
import tempfile

import numpy as np
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.training_utils import _collate_lora_metadata
from make_wan_dit import CASES, CONFIGS
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from random_weights import random_tensor

FOLDER = pathlib.Path(__file__).parent
TARGETS = ["attn1.to_q", "attn1.to_out.0", "attn2.to_v", "ffn.net.2"]
# Outside of the blocks: a dense layer, and a convolution that is one for us.
TARGETS += ["condition_embedder.time_proj", "patch_embedding"]


def main():
  kind, shape, tokens, timestep = CASES["image"]
  model = WanTransformer3DModel(**CONFIGS[kind]).eval()
  with torch.no_grad():
    for key, value in model.state_dict().items():
      value.copy_(torch.from_numpy(random_tensor(key, value.shape)))
  model.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS))
  adapters = get_peft_model_state_dict(model)
  with torch.no_grad():
    for key, value in model.state_dict().items():
      if "lora" in key:
        value.copy_(torch.from_numpy(random_tensor(key, value.shape)))
  with tempfile.TemporaryDirectory() as folder:
    WanPipeline.save_lora_weights(
      folder,
      transformer_lora_layers=adapters,
      weight_name="wan_lora.safetensors",
      **_collate_lora_metadata({"transformer": model}),
    )
    made = pathlib.Path(folder) / "wan_lora.safetensors"
    (FOLDER / made.name).write_bytes(made.read_bytes())
  rng = np.random.default_rng(0)
  latent = rng.standard_normal((1, CONFIGS[kind]["in_channels"], *shape), np.float32)
  text = rng.standard_normal((1, tokens, CONFIGS[kind]["text_dim"]), np.float32)
  timestep = np.array([timestep], np.float32)
  with torch.no_grad():
    out = model(*(torch.from_numpy(x) for x in (latent, timestep, text))).sample
  np.savez_compressed(FOLDER / "wan_lora.npz", image=out.numpy())


if __name__ == "__main__":
  main()
