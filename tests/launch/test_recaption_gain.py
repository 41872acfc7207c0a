"""The table of what new captions are worth: poor ones, and how far new ones go."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import tiny

from sora_jax.data import clips, shapes
from sora_jax.data.clips import Clip
from sora_jax.data.shape_worlds import WORLDS
from sora_jax.evaluation import caption_attributes
from sora_jax.evaluation.shares import share_of

sys.path.insert(0, str(tiny.ROOT / "launch"))
import recaption_gain  # noqa: E402


def clip_of(index, world="short", split="train"):
  row = shapes.describe(split, index, 0, WORLDS[world])
  truth = row["truth"]
  return Clip(
    id=row["path"],
    path=row["path"],
    start=0.0,
    frames=truth["frames"],
    fps=float(truth["fps"]),
    height=truth["height"],
    width=truth["width"],
    captions=tuple(row["captions"]),
    split=split,
    truth=truth,
  )


def test_captions_are_poor_in_three_ways():
  known = [clip_of(i) for i in range(60)]
  rng = np.random.default_rng(0)
  counts = dict.fromkeys(("none", "two words", "one attribute"), 0)
  for clip in known * 5:
    found = recaption_gain.poor_captions(clip, known, rng)
    if not found:
      counts["none"] += 1
      continue
    article, *words = found[0].split()
    if article not in ("a", "an"):
      counts["two words"] += 1
      item = clip.truth["objects"][0]
      assert found == [f"{item['color']} {item['shape']}"]
      continue
    counts["one attribute"] += 1
    scores = caption_attributes.score(found[0], clip.truth)
    missed = [n for n in ("color", "shape", "motion") if not scores.get(n, True)]
    # A caption without a known shape has no object of which anything can be right.
    assert missed and (len(missed) == 1 or "object" in words), (found, clip.captions)
  assert all(70 < count < 130 for count in counts.values()), counts


def test_a_world_of_several_objects_is_refused():
  pairs = (clip_of(i, "whole") for i in range(100))
  pair = next(clip for clip in pairs if clip.truth["count"] == 2)
  with pytest.raises(ValueError, match="has 2 objects"):
    recaption_gain.poor_captions(pair, [], np.random.default_rng(0))


def test_sources_keep_held_out_captions_and_a_few_good_ones(tmp_path):
  known = [clip_of(i) for i in range(200)]
  known += [clip_of(i, split="heldout") for i in range(9)]
  data = tmp_path / "true" / "data"
  data.mkdir(parents=True)
  known = [dataclasses.replace(c, path=str(data / c.path)) for c in known]
  clips.write_manifest(data / "manifest.jsonl", known)
  recaption_gain.write_sources(data, tmp_path / "sources", 0.15, most=100, seed=0)
  good, poor, true = (
    [json.loads(x) for x in (tmp_path / "sources" / name).read_text().splitlines()]
    for name in ("good.jsonl", "poor.jsonl", "true.jsonl")
  )
  assert 9 + 15 < len(good) < 9 + 45
  # The first 100, and what is held out; the same ones with either captions.
  assert len(poor) == len(true) == 109
  assert [row["path"] for row in poor] == [row["path"] for row in true]
  captions = {
    (tmp_path / "sources" / row["path"]).resolve(): row["captions"] for row in true
  }
  assert captions == {
    data / f"{clip.path}": list(clip.captions) for clip in (*known[:100], *known[200:])
  }
  by_path = {row["path"]: row for row in good}
  kept = [row for row in poor if row["path"] in by_path]
  assert 9 + 5 < len(kept) < 9 + 30 and all(by_path[r["path"]] == r for r in kept)
  worse = [a["captions"] != b["captions"] for a, b in zip(poor, true, strict=True)]
  assert sum(worse) == 109 - len(kept)


def test_the_table_says_how_far_new_captions_go():
  def shares(right):
    return {n: share_of([True] * right + [False] * (100 - right)) for n in ("shape",)}

  results = {
    arm: {kind: shares(right) for kind in recaption_gain.PROMPTS}
    for arm, right in {"poor": 40, "new": 70, "true": 80}.items()
  }
  assert recaption_gain.way_gone(results, "short") == pytest.approx(0.75)
  lines = recaption_gain.table(results)
  assert any("new" in line and "70% (60-78)" in line for line in lines)
  assert lines[-1] == "expanded prompts: 75% of the way"
  results["true"] = results["poor"]
  assert recaption_gain.way_gone(results, "long") is None
