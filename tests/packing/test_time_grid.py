"""The time grid against a list of which frame is in which latent frame."""

import pytest

from sora_jax.models import vae_config
from sora_jax.packing import time_grid

# Written out once, by hand: the latent frame that holds each frame of a video.
LATENT_OF = [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


def test_every_frame_is_in_one_latent_frame():
  assert [time_grid.latent_of(f) for f in range(len(LATENT_OF))] == LATENT_OF


@pytest.mark.parametrize("frames", range(1, len(LATENT_OF) + 1))
def test_counts_are_those_of_the_list(frames):
  held = LATENT_OF[:frames]
  whole = [i for i in set(held) if held.count(i) == LATENT_OF.count(i)]
  assert time_grid.latent_frames(frames) == len(set(held))
  assert time_grid.whole_latent_frames(frames) == len(whole)
  assert time_grid.is_on_grid(frames) == (len(whole) == len(set(held)))
  assert time_grid.round_down(frames) == sum(held.count(i) for i in whole)
  up = time_grid.round_up(frames)
  assert up >= frames and up - frames < 4 and time_grid.is_on_grid(up)


@pytest.mark.parametrize("latent", range(4))
def test_a_latent_frame_is_at_its_last_frame(latent):
  last = max(f for f, i in enumerate(LATENT_OF) if i == latent)
  assert time_grid.frame_at(latent) == last
  assert time_grid.time_of(last) == latent
  assert time_grid.is_last_of_latent(last)
  assert time_grid.video_frames(latent + 1) == last + 1
  assert not any(time_grid.is_last_of_latent(last + n) for n in (1, 2, 3))


@pytest.mark.parametrize("preset", vae_config.PRESETS)
def test_the_factor_is_that_of_the_networks(preset):
  assert vae_config.PRESETS[preset].time_factor == time_grid.TIME_FACTOR
