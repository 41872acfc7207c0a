"""Makes wan_models.npz and wan_models.json: Wan's models with experts, and with images.

  python tests/golden/make_wan_models.py

Made with torch, diffusers and transformers as `versions` of the json says, float32 on
CPU. The weights follow from the names of the tensors (random_weights.py), those of the
second transformer from "transformer_2." and its names. The npz has, by case, method and
steps, the final latents of a whole pipeline; what the vision tower makes of an image;
the condition channels; and what a transformer makes in one call. The json has the
configs of the folders, and names and shapes of the published sizes.
"""

import json
import pathlib

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
  AutoencoderKLWan,
  FlowMatchEulerDiscreteScheduler,
  UniPCMultistepScheduler,
  WanImageToVideoPipeline,
  WanPipeline,
  WanTransformer3DModel,
)
from PIL import Image
from random_weights import random_tensor, smooth_images
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

FOLDER = pathlib.Path(__file__).parent
STATS = ([0.1, -0.2, 0.3, 0.0], [1.5, 2.0, 0.8, 1.0])
VAE = dict(
  base_dim=4, num_res_blocks=1, z_dim=4, latents_mean=STATS[0], latents_std=STATS[1]
)
DIT = dict(
  num_attention_heads=2,
  attention_head_dim=16,
  text_dim=24,
  freq_dim=32,
  ffn_dim=48,
  num_layers=2,
  in_channels=4,
  out_channels=4,
)
VISION = dict(
  hidden_size=16,
  intermediate_size=32,
  num_hidden_layers=3,
  num_attention_heads=2,
  image_size=28,
  patch_size=14,
  hidden_act="gelu",
)
CHANNELS = dict(in_channels=12)  # of noise, 4 of the mask, those of the condition
IMAGE = dict(image_dim=16, added_kv_proj_dim=32)
TOKENS = 1 + (28 // 14) ** 2
# name: config of the transformer, boundary_ratio, flow shift, (guidance of either).
KINDS = {
  "t2v-a14b": (DIT, 0.875, 5.0, (4.0, 3.0)),
  "i2v-a14b": (DIT | CHANNELS, 0.9, 5.0, (3.5, 3.5)),
  "i2v-2.1": (DIT | CHANNELS | IMAGE, None, 3.0, (5.0, None)),
  "flf2v-2.1": (
    DIT | CHANNELS | IMAGE | dict(pos_embed_seq_len=2 * TOKENS),
    None,
    5.0,
    (5.0, None),
  ),
}
SIZE = (9, 32, 48)  # frames, height, width
STEPS = (8, 50)
SEED = 5
_A14B = dict(num_attention_heads=40, ffn_dim=13824, num_layers=40)
FULL = {
  "wan2.2-t2v-a14b": _A14B,
  "wan2.2-i2v-a14b": _A14B | dict(in_channels=36),
  "wan2.1-i2v-14b": _A14B
  | dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
  "wan2.1-flf2v-14b": _A14B
  | dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120, pos_embed_seq_len=514),
}
VIT_H = dict(
  hidden_size=1280,
  intermediate_size=5120,
  num_hidden_layers=32,
  num_attention_heads=16,
  image_size=224,
  patch_size=14,
  hidden_act="gelu",
)


def fill(model, prefix=""):
  with torch.no_grad():
    for name, value in model.state_dict().items():
      if value.is_floating_point():
        value.copy_(torch.from_numpy(random_tensor(prefix + name, value.shape)))
  return model.eval()


def scheduler(name, shift):
  if name == "euler":
    return FlowMatchEulerDiscreteScheduler(shift=shift)
  return UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
  )


def noise():
  """Our noise of a request: tokens [L, P] in order of (t, h, w), P of (t, h, w, c)."""
  frames, height, width = SIZE
  t, h, w = 1 + (frames - 1) // 4, height // 16, width // 16
  rng = np.random.default_rng(SEED)
  patch_LP = rng.standard_normal((t * h * w, 16), np.float32)
  x = patch_LP.reshape(t, h, w, 1, 2, 2, 4).transpose(6, 0, 3, 1, 4, 2, 5)
  return torch.from_numpy(x.reshape(1, 4, t, 2 * h, 2 * w).copy())


def text(seed):
  return torch.from_numpy(
    np.random.default_rng(seed).standard_normal((1, 512, 24), np.float32)
  )


def vision():
  processor = CLIPImageProcessor(
    size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
  )
  return fill(CLIPVisionModel(CLIPVisionConfig(**VISION))), processor


def pipeline_of(kind):
  config, boundary, shift, _ = KINDS[kind]
  parts = dict(
    tokenizer=None,
    text_encoder=None,
    vae=fill(AutoencoderKLWan(**VAE)),
    transformer=fill(WanTransformer3DModel(**config)),
    scheduler=scheduler("unipc", shift),
    boundary_ratio=boundary,
  )
  if boundary:
    parts["transformer_2"] = fill(WanTransformer3DModel(**config), "transformer_2.")
  if config["in_channels"] == 4:
    return WanPipeline(**parts)
  encoder, processor = vision() if "image_dim" in config else (None, None)
  return WanImageToVideoPipeline(
    image_encoder=encoder, image_processor=processor, **parts
  )


def given_of(kind):
  first, last = (Image.fromarray(image) for image in smooth_images(*SIZE[1:]))
  if "i2v" in kind:
    return {"image": first}
  return {"image": first, "last_image": last} if "flf" in kind else {}


def sample(kind, golden):
  made = pipeline_of(kind)
  made.set_progress_bar_config(disable=True)
  *_, shift, (scale, scale_2) = KINDS[kind]
  for method in ("unipc", "euler"):
    made.scheduler = scheduler(method, shift)
    for steps in STEPS:
      latents = made(
        prompt_embeds=text(1), negative_prompt_embeds=text(2), num_frames=SIZE[0],
        height=SIZE[1], width=SIZE[2], num_inference_steps=steps, guidance_scale=scale,
        guidance_scale_2=scale_2, output_type="latent", latents=noise(),
        **given_of(kind),
      ).frames  # fmt: skip
      value = latents[0].permute(1, 2, 3, 0).detach().numpy()
      golden[f"{kind}/{method}/{steps}"] = value
      print(kind, method, steps, value.shape, np.abs(value).max())
  return made


def parts_of(kind, made, golden):
  """The pieces that the pipeline is made of, each by itself."""
  condition = None
  if "image" in given_of(kind):
    ready = [
      made.video_processor.preprocess(image, height=SIZE[1], width=SIZE[2])
      for image in given_of(kind).values()
    ]
    _, condition = made.prepare_latents(
      ready[0], 1, 4, *SIZE[1:], SIZE[0], torch.float32, "cpu", None, noise(),
      ready[1] if len(ready) > 1 else None,
    )  # fmt: skip
    golden[f"{kind}/condition"] = condition[0].permute(1, 2, 3, 0).detach().numpy()
  x, features = noise(), None
  if condition is not None:
    x = torch.cat([x, condition], 1)
  if made.config.get("image_encoder", (None, None))[0]:
    pair = list(given_of(kind).values())
    features = made.encode_image(pair, "cpu")
    golden[f"{kind}/image"] = features.detach().numpy()
  out = made.transformer(
    x, torch.tensor([637.0]), text(1), encoder_hidden_states_image=features
  ).sample
  golden[f"{kind}/call"] = out[0].permute(1, 2, 3, 0).detach().numpy()


def shapes(model):
  """Names and shapes; of the blocks, which are alike, those of the last one."""
  found = {k: list(v.shape) for k, v in model.state_dict().items()}
  numbers = [
    int(part) for k in found for part in k.split(".") if "." in k and part.isdigit()
    and ("blocks." in k or "layers." in k)
  ]  # fmt: skip
  last = str(max(numbers))
  kept = {
    k: v
    for k, v in found.items()
    if not ("blocks." in k or "layers." in k)
    or k.split("blocks.")[-1].split("layers.")[-1].split(".")[0] == last
  }
  return {
    "params": sum(p.numel() for p in model.parameters()),
    "tensors": len(found),
    "shapes": kept,
  }


def main():
  golden, described = {}, {"configs": {}, "published": {}}
  described["versions"] = [
    f"{module.__name__} {module.__version__}"
    for module in (torch, diffusers, transformers)
  ]
  with torch.no_grad():
    for kind in KINDS:
      made = sample(kind, golden)
      parts_of(kind, made, golden)
      described["configs"][kind] = {
        "model_index": json.loads(made.to_json_string()),
        "transformer": json.loads(made.transformer.to_json_string()),
        "vae": json.loads(made.vae.to_json_string()),
      }
      if getattr(made, "image_encoder", None):
        described["configs"][kind] |= {
          "image_encoder": json.loads(made.image_encoder.config.to_json_string()),
          "image_processor": json.loads(made.image_processor.to_json_string()),
        }
  with torch.device("meta"):
    for name, config in FULL.items():
      described["published"][name] = shapes(WanTransformer3DModel(**config))
    tower = CLIPVisionModel(CLIPVisionConfig(**VIT_H))
    described["published"]["clip-vit-h"] = shapes(tower)
  np.savez_compressed(FOLDER / "wan_models.npz", **golden)
  text_of = json.dumps(described, indent=0, sort_keys=True)
  (FOLDER / "wan_models.json").write_text(text_of + "\n")


if __name__ == "__main__":
  main()
