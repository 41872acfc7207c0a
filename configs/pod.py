"""Pods: a folder of videos to a DiT of 2 or 14 billion params.

Commands, on every host of a slice (see launch/); any key follows as --config.key=value:
  python -m sora_jax.main --config=configs/pod.py:2b --config.data.source=DIR \
    --distributed
  python -m sora_jax.plan --config=configs/pod.py:2b --topology=v5p:4x4x4
The second one needs no TPU: it says what the first would take.

Hardware: 64 chips of TPU v5p (v5p:4x4x4), and text/model of UMT5-XXL in
runs/umt5-xxl. Time, by the plan, whose times are estimates: rows of 4 clips
(--clip_tokens=8190), 2b 18 GB a chip, 3.0 s a step, MFU 37 %, 14b 59 GB, 15.1 s, 44 %;
wan2.1-14b 44 GB, 24.1 s, 44 %. Metric: eval/loss in dit/metrics.jsonl; nothing was
trained at this size.
"""

from ml_collections import ConfigDict

from sora_jax.models import dit, vae
from sora_jax.run import recipe

VARIANTS = ("2b", "14b", "wan2.1-14b")


def get_config(variant: str = "2b") -> ConfigDict:
  """The recipe of a variant.

  "2b", "14b": rows of 32,768 tokens pack clips of up to 81 frames of 832x480 (32,760
  tokens), any aspect ratio, and images. "wan2.1-14b": exactly Wan 2.1 14B, 16 clips of
  81 frames of 1280x720 (75,600 tokens; rows are a multiple of the kernel's 1,024).
  """
  if variant not in VARIANTS:
    raise ValueError(f"pod has no variant {variant!r}; there are {', '.join(VARIANTS)}")
  c = ConfigDict()

  c.data = ConfigDict()
  c.data.source = "videos"
  c.data.max_frames = 81
  c.data.max_pixels = 832 * 480
  c.data.fps = 16.0
  c.data.workers = 32
  c.text = ConfigDict()
  c.text.folder = "runs/umt5-xxl"
  c.text.max_tokens = 256

  c.vae = ConfigDict()
  c.vae.model = recipe.preset(vae.PRESETS, "wan2.1")
  c.vae.batch_size = 64
  c.vae.crop = (17, 256, 256)
  c.vae.train = ConfigDict()
  c.vae.train.steps = 200_000
  c.vae.train.learning_rate = 1e-4
  c.vae.train.warmup_steps = 1000
  c.vae.train.eval_every = 10_000
  # A step takes seconds: after half an hour without one, a host or its storage hangs.
  c.vae.train.deadline = 1800.0
  c.encode = ConfigDict()
  c.encode.frame_buckets = (1, 17, 33, 49, 65, 81)

  c.dit = ConfigDict()
  name = "wan2.1-t2v-14b" if variant == "wan2.1-14b" else variant
  c.dit.model = recipe.preset(dit.PRESETS, name)
  c.dit.model.remat = "attention_saved"
  c.dit.rows = 64
  c.dit.tokens = 32_768
  c.dit.text_tokens = 2048
  c.dit.segments = 16
  c.dit.loss = ConfigDict()
  c.dit.loss.shift = 3.0
  c.dit.train = ConfigDict()
  c.dit.train.steps = 100_000
  c.dit.train.learning_rate = 1e-4
  c.dit.train.warmup_steps = 2000
  c.dit.train.weight_decay = 0.01
  c.dit.train.b2 = 0.95
  c.dit.train.ema_decay = 0.9999
  c.dit.train.eval_every = 5000
  c.dit.train.deadline = 1800.0
  c.mesh = ConfigDict()

  if variant == "wan2.1-14b":
    c.data.max_pixels = 1280 * 720
    c.text.max_tokens = 512
    c.text.pad_to = 512
    c.encode.batch_size = 1
    c.encode.devices_per_clip = 4
    c.dit.model.remat = "attention_mlp_saved"
    c.dit.rows = 16
    c.dit.tokens = 75_776
    c.dit.text_tokens = 512
    c.dit.segments = 1
    c.mesh.fsdp = 16
    c.mesh.context = 4
  return recipe.complete(c)
