"""Quickstart: the whole chain on generated clips of moving shapes, on a laptop.

Command: python -m sora_jax.main --config=configs/quickstart.py
Hardware: 2 CPU cores, 6 GB of memory (1.8 GB used).
Time: 8 min 34 s with the installation, on cores with AVX-512 and bfloat16: that 0.6,
data 0.5, VAE 1.2, DiT 5.9, sample and evaluate 0.4. 16 to 18 minutes on others.
Metrics: VAE PSNR 31.0 dB; of 192 samples, colour 100 % (chance 19 %), shape 81 to 89 %
(25 %), motion 80 to 87 % (11 %), count 97 to 99 %.

Its world is simple, see configs/shapes.py for all that shapes can do.
"""

from ml_collections import ConfigDict

from sora_jax.models import vae
from sora_jax.run import recipe

VARIANTS = ("short", "memorise", "ddpm")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; any key can be overridden with --config.key=value.

  Variant "short" (--config=configs/quickstart.py:short) does the same on a handful of
  clips in a minute or two: to see that everything runs, not to learn anything.
  Variant "memorise" trains the DiT on 24 clips only, and compares samples of their
  captions with the clips: a chain that cannot do that cannot learn more either.
  These are in evaluate/samples; other prompts, as in sample/, are nothing to it.
  Variant "ddpm" trains and samples the DiT as DDPM does (arXiv:2006.11239, algorithms 1
  and 2, but 250 of the 1000 steps).
  """
  if variant not in ("", *VARIANTS):
    raise ValueError(
      f"quickstart has no variant {variant!r}; there are {', '.join(VARIANTS)}"
    )
  c = ConfigDict()

  c.data = ConfigDict()
  c.data.source = "shapes"  # or a folder of videos and images
  c.data.world = "short"  # of shapes: one object, one background, 64x64, 9 frames
  c.data.train_clips = 4800
  c.data.heldout_clips = 192
  c.data.max_pixels = 64 * 64

  c.vae = ConfigDict()
  c.vae.model = recipe.preset(vae.SMALL, "patches")
  c.vae.crop = (9, 64, 64)
  c.vae.loss = ConfigDict()
  c.vae.loss.mse_weight = 5.0
  c.vae.loss.kl_weight = 5e-4
  c.vae.loss.latent_noise = 0.3
  c.vae.loss.decorrelation_weight = 0.1
  c.vae.train = ConfigDict()
  c.vae.train.optimizer = "muon"
  c.vae.train.steps = 500
  c.vae.train.learning_rate = 5e-3
  c.vae.train.warmup_steps = 50
  c.vae.train.schedule = "cosine"
  c.vae.train.weight_decay = 1e-4
  c.vae.train.b2 = 0.99
  c.vae.train.ema_decay = 0.99
  c.vae.train.eval_every = 500
  c.vae.train.save_every = 250

  c.dit = ConfigDict()
  c.dit.model = ConfigDict()
  c.dit.model.width = 256
  c.dit.model.depth = 4
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
  c.dit.given_prob = 0.2
  c.dit.extra_prob = 0.1
  c.dit.rows = 6
  c.dit.tokens = 160
  c.dit.text_tokens = 96
  c.dit.segments = 10
  c.dit.max_text_tokens = 40
  c.dit.train = ConfigDict()
  c.dit.train.optimizer = "muon"
  c.dit.train.steps = 1400
  c.dit.train.learning_rate = 6e-3
  c.dit.train.warmup_steps = 50
  c.dit.train.schedule = "cosine"
  c.dit.train.weight_decay = 0.01
  c.dit.train.b2 = 0.99
  c.dit.train.ema_decay = 0.995
  c.dit.train.eval_every = 1400
  c.dit.train.save_every = 500

  c.sample = ConfigDict()
  c.sample.prompts = (
    ("a red circle moves right", (64, 64), 9, 8.0),
    ("a blue square bounces", (64, 64), 9, 8.0),
    ("a yellow star turns", (64, 64), 9, 8.0),
    ("a green triangle grows", (64, 64), 9, 8.0),
    ("a white square moves left", (64, 64), 9, 8.0),
    ("a magenta star moves down", (64, 64), 9, 8.0),
    ("an orange circle shrinks", (64, 64), 9, 8.0),
    ("a cyan triangle", (64, 64), 1, 8.0),
  )
  c.sample.steps = 24
  c.sample.shift = 3.0

  c.evaluate = ConfigDict()
  c.evaluate.clips = 192

  c.matmul_precision = "BF16_BF16_F32"
  if variant == "ddpm":
    c.dit.loss.process = "ddpm_linear"
    c.dit.loss.target = "eps"
    c.dit.loss.timesteps = "discrete"
    c.sample.method = "ddpm"
    c.sample.steps = 250
    del c.dit.loss.logit_mean, c.sample.shift
  if variant == "memorise":
    c.data.train_clips = 24
    c.data.heldout_clips = 8
    c.vae.train.steps = 300
    c.dit.train.steps = 1000
    c.dit.given_prob = 0.0
    c.dit.extra_prob = 0.0
    c.evaluate.split = "train"
    c.evaluate.clips = 24
  if variant == "short":
    c.data.train_clips = 48
    c.data.heldout_clips = 8
    c.vae.train.steps = 8
    c.vae.train.warmup_steps = 2
    c.vae.train.log_every = 4
    c.vae.train.eval_every = 8
    c.vae.train.save_every = 4
    c.dit.model.depth = 2
    c.dit.train.steps = 8
    c.dit.train.warmup_steps = 2
    c.dit.train.log_every = 4
    c.dit.train.eval_every = 8
    c.dit.train.save_every = 4
    c.sample.prompts = c.sample.prompts[:2]
    c.sample.steps = 4
    c.evaluate.clips = 8
  return recipe.complete(c)
