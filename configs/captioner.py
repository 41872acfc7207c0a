"""A captioner of generated clips: all that shapes can do, in words.

Command: python -m sora_jax.main --config=configs/captioner.py
  python -m sora_jax.evaluate --config=configs/captioner.py --suite=captioner
Hardware: 2 CPU cores, 3 GB of memory, 2 GB of disk.
Time: of "small" 9 min 40 s (data 0.5, 6000 steps of 0.088 s) on cores with AVX-512 and
  bfloat16; 13 to 20 minutes on others. The whole world: data 2, steps of 0.55 s.
Metrics: of "small", 512 held-out clips, descriptive captions: shape 98 % (chance 25 %),
  motion 100 % (11 %), all else 100 %; R@1 95 % clip to caption, 97 % back. The whole
  world is not trained with that many steps: after 900 of an earlier network shape was
  17 % and motion 14 %. The table is in configs/README.md.

It reads pixels, so that it needs neither a VAE nor latents. Variant "small" is for the
quickstart's world, "short" for a handful of clips: to see in a minute that it runs.
"""

from ml_collections import ConfigDict

from sora_jax.models import captioner, expander
from sora_jax.run import recipe

VARIANTS = ("short", "small")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; any key can be overridden with --config.key=value."""
  if variant not in ("", *VARIANTS):
    raise ValueError(
      f"captioner has no variant {variant!r}; there are {', '.join(VARIANTS)}"
    )
  c = ConfigDict()
  c.stages = ("data", "captioner")

  c.data = ConfigDict()
  c.data.source = "shapes"  # or a folder of videos and images with captions
  c.data.train_clips = 6000
  c.data.heldout_clips = 512
  c.data.max_pixels = 96 * 64
  c.data.cache = "raw"  # 1.6 GB, in place of decoding at each visit

  c.captioner = ConfigDict()
  c.captioner.model = recipe.preset(captioner.PRESETS, "tiny")
  c.captioner.model.stem_pieces = 4
  c.captioner.rows = 8
  c.captioner.tokens = 216  # the longest clip: 33 frames of 96x64
  c.captioner.text_tokens = 128
  c.captioner.segments = 16
  c.captioner.max_text_tokens = 64
  c.captioner.train = ConfigDict()
  c.captioner.train.optimizer = "muon"
  c.captioner.train.steps = 900
  c.captioner.train.learning_rate = 6e-3
  c.captioner.train.warmup_steps = 50
  c.captioner.train.schedule = "wsd"
  c.captioner.train.decay_steps = 300
  c.captioner.train.weight_decay = 0.01
  c.captioner.train.b2 = 0.99
  c.captioner.train.ema_decay = 0.99
  c.captioner.train.eval_every = 300
  c.captioner.train.save_every = 100

  # Of prompts, by the stage expander: captions of shapes are short and alike.
  c.expander = ConfigDict()
  c.expander.model = recipe.preset(expander.PRESETS, "tiny")

  # The chain that goes on from here has keys of its own, which are not read.
  c.vae = ConfigDict()
  c.vae.train = ConfigDict()
  c.vae.train.steps = 0
  c.dit = ConfigDict()
  c.dit.train = ConfigDict()
  c.dit.train.steps = 0

  c.evaluate = ConfigDict()
  c.evaluate.clips = 512
  c.matmul_precision = "BF16_BF16_F32"
  if variant == "small":
    c.data.world = "short"
    c.data.train_clips = 12000
    c.data.max_pixels = 64 * 64
    c.captioner.rows = 4
    c.captioner.tokens = 144  # three clips of 9 frames of 64x64
    c.captioner.text_tokens = 96
    c.captioner.segments = 10
    c.captioner.max_text_tokens = 40
    c.captioner.train.steps = 6000
    c.captioner.train.decay_steps = 2000
    c.captioner.train.eval_every = 2000
    c.captioner.train.save_every = 500
  if variant == "short":
    c.data.train_clips = 48
    c.data.heldout_clips = 8
    c.captioner.train.steps = 8
    c.captioner.train.warmup_steps = c.captioner.train.decay_steps = 2
    c.captioner.train.log_every = 4
    c.captioner.train.eval_every = 8
    c.captioner.train.save_every = 4
    c.expander.train = ConfigDict()
    c.expander.train.steps = 8
    c.expander.train.warmup_steps = 2
    c.expander.train.save_every = c.expander.train.eval_every = 8
    c.evaluate.clips = 8
  return recipe.complete(c)
