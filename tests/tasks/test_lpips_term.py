"""The terms of the VAE's loss by LPIPS, and the weight of its critic."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_losses as golden
from random_params import random_params
from tasks.test_tasks import (
  KEY,
  SMALL_GAN,
  SMALL_VAE,
  names_of,
)

from sora_jax.models.lpips import LPIPS
from sora_jax.runtime import sharding
from sora_jax.tasks import clip_pixels
from sora_jax.tasks import vae as vae_task
from sora_jax.training import loop

LPIPS_WIDTHS = (4, 4, 4, 4, 4)
EVERYTHING = dataclasses.replace(
  SMALL_GAN,
  mse_weight=0.5,
  lpips_weight=0.7,
  lpips_file="weights.safetensors",
  lpips_frames=2,
  gan_adaptive=True,
  gan_weight=0.8,
)


@pytest.fixture
def narrow_lpips(monkeypatch):
  """Params of an LPIPS that takes no time; the task then makes that one."""
  narrow = functools.partial(LPIPS, LPIPS_WIDTHS)
  monkeypatch.setattr(vae_task, "LPIPS", narrow)
  image = jnp.zeros((1, 16, 16, 3))
  return jax.jit(narrow().init)(KEY, image, image)["params"]


def large_batch(step=golden.GAN_START, rows=2, size=16):
  """Clips that LPIPS can look at; the second one is short and small."""
  rng = np.random.default_rng(0)
  valid = np.tile(np.array([5, size, size]), (rows, 1))
  valid[1] = (2, size - 4, size)
  return {
    "video_THWC": rng.integers(0, 256, (rows, 5, size, size, 3), np.uint8),
    "valid_3": valid.astype(np.int32),
    "step": np.int32(step),
  }


@pytest.mark.slow
def test_chosen_frames_are_different_and_valid():
  batch = large_batch()
  mask = clip_pixels.valid_mask(batch)
  # Frames say who they are.
  time = np.broadcast_to(np.arange(5.0)[:, None, None, None], mask.shape)
  seen = set()
  for seed in range(20):
    clip, chosen = clip_pixels.choose_frames((time, mask), jax.random.key(seed), 3)
    assert clip.shape == (2, 3, 16, 16, 1)
    frames = np.asarray(clip[:, :, 0, 0, 0])
    assert [len(set(row)) for row in frames] == [3, 3]
    assert set(frames[1, :2]) == {0, 1} and not np.any(chosen[1, 2])
    seen.add(tuple(frames[0]))
  assert len(seen) > 10
  for count in (0, 5, 9):
    assert clip_pixels.choose_frames((time, mask), KEY, count)[0] is time


@pytest.mark.slow
def test_lpips_term(narrow_lpips):
  """It is the mean over valid frames, and padding changes nothing."""
  config = dataclasses.replace(EVERYTHING, gan_weight=0.0, lpips_frames=0)
  task = vae_task.make(SMALL_VAE, config, lpips_params=narrow_lpips)
  params = random_params(task.init, KEY, scale=0.1)
  assert "lpips" not in params and set(task.frozen) == {"lpips"}
  step = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
  batch = large_batch()
  (loss, metrics), gradients = step(params, batch, KEY, task.frozen)
  expected = metrics["l1"] + config.kl_weight * metrics["kl"]
  expected += 0.5 * metrics["mse"] + 0.7 * metrics["lpips"]
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert metrics["lpips"] > 0.01
  dark = np.where(clip_pixels.valid_mask(batch) > 0, batch["video_THWC"], 7)
  # The encoder sees padding, so only behind the clip's end.
  dark[:, :, 12:] = batch["video_THWC"][:, :, 12:]
  assert np.any(dark != batch["video_THWC"])
  other = {**batch, "video_THWC": dark.astype(np.uint8)}
  (_, found), _ = step(params, other, KEY, task.frozen)
  np.testing.assert_allclose(found["lpips"], metrics["lpips"], rtol=1e-5)
  nothing = {**batch, "valid_3": np.zeros_like(batch["valid_3"])}
  (loss, _), gradients = step(params, nothing, KEY, task.frozen)
  assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))
  evaluated = jax.jit(task.evaluate)(params, batch, KEY, task.frozen)
  assert (
    set(evaluated) == {"psnr", "effective_rank", "lpips"} and evaluated["lpips"] > 0
  )


@pytest.mark.slow
def test_adaptive_weight_is_the_ratio_of_gradient_norms(narrow_lpips):
  """Against whole gradients of whole losses, differentiated one by one."""
  task = vae_task.make(SMALL_VAE, EVERYTHING, lpips_params=narrow_lpips)
  fixed = dataclasses.replace(EVERYTHING, gan_adaptive=False)
  fixed_task = vae_task.make(SMALL_VAE, fixed, lpips_params=narrow_lpips)
  params, batch = random_params(task.init, KEY, scale=0.1), large_batch()

  def term(weigh):
    def loss(params):
      _, metrics = fixed_task.loss(params, batch, KEY, task.frozen)
      return sum(weight * metrics[name] for name, weight in weigh.items())

    return jax.grad(loss)

  @jax.jit
  def brute_force(params):
    ours = term({"l1": 1.0, "mse": 0.5, "lpips": 0.7})(params)
    theirs = term({"gan_generator": 1.0})(params)
    kl = term({"kl": EVERYTHING.kl_weight})(params)
    critic = term({"gan_critic": 0.5})(params)
    return ours, theirs, kl, critic

  ours, theirs, kl, critic = brute_force(params)
  last = [
    tree["vae"]["decoder"]["conv_out"]["conv"]["kernel"] for tree in (ours, theirs)
  ]
  scale = np.linalg.norm(last[0]) / (np.linalg.norm(last[1]) + 1e-4)
  step = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
  (loss, metrics), gradients = step(params, batch, KEY, task.frozen)
  np.testing.assert_allclose(metrics["gan_scale"], scale, rtol=1e-4)
  # And the gradients are those of the terms, so weighted; the weight has none itself.
  expected = jax.tree.map(
    lambda a, b, c: a + 0.8 * scale * b + c, ours["vae"], theirs["vae"], kl["vae"]
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    gradients["vae"],
    expected,
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    gradients["discriminator"],
    critic["discriminator"],
  )
  expected = metrics["l1"] + EVERYTHING.kl_weight * metrics["kl"]
  expected += 0.5 * metrics["mse"] + 0.7 * metrics["lpips"]
  expected += 0.8 * scale * metrics["gan_generator"] + 0.5 * metrics["gan_critic"]
  np.testing.assert_allclose(loss, expected, rtol=1e-4)
  # Before the start the generator's term has no part in it.
  (_, _), gradients = step(params, large_batch(golden.GAN_START - 1), KEY, task.frozen)
  jax.tree.map(
    lambda a, b, c: np.testing.assert_allclose(a, b + c, rtol=1e-3, atol=1e-5),
    gradients["vae"],
    ours["vae"],
    kl["vae"],
  )


@pytest.mark.slow
def test_step_with_everything_on_two_devices(narrow_lpips):
  """Frozen params are sharded, are no part of the state, and two microbatches work."""
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  placed = sharding.param_shardings({"lpips": narrow_lpips}, vae_task.LPIPS_RULES, mesh)
  frozen = jax.device_put({"lpips": narrow_lpips}, placed)
  task = vae_task.make(SMALL_VAE, EVERYTHING, lpips_params=frozen["lpips"])
  rules = vae_task.sharding_rules(SMALL_VAE, EVERYTHING)
  config = dataclasses.replace(golden.VAE_TRAIN, grad_accumulation=2)
  built = loop.build(task, config, mesh, rules, seed=0)
  batch = large_batch(rows=4)
  del batch["step"]
  batch = sharding.shard_batch(batch, mesh)
  with jax.set_mesh(mesh):
    state = built.init.lower().compile()()
    lowered = built.update.lower(built.abstract, batch, task.frozen)
    state, values = lowered.compile()(state, batch, task.frozen)
  assert set(state.params) == {"vae", "discriminator"}
  assert {"l1", "kl", "mse", "lpips", "gan_scale", "gan_critic"} < set(values)
  for value in (*values.values(), *jax.tree.leaves(state)):
    assert np.isfinite(value).all()


def test_rules_cover_lpips():
  image = np.zeros((1, 16, 16, 3), np.float32)
  shapes = {"lpips": jax.eval_shape(LPIPS().init, KEY, image, image)["params"]}
  mesh = sharding.make_mesh(fsdp=8)
  placed = sharding.param_shardings(shapes, vae_task.LPIPS_RULES, mesh)
  for name, leaf in names_of(placed).items():
    assert name.endswith("kernel") != leaf.is_fully_replicated, name


def test_lpips_without_a_file_is_refused():
  with pytest.raises(ValueError, match=r"lpips_weight 0\.5 needs lpips_file"):
    vae_task.VAELossConfig(lpips_weight=0.5)
  with pytest.raises(ValueError, match="lpips_frames -1 is less than 0"):
    vae_task.VAELossConfig(lpips_frames=-1)


def test_pixels_there_and_back():
  video = np.arange(256, dtype=np.uint8)
  as_float = clip_pixels.to_float(video)
  assert float(as_float[0]) == -1.0 and float(as_float[-1]) == 1.0
  np.testing.assert_array_equal(clip_pixels.to_uint8(as_float), video)
  np.testing.assert_array_equal(
    clip_pixels.to_uint8(jnp.array([-3.0, 0.999, 3.0])), [0, 255, 255]
  )


def test_valid_masks():
  batch = {
    "video_THWC": np.zeros((4, 5, 8, 12, 3), np.uint8),
    "valid_3": np.array([[5, 8, 12], [1, 4, 8], [3, 8, 12], [0, 0, 0]]),
  }
  mask = np.asarray(clip_pixels.valid_mask(batch))
  assert mask.shape == (4, 5, 8, 12, 1)
  assert list(mask.sum((1, 2, 3, 4))) == [5 * 8 * 12, 4 * 8, 3 * 8 * 12, 0]
  assert mask[1, 0, :4, :8].all() and mask[2, :3].all()
  # Latents count where all of their 4x4x4 (the first: 1x4x4) pixels do.
  mask = np.asarray(clip_pixels.latent_mask(golden.VAE, batch))
  assert mask.shape == (4, 2, 2, 3, 1)
  assert list(mask.sum((1, 2, 3, 4))) == [12, 2, 6, 0]
