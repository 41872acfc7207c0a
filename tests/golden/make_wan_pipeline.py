"""Makes wan_pipeline.npz and wan_pipeline.json: latents of whole tiny Wan pipelines.

  python tests/golden/make_wan_pipeline.py

Made with torch 2.14.1, diffusers 0.42.1, transformers 5.24.0 and sentencepiece 0.2.3,
float32 on CPU; needs protobuf. The weights follow from the names of the tensors
(random_weights.py). The json has all configs of the folders as `save_pretrained` writes
them, and the names and shapes of the tensors; the npz the tokenizer and the final
latents.
"""

import json
import pathlib
import tempfile

import numpy as np
import sentencepiece
import torch
from diffusers import (
  AutoencoderKLWan,
  FlowMatchEulerDiscreteScheduler,
  UniPCMultistepScheduler,
  WanImageToVideoPipeline,
  WanPipeline,
  WanTransformer3DModel,
)
from PIL import Image
from random_weights import random_tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

FOLDER = pathlib.Path(__file__).parent
TEXT = "a red circle moves right and a blue square moves left over green grass. "
PROMPT, NEGATIVE = "a red circle moves right", "blue grass"
GUIDANCE = 4.0
DIT = dict(
  num_attention_heads=2,
  attention_head_dim=16,
  text_dim=24,
  freq_dim=32,
  ffn_dim=48,
  num_layers=2,
)
VAE = dict(base_dim=4, num_res_blocks=1)
RESIDUAL = dict(is_residual=True, in_channels=12, out_channels=12, patch_size=2)
KINDS = {
  "t2v-2.1": dict(
    dit=dict(in_channels=4, out_channels=4, **DIT),
    vae=dict(z_dim=4, latents_mean=[0.1, -0.2, 0.3, 0.0],
             latents_std=[1.5, 2.0, 0.8, 1.0], **VAE),
    pipeline=dict(expand_timesteps=False),
    shift=3.0,
  ),
  "ti2v-2.2": dict(
    dit=dict(in_channels=6, out_channels=6, **DIT),
    vae=dict(z_dim=6, decoder_base_dim=8, scale_factor_spatial=16,
             latents_mean=[0.1, -0.2, 0.3, 0.0, 0.5, -0.5],
             latents_std=[1.5, 2.0, 0.8, 1.0, 0.6, 1.2], **VAE, **RESIDUAL),
    pipeline=dict(expand_timesteps=True),
    shift=5.0,
  ),
}  # fmt: skip
# name: kind, (frames, height, width), whether an image is given. 2.2 is the same for
# texts alone whether timesteps are expanded or not; with an image it is not.
CASES = {
  "text": ("t2v-2.1", (9, 32, 48), False),
  "text-2.2": ("ti2v-2.2", (9, 64, 96), False),
  "image-2.2": ("ti2v-2.2", (9, 64, 96), True),
}
STEPS = (8, 50)


def fill(model):
  with torch.no_grad():
    for name, value in model.state_dict().items():
      value.copy_(torch.from_numpy(random_tensor(name, value.shape)))
  return model.eval()


def tokenizer_of(folder):
  path = folder / "spiece.model"
  with open(path, "wb") as f:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([TEXT] * 3), model_writer=f, model_type="unigram",
      vocab_size=48, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
      normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
  return T5Tokenizer.from_pretrained(folder, extra_ids=0), path


def scheduler(name, shift):
  if name == "euler":
    return FlowMatchEulerDiscreteScheduler(shift=shift)
  return UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
  )


def noise_of(config, vae, size, seed):
  """Our noise of a request: tokens [L, P] in order of (t, h, w), P of (t, h, w, c)."""
  frames, height, width = size
  space = vae.config.scale_factor_spatial
  t, h, w = 1 + (frames - 1) // 4, height // space // 2, width // space // 2
  channels = config["in_channels"]
  rng = np.random.default_rng(seed)
  patch_LP = rng.standard_normal((t * h * w, 4 * channels), np.float32)
  x = patch_LP.reshape(t, h, w, 1, 2, 2, channels).transpose(6, 0, 3, 1, 4, 2, 5)
  return torch.from_numpy(x.reshape(1, channels, t, 2 * h, 2 * w).copy())


def image_of(size):
  _, height, width = size
  rng = np.random.default_rng(1)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def build(kind, tokenizer):
  parts = KINDS[kind]
  text = UMT5Config(
    vocab_size=64, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
    feed_forward_proj="gated-gelu",
  )  # fmt: skip
  encoder = fill(UMT5EncoderModel(text))
  with torch.no_grad():  # tied: the name that came last must not win
    shared = encoder.shared.weight
    shared.copy_(torch.from_numpy(random_tensor("shared.weight", shared.shape)))
  return dict(
    tokenizer=tokenizer,
    text_encoder=encoder,
    vae=fill(AutoencoderKLWan(**parts["vae"])),
    transformer=fill(WanTransformer3DModel(**parts["dit"])),
    **parts["pipeline"],
  )


def describe(pipeline):
  """The files of JSON that a published folder has, and its tensors."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    pipeline.save_pretrained(folder)
    places = ("vae", "text_encoder", "transformer", "scheduler")
    paths = [folder / "model_index.json"]
    paths += [p for place in places for p in (folder / place).glob("*config.json")]
    configs = {str(p.relative_to(folder)): json.loads(p.read_text()) for p in paths}
  tensors = {
    place: {
      name: " ".join(map(str, value.shape))
      for name, value in getattr(pipeline, place).state_dict().items()
    }
    for place in places[:3]
  }
  tensors["text_encoder"].pop("encoder.embed_tokens.weight", None)
  return {"configs": configs, "tensors": tensors}


def main():
  golden, described = {}, {"prompt": PROMPT, "negative": NEGATIVE, "kinds": {}}
  with tempfile.TemporaryDirectory() as name:
    tokenizer, path = tokenizer_of(pathlib.Path(name))
    golden["spiece"] = np.frombuffer(path.read_bytes(), np.uint8)
    words = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in (PROMPT, NEGATIVE):
      assert tokenizer(text).input_ids == [*words.encode(text), 1], text
  for case, (kind, size, has_image) in CASES.items():
    parts = build(kind, tokenizer)
    for method in ("unipc", "euler"):
      made = scheduler(method, KINDS[kind]["shift"])
      which = WanImageToVideoPipeline if has_image else WanPipeline
      pipeline = which(scheduler=made, **parts)
      pipeline.set_progress_bar_config(disable=True)
      if method == "unipc" and not has_image:
        described["kinds"][kind] = describe(pipeline)
      given = {"image": Image.fromarray(image_of(size))} if has_image else {}
      for steps in STEPS:
        latents = pipeline(
          prompt=PROMPT, negative_prompt=NEGATIVE, num_frames=size[0], height=size[1],
          width=size[2], num_inference_steps=steps, guidance_scale=GUIDANCE,
          max_sequence_length=512, output_type="latent",
          latents=noise_of(KINDS[kind]["dit"], parts["vae"], size, seed=5), **given,
        ).frames[0]  # fmt: skip
        latents = latents.permute(1, 2, 3, 0) if latents.ndim == 4 else latents
        golden[f"{case}/{method}/{steps}"] = latents.detach().numpy()
        print(case, method, steps, golden[f"{case}/{method}/{steps}"].shape,
              np.abs(golden[f"{case}/{method}/{steps}"]).max())  # fmt: skip
  np.savez_compressed(FOLDER / "wan_pipeline.npz", **golden)
  text = json.dumps(described, indent=0, sort_keys=True)
  (FOLDER / "wan_pipeline.json").write_text(text + "\n")


if __name__ == "__main__":
  main()
