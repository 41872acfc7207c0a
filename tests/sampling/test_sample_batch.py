"""Rows of prompts: written as training lays them out, and taken apart again."""

import dataclasses

import numpy as np
import pytest

from sora_jax.models.dit import DiTConfig
from sora_jax.packing.planner import Budget
from sora_jax.sampling import sample_batch
from sora_jax.sampling.batching import RowClip, plan_rows, size_of
from sora_jax.sampling.conditioning import Prompt, Request

MODEL = DiTConfig(channels=2, width=24, depth=1, heads=2, mlp_width=16)
LAYOUT = sample_batch.RowLayout(MODEL, reference_fps=16.0, process="flow")
BUDGET = Budget(tokens=48, text_tokens=16, segments=4)


def ids(*values):
  return np.array(values, np.int32)


def latents(grid, seed=0):
  shape = (grid[0], 2 * grid[1], 2 * grid[2], MODEL.channels)
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def prompt_of(grid, seed=0, **changes):
  request = Request("a star", 32, 32, 1 + 4 * (grid[0] - 1), 8.0, seed=seed)
  known = np.ones(grid, bool)
  known[-1:] = False
  return Prompt(request, grid, latents(grid, seed), known, **changes)


def clip_of(prompt, *texts, shot_T=None):
  texts = texts or ((ids(1, 2), ids(3)),)
  shot_T = np.zeros(prompt.grid[0], int) if shot_T is None else shot_T
  return RowClip(prompt, list(texts), shot_T)


@pytest.fixture(scope="module")
def written():
  """An image between two frames, a clip of two shots, a blend; and their rows."""
  image = latents((1, 2, 2), 9)[0]
  prompts = [
    prompt_of((3, 2, 2), 1, extras=((1.25, image),), given_noise=0.25),
    prompt_of((4, 2, 2), 2),
    prompt_of((2, 3, 2), 3),
  ]
  prompts[1] = dataclasses.replace(
    prompts[1], request=dataclasses.replace(prompts[1].request, guidance_scale=7.0)
  )
  two = (ids(4, 5), ids(3)), (ids(6), ids(3))
  units = [
    [clip_of(prompts[0])],
    [clip_of(prompts[1], *two, shot_T=np.array([0, 0, 1, 1]))],
    [clip_of(prompts[2]), clip_of(prompts[2], (ids(8), ids(3)))],
  ]
  planned = plan_rows([size_of(unit) for unit in units], BUDGET)
  assert planned == [[2, 0], [1]]
  batch, slots = LAYOUT.batch(units, planned, 3, BUDGET, guidance_scale=2.0)
  return prompts, batch, slots


def test_rows_taken_apart_are_the_prompts(written):
  prompts, batch, _ = written
  found = dict(
    sample_batch.take_apart(batch.packed["patch_LP"], batch.packed, prompts, (1, 2, 2))
  )
  assert sorted(found) == [0, 1, 2]
  for i, prompt in enumerate(prompts):
    np.testing.assert_array_equal(found[i], prompt.latent_THWC)


def test_given_latents_are_exact_whatever_the_network_says(written):
  prompts, batch, _ = written
  zeros = np.zeros_like(batch.packed["patch_LP"])
  for i, latent in sample_batch.take_apart(zeros, batch.packed, prompts, (1, 2, 2)):
    np.testing.assert_array_equal(latent[:-1], prompts[i].latent_THWC[:-1])
    assert not latent[-1:].any()


def test_rows_are_laid_out_as_in_training(written):
  _, (packed, negative, _), _ = written
  # Both clips of the blend, then the one with an image; slots go on in the row.
  assert packed["segment_L"][0].tolist() == [1] * 12 + [2] * 12 + [3] * 16 + [0] * 8
  assert packed["clip_N"].tolist() == [[2, -1, 0, -1], [1, -1, -1, -1], [-1] * 4]
  slot_L, given_L = packed["group_L"][0] // 2, packed["group_L"][0] % 2
  assert slot_L.tolist() == [0] * 12 + [1] * 12 + [2] * 16 + [0] * 8
  assert given_L[24:40].tolist() == [1] * 8 + [0] * 4 + [1] * 4
  assert (packed["group_L"][1, :16] // 2).tolist() == [0] * 8 + [1] * 8
  # Real time, at twice the frame rate of training.
  time_L = packed["position_L3"][0, 24:40, 0]
  assert time_L.tolist() == [0] * 4 + [2] * 4 + [4] * 4 + [2.5] * 4
  assert packed["text_segment_S"][0, :6].tolist() == [1, 1, 2, 3, 3, 0]
  assert negative["text_segment_S"][0, :4].tolist() == [1, 2, 3, 0]
  # Guidance leads away from a clip without its image, too.
  there = [1] * 12 + [2] * 12 + [3] * 12 + [0] * 4 + [0] * 8
  assert negative["segment_L"][0].tolist() == there
  np.testing.assert_array_equal(negative["segment_L"][1:], packed["segment_L"][1:])
  assert not packed["segment_L"][2].any()


def test_how_tokens_begin_and_what_slots_have(written):
  prompts, (packed, _, sampling), slots = written
  assert sampling["guidance_scale_N"].tolist() == [[2] * 4, [7, 7, 2, 2], [2] * 4]
  assert sampling["given_level_N"].tolist() == [[0, 0, 0.25, 0], [0] * 4, [0] * 4]
  assert slots.tokens_BN.tolist() == [[12, 12, 16, 0], [16, 16, 0, 0], [0] * 4]
  assert np.all(slots.start_BN == 1.0)
  given_BL = packed["group_L"] % 2 == 1
  exact = np.all(sampling["start_LP"] == packed["patch_LP"], axis=-1)
  noisy_given = sampling["given_level_N"][0, 2] > 0
  assert noisy_given and not exact[0, 24:40].any()
  assert exact[1][given_BL[1]].all() and not exact[1, :16][~given_BL[1, :16]].any()
  # Noise goes by the request, not by the place in the row.
  rng = np.random.default_rng(prompts[1].request.seed)
  noise_LP = rng.standard_normal((16, MODEL.patch_width), np.float32)
  free = ~given_BL[1, :16]
  np.testing.assert_array_equal(sampling["start_LP"][1, :16][free], noise_LP[free])


def test_twins_look_at_each_other(written):
  _, (_, _, sampling), _ = written
  twin_L, weight_L = sampling["twin_L"][0], sampling["twin_weight_L"][0]
  assert twin_L[:24].tolist() == [*range(12, 24), *range(12)]
  np.testing.assert_allclose(weight_L[:12] + weight_L[12:24], 1.0)
  assert twin_L[24:].tolist() == [*range(24, 48)] and not weight_L[24:].any()
