"""What is read from captions: all of every true one, and nothing that is not said."""

import pytest

from sora_jax.data import shapes
from sora_jax.data.shape_worlds import WORLDS
from sora_jax.evaluation import caption_attributes
from sora_jax.evaluation.caption_attributes import Said


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("world", WORLDS)
def test_true_captions_are_read_without_a_fault(split, world):
  kinds = set()
  for index in range(600):
    row = shapes.describe(split, index, 5, WORLDS[world])
    truth, (short, descriptive) = row["truth"], row["captions"]
    kinds |= {(truth["count"], truth["frames"] == 1, truth["occluder"])}
    kinds |= {item["motion"] for item in truth["objects"]}
    scores = caption_attributes.score(descriptive, truth)
    assert all(scores.values()), (descriptive, scores)
    assert ("motion" in scores) == (truth["frames"] > 1)
    scores = caption_attributes.score(short, truth)
    unsaid = {"background", "all"}
    assert {name for name, right in scores.items() if not right} == unsaid, short
  assert set(shapes.MOTIONS) <= kinds
  if world == "whole":
    assert {(1, False, True), (2, False, False), (2, True, False)} <= kinds


@pytest.mark.parametrize(
  "caption, objects",
  [
    ("", ()),
    ("a cat on a mat", ()),
    ("a purple circle moves left", (Said(None, "circle", "left"),)),
    ("Square", (Said(None, "square", None),)),
    ("a red star flies away", (Said("red", "star", None),)),
    ("a red star moves", (Said("red", "star", None),)),
    # What contradicts itself says nothing.
    ("a red star grows and shrinks", (Said("red", "star", None),)),
    (
      "a blue circle moves and a red star stands still",
      (Said("blue", "circle", None), Said("red", "star", "still")),
    ),
    ("красный круг\n" * 3, ()),
  ],
)
def test_what_is_not_said_is_missing(caption, objects):
  assert caption_attributes.read(caption).objects == objects
  assert caption_attributes.read(caption).background is None


def test_grounds_and_bars_are_read_and_unknown_ones_are_missing():
  read = caption_attributes.read
  said = read("A large red star grows, over a smoothly shaded dark grey background.")
  assert said.background == "dark grey" and not said.occluder
  assert read("a red star, over a pink background.").background is None
  assert read("a red star moves left behind a bar").occluder


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_each_attribute_that_is_wrong_is_found(split):
  truths = [shapes.describe(split, i, 0, WORLDS["whole"]) for i in range(300)]
  row = next(r for r in truths if r["truth"]["count"] == 2 and r["truth"]["frames"] > 1)
  truth, caption = row["truth"], row["captions"][1]
  first = truth["objects"][0]
  other = {
    "color": next(c for c in shapes.COLORS if c not in caption),
    "shape": next(s for s in shapes.SHAPES if s not in caption),
  }
  for name, word in other.items():
    scores = caption_attributes.score(caption.replace(first[name], word), truth)
    assert [k for k, right in scores.items() if not right] == [name, "all"]
  one = {**truth, "objects": truth["objects"][:1], "count": 1}
  assert not caption_attributes.score(caption, one)["count"]
  hidden = {**truth, "occluder": True}
  assert not caption_attributes.score(caption, hidden)["occluder"]
  elsewhere = {**truth, "background": "none"}
  assert not caption_attributes.score(caption, elsewhere)["background"]


def test_two_objects_may_be_said_in_either_order():
  truth = {
    "objects": [
      {"color": "red", "shape": "star", "motion": "left"},
      {"color": "blue", "shape": "circle", "motion": "grow"},
    ],
    "count": 2,
    "occluder": False,
    "background": "olive",
    "frames": 9,
  }
  text = "A {} and a {}, over a plain olive background."
  parts = ["small red star moves from right to left", "large blue circle grows larger"]
  for order in (parts, parts[::-1]):
    assert caption_attributes.score(text.format(*order), truth)["all"]
  swapped = [
    "small red circle grows larger",
    "large blue star moves from right to left",
  ]
  scores = caption_attributes.score(text.format(*swapped), truth)
  assert not scores["all"]
  assert not (scores["color"] and scores["shape"] and scores["motion"])
