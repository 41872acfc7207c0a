"""Prompting: what is given stays exact, one program for all modes, clear errors."""

import collections
import dataclasses
import functools
import json
import threading
import types

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from sora_jax import sample
from sora_jax.data.video import reader, resizing, writer
from sora_jax.diffusion import solvers as solver
from sora_jax.diffusion.solvers import Options
from sora_jax.evaluation import prompting_suite
from sora_jax.models import dit
from sora_jax.packing import patches
from sora_jax.run import cli
from sora_jax.runtime import sharding
from sora_jax.sampling import batching, conditioning, denoise, job_plan, pipeline
from sora_jax.sampling.conditioning import Prompt, Request, Timeline, Windows
from sora_jax.sampling.job import Job
from sora_jax.tasks import dit as dit_task

OPTIONS = Options(steps=2)
C = 4


@pytest.fixture(scope="module", autouse=True)
def fast_compile():
  """Compiling takes nearly all of the time, and the programs are tiny."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def sampler(tiny_run):
  """The tiny model with random params, so that every input has a say."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  made = sample.Sampler.from_checkpoint(tiny_run.workdir, mesh)
  rng = np.random.default_rng(0)
  made.params = jax.tree.map(
    lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), made.params
  )
  return made


def request(**kwargs):
  return Request(**{"prompt": "a red circle", "width": 32, "height": 32, "frames": 17,
                    "fps": 12.0, "seed": 1, **kwargs})  # fmt: skip


def latents(frames, seed=0, size=4):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((frames, size, size, C)).astype(np.float32)


def clip(frames, seed=0, size=(32, 32)):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (frames, *size, 3), np.uint8)


# --- prompts: pure


def test_bridge_lays_out_what_is_known_as_training_does():
  before, after = latents(2), latents(3, 1)
  image = latents(1, 2)[0]
  prompt = conditioning.bridge(request(), (7, 2, 2), before, after, ((2.5, image),))
  assert prompt.given_THW.all(axis=(1, 2)).tolist() == [1, 1, 0, 0, 1, 1, 1]
  np.testing.assert_array_equal(prompt.latent_THWC[:2], before)
  np.testing.assert_array_equal(prompt.latent_THWC[4:], after)
  assert [time for time, _ in prompt.extras] == [2.5]


def test_images_at_whole_times_are_on_the_grid():
  """Other ones, between those of latents, are extra tokens."""
  job = Job(
    key_frames=((0.5, clip(1)), (4 / 12, clip(1))), last_image=clip(1), fps=12.0
  )
  encoded = []

  def encode(video_THWC):
    encoded.append(len(video_THWC))
    return np.full((1 + len(video_THWC) // 4, 4, 4, C), len(encoded), np.float32)

  timeline = job_plan.plan(job, encode, 16).timeline
  assert sorted(encoded) == [1, 5, 5]  # a still is the second latent of 5 frames
  assert sorted(index for index, _ in timeline.stills) == [1, 4]
  assert [time for time, _ in timeline.extras] == [1.5]
  prompt, _, new = conditioning.next_window(timeline, Windows(3, 1), 2, latents(1))
  assert new == 2 and prompt.given_THW[:, 0, 0].tolist() == [1, 0, 0]
  prompt, _, new = conditioning.next_window(timeline, Windows(3, 1), 4, latents(1))
  assert new == 1 and prompt.given_THW[:, 0, 0].tolist() == [1, 1]
  np.testing.assert_array_equal(prompt.latent_THWC[1], dict(timeline.stills)[4])


@pytest.mark.parametrize(
  "before, after, extras, message",
  [
    (5, None, (), "nothing to make: of 5 latent frames 5 are given at the start and 0"),
    (3, 2, (), "3 are given at the start and 2 at the end"),
    (1, None, (4.25,), "key frame at frame 17 is outside the video of 17 frames"),
    (1, None, (-1.0,), "key frame at frame -4 is outside"),
    (1, None, (2.5, 2.5), "two key frames at frame 10"),
  ],
)
def test_bridges_that_cannot_be(before, after, extras, message):
  known = [None if n is None else latents(n) for n in (before, after)]
  images = tuple((time, latents(1)[0]) for time in extras)
  with pytest.raises(ValueError, match=message):
    conditioning.bridge(request(), (5, 2, 2), *known, images)


def test_kept_tokens_have_no_pixel_of_the_mask():
  mask = np.zeros((32, 32), bool)
  mask[3, 17] = True
  kept = conditioning.kept(mask, (2, 2, 2))
  assert kept.tolist() == [[[True, False], [True, True]]] * 2
  with pytest.raises(ValueError, match="the mask is empty"):
    conditioning.kept(np.zeros((32, 32), bool), (2, 2, 2))
  with pytest.raises(ValueError, match="33x32 pixels does not divide into 2x2"):
    conditioning.kept(np.ones((32, 33), bool), (2, 2, 2))


def walk(timeline, windows):
  """Runs windows over a timeline of frames that hold their own index."""
  made, spans = list(timeline.before_THWC), []
  while len(made) < timeline.end:
    last = np.array(made[-windows.given :]).reshape(-1, 4, 4, C)
    anchor = None if len(last) == len(made) else np.full((4, 4, C), -1.0)
    prompt, known, new = conditioning.next_window(
      timeline, windows, len(made), last, anchor
    )
    assert 0 < new and known == len(last) and prompt.start == len(made) - known
    if prompt.given_THW is not None and known:
      first = prompt.latent_THWC[0] if anchor is None else anchor
      np.testing.assert_array_equal(prompt.latent_THWC[0], first)
      np.testing.assert_array_equal(prompt.latent_THWC[1:known], last[1:])
    spans.append((prompt.start, prompt.grid[0], new))
    made += [np.full((4, 4, C), len(made) + i, np.float32) for i in range(new)]
  return spans, made


def test_windows_cover_a_long_video_once():
  timeline = Timeline(request(frames=97), (25, 2, 2), np.zeros((0,)))
  spans, made = walk(timeline, Windows(9, 3))
  assert spans == [(0, 9, 9), (6, 9, 6), (12, 9, 6), (18, 7, 4)]
  assert [frame[0, 0, 0] for frame in made] == list(range(25))
  assert walk(timeline, Windows(0, 3))[0] == [(0, 25, 25)]


def test_windows_meet_what_follows():
  timeline = Timeline(request(frames=57), (15, 2, 2), latents(4), latents(4, 1))
  spans, made = walk(timeline, Windows(6, 2))
  # 11 are known or made before those of `after`; the window that reaches them sees one.
  assert spans == [(2, 6, 4), (6, 6, 3)]
  assert len(made) == 11
  # Also if it is full without it.
  assert walk(timeline, Windows(9, 2))[0] == [(2, 10, 7)]
  prompt, _, _ = conditioning.next_window(
    timeline, Windows(6, 2), 10, latents(2), latents(1)[0]
  )
  assert prompt.grid[0] == 5 and prompt.given_THW[:, 0, 0].tolist() == [1, 1, 0, 1, 1]


def test_windows_with_noise_take_it_from_the_second_on():
  timeline = Timeline(request(frames=97), (25, 2, 2), np.zeros((0,)))
  windows = Windows(9, 3, noise=0.2)
  first, _, _ = conditioning.next_window(timeline, windows, 0, np.zeros((0,)))
  later, _, _ = conditioning.next_window(
    timeline, windows, 9, latents(3), latents(1)[0]
  )
  assert (first.given_noise, later.given_noise) == (0.0, 0.2)


@pytest.mark.parametrize("length, given, noise", [(4, 4, 0), (4, 0, 0), (9, 2, 1.5)])
def test_windows_that_cannot_be(length, given, noise):
  with pytest.raises(ValueError, match="windows of|given_noise 1.5 is not between"):
    Windows(length, given, noise)


def test_shots_change_with_time_also_in_later_windows():
  made = request(frames=49, shots=((1.0, "a star"), (2.0, "a square")))
  texts, shot_T = conditioning.texts(Prompt(made, (13, 2, 2)))
  assert [text for text, _ in texts] == ["a red circle", "a star", "a square"]
  # Frames 12 and 24 at 12 fps are latent frames 3 and 6.
  assert shot_T.tolist() == [0] * 3 + [1] * 3 + [2] * 7
  texts, shot_T = conditioning.texts(Prompt(made, (4, 2, 2), start=4))
  assert [text for text, _ in texts] == ["a star", "a square"]
  assert shot_T.tolist() == [0, 0, 1, 1]


def test_blend_weights():
  weights = conditioning.blend_weights(Prompt(request(), (5, 2, 2)))
  np.testing.assert_allclose(weights, [0, 0.1464, 0.5, 0.8536, 1], atol=1e-4)


# --- latents: what is given stays, and company has no say


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


# --- jobs: from pixels to pixels


def test_every_mode_through_pixels(sampler):
  """Lengths, what is kept, and one compiled function for all of them."""
  own, other = clip(17), clip(17, 1)
  mask = np.zeros((32, 32), bool)
  mask[:, 16:] = True
  kept = sampler.video("", video=own, strength=0.0, options=OPTIONS)
  kept_other = sampler.video("", video=other, strength=0.0, options=OPTIONS)
  assert kept.shape == (17, 32, 32, 3)
  programs = sampler.denoiser.integrate._cache_size()

  def make(**kwargs):
    return sampler.video("a star", options=OPTIONS, **{"fps": 12.0, **kwargs})

  def close(a, b):
    assert np.abs(a.astype(int) - b).max() <= 1

  after = make(video=own, extend_after=1.0)
  assert len(after) == 29
  close(after[:17], kept)
  before = make(video=own, extend_before=1.0)
  assert len(before) == 29
  both = make(video=own, extend_before=0.5, extend_after=0.5)
  assert len(both) == 17 + 8 + 8
  joined = make(video=own, connect=other, gap=1.0)
  assert len(joined) == 17 + 11 + 17
  close(joined[:17], kept)
  filled = make(video=own, infill=(5 / 12, 8 / 12))
  assert len(filled) == 17
  close(filled[:5], kept[:5])
  loop = make(video=own, loop=True)
  assert len(loop) == 17 + 15
  assert len(make(video=own, loop=True, gap=1.0, gap_strength=1.0)) == 17 + 11
  assert make(loop=True, frames=16, size=(32, 32)).shape == (16, 32, 32, 3)
  assert len(make(video=own, mask=mask)) == 17
  assert len(make(video=own, connect=other, strength=0.5, blend="a bar")) == 17
  image = make(image=own[0], frames=17)
  close(image[:1], sampler.video("", video=own[:1], strength=0.0, options=OPTIONS))
  assert len(make(last_image=own[0], frames=17)) == 17
  assert len(make(image=own[0], key_frames=((0.5, own[6]),), frames=17)) == 17
  assert len(make(image=own[0], frames=41, given_noise=0.1)) == 41
  assert make(size=(33, 31), frames=6).shape == (6, 31, 33, 3)
  assert sampler.denoiser.integrate._cache_size() - programs <= 1
  # Causal convolutions of the VAE see what is before: only near what it alone makes.
  assert np.abs(joined[-8:].astype(int) - kept_other[-8:]).mean() < 20
  assert np.abs(loop[9:17].astype(int) - kept[9:17]).mean() < 20


def test_a_loop_comes_back_the_way_it_went(sampler):
  """At its own pace and, at strength 0, the same way; else most changed half way."""
  own, made = clip(17), {}
  back = sampler.encode(own[::-1])
  for strength in (0.0, 0.4, 1.0):
    watched = []
    job = Job("", video=own, loop=True, gap_strength=strength)
    collections.deque(
      sampler.stream(job, OPTIONS, watch=lambda p, x, to=watched: to.append((p, x)))
    )
    ((prompt, latent_THWC),) = watched
    made[strength] = np.abs(latent_THWC[3:6] - back[1:4]).mean(axis=(1, 2, 3))
    if strength == 0.4:
      level_T = prompt.strength_THW[:, 0, 0]
      np.testing.assert_allclose(level_T, [0, 0, 0, 0.2, 0.4, 0.2, 0, 0, 0])
  np.testing.assert_array_equal(made[0.0], 0.0)
  assert 0 < made[0.4].max() < made[1.0].min()
  assert made[0.4].argmax() == 1


def test_a_connection_turns_from_one_video_into_the_other():
  """In pixels, where either goes on the way it came; here one is 10, the other 50."""
  a, b = (np.full((9, 32, 32, 3), value, np.uint8) for value in (10, 50))
  seen = []

  def encode(video_THWC):
    seen.append(video_THWC[:, 0, 0, 0].astype(int))
    return latents(1 + len(video_THWC) // 4)

  made = job_plan.plan(Job(video=a, connect=b, gap=7 / 12), encode, 16)
  assert made.frames == 9 + 7 + 9
  (between,) = (x for x in seen if len(set(x)) > 1)
  np.testing.assert_array_equal(between, [10, 12, 16, 22, 30, 38, 44, 48, 50])
  level_T = made.timeline.strength_THW[:, 0, 0]
  np.testing.assert_allclose(level_T, [0, 0, 0, 0.4, 0, 0, 0])
  alone = Job(video=a, connect=b, gap=7 / 12, gap_strength=1.0)
  assert job_plan.plan(alone, encode, 16).timeline.start_THWC is None


def test_the_decoder_goes_around_a_loop(sampler):
  """Its start is decoded behind its end, and no frame is a clip's first one."""
  for job in (
    Job("", loop=True, frames=8, size=(32, 32)),
    Job("", video=clip(9), loop=True),
  ):
    watched = []
    video_THWC = np.concatenate(
      list(sampler.stream(job, OPTIONS, watch=lambda _, x, to=watched: to.append(x)))
    )
    latent_THWC = watched[-1][: len(video_THWC) // 4]
    begin = 1 + 4 * 3
    if job.video is not None:
      # A video begins with the last frame of a latent, here one of the middle.
      latent_THWC[0] = job_plan.still(sampler.encode, job.video)
      np.testing.assert_array_equal(latent_THWC[1:3], sampler.encode(job.video)[1:])
      begin += 3
    around = np.concatenate([latent_THWC] * 5)[-4 - 2 * len(latent_THWC) :]
    decoded = sampler.autoencoder.decode(around[None])[0]
    wanted = decoded[begin : begin + len(video_THWC)]
    assert np.abs(video_THWC.astype(int) - wanted).max() <= 1


def test_more_frames_a_second(sampler):
  own = clip(9)
  made = sampler.video("", video=own, interpolate=2, fps=8.0, options=OPTIONS)
  assert len(made) == 17
  assert job_plan.rate(Job(video=own, interpolate=2, fps=8.0)) == 16.0


def test_a_preview_is_half_the_size(sampler):
  job = Job("a star", size=(60, 32), frames=6, preview=0.5)
  small = np.concatenate(list(sampler.preview(job, OPTIONS)))
  assert small.shape == (6, 16, 30, 3)
  full = np.concatenate(list(sampler.stream(job, OPTIONS)))
  assert full.shape == (6, 32, 60, 3)
  # No strength: the preview itself, larger.
  same = dataclasses.replace(sampler.refined(job, small), strength=0.0)
  kept = np.concatenate(list(sampler.stream(same, OPTIONS)))
  assert kept.shape == full.shape and np.abs(kept.astype(int) - full).max() > 3


def test_streams_hold_a_window_at_a_time(sampler):
  """60 s at a low size: chunks of frames come as they are made."""
  job = Job("a star", size=(16, 16), frames=241, fps=4.0)
  count, largest = 0, 0
  for chunk in sampler.stream(job, OPTIONS):
    count, largest = count + len(chunk), max(largest, len(chunk))
  assert count == 241 and largest <= 33


def test_the_next_window_is_made_while_frames_are_used(sampler):
  """At the last but one of the three parts of a window, two having been asked for."""
  windows = [threading.Event() for _ in range(3)]
  made = iter(windows)
  job = Job("a star", size=(16, 16), frames=81)
  chunks = sampler.stream(job, OPTIONS, watch=lambda *_: next(made).set())
  assert len(next(chunks)) == 13 and not windows[1].is_set()
  assert len(next(chunks)) == 16 and windows[1].wait(60)
  assert not windows[2].is_set()
  assert sum(map(len, chunks)) == 81 - 13 - 16


def test_what_comes_before_waits_in_files(sampler):
  """Windows from the start to the front, in chunks that go from the front on."""
  own = clip(9, size=(16, 16))
  job = Job("a star", video=own, extend_before=10.0, extend_after=1.0)
  windows = []

  def watch(prompt, latent_THWC):
    windows.append((prompt.start, latent_THWC))

  chunks = list(sampler.stream(job, OPTIONS, watch=watch))
  held = [len(chunk) for chunk in chunks]
  assert sum(held) == 120 + 9 + 12 and max(held) <= 33
  assert [start for start, _ in windows] == [24, 18, 12, 6, 0, 30]
  whole = sampler.encode(own)
  for _, made in windows[:-1]:
    whole = np.concatenate([made[:7], whole[1:]])
  whole = np.concatenate([whole, windows[-1][1][3:]])
  by_hand = sampler.autoencoder.decode(whole[None])[0]
  assert np.abs(np.concatenate(chunks).astype(int) - by_hand).max() <= 1


def test_windows_see_what_came_before(sampler):
  """Another first image changes the last window, through the ones between."""
  options = {"frames": 41, "window": 17, "given": 9, "options": OPTIONS}
  a, b = (sampler.video("", image=clip(1, n)[0], **options) for n in range(2))
  assert np.any(a[-4:] != b[-4:])
  again = sampler.video("", image=clip(1, 0)[0], **options)
  np.testing.assert_array_equal(a, again)


def make_job(kwargs):
  return job_plan.plan(Job(**kwargs), lambda v: latents(1 + (len(v) - 1) // 4), 16)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"strength": 1.5, "video": clip(5)}, "strength 1.5 is not between 0 and 1"),
    ({"given_noise": -0.1}, "given_noise -0.1 is not between"),
    ({"strength": 0.5}, "edit needs a video to work on"),
    ({"extend_after": 1.0}, "extend needs a video to work on"),
    ({"video": clip(5)}, "what is to be done with the video"),
    ({"video": clip(5), "loop": True, "infill": (0, 1)}, "loop and infill exclude"),
    ({"video": clip(5), "loop": True, "image": clip(1)}, "image and loop of a video"),
    ({"loop": True, "image": clip(1)}, "a loop from text has no image"),
    ({"loop": True, "video": clip(9), "gap_strength": -1.0}, "gap_strength -1.0 is"),
    ({"loop": True, "video": clip(9), "gap": 0.0}, "gap 0.0 s is not above 0"),
    ({"image": clip(1), "key_frames": ((0.0, clip(1)),)}, "two images for frame 0"),
    ({"key_frames": ((1.0, clip(1)), (1.01, clip(1)))}, "two images for frame 12"),
    ({"key_frames": ((9.0, clip(1)),)}, "a key frame at 9 s is outside the 17 frames"),
    ({"key_frames": ((-1.0, clip(1)),)}, "a key frame at -1 s is outside"),
    ({"image": clip(5)}, "an image is needed, not 5 frames"),
    ({"image": clip(1), "frames": 1}, "needs 2 frames or more"),
    ({"image": np.zeros((4, 4), np.uint8)}, "must be uint8 .T, H, W, 3. or"),
    (
      {"video": clip(9), "infill": (0.5, 2.0)},
      "infill from 0.5 to 2.0 s is not inside",
    ),
    ({"video": clip(9), "infill": (0.0, 0.75)}, "leaves nothing of the video"),
    ({"video": clip(9), "extend_after": 0.01}, "less than a frame"),
    ({"video": clip(9), "extend_after": -1.0}, "extend_after -1.0 s is negative"),
    ({"video": clip(9), "mask": np.zeros((32, 32), bool)}, "the mask is empty"),
    ({"interpolate": 3, "video": clip(9)}, "interpolate 3 is not 2 or 4"),
    ({"size": (0, 64)}, "size 0x64: width and height must be positive"),
    ({"frames": 0}, "frames 0: at least 1"),
    ({"window": 9, "given": 9}, "a window of 9 frames with 9 given"),
    ({"shots": ((2.0, "a star"), (1.0, "x"))}, "shots begin at"),
    ({"shots": ((2.0, "a star"),)}, "a shot begins at 2.0 s, but the video has 17"),
    ({"video": "no/such.mp4", "loop": True}, "no/such.mp4: cannot be read"),
    ({"video": __file__, "loop": True}, "not a video"),
    ({"fit": "stretch"}, "fit 'stretch' is not crop or pad"),
    ({"preview": 0.5, "loop": True}, "a preview is for text and images, not for loop"),
  ],
)
def test_jobs_that_cannot_be(kwargs, message):
  with pytest.raises(ValueError, match=message):
    make_job(kwargs)


def test_what_is_lost_is_said(sampler, caplog):
  caplog.set_level("INFO", logger="absl")
  made = make_job({"image": clip(1, size=(32, 64)), "size": (32, 32)})
  assert made.size == (32, 32)
  assert "is 64x32, another aspect ratio than 32x32: cropped" in caplog.text
  make_job({"image": clip(1, size=(32, 64)), "size": (32, 32), "fit": "pad"})
  assert "padded with black" in caplog.text
  make_job({"video": clip(7), "extend_after": 1.0})
  assert "7 frames are not 1 + 4k, 2 at its start are left out" in caplog.text
  assert "has 5 frames, fewer than the 9 that a window takes over" in caplog.text
  assert "an empty prompt" in caplog.text
  sampler.latents([Prompt(request(prompt="x" * 10_000), (5, 2, 2))], OPTIONS, rows=1)
  assert "a prompt of 10000 characters has more than the 40 tokens" in caplog.text


@pytest.mark.parametrize("text", ["立方体が回る", "دائرة حمراء", "лиса 🦊", " ", ""])
def test_prompts_in_any_script(sampler, text):
  (latent,) = sampler.latents(
    [Prompt(request(prompt=text), (5, 2, 2))], OPTIONS, rows=1
  )
  assert np.isfinite(latent).all()


def test_fits():
  wide = np.full((1, 16, 32, 3), 200, np.uint8)
  padded = resizing.resize(wide, (32, 32), "pad")[0]
  assert (padded[:8] == 0).all() and (padded[24:] == 0).all()
  assert (padded[8:24] == 200).all()
  assert (resizing.resize(wide, (32, 32), "crop") == 200).all()


# --- the command


@pytest.fixture(scope="module")
def command(sampler):
  """Runs the command in this process, with the model that is loaded already."""
  values = flags.FLAGS
  if "checkpoint" not in values:
    cli.define_flags()
    sample._define_flags()

  def run(*arguments):
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
      patch.setattr(sample.Sampler, "from_checkpoint", lambda *_, loras: sampler)
      sample._main(values(["sample", *arguments]))

  return run


def test_a_sidecar_makes_the_same_again(command, tmp_path):
  source, first, again = (tmp_path / f"{name}.mp4" for name in ("in", "a", "b"))
  writer.write(source, clip(9), 12)
  command(
    "--checkpoint=runs/tiny",
    "--prompt=a red circle",
    f"--video={source}",
    "--extend_after=0.7",
    "--shot=0.9:a blue star",
    "--steps=2",
    "--seed=5",
    "--negative_prompt=noise",
    "--guidance_interval=0,0.9",
    f"--out={first}",
  )
  made = json.loads((tmp_path / "a.mp4.json").read_text())
  assert made["job"]["extend_after"] == 0.7 and made["options"]["steps"] == 2
  assert len(reader.read(first)) == 17
  command(f"--from={first}.json", f"--out={again}")
  assert first.read_bytes() == again.read_bytes()
  assert json.loads((tmp_path / "b.mp4.json").read_text()) == made
  # A flag changes what it says, and nothing else.
  command(f"--from={first}.json", "--seed=6", f"--out={again}")
  assert first.read_bytes() != again.read_bytes()
  writer.write(source, clip(9, 1), 12)
  with pytest.raises(ValueError, match="in.mp4 has changed since"):
    command(f"--from={first}.json", f"--out={again}")


def test_the_next_item_is_made_while_one_is_used():
  """Once the first one is in use the second begins; errors come where they belong."""
  began = [threading.Event() for _ in range(3)]

  def make():
    for i, event in enumerate(began):
      event.set()
      yield i
    raise ValueError("the end")

  items = pipeline.ahead(make(), 1)
  assert next(items) == 0 and began[1].wait(10)
  assert not began[2].is_set()
  assert [next(items), next(items)] == [1, 2]
  with pytest.raises(ValueError, match="the end"):
    next(items)


def test_what_nobody_waits_for_is_not_made():
  made, go = [], threading.Event()

  def make():
    yield 0
    for i in range(1, 9):
      made.append(i)
      assert go.wait(10)
      yield i

  items = pipeline.ahead(make(), 3)
  assert next(items) == 0
  threading.Timer(0.2, go.set).start()
  items.close()
  assert made == [1]


def test_previews_are_written_first(command, tmp_path):
  out = tmp_path / "x.png"
  command("--checkpoint=runs/tiny", "--prompt=a star", "--size=32x64", "--steps=2",
          "--preview=0.5", f"--out={out}")  # fmt: skip
  assert reader.read(tmp_path / "x-preview.png").shape == (1, 32, 16, 3)
  assert reader.read(out).shape == (1, 64, 32, 3)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--size=64"], "--size=64 is not WIDTHxHEIGHT"),
    (["--size=0x64"], "--size=0x64 is not WIDTHxHEIGHT"),
    (["--shot=a star"], "--shot=a star is not SECONDS:"),
    (["--key_frame=x:y.png"], "--key_frame=x is not SECONDS:"),
    (["--infill=1"], "--infill=1 is not FROM,TO"),
    (["--guidance_interval=a,b"], "--guidance_interval=a,b is not LOW,HIGH"),
    (["--out=x.avi"], "must end in .mp4"),
    (["--last_image=no.png"], "no.png: cannot be read"),
    (["--strength=2"], "strength 2.0 is not between 0 and 1"),
    (["--from=no.json"], "--from=no.json is no description of a video"),
    (["--frames=9", "--out=x.png"], "holds one image, but --frames=9"),
  ],
)
def test_flags_that_cannot_be(command, arguments, message):
  with pytest.raises(ValueError, match=message):
    command("--checkpoint=runs/tiny", "--prompt=a star", *arguments)


# --- the measures of the suite


def test_seam_ratio():
  frames = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones(
    (1, 4, 4, 3), np.uint8
  )
  assert prompting_suite.seam_ratio(frames, 3) == 1.0
  assert prompting_suite.seam_ratio(frames, 0) == 7.0
  frames[5:] += 4
  assert prompting_suite.seam_ratio(frames, 5) == 5.0
  assert prompting_suite.seam_ratio(frames, 4, [5]) == 0.2
  assert prompting_suite.alike(17, 5) == [1, 9, 13]
  assert prompting_suite.alike(16, 0, (8,)) == [4, 12]


def test_histogram_distance():
  black, white = np.zeros((2, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
  assert prompting_suite.histogram_distance(black, black) == 0.0
  assert prompting_suite.histogram_distance(black, white) == 1.0


# --- full size, by shapes alone


@functools.cache
def published_params(model):
  init = dit_task.make(model, None, dit_task.DiTLossConfig(), 1).init
  return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize(
  "wanted, trained, length",
  [
    *((80, 256, 256), (300, 256, 512), (5000, 256, 5120), (100, 75776, 4096)),
    *((16384, 75776, 17408), (75600, 75776, 75776), (171360, 75776, 189440)),
  ],
)
def test_rows_have_few_lengths(wanted, trained, length):
  assert batching.row_length(wanted, trained) == length


def test_rows_are_shorter_so_that_all_devices_have_one():
  meta = types.SimpleNamespace(tokens=32768, text_tokens=64, segments=8)
  sizes = [(6000, 8, 1)] * 4
  for ways, tokens, rows in ((1, 24576, 1), (2, 12288, 2), (4, 6144, 4)):
    budget = batching.budget_of(sizes, meta, ways)
    assert budget.tokens == tokens and len(batching.plan_rows(sizes, budget)) == rows
  many = batching.budget_of(8 * sizes, meta, 2)
  assert many.tokens == 32768


@pytest.mark.parametrize(
  "size, frames, tokens",
  [
    ((2048, 2048), 1, 16384),
    ((1920, 1080), 17, 40800),
    # 60 s at 16 frames a second, in windows of 81 with 9 of them given.
    ((832, 480), 961, 32760),
  ],
)
def test_rows_of_a_published_size(size, frames, tokens):
  """Wan 2.1's 14B: prompts of large images and long videos become one row each."""
  model = dit.PRESETS["wan2.1-t2v-14b"]
  meta = types.SimpleNamespace(tokens=4096, text_tokens=512, segments=1)
  job = Job("a star", size=size, frames=frames, fps=16.0, window=81, given=9)
  made = job_plan.plan(job, None, 16)
  windows, timeline = job.windows, made.timeline
  assert made.frames == frames and timeline.grid[0] == 1 + (frames - 1) // 4
  prompt, _, _ = conditioning.next_window(timeline, windows, 0, np.zeros((0,)))
  assert np.prod(prompt.grid) == tokens
  features = np.zeros((512, 1), np.float32)
  texts, shot_T = conditioning.texts(prompt)
  clip = batching.RowClip(prompt, [(features, features)] * len(texts), shot_T)
  budget = batching.budget_of([clip.size], meta)
  assert tokens <= budget.tokens < max(2 * tokens, 4097)
  rows = batching.RowLayout(
    dataclasses.replace(model, channels=1), 16.0, "flow", "text_SE"
  )
  batch, scale_BN, _ = rows.batch([[[clip]]], 1, budget, 5.0)
  for name in ("tokens_N", "start_N"):
    batch.pop(name)
  assert (batch["segment_L"] > 0).sum() == tokens
  # The network itself: nothing is computed, but every shape has to fit.
  params = published_params(model)
  L, S, N = dataclasses.astuple(budget)
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
  for name in ("start_LP", "known_LP"):
    shapes[name] = jax.ShapeDtypeStruct((1, L, model.patch_width), np.float32)
  for name in ("text_SE", "empty_text_SE"):
    shapes[name] = jax.ShapeDtypeStruct((1, S, model.text_width), np.float32)
  table = solver.make_table("euler", solver.schedule(2, np.ones((1, N))))
  out = jax.eval_shape(
    functools.partial(
      denoise.integrate, model, None, np.float32, process="flow", target="velocity",
      options=Options(steps=1),
    ),
    params, shapes, table, scale_BN,
  )  # fmt: skip
  assert out.shape == (1, L, model.patch_width)
