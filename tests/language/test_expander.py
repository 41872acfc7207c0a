"""The expander that is trained here: its network, its pairs, and what survives it."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tiny
from data.batch_checks import assert_equal, take
from random_params import random_params

from sora_jax import train_expander
from sora_jax.data import shapes, tokenizer
from sora_jax.data.batches import Batches
from sora_jax.data.clips import Clip, SyntheticCaption, write_manifest
from sora_jax.data.shape_worlds import WORLDS
from sora_jax.evaluation import caption_attributes
from sora_jax.language.expander import TrainedExpander
from sora_jax.language.pairs import Pair, PairDataset, pairs_of
from sora_jax.models import expander
from sora_jax.models.expander import ExpanderConfig, ExpanderLM
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding, shipped
from sora_jax.tasks import expander as task

CONFIG = ExpanderConfig(vocab_size=40, width=16, depth=2, heads=2)


@pytest.fixture(scope="module")
def params():
  return random_params(task.make(CONFIG).init, jax.random.key(0))


# --- the network


def random_ids(rows=3, tokens=9):
  return np.random.default_rng(0).integers(2, 40, (rows, tokens)).astype(np.int32)


@pytest.mark.slow
def test_a_token_sees_none_behind_it(params):
  ids_BS = random_ids()
  apply = jax.jit(ExpanderLM(CONFIG).apply)
  whole, _ = apply({"params": params}, ids_BS)
  part, _ = apply({"params": params}, ids_BS[:, :5])
  np.testing.assert_allclose(whole[:, :5], part, rtol=1e-4, atol=1e-5)
  assert np.abs(whole[:, 1:] - whole[:, :-1]).max() > 1e-2


@pytest.mark.slow
def test_generation_is_what_the_whole_text_says(params):
  """With its cache, greedy: each token is the likeliest behind those before it."""
  ids_BS, given_B = random_ids(), np.array([1, 3, 9])
  keys_B = jax.random.split(jax.random.key(0), 3)
  generate = jax.jit(functools.partial(expander.generate, CONFIG))
  made_BS = np.asarray(generate(params, ids_BS, given_B, keys_B, 0.0))
  logits_BSV, _ = jax.jit(ExpanderLM(CONFIG).apply)({"params": params}, made_BS)
  likeliest_BS = np.argmax(logits_BSV, -1)
  for row, given in enumerate(given_B):
    np.testing.assert_array_equal(made_BS[row, :given], ids_BS[row, :given])
    np.testing.assert_array_equal(
      made_BS[row, given:], likeliest_BS[row, given - 1 : -1]
    )
  # Sampled texts depend on their own key alone, and on the nucleus.
  drawn = np.asarray(generate(params, ids_BS, given_B, keys_B, 1.0))
  again = np.asarray(generate(params, ids_BS[::-1], given_B[::-1], keys_B[::-1], 1.0))
  np.testing.assert_array_equal(drawn, again[::-1])
  assert np.any(drawn != made_BS)
  near = np.asarray(generate(params, ids_BS, given_B, keys_B, 1e-6))
  np.testing.assert_array_equal(near, made_BS)
  # Ids that the tokenizer does not have are never said.
  pieces = int(drawn[0, 1:].max())
  few = jax.jit(functools.partial(expander.generate, CONFIG, pieces=pieces))
  assert np.asarray(few(params, ids_BS, given_B, keys_B, 1.0))[0, 1:].max() < pieces


def test_sharding_rules_fit():
  shapes_of = jax.eval_shape(task.make(CONFIG).init, jax.random.key(0))
  sharding.param_shardings(shapes_of, task.RULES, sharding.make_mesh(fsdp=2, tensor=4))


@pytest.mark.slow
def test_the_loss_is_of_the_long_caption_only(params):
  made = task.make(CONFIG)
  ids_BS = random_ids()
  long_BS = np.zeros_like(ids_BS)
  long_BS[:, 5:8] = 1
  batch = {"ids_S": ids_BS, "long_S": long_BS}
  value, values = jax.jit(made.loss)(params, batch, None)
  logits_BSV, _ = jax.jit(ExpanderLM(CONFIG).apply)({"params": params}, ids_BS)
  logits = np.asarray(logits_BSV, np.float64)[:, 4:7].reshape(-1, 40)
  target = ids_BS[:, 5:8].reshape(-1)
  log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = -np.mean(log[np.arange(9), target])
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert values["accuracy"] == pytest.approx(np.mean(logits.argmax(-1) == target))


def test_bad_sizes():
  with pytest.raises(ValueError, match="width 6 over 4 heads must be an even"):
    ExpanderConfig(width=6)
  bad = tiny.get_config()
  bad.expander.max_tokens = 3
  with pytest.raises(ValueError, match="config.expander.max_tokens 3 must be at least"):
    recipes.read(bad)


# --- pairs


def make_clip(i, *captions, split="train", synthetic=()):
  return Clip(f"c{i}", "/x", 0.0, 1, 1.0, 16, 16, captions, split, synthetic=synthetic)


def test_pairs():
  written = (
    SyntheticCaption("asked to be long", "descriptive", "m"),
    SyntheticCaption("brief", "short", "m"),
  )
  clips = [
    make_clip(0, "a", "a long one"),
    make_clip(1, "a", "a long one"),
    make_clip(2, "only one"),
    make_clip(3),
    make_clip(4, "own", "own and much longer than asked", synthetic=written),
    make_clip(5, "x", "x of heldout", split="heldout"),
  ]
  assert pairs_of(clips) == [
    ("a", "a long one"),
    ("a long one", "a long one"),
    ("own", "asked to be long"),
    ("brief", "asked to be long"),
    ("asked to be long", "asked to be long"),
  ]
  with pytest.raises(
    ValueError, match="no train clip has a short caption and a longer"
  ):
    pairs_of(clips[2:4])


def test_images_are_left_out_where_there_are_videos():
  """Else a few words that say no motion would make an image of every video."""
  image, video = make_clip(0, "a", "an image of a"), make_clip(1, "b", "b moves")
  video = dataclasses.replace(video, frames=5)
  assert pairs_of([image, video]) == [("b", "b moves"), ("b moves", "b moves")]
  assert ("a", "an image of a") in pairs_of([image])


def test_rows_of_pairs(tmp_path):
  pairs = [Pair("ab", "ab cd ab"), Pair("cd", "cd " * 40), Pair("ab", "cd ab cd")]
  tokenizer.train(["ab cd"], str(tmp_path / "t"), 300)
  words = tokenizer.Tokenizer(str(tmp_path / "t"))
  dataset = PairDataset(pairs, words, 20, 0)
  assert dataset.left_out == 1 and dataset.elements_per_epoch() == 2
  texts = set()
  for i in range(2):
    ids_S, long_S = dataset[i]["ids_S"], dataset[i]["long_S"]
    first = int(np.argmax(long_S))
    pair = words.decode(ids_S[:first]), words.decode(ids_S[first:])
    assert long_S.sum() == len(words.encode(pair[1], 99))
    texts.add(pair)
  assert texts == {pairs[0], pairs[2]}
  with pytest.raises(ValueError, match="max_tokens 5: the shortest pair of caption"):
    PairDataset(pairs, words, 5, 0)


def test_pairs_resume_exactly(tmp_path):
  pairs = [Pair("ab", "ab cd ab"), Pair("ab", "cd ab cd"), Pair("cd", "ab cd")]
  tokenizer.train(["ab cd"], str(tmp_path / "t"), 300)
  words = tokenizer.Tokenizer(str(tmp_path / "t"))

  def batches():
    return Batches(PairDataset(pairs, words, 20, 0), 2)

  whole, begun, resumed = take(batches(), 6), batches(), batches()
  for _ in range(2):
    next(begun)
  resumed.set_state(json.loads(json.dumps(begun.get_state())))
  begun.close()
  for a, b in zip(take(resumed, 4), whole[2:], strict=True):
    assert_equal(a, b)


# --- trained on shapes


SIMPLE = shapes.WORLDS["simple"]


def config(steps, rows=32):
  c = tiny.get_config()
  c.expander.model = {"vocab_size": 400, "width": 96, "depth": 2, "heads": 4}
  c.expander.max_tokens, c.expander.rows = 96, rows
  c.expander.train = {
    "steps": steps, "learning_rate": 5e-3, "warmup_steps": steps // 15,
    "schedule": "cosine", "ema_decay": 0.95, "log_every": 50, "eval_every": steps,
    "save_every": 0,
  }  # fmt: skip
  c.mesh = {"fsdp": -1}
  return recipes.read(recipes.complete(c))


def write_captions(workdir, count):
  rows = [shapes.describe("train", i, 0, SIMPLE) for i in range(count)]
  rows += [shapes.describe("heldout", i, 0, SIMPLE) for i in range(32)]
  clips = [make_clip(i, *r["captions"], split=r["split"]) for i, r in enumerate(rows)]
  write_manifest(workdir / "data" / "manifest.jsonl", clips)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, fast_compile):
  workdir = tmp_path_factory.mktemp("run")
  write_captions(workdir, 100)
  train_expander.run(config(15, rows=8), workdir)
  return workdir


@pytest.mark.slow
@pytest.mark.learns
def test_what_a_prompt_names_survives(tmp_path):
  """Combinations of colour, shape and motion that training has not seen."""
  write_captions(tmp_path, 1500)
  train_expander.run(config(300), tmp_path)
  made = TrainedExpander(tmp_path)
  rows = [shapes.describe("heldout", i, 1, SIMPLE) for i in range(64)]
  shorts = [row["captions"][0] for row in rows]
  longs = made.expand(shorts)
  right = 0
  for row, long in zip(rows, longs, strict=True):
    (item,) = row["truth"]["objects"]
    words = long.lower().replace(",", "").replace(".", "").split()
    said = [item["color"], item["shape"]]
    if row["truth"]["frames"] > 1:
      # "moves left" of the short one is "moves from right to left" of the long one.
      phrase = shapes._PHRASES[item["motion"]][1].format(speed="").split(",")[0].split()
      said += [phrase[0], phrase[-1]]
    others = {*shapes.COLORS, *shapes.SHAPES} - {item["color"], item["shape"]}
    ground = row["truth"]["background"]
    right += set(said) <= set(words) and not (others & set(words[:6]))
    assert len(long) > len(row["captions"][0]) and ground is not None
  assert right >= 60, [*zip(shorts, longs, strict=True)][:8]
  # It is what was trained on: long captions stay as they are.
  asis = [row["captions"][1] for row in rows[:16]]
  kept = sum(a == b for a, b in zip(asis, made.expand(asis), strict=True))
  assert kept >= 12, kept


@pytest.mark.slow
def test_seeds(trained):
  texts = ["a red circle moves right", "a blue star", "a green square turns"]
  made = TrainedExpander(trained, 0.95)
  first = made.expand(texts, 1)
  assert first == made.expand(texts, 1) and made.expand([]) == []
  assert [made.expand([text], 1)[0] for text in texts] == first
  assert len({tuple(made.expand(texts, seed)) for seed in range(4)}) > 1
  assert made.expand([text.upper() for text in texts]) == made.expand(
    [text.lower() for text in texts]
  )
  with pytest.raises(ValueError, match="has [1-9][0-9]{2,} tokens, but .* takes 48"):
    made.expand(["a red circle " * 100])
  with pytest.raises(ValueError, match="top_p 2 is not from 0 to 1"):
    TrainedExpander(trained, 2)


def test_an_expander_that_is_none(tmp_path):
  assert not TrainedExpander.is_in(tmp_path)
  with pytest.raises(ValueError, match="no complete model"):
    TrainedExpander(tmp_path)
  write_manifest(tmp_path / "data" / "manifest.jsonl", [make_clip(0, "one caption")])
  with pytest.raises(ValueError, match="no train clip has a short caption"):
    train_expander.run(config(20), tmp_path)


@pytest.mark.slow
def test_the_expander_of_the_package_keeps_what_is_said():
  """Of videos that its training has not seen, as words of the whole caption."""
  clips = (shapes.describe("heldout", i, 1, WORLDS["medium"]) for i in range(99))
  clips = [clip for clip in clips if clip["truth"]["frames"] > 1][:8]
  short = [clip["captions"][0] for clip in clips]
  trained = TrainedExpander(shipped.find("shapes"))
  longer = trained.expand(short)
  for clip, text in zip(clips, longer, strict=True):
    assert caption_attributes.score(text, clip["truth"])["all"], text
  assert trained.expand([text.upper() for text in short]) == longer
