"""Prompts to latents: what is given stays exact, one program for all kinds."""

import dataclasses

import numpy as np
import pytest
from sampling.toy_media import OPTIONS, latents, request

from sora_jax.diffusion.solvers import Options
from sora_jax.packing import patches
from sora_jax.sampling import conditioning
from sora_jax.sampling.conditioning import Prompt


def whole_prompts():
  """One of each kind; together they fill more than one row."""
  video_THWC, image = latents(5), latents(1, 1)[0]
  region = np.zeros((5, 2, 2), bool)
  region[:, :, 0] = True
  grid = (5, 2, 2)
  first = conditioning.bridge(request(), grid, latents(1))
  return {
    "text": Prompt(request(), grid),
    "first": first,
    "ends": conditioning.bridge(request(seed=2), grid, latents(2), latents(2, 1)),
    "keys": conditioning.bridge(
      request(seed=3), grid, latents(1), None, ((1.75, image),)
    ),
    "noisy": dataclasses.replace(first, given_noise=0.3),
    "edit": Prompt(request(seed=4), grid, video_THWC, strength=0.5),
    "region": Prompt(request(seed=5), grid, video_THWC, region),
    "loop": Prompt(request(seed=6, frames=16), (4, 2, 2), loop=True),
    "shots": Prompt(request(seed=7, shots=((0.7, "a blue star"),)), grid),
    "blend": Prompt(request(seed=8, blend="a blue star"), grid),
    "strong": Prompt(request(seed=9, guidance_scale=6.0), grid),
  }


@pytest.fixture(scope="module")
def made(sampler):
  """Latents of each kind, alone in a row; and how many functions were compiled."""
  sampler.denoiser.integrate.clear_cache()
  out = {
    name: sampler.latents([prompt], OPTIONS, rows=1)[0]
    for name, prompt in whole_prompts().items()
  }
  return out, sampler.denoiser.integrate._cache_size()


def test_one_compiled_function_for_all_kinds(made):
  assert made[1] == 1


def test_given_latents_are_bit_equal(made):
  for name, prompt in whole_prompts().items():
    assert made[0][name].dtype == np.float32 and np.isfinite(made[0][name]).all()
    if prompt.given_THW is not None:
      given = prompt.given_THW.repeat(2, 1).repeat(2, 2)
      assert given.any() and not given.all()
      np.testing.assert_array_equal(made[0][name][given], prompt.latent_THWC[given])
      assert not np.any(made[0][name][~given] == prompt.latent_THWC[~given])


def test_every_kind_is_another_video(made):
  values = list(made[0].values())
  for i, a in enumerate(values):
    assert all(a.shape != b.shape or np.abs(a - b).max() > 0.01 for b in values[:i])


def test_a_prompt_alone_is_that_of_a_packed_row(sampler, made):
  kinds = whole_prompts()
  together = sampler.latents(list(kinds.values()), OPTIONS, rows=1)
  assert sampler.denoiser.integrate._cache_size() == 1
  for name, latent_THWC in zip(kinds, together, strict=True):
    np.testing.assert_allclose(latent_THWC, made[0][name], atol=2e-4, err_msg=name)


def test_steps_that_reuse_what_blocks_added(sampler):
  """Given latents stay exact, clips keep their own; the first and last call run."""
  prompts = [whole_prompts()[name] for name in ("ends", "noisy")]

  def make(steps, reuse):
    return sampler.latents(prompts, Options(steps=steps, reuse=reuse), rows=1)

  for a, b in zip(make(2, 1e9), sampler.latents(prompts, OPTIONS, rows=1), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)
  for a, b, prompt in zip(make(4, 1e9), make(4, 1e-9), prompts, strict=True):
    given = prompt.given_THW.repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(a[given], prompt.latent_THWC[given])
    assert np.isfinite(a).all() and np.abs(a - b)[~given].max() > 0.01


def test_an_edit_is_near_its_video_at_little_strength(sampler):
  prompt = whole_prompts()["edit"]
  errors = []
  for strength in (0.02, 0.5, 1.0):
    changed = dataclasses.replace(prompt, strength=strength)
    (latent_THWC,) = sampler.latents([changed], OPTIONS, rows=1)
    errors.append(np.abs(latent_THWC - prompt.latent_THWC).mean())
  assert errors[0] < 0.2 * errors[1] < errors[1] < errors[2]


def test_frames_of_a_shot_are_led_by_its_text(sampler, made):
  """Changing the later text changes what attends to it."""
  other = request(seed=7, shots=((0.7, "white noise all over"),))
  (latent_THWC,) = sampler.latents([Prompt(other, (5, 2, 2))], OPTIONS, rows=1)
  change_T = np.abs(latent_THWC - made[0]["shots"]).mean(axis=(1, 2, 3))
  assert change_T[3:].min() > 2 * change_T[:3].max() > 0


def test_a_blend_turns_from_one_text_to_the_other(sampler, made):
  grid = (5, 2, 2)
  a, b = (
    sampler.latents([Prompt(request(seed=8, prompt=text), grid)], OPTIONS, rows=1)[0]
    for text in ("a red circle", "a blue star")
  )
  blend = made[0]["blend"]
  from_a, from_b = (np.abs(blend - x).mean(axis=(1, 2, 3)) for x in (a, b))
  assert from_a[0] < from_b[0] and from_b[-1] < from_a[-1]


def test_a_loop_turns_by_a_frame_with_each_call(sampler):
  """Its second call is a plain one on latents that are turned by hand."""
  grid, asked = (4, 2, 2), request(frames=16)

  def make(latent_THWC=None, loop=False, steps=1):
    strength = 1.0 if latent_THWC is None else 0.5
    prompt = Prompt(asked, grid, latent_THWC, strength=strength, loop=loop)
    (out,) = sampler.latents([prompt], Options(steps=steps), rows=1)
    return out

  first = make()
  noise_LP = np.random.default_rng(asked.seed).standard_normal((16, 16), np.float32)
  noise = patches.unpatchify(noise_LP, grid, (1, 2, 2))
  # Half way the latents are half noise, half what the first call predicts.
  half = 0.5 * (noise + first)
  np.testing.assert_allclose(make(first), make(steps=2), atol=1e-4)
  turned = np.roll(half, 1, axis=0)
  by_hand = np.roll(make(2.0 * turned - noise), -1, axis=0)
  loop = make(loop=True, steps=2)
  np.testing.assert_allclose(loop, by_hand, atol=1e-4)
  assert np.abs(loop - make(steps=2)).max() > 0.01


def test_tokens_follow_what_is_known_down_to_their_strength(sampler):
  """All the way at 0, not at all at the prompt's own, and half way in between."""
  grid, asked = (4, 2, 2), request(frames=13)
  known = latents(4)

  def make(strength=None, level=0.5, steps=2, latent_THWC=known):
    strength_THW = None if strength is None else np.broadcast_to(strength, grid)
    prompt = Prompt(asked, grid, latent_THWC, None, level, strength_THW)
    (out,) = sampler.latents([prompt], Options(steps=steps), rows=1)
    return out

  free = make()
  np.testing.assert_array_equal(make(0.5), free)
  np.testing.assert_allclose(make(0.0), known, atol=1e-6)
  first = np.array([0.0, 0.5, 0.5, 0.5])[:, None, None]
  mixed = make(first)
  np.testing.assert_allclose(mixed[:1], known[:1], atol=1e-6)
  assert np.abs(mixed[1:] - known[1:]).max(axis=(1, 2, 3)).min() > 1e-3
  # Having followed for the first of two steps is to begin at the second's level.
  np.testing.assert_allclose(make(0.3), make(level=0.25, steps=1), atol=1e-5)
  assert np.abs(make(0.3) - free).max() > 1e-3


@pytest.mark.parametrize("text", ["立方体が回る", "دائرة حمراء", "лиса 🦊", " ", ""])
def test_prompts_in_any_script(sampler, text):
  (latent,) = sampler.latents(
    [Prompt(request(prompt=text), (5, 2, 2))], OPTIONS, rows=1
  )
  assert np.isfinite(latent).all()
