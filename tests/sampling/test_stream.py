"""Jobs from pixels to pixels."""

import collections
import dataclasses
import threading

import numpy as np
from sampling.toy_media import OPTIONS, clip

from sora_jax.sampling import modes
from sora_jax.sampling.job import Job


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
    made[strength] = np.abs(latent_THWC[3:7] - back[1:5]).mean(axis=(1, 2, 3))
    if strength == 0.4:
      level_T = prompt.strength_THW[:, 0, 0]
      assert not level_T[:3].any() and not level_T[7:].any()
      low = 0.4 * (np.sin(np.pi / 5) / np.sin(2 * np.pi / 5)) ** 2
      np.testing.assert_allclose(level_T[3:7], [low, 0.4, 0.4, low])
  np.testing.assert_array_equal(made[0.0], 0.0)
  assert 0 < made[0.4].max() < made[1.0].min()
  assert made[0.4].argmax() in (1, 2)


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
      # A video begins with the last frame of a latent: of that which leads to it.
      latent_THWC[0] = watched[-1][len(latent_THWC)]
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
  assert modes.rate(Job(video=own, interpolate=2, fps=8.0)) == 16.0


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


def test_a_preview_is_planned_and_encoded_once_at_each_size(sampler, monkeypatch):
  """Small, and refined from that: with a first and a last image, too."""
  plans, encoded = [], []
  plan, encode = modes.plan, sampler._encode_all

  def planned(job, encode, multiple):
    plans.append(job.size)
    return plan(job, encode, multiple)

  def encoding(videos):
    encoded.append([video_THWC.shape[:2] for video_THWC in videos])
    return encode(videos)

  monkeypatch.setattr(modes, "plan", planned)
  monkeypatch.setattr(sampler, "_encode_all", encoding)
  images = {"image": clip(1)[0], "last_image": clip(1, 1)[0]}
  video_THWC = sampler.video("a star", preview=0.5, options=OPTIONS, **images)
  assert video_THWC.shape == (17, 32, 32, 3)
  assert plans == [(16, 16), (32, 32)]
  assert encoded == [[(1, 16), (1, 16)], [(17, 32), (1, 32), (1, 32)]]


def test_streams_hold_a_window_at_a_time(sampler):
  """60 s at a low size: chunks of frames come as they are made."""
  job = Job("a star", size=(16, 16), frames=241, fps=4.0, window=33)
  count, largest = 0, 0
  for chunk in sampler.stream(job, OPTIONS):
    count, largest = count + len(chunk), max(largest, len(chunk))
  assert count == 241 and largest <= 33


def test_the_next_window_is_made_while_frames_are_used(sampler):
  """At the last but one of the three parts of a window, two having been asked for."""
  windows = [threading.Event() for _ in range(3)]
  made = iter(windows)
  job = Job("a star", size=(16, 16), frames=81, window=33)
  chunks = sampler.stream(job, OPTIONS, watch=lambda *_: next(made).set())
  assert len(next(chunks)) == 13 and not windows[1].is_set()
  assert len(next(chunks)) == 16 and windows[1].wait(60)
  assert not windows[2].is_set()
  assert sum(map(len, chunks)) == 81 - 13 - 16


def test_what_comes_before_waits_in_files(sampler):
  """Windows from the start to the front, in chunks that go from the front on."""
  own = clip(9, size=(16, 16))
  job = Job("a star", video=own, extend_before=10.0, extend_after=1.0, window=33)
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
