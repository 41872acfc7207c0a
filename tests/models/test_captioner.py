"""The captioner: a packed clip alone, a cache that changes nothing, causal texts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from sora_jax.models import captioner
from sora_jax.models.captioner import Captioner, CaptionerConfig, Text
from sora_jax.packing.caption_styles import STYLES, styles_of

CONFIG = CaptionerConfig(
  width=32,
  depth=2,
  heads=2,
  mlp_width=48,
  text_depth=1,
  caption_depth=2,
  embed_width=8,
  vocab_size=20,
  absolute_positions=2,
)
SEGMENTS, P = 3, 5
# Two rows: clips of 4, 6 and 2 tokens beside padding, and one of 7.
CLIPS = ((4, 6, 2), (7,))
TEXTS = ((5, 3, 4), (6,))


def row_of(lengths, size):
  ids = np.repeat(1 + np.arange(len(lengths)), lengths)
  return np.pad(ids, (0, size - len(ids)))


@functools.cache
def batch():
  rng = np.random.default_rng(0)
  segment_BL = np.stack([row_of(lengths, 14) for lengths in CLIPS])
  text_segment_BS = np.stack([row_of(lengths, 13) for lengths in TEXTS])
  position_BS = np.stack(
    [
      np.pad(np.concatenate([np.arange(n) for n in lengths]), (0, 13 - sum(lengths)))
      for lengths in TEXTS
    ]
  )
  text_BS = rng.integers(3, CONFIG.vocab_size, text_segment_BS.shape)
  text_BS = np.where(position_BS == 0, CONFIG.vocab_size, text_BS)
  patch_BLP = rng.normal(size=(2, 14, P)).astype(np.float32)
  position_BL3 = rng.uniform(0, 4, (2, 14, 3)).astype(np.float32)
  return (
    patch_BLP,
    segment_BL,
    position_BL3,
    Text(text_BS, text_segment_BS, position_BS),
  )


@functools.cache
def variables():
  init = functools.partial(Captioner(CONFIG).init, segments=SEGMENTS)
  return random_params(init, jax.random.key(0), *batch())


@functools.cache
def program():
  """One, for all tests."""
  apply = jax.jit(Captioner(CONFIG).apply, static_argnums=5)
  return functools.partial(apply, variables())


@functools.cache
def whole():
  """(logits, clip embeddings, text embeddings, scale) of the batch."""
  return jax.device_get(program()(*batch(), SEGMENTS))


@pytest.mark.slow
def test_a_packed_clip_and_its_text_are_as_alone():
  patch_BLP, segment_BL, position_BL3, text = batch()
  logits_BSV, clip_BNE, text_BNE, _ = whole()

  def moved(x, chosen):
    """The chosen of the first row to the beginning of both rows, padding behind."""
    out = np.zeros_like(x)
    out[:, : chosen.sum()] = x[0, chosen]
    return out

  for number in (2, 3):
    tokens, words = segment_BL[0] == number, text.segment_BS[0] == number
    alone = Text(*(moved(x, words) for x in text))
    logits_alone, clip_alone, text_alone, _ = program()(
      moved(patch_BLP, tokens),
      moved(np.ones_like(segment_BL), tokens),
      moved(position_BL3, tokens),
      alone._replace(segment_BS=moved(np.ones_like(segment_BL)[:, :13], words)),
      SEGMENTS,
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(logits_alone[1, : words.sum()], logits_BSV[0][words])
    close(clip_alone[1, 0], clip_BNE[0, number - 1])
    close(text_alone[1, 0], text_BNE[0, number - 1])


def test_embeddings_have_length_1_and_those_of_nothing_are_finite():
  _, clip_BNE, text_BNE, _ = whole()
  there = np.array([[1, 1, 1], [1, 0, 0]], bool)
  for embed_BNE in (clip_BNE, text_BNE):
    np.testing.assert_allclose((embed_BNE[there] ** 2).sum(-1), 1, rtol=1e-5)
    assert np.isfinite(embed_BNE).all()


@pytest.mark.slow
def test_decoding_with_a_cache_equals_the_whole_text():
  patch_BLP, segment_BL, position_BL3, text = batch()
  logits_BSV = whole()[0]
  model, tokens = Captioner(CONFIG), max(map(max, TEXTS))
  clip_BM = np.array([[1, 2, 3], [1, 0, 0]])

  @jax.jit
  def prompt(variables):
    inputs = (patch_BLP, segment_BL, position_BL3, SEGMENTS)
    clips = model.apply(variables, *inputs, method=Captioner.encode)
    return model.apply(variables, clips, clip_BM, method=Captioner.prompt)

  prompted = prompt(variables())
  past = captioner.no_past(CONFIG, clip_BM, tokens, jnp.float32)
  step = jax.jit(functools.partial(model.apply, method=Captioner.step))
  ids_BMT = np.full((2, 3, tokens), 3)
  for row, lengths in enumerate(TEXTS):
    for number, length in enumerate(lengths):
      here = text.segment_BS[row] == number + 1
      ids_BMT[row, number, :length] = text.text_BS[row, here]
  found = []
  for time in range(tokens):
    logits_BMV, past = step(variables(), ids_BMT[:, :, time], time, past, prompted)
    found.append(logits_BMV)
  found_BMTV = np.stack(found, axis=2)
  for row, lengths in enumerate(TEXTS):
    for number, length in enumerate(lengths):
      np.testing.assert_allclose(
        found_BMTV[row, number, :length],
        logits_BSV[row, text.segment_BS[row] == number + 1],
        rtol=1e-5,
        atol=1e-5,
      )


def test_a_word_sees_none_of_those_behind_it():
  patch_BLP, segment_BL, position_BL3, text = batch()
  changed_BS = text.text_BS.copy()
  changed_BS[0, 3] = 4 if changed_BS[0, 3] != 4 else 5
  text = text._replace(text_BS=changed_BS)
  logits_BSV = program()(patch_BLP, segment_BL, position_BL3, text, SEGMENTS)[0]
  same_BS = np.abs(logits_BSV - whole()[0]).max(-1) < 1e-6
  expected_BS = np.ones_like(same_BS)
  expected_BS[0, 3:5] = False
  np.testing.assert_array_equal(same_BS, expected_BS)


def test_styles_go_by_length():
  assert styles_of(["a red dot", "A small red dot, over grey."]) == list(STYLES[1:])
  assert styles_of(["long one", "b", "mid"]) == ["descriptive", "short", "any"]
  assert styles_of(["alone"]) == ["any"] and styles_of(["ab", "cd"]) == ["any"] * 2
  assert styles_of([]) == []


@pytest.mark.parametrize(
  "change, message",
  [
    ({"heads": 5}, "even whole number"),
    ({"caption_depth": 0}, "caption_depth 0 must be at least 1"),
    ({"remat": "some"}, "remat 'some'"),
  ],
)
def test_sizes_that_cannot_be(change, message):
  with pytest.raises(ValueError, match=message):
    CaptionerConfig(**change)
