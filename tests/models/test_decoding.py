"""Searches: what they find in a network whose texts can all be listed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models import decoding

V, T, END, PAD, FIRST = 4, 4, 1, 0, 3
WANTED = jnp.ones((1, 2), bool)


PREFIXES = sum(V**n for n in range(T + 2))


def table(seed):
  """Logits after each beginning of two texts."""
  return 2 * np.random.default_rng(seed).normal(size=(2, PREFIXES, V))


def network(table_NXV):
  """(step, cache of texts that have not begun), for two texts with a table each.

  The cache holds the number of what was said, on which all depends.
  """

  def step(ids_BM, time, cache):
    del time
    (number_DBM,) = cache
    M = ids_BM.shape[1]
    number_BM = (number_DBM[0] * V + ids_BM) % PREFIXES
    text_M = jnp.arange(M) // (M // 2)
    return jnp.asarray(table_NXV)[text_M, number_BM], (number_BM[None],)

  return step, lambda beams=1: (jnp.zeros((1, 1, 2 * beams), jnp.int32),)


def log_probability(table_XV, ids):
  number, total, last = 0, 0.0, FIRST
  for token in ids:
    number = (number * V + last) % len(table_XV)
    logits_V = np.where(np.arange(V) == PAD, -1e30, table_XV[number])
    total += logits_V[token] - np.log(np.exp(logits_V).sum())
    last = token
  return total


def all_texts():
  """All that can be said in T tokens: with an end, or cut at T."""
  said = [t for t in range(V) if t not in (END, PAD)]
  for n in range(T):
    for words in itertools.product(said, repeat=n):
      yield (*words, END)
  yield from itertools.product(said, repeat=T)


def ended(ids_T):
  ids = list(np.asarray(ids_T))
  return tuple(ids[: ids.index(END) + 1]) if END in ids else tuple(ids)


@functools.partial(jax.jit, static_argnames=("beams", "power"))
def _search(table_NXV, wanted, beams, power):
  step, cache = network(table_NXV)
  return decoding.beam(
    step, cache(beams), jnp.full((1, 2), FIRST), wanted, beams=beams, end=END,
    tokens=T, length_power=power, pad=PAD,
  )  # fmt: skip


def search(table_NXV, beams, power=1.0, wanted=WANTED):
  return jax.device_get(_search(table_NXV, wanted, beams, power))


@jax.jit
def generate(table_NXV, keys_BM=None, wanted=WANTED):
  """Greedy without keys; otherwise drawn from all."""
  step, cache = network(table_NXV)
  choose = decoding.greedy if keys_BM is None else decoding.nucleus(keys_BM, 1.0)
  return decoding.generate(
    step, cache(), jnp.full((1, 2), FIRST), wanted, choose, end=END, tokens=T, pad=PAD
  )


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_wide_beams_find_the_best_text(seed, power):
  table_NXV = table(seed)
  # As many as there are texts: none is lost.
  found = search(table_NXV, 32, power)
  for n in range(2):
    value = {
      ids: log_probability(table_NXV[n], ids) / len(ids) ** power for ids in all_texts()
    }
    best = max(value, key=value.get)
    assert ended(found.ids_BMT[0, n]) == best
    np.testing.assert_allclose(
      found.score_BM[0, n], value[best] * len(best) ** power, rtol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_one_beam_is_greedy(seed):
  table_NXV = table(seed)
  greedy, one = generate(table_NXV), search(table_NXV, 1)
  np.testing.assert_array_equal(greedy.ids_BMT, one.ids_BMT)
  np.testing.assert_allclose(greedy.score_BM, one.score_BM, rtol=1e-5)
  for n in range(2):
    ids = ended(greedy.ids_BMT[0, n])
    np.testing.assert_allclose(
      greedy.score_BM[0, n], log_probability(table_NXV[n], ids), rtol=1e-4
    )


def test_more_beams_are_never_worse():
  worse = 0
  for seed in range(10):
    few, many = (search(table(seed), beams, 0.0).score_BM for beams in (1, 32))
    worse += int((many < few - 1e-5).sum())
  assert not worse


def test_texts_that_are_not_wanted_stay_empty():
  wanted = jnp.array([[True, False]])
  found_by = (
    generate(table(0), wanted=wanted),
    search(table(0), 32, wanted=wanted),
  )
  for found in found_by:
    assert (np.asarray(found.ids_BMT)[0, 1] == PAD).all()
    assert (np.asarray(found.ids_BMT)[0, 0] != PAD).any()


@pytest.mark.slow
def test_a_nucleus_holds_the_likeliest_and_no_more_than_it_needs():
  logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
  keys_BM = jax.random.split(jax.random.key(0), (1, 4000))
  logits_BMV = jnp.broadcast_to(logits, (1, 4000, 4))

  def shares(top_p, temperature=1.0):
    ids = decoding.nucleus(keys_BM, top_p, temperature)(logits_BMV, 0)
    return np.bincount(np.asarray(ids).ravel(), minlength=4) / 4000

  np.testing.assert_array_equal(shares(0.4), [1, 0, 0, 0])
  np.testing.assert_allclose(shares(0.7), [0.625, 0.375, 0, 0], atol=0.03)
  np.testing.assert_allclose(shares(1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
  assert shares(1.0, 0.25)[0] > 0.85


@pytest.mark.slow
def test_a_text_is_drawn_by_its_own_key():
  def draw(seeds):
    keys_BM = jax.vmap(jax.vmap(jax.random.key))(jnp.array([seeds]))
    return np.asarray(generate(table(0), keys_BM).ids_BMT)

  same = draw([3, 4])
  np.testing.assert_array_equal(same, draw([3, 4]))
  np.testing.assert_array_equal(same[0, 1], draw([9, 4])[0, 1])
  assert len({draw([s, 0])[0, 0].tobytes() for s in range(20)}) > 2
