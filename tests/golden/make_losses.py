"""Makes losses.json: losses of 20 steps of each task, tiny, on synthetic batches.

  python tests/golden/make_losses.py

Run it again only after a change that is meant to change training, and say so in the
commit. The losses go through the real train step, optimizer and sharding rules.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np

from sora_jax.models.caption_encoder import TextEncoderConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.models.vae import VAEConfig
from sora_jax.runtime import sharding
from sora_jax.tasks import dit as dit_task
from sora_jax.tasks import vae as vae_task
from sora_jax.training import loop

PATH = pathlib.Path(__file__).parent / "losses.json"
STEPS, SEED, ROWS = 20, 5, 8
# Compiling takes nearly all of the time, and the programs are tiny. Full optimization
# moves these losses by less than 1e-5 of their size.
FAST_COMPILE = {
  "xla_backend_optimization_level": 0,
  "xla_cpu_use_fusion_emitters": False,
}

VAE = VAEConfig(
  width=8,
  width_multipliers=(1,),
  downsample=(),
  blocks=1,
  latent_channels=4,
  patch_size=(4, 4, 4),
  middle=False,
)
GAN_START = 10
VAE_LOSS = vae_task.VAELossConfig(
  kl_weight=1e-3, gan_weight=0.1, gan_start=GAN_START, discriminator_width=8
)
VAE_TRAIN = loop.TrainConfig(
  steps=STEPS,
  learning_rate=1e-3,
  warmup_steps=4,
  schedule="cosine",
  weight_decay=1e-2,
  # Own learning rate, so own clipping: the critic does not touch the generator.
  learning_rates=((r"discriminator/.*", 1e-3),),
)
# Without any of the terms that are networks themselves.
PLAIN_LOSS = vae_task.VAELossConfig(kl_weight=1e-3, mse_weight=5.0)
DIT = DiTConfig(
  patch_size=(1, 2, 2),
  channels=4,
  width=32,
  depth=2,
  heads=2,
  mlp_width=64,
  text_width=16,
  frequency_width=16,
)
TEXT = TextEncoderConfig(vocab_size=32, width=16, depth=2, heads=2)
DIT_TRAIN = loop.TrainConfig(
  steps=STEPS, learning_rate=1e-3, warmup_steps=4, schedule="constant"
)
TOKENS, TEXT_TOKENS, SEGMENTS = 24, 12, 3


def vae_batch(index: int) -> dict[str, np.ndarray]:
  """Drifting colour waves; some clips shorter or smaller, one without any frame."""
  rng = np.random.default_rng([1, index])
  t, h, w = np.meshgrid(np.arange(5), np.arange(8), np.arange(8), indexing="ij")
  wave = rng.uniform(-0.2, 0.2, (ROWS, 3, 4)) * [1, 1, 1, 8]
  phase = (
    np.stack([t, h, w, np.ones_like(t)], -1) @ wave.transpose(0, 2, 1)[:, None, None]
  )
  valid = np.tile(np.array([5, 8, 8]), (ROWS, 1))
  valid[1], valid[2], valid[3] = (1, 8, 8), (5, 4, 8), 0
  return {
    "video_THWC": (127.5 + 127.5 * np.sin(phase)).astype(np.uint8),
    "valid_3": valid.astype(np.int32),
  }


def dit_batch(index: int) -> dict[str, np.ndarray]:
  """Rows of up to 3 clips of (t, 2, 2) tokens, some tokens given, and padding."""
  rng = np.random.default_rng([2, index])
  batch = {
    "patch_LP": rng.standard_normal((ROWS, TOKENS, DIT.patch_width)),
    "position_L3": np.zeros((ROWS, TOKENS, 3)),
  }
  for name in ("segment_L", "group_L"):
    batch[name] = np.zeros((ROWS, TOKENS), int)
  for name in ("text_S", "text_segment_S", "text_position_S"):
    batch[name] = np.zeros((ROWS, TEXT_TOKENS), int)
  for row in range(ROWS):
    start = text_start = 0
    for n in range(rng.integers(1, SEGMENTS + 1)):
      frames, length = rng.integers(1, 3), rng.integers(1, 5)
      token = np.arange(4 * frames)
      here = slice(start, start + len(token))
      there = slice(text_start, text_start + length)
      given = (token < 4) & (frames > 1) & (rng.random() < 0.5)
      # The text says what the clip holds, so there is something to learn.
      word = rng.integers(1, TEXT.vocab_size)
      batch["patch_LP"][row, here] = 0.2 * batch["patch_LP"][row, here] + word / 16 - 1
      batch["position_L3"][row, here] = np.stack(
        [1.5 * (token // 4), 4 * (token // 2 % 2), 5 * (token % 2)], -1
      )
      batch["segment_L"][row, here] = n + 1
      batch["group_L"][row, here] = 2 * n + given
      batch["text_S"][row, there] = word
      batch["text_segment_S"][row, there] = n + 1
      batch["text_position_S"][row, there] = np.arange(length)
      start, text_start = here.stop, there.stop
  return {
    name: value.astype(np.float32 if value.dtype == float else np.int32)
    for name, value in batch.items()
  }


# Name -> (task, train config, sharding rules, index -> batch).
CASES = {
  "vae": (
    vae_task.make(VAE, VAE_LOSS),
    VAE_TRAIN,
    vae_task.sharding_rules(VAE, VAE_LOSS),
    vae_batch,
  ),
  "vae_plain": (
    vae_task.make(VAE, PLAIN_LOSS),
    dataclasses.replace(VAE_TRAIN, learning_rates=()),
    vae_task.sharding_rules(VAE, PLAIN_LOSS),
    vae_batch,
  ),
  "dit": (
    dit_task.make(DIT, TEXT, dit_task.DiTLossConfig(), SEGMENTS),
    DIT_TRAIN,
    dit_task.SHARDING_RULES,
    dit_batch,
  ),
}


@functools.cache
def build(case: str, mesh) -> loop.Built:
  """What loop.build gives, compiled quickly."""
  task, config, rules, make_batch = CASES[case]
  built = loop.build(task, config, mesh, rules, SEED)
  batch = sharding.shard_batch(make_batch(0), mesh)
  with jax.set_mesh(mesh):
    return built._replace(
      init=lambda: built.init.lower().compile(FAST_COMPILE)(),
      update=built.update.lower(built.abstract, batch).compile(FAST_COMPILE),
    )


def run(case: str, mesh, steps: int = STEPS, state=None):
  """Yields the state on the host, then after each step its metrics and the state."""
  built, make_batch = build(case, mesh), CASES[case][-1]
  state = built.init() if state is None else to_device(state, built)
  yield {}, host_copy(state)
  for step in range(steps):
    batch = sharding.shard_batch(make_batch(step), mesh)
    state, values = built.update(state, batch)
    yield {name: float(value) for name, value in values.items()}, host_copy(state)


def host_copy(state):
  """The state as numpy arrays; a copy, since the next update donates the state."""
  return jax.tree.map(np.array, state)


def to_device(state, built: loop.Built):
  """Inverse of `host_copy`."""
  return jax.device_put(state, jax.tree.map(lambda x: x.sharding, built.abstract))


def losses(case: str, values: list[dict[str, float]]) -> dict[str, list[float]]:
  """What is kept of the metrics of each step."""
  names = ("loss",) if case == "dit" else ("loss", "l1")
  return {name: [round(v[name], 7) for v in values] for name in names}


def main():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  made = {
    case: losses(case, [values for values, _ in run(case, mesh)][1:]) for case in CASES
  }
  PATH.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
