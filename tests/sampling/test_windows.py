"""Windows of a long video: pure steps."""

import numpy as np
import pytest
from sampling.toy_media import C, latents, request

from sora_jax.sampling import windows
from sora_jax.sampling.conditioning import Timeline
from sora_jax.sampling.windows import State, Windows


def walk(timeline, cut):
  """Runs windows over a timeline of frames that hold their own index.

  Returns (start, latent frames, new ones) of each window, all frames, and the prompts.
  """
  state = windows.see(timeline, cut, windows.begin(timeline), timeline.before_THWC)
  made, spans, prompts = list(timeline.before_THWC), [], []
  while not windows.finished(timeline, state):
    anchor = np.full((4, 4, C), -1.0) if state.needs_anchor else None
    prompt, known, new = window = windows.next_window(timeline, cut, state, anchor)
    last = np.array(made[-cut.given :]).reshape(-1, 4, 4, C)
    np.testing.assert_array_equal(last, state.last_THWC.reshape(-1, 4, 4, C))
    assert 0 < new and known == len(last) and prompt.start == len(made) - known
    if prompt.given_THW is not None and known:
      first = prompt.latent_THWC[0] if anchor is None else anchor
      np.testing.assert_array_equal(prompt.latent_THWC[0], first)
      np.testing.assert_array_equal(prompt.latent_THWC[1:known], last[1:])
    spans.append((prompt.start, prompt.grid[0], new))
    prompts.append(prompt)
    latent_THWC = np.full((prompt.grid[0], 4, 4, C), np.nan, np.float32)
    latent_THWC[known : known + new] = np.arange(len(made), len(made) + new)[
      :, None, None, None
    ]
    state, fresh_THWC = windows.step(timeline, cut, state, window, latent_THWC)
    made += list(fresh_THWC)
    assert state.known == len(made)
  return spans, made, prompts


def test_windows_cover_a_long_video_once():
  timeline = Timeline(request(frames=97), (25, 2, 2), np.zeros((0,)))
  spans, made, _ = walk(timeline, Windows(9, 3))
  assert spans == [(0, 9, 9), (6, 9, 6), (12, 9, 6), (18, 7, 4)]
  assert [frame[0, 0, 0] for frame in made] == list(range(25))
  assert walk(timeline, Windows(0, 3))[0] == [(0, 25, 25)]


def test_windows_meet_what_follows():
  timeline = Timeline(request(frames=57), (15, 2, 2), latents(4), latents(4, 1))
  spans, made, _ = walk(timeline, Windows(6, 2))
  # 11 are known or made before those of `after`; the window that reaches them sees one.
  assert spans == [(2, 6, 4), (6, 6, 3)]
  assert len(made) == 11
  # Also if it is full without it.
  assert walk(timeline, Windows(9, 2))[0] == [(2, 10, 7)]
  state = State(10, latents(2))
  prompt, _, _ = windows.next_window(timeline, Windows(6, 2), state, latents(1)[0])
  assert prompt.grid[0] == 5 and prompt.given_THW[:, 0, 0].tolist() == [1, 1, 0, 1, 1]


def test_windows_far_from_what_follows_see_nothing_of_it():
  """However long that is, and in windows that end before the gap does."""
  timeline = Timeline(
    request(frames=97), (25, 2, 2), latents(3), latents(11, 1), ((13.0, latents(1)[0]),)
  )
  for length in (9, 5):
    spans, made, prompts = walk(timeline, Windows(length, 2))
    assert len(made) == timeline.end == 14
    assert sum(new for _, _, new in spans) == 11
    for prompt in prompts[:-1]:
      assert prompt.given_THW[:, 0, 0].tolist() == [1, 1] + [0] * (length - 2)
      assert not prompt.extras
    last = prompts[-1]
    ((time, _),) = last.extras
    led_to = int(time)
    after_THWC = last.latent_THWC[led_to + 1 :]
    assert 1 <= len(after_THWC) <= 2 and led_to == time
    assert (
      not last.given_THW[2 : led_to + 1].any() and last.given_THW[led_to + 1 :].all()
    )
    np.testing.assert_array_equal(after_THWC, timeline.after_THWC[: len(after_THWC)])


def test_backward_windows_lead_to_the_first_known_frame():
  """It guides, at the end of the latent that is made last; later ones are given."""
  before_THWC = latents(3)
  timeline = Timeline(request(frames=33), (3, 2, 2), before_THWC, backwards=6)
  cut = Windows(5, 2)
  state = windows.begin_backwards(timeline, cut)
  first_HWC, known_HWC = before_THWC[:2]
  for left, new in ((3, 3), (0, 3)):
    window = windows.previous_window(timeline, cut, state)
    prompt = window.prompt
    assert window.new == new and prompt.given_THW[:, 0, 0].tolist() == [0] * 4 + [1]
    ((time, image_HWC),) = prompt.extras
    assert time == new
    np.testing.assert_array_equal(image_HWC, first_HWC)
    np.testing.assert_array_equal(prompt.latent_THWC[-1], known_HWC)
    made_THWC = latents(5, left)
    state, final_THWC = windows.step_back(cut, state, window, made_THWC)
    # The latent that was led to is one that was made.
    np.testing.assert_array_equal(final_THWC[0], made_THWC[new])
    assert state.left == left
    first_HWC, known_HWC = made_THWC[:2]


def test_windows_with_noise_take_it_from_the_second_on():
  timeline = Timeline(request(frames=97), (25, 2, 2), np.zeros((0,)))
  cut, state = Windows(9, 3, noise=0.2), State(9, latents(3))
  first, _, _ = windows.next_window(timeline, cut, windows.begin(timeline))
  later, _, _ = windows.next_window(timeline, cut, state, latents(1)[0])
  assert (first.given_noise, later.given_noise) == (0.0, 0.2)


@pytest.mark.parametrize("length, given, noise", [(4, 4, 0), (4, 0, 0), (9, 2, 1.5)])
def test_windows_that_cannot_be(length, given, noise):
  with pytest.raises(ValueError, match="windows of|given_noise 1.5 is not between"):
    Windows(length, given, noise)
