"""What is known of a video: given frames, masks, shots and blends; pure."""

import numpy as np
import pytest
from sampling.toy_media import latents, request

from sora_jax.sampling import conditioning
from sora_jax.sampling.conditioning import Prompt


def test_bridge_lays_out_what_is_known_as_training_does():
  before, after = latents(2), latents(3, 1)
  image = latents(1, 2)[0]
  prompt = conditioning.bridge(request(), (7, 2, 2), before, after, ((2.5, image),))
  assert prompt.given_THW.all(axis=(1, 2)).tolist() == [1, 1, 0, 0, 1, 1, 1]
  np.testing.assert_array_equal(prompt.latent_THWC[:2], before)
  np.testing.assert_array_equal(prompt.latent_THWC[4:], after)
  assert [time for time, _ in prompt.extras] == [2.5]


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
