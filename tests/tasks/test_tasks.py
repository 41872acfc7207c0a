"""Tasks: golden losses, 8 devices equal 1, masks, GAN terms, sharding rules."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest
from golden import make_losses as golden
from jax.sharding import PartitionSpec
from random_params import random_params

from sora_jax.evaluation import vae_health
from sora_jax.models import discriminator
from sora_jax.models.discriminator import Discriminator
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.runtime import sharding
from sora_jax.tasks import clip_pixels
from sora_jax.tasks import vae as vae_task

KEY = jax.random.key(3)


@functools.cache
def one_device(case):
  """[(metrics, state)] before and after each of 20 steps, on the first device alone."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return list(golden.run(case, mesh))


def initial_params(case):
  return one_device(case)[0][1].params


def names_of(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {sharding.path_name(path): leaf for path, leaf in leaves}


# --- training


@pytest.mark.slow
@pytest.mark.parametrize("case", golden.CASES)
def test_golden_losses(case):
  """See golden/make_losses.py."""
  expected = json.loads(golden.PATH.read_text())[case]
  values = golden.losses(case, [values for values, _ in one_device(case)][1:])
  assert values.keys() == expected.keys()
  for name, curve in values.items():
    assert len(curve) == golden.STEPS
    np.testing.assert_allclose(curve, expected[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("dit/loss", "vae/l1"))
def test_tasks_learn(name):
  """Until the VAE begins to feel its critic."""
  case, metric = name.split("/")
  curve = [values[metric] for values, _ in one_device(case)[1 : golden.GAN_START]]
  assert np.mean(curve[-4:]) < 0.95 * np.mean(curve[:2])


@pytest.mark.slow
@pytest.mark.parametrize(
  "case, axes",
  [("vae", {"data": 2, "fsdp": 4}), ("dit", {"data": 2, "fsdp": 2, "tensor": 2})],
)
def test_eight_devices_equal_one(case, axes):
  steps = 3
  mesh = sharding.make_mesh(**axes)
  reference = one_device(case)[: steps + 1]
  many = list(golden.run(case, mesh, steps, state=reference[0][1]))
  for (a, _), (b, _) in zip(reference[1:], many[1:], strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-6, err_msg=name)
  expected, state = names_of(reference[-1][1].params), names_of(many[-1][1].params)
  for name, value in expected.items():
    np.testing.assert_allclose(state[name], value, atol=1e-5, err_msg=name)


# --- sharding rules


def without_middle():
  model = VAEConfig(
    width_multipliers=(1,), downsample=(), patch_size=(4, 8, 8), middle=False
  )
  return model, golden.VAE_LOSS


RULES = {
  "vae": (golden.VAE, dataclasses.replace(golden.VAE_LOSS, gan_weight=0.0)),
  "vae_gan": (golden.VAE, golden.VAE_LOSS),
  "vae_wan": (VAEConfig(), golden.VAE_LOSS),
  "vae_folded": without_middle(),
  "dit": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RULES)
def test_every_param_matches_exactly_one_rule(case):
  if case == "dit":
    task, _, rules, _ = golden.CASES["dit"]
  else:
    task = vae_task.make(*RULES[case])
    rules = vae_task.sharding_rules(*RULES[case])
  shapes = jax.eval_shape(task.init, KEY)
  used = set()
  for name, leaf in names_of(shapes).items():
    matching = [rule for rule in rules if re.fullmatch(rule[0], name)]
    assert len(matching) == 1, (name, matching)
    (regex, spec) = matching[0]
    assert len(spec) <= leaf.ndim, (name, spec)
    # Large params must not be whole on every device.
    assert leaf.size < 1000 or spec != PartitionSpec() or leaf.ndim < 3, name
    used.add(regex)
  assert used == {regex for regex, _ in rules}


# --- VAE


SMALL_VAE = dataclasses.replace(golden.VAE, width=4, blocks=0)
SMALL_GAN = dataclasses.replace(golden.VAE_LOSS, discriminator_width=4)


@jax.jit
def vae_gradients(params, batch):
  task = vae_task.make(SMALL_VAE, SMALL_GAN)
  (loss, metrics), gradients = jax.value_and_grad(task.loss, has_aux=True)(
    params, batch, KEY
  )
  return loss, metrics, gradients


@functools.cache
def small_vae_params():
  return random_params(vae_task.make(SMALL_VAE, SMALL_GAN).init, KEY, scale=0.1)


def vae_batch(step=0, **changes):
  return {**golden.vae_batch(0), "step": np.int32(step), **changes}


def scaled_critic(params):
  """These params, with other ones of the discriminator."""
  critic = jax.tree.map(lambda leaf: 1.5 * leaf + 0.01, params["discriminator"])
  return {**params, "discriminator": critic}


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def differs(a, b):
  return any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.slow
def test_generator_does_not_feel_the_critic_before_gan_start():
  params = small_vae_params()
  for step in (golden.GAN_START - 1, golden.GAN_START):
    _, _, one = vae_gradients(params, vae_batch(step))
    _, _, other = vae_gradients(scaled_critic(params), vae_batch(step))
    assert differs(one["vae"], other["vae"]) == (step == golden.GAN_START)


@pytest.mark.slow
def test_critic_has_no_gradient_from_the_generators_term():
  """Switching that term on changes the generator's gradients only."""
  params = small_vae_params()
  off, metrics_off, before = vae_gradients(params, vae_batch(golden.GAN_START - 1))
  on, metrics_on, after = vae_gradients(params, vae_batch(golden.GAN_START))
  assert_equal(metrics_off, metrics_on)
  assert_equal(before["discriminator"], after["discriminator"])
  assert differs(before["vae"], after["vae"])
  assert any(np.any(leaf) for leaf in jax.tree.leaves(before["discriminator"]))
  expected = golden.VAE_LOSS.gan_weight * metrics_on["gan_generator"]
  np.testing.assert_allclose(on - off, expected, rtol=1e-4)


def test_vae_loss_masks():
  """Frames behind a clip's end, and clips without frames, change nothing."""
  params = small_vae_params()
  batch = vae_batch()
  _, metrics, gradients = vae_gradients(params, batch)
  video = batch["video_THWC"].copy()
  frames = batch["valid_3"][:, 0]
  assert 0 in frames and 1 in frames
  for row, count in enumerate(frames):
    video[row, count:] = 255 - video[row, count:]
  _, other, _ = vae_gradients(params, vae_batch(video_THWC=video))
  for name in ("l1", "kl", "gan_generator", "gan_critic"):
    np.testing.assert_allclose(other[name], metrics[name], rtol=1e-6)
  # The pixels that count do change it.
  video = batch["video_THWC"].copy()
  video[1, 0] = 255 - video[1, 0]
  _, other, _ = vae_gradients(params, vae_batch(video_THWC=video))
  assert abs(other["l1"] - metrics["l1"]) > 1e-4


def test_vae_loss_is_finite_without_any_clip():
  batch = vae_batch(valid_3=np.zeros((golden.ROWS, 3), np.int32))
  loss, metrics, gradients = vae_gradients(small_vae_params(), batch)
  assert not any(metrics.values())
  for value in (loss, *metrics.values(), *jax.tree.leaves(gradients)):
    assert np.isfinite(value).all()
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["vae"]))


@pytest.mark.slow
def test_noise_on_latents_is_for_the_decoder_in_training():
  """Noise has another level in each clip; what is scored has none."""
  quiet = dataclasses.replace(golden.VAE_LOSS, gan_weight=0.0)
  noisy = dataclasses.replace(quiet, latent_noise=0.5)
  tasks = [vae_task.make(SMALL_VAE, config) for config in (quiet, noisy)]
  params, batch = {"vae": small_vae_params()["vae"]}, vae_batch()
  (_, a), (_, b) = (jax.jit(task.loss)(params, batch, KEY) for task in tasks)
  assert a["kl"] == b["kl"] and a["l1"] != b["l1"]
  latent = 3.0 * np.random.default_rng(0).standard_normal((64, 5, 4, 4, 2))
  noise = vae_task.noise_like(latent.astype(np.float32), KEY)
  size_B = np.std(noise, axis=(1, 2, 3, 4)) / 3.0
  assert 0.0 < size_B.min() < 0.1 and 0.9 < size_B.max() < 1.1
  np.testing.assert_allclose(size_B.mean(), 0.5, atol=0.1)
  with pytest.raises(ValueError, match="latent_noise -0.1 is negative"):
    vae_task.VAELossConfig(latent_noise=-0.1)


@pytest.mark.slow
def test_critic_sees_clips_only():
  """Its terms are means over the cells that begin inside of a clip."""
  params, batch = small_vae_params(), vae_batch()
  real = {name: value[:2] for name, value in batch.items() if np.ndim(value)}
  padded = {name: np.concatenate([v, np.zeros_like(v)]) for name, v in real.items()}
  _, metrics, _ = vae_gradients(params, {**batch, **real})
  _, other, _ = vae_gradients(params, {**batch, **padded})
  for name in ("gan_generator", "gan_critic"):
    np.testing.assert_allclose(other[name], metrics[name], rtol=1e-5)


def test_critic_has_a_logit_for_each_cell_of_the_mask():
  for depth in (1, 3):
    critic, video = Discriminator(4, depth), np.zeros((1, 17, 40, 23, 3), np.float32)
    logits, _ = jax.eval_shape(lambda x: critic.init_with_output(KEY, x), video)  # noqa: B023
    cells = slice(None, None, 2**depth)
    assert logits.shape == video[:, cells, cells, cells, 0].shape


@pytest.mark.slow
def test_critic_on_cpu_equals_plain_convolutions(monkeypatch):
  critic = Discriminator(4, 3)
  video = np.random.default_rng(0).uniform(-1, 1, (2, 5, 24, 17, 3)).astype(np.float32)
  params = jax.jit(critic.init)(KEY, video)
  folded = jax.jit(critic.apply)(params, video)
  monkeypatch.setattr(discriminator, "_conv", None)  # what flax takes by itself
  plain = jax.jit(Discriminator(4, 3).apply)(params, video)
  assert folded.shape == plain.shape
  np.testing.assert_allclose(folded, plain, atol=1e-5)


# --- DiT


@jax.jit
def dit_loss(params, batch):
  return golden.CASES["dit"][0].loss(params, batch, KEY)


def dit_batch(**changes):
  return {**golden.dit_batch(0), "step": np.int32(0), **changes}


@pytest.mark.slow
def test_dit_loss_ignores_padding():
  batch, params = (
    dit_batch(),
    random_params(golden.CASES["dit"][0].init, KEY, scale=0.2),
  )
  loss, metrics = dit_loss(params, batch)
  rng = np.random.default_rng(1)
  padding, text_padding = batch["segment_L"] == 0, batch["text_segment_S"] == 0
  patch, position, text = (
    batch[name].copy() for name in ("patch_LP", "position_L3", "text_S")
  )
  assert padding.any() and text_padding.any()
  patch[padding] = 100 * rng.standard_normal((padding.sum(), patch.shape[-1]))
  position[padding] = rng.uniform(0, 50, (padding.sum(), 3))
  text[text_padding] = rng.integers(1, 32, text_padding.sum())
  changed = dit_batch(patch_LP=patch, position_L3=position, text_S=text)
  other, other_metrics = dit_loss(params, changed)
  assert other == loss
  assert_equal(other_metrics, metrics)


@pytest.mark.slow
def test_dit_loss_is_the_mean_over_noisy_tokens():
  """At init the prediction is 0, so the error of a token is |eps - x0|^2 itself."""
  batch, params = dit_batch(), initial_params("dit")
  assert not np.any(params["dit"]["head"]["kernel"])
  real, given = batch["segment_L"] > 0, batch["group_L"] % 2 == 1
  noisy = real & ~given
  assert given.any() and (given <= real).all()
  loss, metrics = dit_loss(params, batch)
  # The targets of noisy tokens alone decide it.
  patch = batch["patch_LP"].copy()
  patch[~noisy] += 10.0
  other, _ = dit_loss(params, dit_batch(patch_LP=patch))
  assert other == loss
  # (eps - x0)^2 grows by 2 * 10 * (x0 - eps) + 100, so two shifts give the curvature.
  up, _ = dit_loss(params, dit_batch(patch_LP=batch["patch_LP"] + 1.0))
  down, _ = dit_loss(params, dit_batch(patch_LP=batch["patch_LP"] - 1.0))
  np.testing.assert_allclose(up + down - 2 * loss, 2.0, rtol=1e-4)
  np.testing.assert_allclose(metrics["padding"], 1 - real.mean(), rtol=1e-6)
  np.testing.assert_allclose(metrics["given"], given.sum() / real.sum(), rtol=1e-5)
  bins = range(4)
  weight = [float(metrics[f"loss_t/{i}:weight"]) for i in bins]
  assert sum(weight) == noisy.sum()
  by_bin = np.dot(weight, [float(metrics[f"loss_t/{i}"]) for i in bins])
  np.testing.assert_allclose(by_bin / noisy.sum(), loss, rtol=1e-5)


def test_given_tokens_are_seen_clean_and_captions_are_read():
  params = random_params(golden.CASES["dit"][0].init, KEY, scale=0.2)
  batch = dit_batch()
  loss, _ = dit_loss(params, batch)
  given = batch["group_L"] % 2 == 1
  patch, text = batch["patch_LP"].copy(), batch["text_S"].copy()
  patch[given] *= -1.0
  text[batch["text_segment_S"] > 0] ^= 1
  for changed in ({"patch_LP": patch}, {"text_S": text}):
    other, _ = dit_loss(params, dit_batch(**changed))
    assert abs(other - loss) > 1e-5


def test_dit_step_is_finite_without_any_token():
  """Rows whose records are all damaged."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  built = golden.build("dit", mesh)
  _, state = one_device("dit")[0]
  batch = {name: np.zeros_like(value) for name, value in golden.dit_batch(0).items()}
  state = golden.to_device(state, built)
  state, values = built.update(state, sharding.shard_batch(batch, mesh))
  assert values["loss"] == values["grad_norm"] == 0.0 and values["padding"] == 1.0
  for value in (*values.values(), *jax.tree.leaves(state)):
    assert np.isfinite(value).all()


def test_correlation_of_channels():
  """Channels x, -x, y and a constant, with something else where the mask is 0."""
  rng = np.random.default_rng(0)
  x, y = rng.choice([-1.0, 1.0], (2, 2, 3, 16, 16)).astype(np.float32)
  y -= np.sum(x * y) / np.sum(x * x) * x  # no chance correlation
  latent = np.stack([2.0 * x + 3.0, -x, y, np.full_like(x, 7.0)], axis=-1)
  mask = np.ones((2, 4, 16, 16, 1), np.float32)
  mask[:, -1] = 0.0
  padded = np.concatenate([latent, rng.standard_normal((2, 1, 16, 16, 4))], axis=1)
  found = vae_task.correlation(padded.astype(np.float32), mask)
  expected = np.diag([1.0, 1.0, 1.0, 0.0])
  expected[0, 1] = expected[1, 0] = -1.0
  # y has a mean, which is taken off: its correlation with x is small, not 0.
  np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.slow
def test_decorrelation_term():
  """It adds its weight to the loss, asks the encoder only, and can be lowered."""
  quiet = dataclasses.replace(golden.VAE_LOSS, gan_weight=0.0)
  config = dataclasses.replace(quiet, decorrelation_weight=0.5)
  params, batch = {"vae": small_vae_params()["vae"]}, vae_batch()
  losses = []
  for each in (quiet, config):
    task = vae_task.make(SMALL_VAE, each)
    losses.append(jax.jit(task.loss)(params, batch, KEY))
  (plain, _), (total, metrics) = losses
  np.testing.assert_allclose(total, plain + 0.5 * metrics["decorrelation"], rtol=1e-6)
  assert metrics["decorrelation"] > 0.01
  only = dataclasses.replace(config, decorrelation_weight=1e3)
  gradient = jax.jit(
    jax.grad(lambda p: vae_task.make(SMALL_VAE, only).loss(p, batch, KEY)[0])
  )(params)
  stepped = jax.tree.map(lambda p, g: p - 1e-6 * g, params, gradient)
  _, lower = jax.jit(vae_task.make(SMALL_VAE, config).loss)(stepped, batch, KEY)
  assert lower["decorrelation"] < metrics["decorrelation"]
  with pytest.raises(ValueError, match="decorrelation_weight -0.1 is negative"):
    vae_task.VAELossConfig(decorrelation_weight=-0.1)


@pytest.mark.slow
def test_effective_rank_is_scored():
  """It is that of evaluation/vae_health.py, of the posterior's means."""
  task = vae_task.make(SMALL_VAE, dataclasses.replace(golden.VAE_LOSS, gan_weight=0.0))
  # Params of a size that makes channels vary by more than what counts as nothing.
  params, batch = random_params(task.init, KEY, scale=0.4), vae_batch()
  rank = jax.jit(task.evaluate)(params, batch, KEY)["effective_rank"]
  video = clip_pixels.to_float(batch["video_THWC"])
  mean_BTHWC, _ = VAE(SMALL_VAE).apply({"params": params["vae"]}, video,
                                       method=VAE.encode)  # fmt: skip
  mask = np.asarray(clip_pixels.latent_mask(SMALL_VAE, batch))[..., 0] > 0
  moments = vae_health.latent_moments(np.asarray(mean_BTHWC)[mask])
  expected = vae_health.effective_rank(vae_health.correlation_eigenvalues(moments))
  np.testing.assert_allclose(rank, expected, rtol=1e-3)
