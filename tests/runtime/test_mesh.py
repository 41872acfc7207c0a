"""Packed training on meshes of 8 simulated devices equals that on one device.

`PYTHONPATH=tests python tests/runtime/test_mesh.py all` compares every mesh of
four axes, in some minutes.
"""

import itertools
import math
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_losses import FAST_COMPILE
from random_params import random_params
from training import test_loop as toy

from sora_jax.models import attention, partition
from sora_jax.models.caption_encoder import TextEncoderConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.runtime import sharding
from sora_jax.tasks import dit as dit_task
from sora_jax.training import loop

# Remat of a model, and meshes (data, fsdp, context, tensor) for it. On two chips of
# tokens Ulysses shares the heads, over eight keys are gathered as well.
HEADS = 4
CASES = {"attention_saved": ((1, 2, 2, 2),), "full": ((1, 1, 8, 1),)}
ROWS, TOKENS, TEXTS, SEGMENTS, STEPS = 8, 64, 16, 4, 10


def batch(seed=0):
  """Rows of three clips with given tokens, captions and padding."""
  rng = np.random.default_rng(seed)
  segment, group = (np.zeros((ROWS, TOKENS), np.int32) for _ in range(2))
  text_segment = np.zeros((ROWS, TEXTS), np.int32)
  for row in range(ROWS):
    starts = np.sort(rng.choice(np.arange(4, TOKENS - 4), 3, replace=False))
    for clip, (start, stop) in enumerate(zip((0, *starts[:-1]), starts, strict=True)):
      segment[row, start:stop] = clip + 1
      group[row, start:stop] = 2 * clip + (rng.random(stop - start) < 0.2)
      text_segment[row, 5 * clip : 5 * clip + 4 + (clip > 0)] = clip + 1
  text_segment = np.sort(np.where(text_segment == 0, SEGMENTS + 1, text_segment))
  text_segment[text_segment > SEGMENTS] = 0
  return {
    "patch_LP": rng.standard_normal((ROWS, TOKENS, 4)).astype(np.float32),
    "position_L3": 8 * rng.random((ROWS, TOKENS, 3)).astype(np.float32),
    "segment_L": segment,
    "group_L": group,
    "text_S": rng.integers(1, 60, (ROWS, TEXTS)).astype(np.int32),
    "text_segment_S": text_segment,
    "text_position_S": np.tile(np.arange(TEXTS, dtype=np.int32), (ROWS, 1)),
  }


def losses(mesh, remat):
  """Loss and gradient norm of ten steps."""
  model = DiTConfig(
    patch_size=(1, 1, 1),
    channels=4,
    width=32,
    depth=2,
    heads=HEADS,
    mlp_width=64,
    text_width=16,
    frequency_width=16,
    remat=remat,
  )
  text = TextEncoderConfig(vocab_size=64, width=16, depth=1, heads=2)
  task = dit_task.make(model, text, dit_task.DiTLossConfig(), SEGMENTS)

  params = random_params(task.init, jax.random.key(0))

  def init(key):
    del key
    return jax.tree.map(jnp.asarray, params)

  config = loop.TrainConfig(steps=STEPS, learning_rate=3e-3, warmup_steps=2)
  built = loop.build(
    task._replace(init=init), config, mesh, dit_task.SHARDING_RULES, seed=0
  )
  rows = []
  with jax.set_mesh(mesh):
    data = sharding.shard_batch(batch(), mesh)
    init, update = (
      lowered.compile(compiler_options=FAST_COMPILE)
      for lowered in (built.init.lower(), built.update.lower(built.abstract, data))
    )
    state = init()
    for _ in range(STEPS):
      state, values = update(state, data)
      rows.append((float(values["loss"]), float(values["grad_norm"])))
  return np.array(rows)


def compare_losses(cases):
  one = losses(sharding.make_mesh(devices=jax.devices()[:1]), "none")
  assert one[-1, 0] < one[0, 0]
  for remat, meshes in cases.items():
    for shape in meshes:
      if HEADS % shape[3] == 0:
        many = losses(sharding.make_mesh(*shape), remat)
        worst = np.abs(many / one - 1).max(axis=0)
        sys.stderr.write(f"mesh {shape}, remat {remat}: {worst}\n")
        np.testing.assert_allclose(many, one, rtol=1e-5, err_msg=f"{shape} {remat}")


def compare_attention():
  """Values and gradients of each way of sharing tokens; keys of other lengths."""
  rng = np.random.default_rng(0)
  for heads, keys in ((4, 48), (6, 48), (3, 48), (4, 24), (4, 20)):
    q, k, v = (
      rng.standard_normal((2, n, heads, 8)).astype(np.float32) for n in (48, keys, keys)
    )
    segments_q, segments_k = (
      np.sort(np.tile([*np.arange(n - 3) % 3 + 1, 9, 9, 9], (2, 1))).astype(np.int32)
      for n in (48, keys)
    )
    segments_q, segments_k = (np.where(s == 9, 0, s) for s in (segments_q, segments_k))
    inputs = (q, k, v, segments_q, segments_k)

    def run(form, inputs=inputs):
      def total(*inputs):
        out = form(*inputs)
        real = (inputs[3] > 0)[..., None, None]
        return jnp.sum(jnp.sin(out) * real), out * real

      grad = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
      (_, out), gradients = grad.lower(*inputs).compile(compiler_options=FAST_COMPILE)(
        *inputs
      )
      return (out, *gradients)

    expected = run(attention.reference_attention)
    for shape, gathered in itertools.product(((1, 2, 4, 1), (1, 1, 8, 1)), (0, 2**30)):
      attention.GATHERED = gathered
      with jax.set_mesh(sharding.make_mesh(*shape)):
        found = run(attention.attention)
      for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, err_msg=f"{heads} {keys} {shape}")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["losses", "attention"])
def test_eight_devices_equal_one(tmp_path, what):
  toy.finish(toy.start_process(what, tmp_path, script=__file__, devices=8))


def test_axes_that_do_not_divide_are_left_out():
  mesh = jax.sharding.AbstractMesh((1, 2, 4, 2), sharding.AXES)
  spec = partition.fit(mesh, (2, 12, 6), partition.ROWS, partition.TOKENS, "tensor")
  assert spec == jax.P(("data", "fsdp"), ("context",), ("tensor",))
  assert partition.fit(mesh, (3, 6), partition.ROWS, "context") == jax.P(
    ("data",), None
  )


def test_without_a_mesh_nothing_is_constrained():
  x = jnp.ones((3, 5))
  assert partition.constrain(x, partition.ROWS, "context") is x
  assert partition.platform() == jax.default_backend()


if __name__ == "__main__":
  if sys.argv[1] == "all":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    every = itertools.product((1, 2, 4, 8), repeat=4)
    every = [shape for shape in every if math.prod(shape) == 8]
    compare_losses(dict.fromkeys(CASES, every))
  elif sys.argv[1] == "losses":
    toy.cache_compilations(f"{sys.argv[2]}/cache")
    compare_losses(CASES)
  else:
    compare_attention()
