"""Fine-tuning of Wan 2.1 and 2.2 on a folder of videos with captions.

Commands: the weights, once, and then a run, on every host of a slice (see launch/):
  python -m sora_jax.import_weights --source=Wan2.1-T2V-1.3B-Diffusers --out=CKPT
  python -m sora_jax.main --config=configs/finetune_wan.py:lora-1.3b \
    --config.data.source=VIDEOS --config.dit.init_from=CKPT --workdir=RUN
  python -m sora_jax.sample --checkpoint=RUN --prompt=...
Wan 2.2 A14B is two models, each of which a run of its own trains, by the variants that
end in -high and -low. A run is sampled and exported with the other one of where it
began, so that the second of these has both:
  python -m sora_jax.main --config=configs/finetune_wan.py:lora-t2v-a14b-high \
    --config.data.source=VIDEOS --config.dit.init_from=CKPT --workdir=HIGH
  python -m sora_jax.main --config=configs/finetune_wan.py:lora-t2v-a14b-low \
    --config.data.source=VIDEOS --config.dit.init_from=HIGH --workdir=BOTH
RUN/dit/adapter.safetensors is for other programs (diffusers' load_lora_weights), and
for `sample --checkpoint=CKPT --lora=...`.

Hardware and time, estimated from FLOPs at 40 % of the peak and not measured, for 1000
steps on TPU v6e: 8 chips, 0.7 hours for lora-1.3b, 0.9 for full-1.3b, 1.2 for lora-5b
and 4 for lora-14b; 64 chips, 5 hours for full-14b. `plan`, which compiles the step,
says 9.5 hours for lora-14b (4.7 of 4 rows a step: see sora_jax/weights/README.md).
Metric: eval/loss in dit/metrics.jsonl, of the held-out clips.
"""

from ml_collections import ConfigDict

from sora_jax.models import dit, vae
from sora_jax.run import recipe
from sora_jax.weights import pipeline_config

# Variant -> (preset of the DiT, of the VAE, whether only adapters are trained).
VARIANTS = {
  "lora-1.3b": ("wan2.1-t2v-1.3b", "wan2.1", True),
  "full-1.3b": ("wan2.1-t2v-1.3b", "wan2.1", False),
  "lora-14b": ("wan2.1-t2v-14b", "wan2.1", True),
  "full-14b": ("wan2.1-t2v-14b", "wan2.1", False),
  "lora-5b": ("wan2.2-ti2v-5b", "wan2.2", True),
  # Of the first frame of a clip; "flf2v" of the first and the last.
  "lora-i2v-14b": ("wan2.1-i2v-14b", "wan2.1", True),
  "lora-flf2v-14b": ("wan2.1-flf2v-14b", "wan2.1", True),
  # Each of two experts by itself, for the noise levels on its side of the boundary.
  "lora-t2v-a14b-high": ("wan2.2-t2v-a14b", "wan2.1", True),
  "lora-t2v-a14b-low": ("wan2.2-t2v-a14b", "wan2.1", True),
  "lora-i2v-a14b-high": ("wan2.2-i2v-a14b", "wan2.1", True),
  "lora-i2v-a14b-low": ("wan2.2-i2v-a14b", "wan2.1", True),
}


def get_config(variant: str = "lora-1.3b") -> ConfigDict:
  """The recipe of a variant: "lora-" trains adapters of rank 32, "full-" all params.

  Wan 2.1 with clips of up to 81 frames of 832x480 at 16 a second (32,760 tokens), Wan
  2.2 with 121 frames of 1280x704 at 24 (27,280 tokens).
  """
  if variant not in VARIANTS:
    raise ValueError(
      f"finetune_wan has no variant {variant!r}; there are {', '.join(VARIANTS)}"
    )
  dit_name, vae_name, adapters = VARIANTS[variant]
  wan22 = vae_name == "wan2.2"
  c = ConfigDict()

  c.dit = ConfigDict()
  c.dit.init_from = f"checkpoints/{dit_name}"
  # One flag for the checkpoint: all three networks of it are used.
  checkpoint = c.dit.get_ref("init_from")
  c.dit.lora = ConfigDict()
  c.dit.lora.rank = 32 if adapters else 0
  c.dit.lora.alpha = 32.0
  c.dit.model = recipe.preset(dit.PRESETS, dit_name)
  c.dit.model.remat = "full"
  c.dit.rows = 64 if variant == "full-14b" else 8
  c.dit.tokens = 28_672 if wan22 else 32_768
  c.dit.text_tokens = 2048
  c.dit.segments = 4
  c.dit.reference_fps = 24.0 if wan22 else 16.0
  # Wan 2.2 knows given first frames; Wan 2.1 has never seen any. Images in time are new
  # to both: last images, and what else has to lead somewhere, are given so.
  c.dit.given_prob = 0.2 if wan22 else 0.0
  c.dit.extra_prob = 0.1 if wan22 else 0.0
  c.dit.loss = ConfigDict()
  c.dit.loss.shift = 5.0 if wan22 else 3.0
  if dit_name.endswith("a14b"):
    boundary = pipeline_config.usual_boundary(dit.PRESETS[dit_name])
    c.dit.low_noise = variant.endswith("-low")
    c.dit.loss.levels = (0.0, boundary) if c.dit.low_noise else (boundary, 1.0)
    # Samples need the other expert, too, and so much more memory.
    c.stages = ("data", "vae", "encode", "dit")
  elif dit.PRESETS[dit_name].condition_channels:
    c.stages = ("data", "vae", "encode", "dit")  # samples need images
  c.dit.train = ConfigDict()
  c.dit.train.steps = 1000
  c.dit.train.learning_rate = 1e-4 if adapters else 1e-5
  c.dit.train.warmup_steps = 50
  c.dit.train.b2 = 0.99
  c.dit.train.ema_decay = 0.99
  c.dit.train.eval_every = 250
  c.dit.train.save_every = 250

  c.data = ConfigDict()
  c.data.source = "videos"
  c.data.max_frames = 121 if wan22 else 81
  c.data.max_pixels = 1280 * 704 if wan22 else 832 * 480
  c.data.size_multiple = 32 if wan22 else 16
  c.data.fps = c.dit.reference_fps
  c.data.workers = 8

  c.vae = ConfigDict()
  c.vae.folder = checkpoint
  c.vae.model = recipe.preset(vae.PRESETS, vae_name)
  c.vae.train = ConfigDict()
  c.vae.train.steps = 0
  c.text = ConfigDict()
  c.text.folder = checkpoint
  c.text.pad_to = 512
  c.encode = ConfigDict()
  c.encode.batch_size = 1
  c.encode.extras = 1 if wan22 else 0

  c.sample = ConfigDict()
  c.sample.method = "unipc"
  c.sample.schedule = "flow_unipc"
  c.sample.negative_prompt = pipeline_config.NEGATIVE_PROMPT
  c.sample.steps = 50
  c.sample.shift = 5.0 if wan22 else 3.0
  c.sample.guidance_scale = 5.0
  c.sample.rows = 1
  return recipe.complete(c)
