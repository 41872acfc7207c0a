"""The whole world of shapes: the recipe of a small model for every way of prompting.

Command: python -m sora_jax.main --config=configs/shapes.py
Hardware: 2 CPU cores, 8 GB of memory. Typed again after a stop, it goes on.
Time: hours; not yet trained to its end, so there are no figures of it. On cores with
AVX-512 and bfloat16, "medium" takes 65 minutes (VAE 16, DiT 40), "short" 25 (VAE 4, DiT
19), by the time of a step; other cores take twice as long.
Metrics: of "medium", 512 held-out prompts: colour 100 % (chance 17 %), shape 96 %
(25 %), motion 94 % (11 %), count 99 %, reappearance 100 % (8 %); VAE 38.2 dB. Of
"short": colour 100, shape 94, motion 90, count 98 %; VAE 35.1 dB.

All that `sora_jax/data/shapes.py` can draw: one object or two, bars to pass behind, all
motions, images and videos of 9 to 33 frames, three sizes, four rates, shaded grounds.
Variant "gpu" takes larger batches for more clips. "medium" is the recipe of the model
that goes with the package: one object on one ground, clips of 9 and 17 frames at two
rates, bars, and four times as much that turns. "short" is the quickstart's world with
more clips and steps, "simple" that world in 17 frames. The package's expander of
prompts is made by
  python -m sora_jax.train_expander --config=configs/shapes.py:medium

More steps go on from the checkpoint before the decay of the learning rate:
  --config.dit.train.steps=...
"""

from ml_collections import ConfigDict

from sora_jax.models import expander, vae
from sora_jax.run import recipe

VARIANTS = ("gpu", "medium", "simple", "short")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; any key can be overridden with --config.key=value.

  Variant "gpu" takes larger batches, and more clips. The others have one object on one
  ground, and the quickstart's network, which is trained for longer: "short" in 9
  frames, as in the quickstart, "simple" in 17, "medium" in either, with bars to pass
  behind.
  """
  if variant not in ("", *VARIANTS):
    raise ValueError(
      f"shapes has no variant {variant!r}; there are {', '.join(VARIANTS)}"
    )
  c = ConfigDict()
  c.data = ConfigDict()
  c.data.source = "shapes"
  c.data.train_clips = 6000
  c.data.heldout_clips = 256

  c.vae = ConfigDict()
  c.vae.model = recipe.preset(vae.SMALL, "patches")
  c.vae.loss = ConfigDict()
  c.vae.loss.mse_weight = 5.0
  c.vae.loss.kl_weight = 5e-4
  c.vae.loss.latent_noise = 0.3
  c.vae.loss.decorrelation_weight = 0.1
  c.vae.train = ConfigDict()
  c.vae.train.optimizer = "muon"
  c.vae.train.steps = 1500
  c.vae.train.learning_rate = 5e-3
  c.vae.train.warmup_steps = 50
  c.vae.train.schedule = "cosine"
  c.vae.train.weight_decay = 1e-4
  c.vae.train.b2 = 0.99
  c.vae.train.ema_decay = 0.99
  c.vae.train.eval_every = 500
  c.vae.train.save_every = 250

  c.encode = ConfigDict()
  c.encode.frame_buckets = (1, 9, 17, 33)

  c.dit = ConfigDict()
  c.dit.model = ConfigDict()
  c.dit.model.width = 256
  c.dit.model.depth = 5
  c.dit.model.heads = 4
  c.dit.model.mlp_width = 1024
  c.dit.model.pooled_text = True
  c.dit.model.absolute_positions = 16
  c.dit.model.rope_theta = 100.0
  c.dit.text = ConfigDict()
  c.dit.text.vocab_size = 512
  c.dit.text.width = 128
  c.dit.text.depth = 1
  c.dit.text.heads = 2
  c.dit.loss = ConfigDict()
  c.dit.loss.logit_mean = 1.0
  c.dit.given_prob = 0.25
  c.dit.extra_prob = 0.1
  c.dit.rows = 8
  c.dit.tokens = 264  # the longest clip, 33 frames of 96x64, with two key frames
  c.dit.text_tokens = 160
  c.dit.segments = 11
  c.dit.max_text_tokens = 64
  c.dit.train = ConfigDict()
  c.dit.train.optimizer = "muon"
  c.dit.train.steps = 3000
  c.dit.train.learning_rate = 6e-3
  c.dit.train.warmup_steps = 100
  c.dit.train.schedule = "wsd"
  c.dit.train.decay_steps = 800
  c.dit.train.weight_decay = 0.01
  c.dit.train.b2 = 0.99
  c.dit.train.ema_decay = 0.998
  c.dit.train.eval_every = 500
  c.dit.train.save_every = 250

  # Small, so that it fits into the shipped model; captions of shapes are alike.
  c.expander = ConfigDict()
  c.expander.model = recipe.preset(expander.PRESETS, "tiny")

  c.sample = ConfigDict()
  c.sample.prompts = (
    ("a red circle moves right", (64, 64), 17, 12.0),
    ("a blue square bounces", (64, 64), 33, 16.0),
    ("a yellow star turns", (64, 64), 17, 12.0),
    ("a green triangle grows", (96, 64), 17, 12.0),
    ("a white square moves left", (96, 64), 33, 12.0),
    ("a magenta star moves down and a cyan circle stands still", (96, 64), 17, 12.0),
    ("an orange circle moves right behind a bar", (96, 64), 33, 12.0),
    ("a cyan triangle", (64, 96), 1, 12.0),
  )
  c.sample.steps = 24
  c.sample.shift = 3.0

  c.evaluate = ConfigDict()
  c.evaluate.clips = 512
  c.matmul_precision = "BF16_BF16_F32"
  if variant == "gpu":
    c.data.train_clips = 20000
    c.vae.batch_size = 32
    c.vae.train.steps = 4000
    c.dit.rows = 64
    c.dit.train.steps = 20000
    c.dit.train.decay_steps = 4000
    c.dit.train.save_every = c.dit.train.eval_every = 1000
    c.matmul_precision = ""
  if variant in ("medium", "simple", "short"):
    c.data.world = variant
    c.data.train_clips = {"medium": 40000, "simple": 8000, "short": 16000}[variant]
    c.data.heldout_clips = 512
    c.encode.frame_buckets = {
      "medium": (1, 9, 17), "simple": (1, 17), "short": (1, 9)
    }[variant]  # fmt: skip
    c.dit.model.depth = 4
    c.dit.given_prob = 0.2
    c.dit.rows = 6
    c.dit.tokens = 160
    c.dit.text_tokens = 96
    c.dit.segments = 10
    c.dit.train.steps = {"medium": 10000, "simple": 4000, "short": 5000}[variant]
    c.dit.train.decay_steps = 1000
    frames, rate = (9, 8.0) if variant == "short" else (17, 12.0)
    c.sample.prompts = tuple(
      (text, size if "bar" in text else (64, 64), min(count, frames), rate)
      for text, size, count, _ in c.sample.prompts
      if " and " not in text and ("bar" not in text or variant == "medium")
    )
  if variant in ("simple", "short"):
    c.data.max_pixels = 64 * 64  # in place of 96x64, which a clip with a bar has
    c.dit.max_text_tokens = 40
  if variant in ("medium", "short"):
    c.vae.crop = (9, 64, 64)
    c.vae.train.steps = {"medium": 8000, "short": 2000}[variant]
  if variant == "medium":
    c.data.max_frames = 17
    c.dit.given_prob = 0.4
    c.dit.extra_prob = 0.3
    c.dit.tokens = 168  # a clip with a bar, and two key frames
    c.dit.train.decay_steps = 2500
  return recipe.complete(c)
