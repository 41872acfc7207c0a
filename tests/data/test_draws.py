"""Random draws of visits: masks of given tokens, captions and extra images."""

import numpy as np
import pytest

from sora_jax.data import draws


@pytest.mark.parametrize("pattern", draws.GIVEN_PATTERNS)
@pytest.mark.parametrize("grid", [(2, 1, 1), (2, 2, 3), (3, 1, 2), (9, 4, 6)])
def test_some_tokens_are_given_never_all(pattern, grid):
  for seed in range(200):
    given = draws.given_mask(np.random.default_rng(seed), grid, pattern)
    assert given.shape == grid
    assert 0 < given.sum() < given.size


def test_given_patterns_are_what_they_say():
  rng = np.random.default_rng(0)

  def frames(pattern):
    for _ in range(200):
      given = draws.given_mask(rng, (7, 4, 4), pattern)
      assert pattern == "box" or np.all(given == given[:, :1, :1])
      yield given[:, 0, 0] if pattern != "box" else given

  for f in frames("first"):
    assert f[0] and np.all(np.diff(f.astype(int)) <= 0)
  for f in frames("last"):
    assert f[-1] and np.all(np.diff(f.astype(int)) >= 0)
  for name in ("ends", "gap"):
    for f in frames(name):
      assert f[0] and f[-1] and np.abs(np.diff(f.astype(int))).sum() == 2
  for box in frames("box"):
    assert np.all(box == box[:1])
  patterns = {tuple(f) for f in frames("frames")}
  assert len(patterns) > 60
  with pytest.raises(ValueError, match="pattern 'middle' is none of"):
    draws.given_mask(rng, (2, 2, 2), "middle")


def test_given_probability():
  rng = np.random.default_rng(0)
  drawn = [draws.draw_given(rng, (3, 2, 2), 0.3).any() for _ in range(4000)]
  assert np.mean(drawn) == pytest.approx(0.3, abs=0.03)
  assert not draws.draw_given(rng, (1, 2, 2), 1.0).any()
  assert all(draws.draw_given(rng, (2, 2, 2), 1.0).any() for _ in range(100))


def test_what_comes_after_an_image_is_given():
  """The image ends its latent frame, which is made: a video leads to it."""
  rng = np.random.default_rng(0)
  begins = []
  for _ in range(1000):
    given = draws.lead_mask(rng, (6, 2, 2), 3)
    assert np.all(given == given[:, :1, :1])
    (*before, at, after, last) = given[:, 0, 0]
    assert not at and after and last
    assert not before[2] or before[1]  # a beginning, without holes
    begins.append(before[0])
  assert np.mean(begins) == pytest.approx(0.5, abs=0.05)
  # Nothing comes after the last one, or before the first.
  for _ in range(100):
    given = draws.lead_mask(rng, (6, 2, 2), 5)[:, 0, 0]
    assert given[0] and not given[5]
  given = draws.lead_mask(rng, (3, 1, 1), 0)
  assert given[:, 0, 0].tolist() == [False, True, True]
  # Of clips with images as many have given tokens as of others; half of them lead.
  drawn = [draws.draw_given(rng, (6, 1, 1), 0.3, [1, 3])[:, 0, 0] for _ in range(4000)]
  drawn = [tuple(given.tolist()) for given in drawn if given.any()]
  assert len(drawn) == pytest.approx(1200, abs=100)
  ends = [given[i + 1 :] for given in drawn for i in (1, 3) if not given[i]]
  leads = [end for end in ends if end and all(end)]
  assert len(leads) > 0.5 * len(drawn)
  # What is given beside an image need not come after it.
  assert (True, False, False, False, False, False) in drawn


def test_visit_probabilities():
  counts = np.repeat([0, 1, 2], 10_000)
  draw = {"caption_dropout": 0.2, "extra_prob": 0.4}
  caption_N, extra_N = draws.draw_visits(3, 5, counts, counts, **draw)
  assert np.all(caption_N[counts == 0] == -1)
  assert np.all(extra_N[counts == 0] == 0)
  assert np.all(caption_N < np.maximum(counts, 0)) and np.all(extra_N <= counts)
  for count in (1, 2):
    captions, extras = caption_N[counts == count], extra_N[counts == count]
    assert np.mean(captions == -1) == pytest.approx(0.2, abs=0.02)
    assert np.mean(extras > 0) == pytest.approx(0.4, abs=0.02)
    for k in range(count):
      assert np.mean(captions == k) == pytest.approx(0.8 / count, abs=0.02)
      assert np.mean(extras == k + 1) == pytest.approx(0.4 / count, abs=0.02)
  again = draws.draw_visits(3, 5, counts, counts, **draw)
  np.testing.assert_array_equal(again, (caption_N, extra_N))
  other = draws.draw_visits(3, 6, counts, counts, **draw)
  assert np.any(other[0] != caption_N) and np.any(other[1] != extra_N)


def test_synthetic_captions_by_weight():
  own = np.repeat([0, 2, 2], 20_000)
  synthetic = np.repeat([3, 0, 3], 20_000)
  draw = {"caption_dropout": 0.0, "extra_prob": 0.4}
  drawn = draws.draw_visits(
    3, 5, own + synthetic, own, **draw,
    synthetic_counts=synthetic, synthetic_share=0.9,
  )  # fmt: skip
  caption_N, extra_N = drawn
  alone, plain, both = np.split(caption_N, 3)
  assert {*alone} == {0, 1, 2} and {*plain} == {0, 1} and {*both} == set(range(5))
  assert np.mean(both >= 2) == pytest.approx(0.9, abs=0.01)
  for chosen, count in ((both[both < 2], 2), (both[both >= 2] - 2, 3)):
    shares = np.bincount(chosen) / len(chosen)
    assert shares == pytest.approx(np.full(count, 1 / count), abs=0.03)
  # Without synthetic captions all draws are what they always were.
  before = draws.draw_visits(3, 5, own, own, **draw)
  none = draws.draw_visits(
    3, 5, own, own, **draw, synthetic_counts=0 * own, synthetic_share=0.9
  )
  for a, b in zip(before, none, strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(extra_N, before[1])
