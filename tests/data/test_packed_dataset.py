"""Packed latents: what rows hold, damage, exact resume on any host count."""

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from data.batch_checks import assert_equal, rows_of, take

from sora_jax.data import records, tokenizer
from sora_jax.data.batches import Batches, first_batches
from sora_jax.data.caption_texts import CaptionIds, StyledCaptionIds, warn_of_cut
from sora_jax.data.packed_dataset import (
  Choice,
  PackedDataset,
  PackedOptions,
  segment_of,
)
from sora_jax.packing import patches, planner

BUDGET = planner.Budget(tokens=64, text_tokens=40, segments=6)
PATCH = (1, 2, 2)


# --- latents


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
  """40 clips of 1, 2, 3 and 5 latent frames and three sizes, in two shards."""
  folder = str(tmp_path_factory.mktemp("latents"))
  rng = np.random.default_rng(0)

  def make(i):
    t, (h, w) = (1, 2, 3, 5)[i % 4], ((4, 4), (4, 6), (6, 4))[i % 3]
    times = [0.5, 1.25][: 2 * (t > 1)]
    return {
      "id": f"clip{i}",
      "latent_THWC": rng.standard_normal((t, h, w, 3)),
      "extras_NHWC": rng.standard_normal((len(times), h, w, 3)),
      "extras": times,
      "fps": (8.0, 16.0)[i % 2],
      "captions": [f"clip {i}", f"the descriptive text of clip {i}"][: i % 5],
      "split": "heldout" if i % 10 == 9 else "train",
      "frames": 1 + 4 * (t - 1),
      "height": 8 * h,
      "width": 8 * w,
    }

  clips = []
  for shard in range(2):
    path = f"{folder}/{shard}.array_record"
    clips += records.write_shard(path, map(make, range(20 * shard, 20 * shard + 20)))
  captions = [caption for clip in clips for caption in clip.captions]
  tokenizer.train(captions, f"{folder}/tokenizer.model")
  return folder, clips


def packed(latents, folder=None, split="train", seed=7, max_text_tokens=12,
           bad_clips_folder=None, leave_out=(), **options):  # fmt: skip
  source, clips = latents
  words = tokenizer.Tokenizer(f"{source}/tokenizer.model")
  defaults = {"budget": BUDGET, "patch_size": PATCH, "reference_fps": 16.0}
  return PackedDataset(
    clips,
    records.LatentReader(folder or source),
    CaptionIds(words, max_text_tokens),
    PackedOptions(**{**defaults, **options}),
    seed,
    Choice(split, leave_out=leave_out),
    bad_clips_folder,
  )


def epoch_rows(dataset, epoch=0):
  start = sum(dataset.elements_per_epoch(e) for e in range(epoch))
  return [dataset[start + i] for i in range(dataset.elements_per_epoch(epoch))]


def test_shapes_and_types(latents):
  row = packed(latents)[0]
  L, S, N = dataclasses.astuple(BUDGET)
  assert {name: (x.shape, str(x.dtype)) for name, x in row.items()} == {
    "patch_LP": ((L, 12), "float32"),
    "segment_L": ((L,), "int32"),
    "position_L3": ((L, 3), "float32"),
    "group_L": ((L,), "int32"),
    "text_S": ((S,), "int32"),
    "text_segment_S": ((S,), "int32"),
    "text_position_S": ((S,), "int32"),
    "clip_N": ((N,), "int32"),
    "clip_unreadable_N": ((N,), "int32"),
  }


def test_rows_hold_the_clips(latents):
  folder, clips = latents
  dataset = packed(latents, caption_dropout=0.0)
  reader = records.LatentReader(folder)
  words = tokenizer.Tokenizer(f"{folder}/tokenizer.model")
  seen, extra_times, chosen_captions = [], set(), set()
  for epoch in range(3):
    for row in epoch_rows(dataset, epoch):
      segment_L, used = row["segment_L"], np.sum(row["clip_N"] >= 0)
      assert set(segment_L[segment_L > 0]) == set(range(1, used + 1))
      assert np.all(np.diff(segment_L[segment_L > 0]) >= 0)
      for name in ("patch_LP", "position_L3", "group_L"):
        assert not row[name][segment_L == 0].any()
      for k in range(used):
        clip = clips[row["clip_N"][k]]
        assert clip.split == "train"
        seen.append((epoch, clip.id))
        here = segment_L == k + 1
        grid = patches.grid_shape(clip.shape, PATCH)
        count = int(np.prod(grid))
        record = reader.read(clip)
        latent = patches.unpatchify(row["patch_LP"][here][:count], grid, PATCH)
        np.testing.assert_array_equal(latent, record["latent_THWC"])
        # Time is real: a latent frame at 8 fps takes two of those at 16.
        position_l3 = row["position_L3"][here]
        scale = 16.0 / clip.fps
        want = patches.grid_positions(grid) * [scale, 1, 1]
        np.testing.assert_array_equal(position_l3[:count], want)
        group_l = row["group_L"][here]
        assert set(group_l // 2) == {k}
        assert not np.all(group_l[:count] % 2)
        # Image latents come behind the clip, given, at their own times.
        assert np.all(group_l[count:] % 2)
        frame = grid[1] * grid[2]
        for j in range(count, len(group_l), frame):
          (time,) = set(position_l3[j : j + frame, 0])
          extra = record["extras_NHWC"][clip.extras.index(time / scale)]
          tokens = patches.patchify(extra[None], PATCH)
          np.testing.assert_array_equal(row["patch_LP"][here][j : j + frame], tokens)
          want = patches.grid_positions((1, *grid[1:]))[:, 1:]
          np.testing.assert_array_equal(position_l3[j : j + frame, 1:], want)
          extra_times.add(time / scale)
        there = row["text_segment_S"] == k + 1
        text = words.decode(row["text_S"][there])
        assert text in (clip.captions or ("",))
        chosen_captions.add(text)
        assert row["text_S"][there][-1] == tokenizer.EOS
        np.testing.assert_array_equal(row["text_position_S"][there], range(there.sum()))
      assert not row["text_S"][row["text_segment_S"] == 0].any()
  train = [clip.id for clip in clips if clip.split == "train"]
  assert sorted(seen) == sorted((e, i) for e in range(3) for i in train)
  assert extra_times == {0.5, 1.25}
  assert {"clip 2", "the descriptive text of clip 2"} <= chosen_captions


def test_heldout_rows(latents):
  dataset = packed(latents, split="heldout", caption_dropout=1.0, given_prob=0.0)
  rows = epoch_rows(dataset)
  indices = np.concatenate([row["clip_N"][row["clip_N"] >= 0] for row in rows])
  assert sorted(indices) == [9, 19, 29, 39]
  for row in rows:
    used = row["clip_N"] >= 0
    # Dropped captions are the end of text alone.
    assert row["text_S"].sum() == used.sum() * tokenizer.EOS
    assert (row["text_segment_S"] > 0).sum() == used.sum()


def test_elements_do_not_depend_on_the_order_of_access(latents):
  want = [packed(latents)[i] for i in range(40)]
  dataset = packed(latents)
  for i in (39, 3, 20, 0):
    assert_equal(dataset[i], want[i])
  assert_equal(pickle.loads(pickle.dumps(dataset))[20], want[20])
  assert np.any(packed(latents, seed=8)[0]["clip_N"] != want[0]["clip_N"])


def test_fill_is_reported(latents):
  dataset = packed(latents)
  rows = epoch_rows(dataset)
  fill = np.mean([np.mean(row["segment_L"] > 0) for row in rows])
  assert dataset.fill() == pytest.approx(fill)
  assert 0.7 < fill <= 1


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"budget": planner.Budget(29, 40, 6)}, "clip7: 30 tokens, but a row holds 29"),
    ({"patch_size": (1, 4, 4)}, r"clip1: a latent of \(T, H, W\) = \(2, 4, 6\)"),
    ({"patch_size": (2, 2, 2)}, "clip0: a latent of"),
    ({"max_text_tokens": 41}, "max_text_tokens is 41, but a row holds 40"),
    ({"split": "test"}, "no clip of split 'test' among 40 clips"),
  ],
)
def test_errors(latents, changes, words):
  with pytest.raises(ValueError, match=words):
    packed(latents, **changes)


def test_long_clips_take_the_extras_that_fit(latents):
  budget = planner.Budget(30, 40, 6)
  dataset = packed(latents, budget=budget, extra_prob=1.0)
  for row in epoch_rows(dataset):
    assert (row["segment_L"] > 0).sum() <= 30


def test_given_ends_begin_with_an_image(latents):
  """What follows an image at the end of a latent frame is given, where any is."""
  _, clips = latents
  # At half the rate of reference: times in a row are twice those of the clip.
  clip = dataclasses.replace(clips[3], extras=(2.0, 3.25), fps=8.0)
  assert clip.shape[0] == 5
  rng = np.random.default_rng(0)
  record = {
    "latent_THWC": rng.standard_normal((*clip.shape, 3)),
    "extras_NHWC": rng.standard_normal((2, *clip.shape[1:], 3)),
  }
  options = PackedOptions(planner.Budget(60, 40, 6), PATCH, 16.0, given_prob=1.0)
  frame = clip.shape[1] * clip.shape[2] // 4
  for images in (1, 2):
    leads = []
    for seed in range(40):
      segment = segment_of(
        np.random.default_rng(seed), clip, record, images, np.zeros(1, int), options
      )
      times = segment.position_L3[5 * frame :: frame, 0].tolist()
      given = segment.given_L[::frame].tolist()
      assert given[5:] == [True] * images
      if given[2:5] == [False, True, True] and 4.0 in times:
        leads.append(seed)
    assert len(leads) > 5 * images


def test_damaged_records_are_left_out(latents, tmp_path):
  source, clips = latents
  with open(f"{source}/0.array_record", "rb") as f:
    data = bytearray(f.read())
  target = clips[4]
  latent = records.LatentReader(source).read(target)["latent_THWC"]
  data[data.index(latent.astype(np.float16).tobytes()[:32])] ^= 1
  (tmp_path / "0.array_record").write_bytes(data)
  with open(f"{source}/1.array_record", "rb") as f:
    (tmp_path / "1.array_record").write_bytes(f.read()[:70_000])
  dataset = packed(latents, str(tmp_path), bad_clips_folder=str(tmp_path / "run"))
  whole = packed(latents)
  rows, whole_rows = epoch_rows(dataset), epoch_rows(whole)
  indices = np.concatenate([row["clip_N"][row["clip_N"] >= 0] for row in rows])
  good = [i for i in range(20) if clips[i].split == "train" and i != 4]
  assert sorted(indices) == good
  lost = np.concatenate([row["clip_unreadable_N"] for row in rows])
  assert sorted(lost[lost >= 0]) == [4, *(i for i in range(20, 40) if i % 10 < 9)]
  # The other clips of a row are what they are without the damage.
  for row, want in zip(rows, whole_rows, strict=True):
    for k, index in enumerate(row["clip_N"][row["clip_N"] >= 0]):
      k_want = list(want["clip_N"]).index(index)
      np.testing.assert_array_equal(
        row["patch_LP"][row["segment_L"] == k + 1],
        want["patch_LP"][want["segment_L"] == k_want + 1],
      )
  with open(tmp_path / "run" / "bad_clips.jsonl") as f:
    bad = {line["id"]: line["reason"] for line in map(json.loads, f)}
  assert bad.keys() == {"clip4"} | {f"clip{i}" for i in range(20, 40) if i % 10 < 9}
  assert "0.array_record: record 4: Corrupted" in bad["clip4"]
  assert "1.array_record: record 3: " in bad["clip23"]
  # Noted once, however often it is met.
  epoch_rows(dataset, 1)
  with open(tmp_path / "run" / "bad_clips.jsonl") as f:
    assert len(f.readlines()) == len(bad)


def test_a_clip_to_leave_out_is_padding_and_no_other_changes(latents, tmp_path):
  ids = [latents[1][4].id, latents[1][5].id]
  rows = epoch_rows(packed(latents, leave_out=ids, bad_clips_folder=str(tmp_path)))
  whole = epoch_rows(packed(latents))
  assert packed(latents, leave_out=ids).fingerprint == packed(latents).fingerprint
  seen = []
  for row, want in zip(rows, whole, strict=True):
    assert np.all(row["clip_unreadable_N"] == -1)
    for k, index in enumerate(row["clip_N"][row["clip_N"] >= 0]):
      k_want = list(want["clip_N"]).index(index)
      np.testing.assert_array_equal(
        row["patch_LP"][row["segment_L"] == k + 1],
        want["patch_LP"][want["segment_L"] == k_want + 1],
      )
      seen.append(index)
  everything = np.concatenate([row["clip_N"][row["clip_N"] >= 0] for row in whole])
  assert sorted({4, 5}.union(seen)) == sorted(everything) and not {4, 5} & set(seen)
  assert not (tmp_path / "bad_clips.jsonl").exists()


def test_a_row_without_a_readable_record_is_padding(latents, tmp_path):
  source, clips = latents
  with open(f"{source}/1.array_record", "rb") as f:
    (tmp_path / "1.array_record").write_bytes(f.read())
  budget = planner.Budget(64, 40, 1)
  rows = epoch_rows(packed(latents, str(tmp_path), budget=budget))
  empty = [row for row in rows if not row["segment_L"].any()]
  assert len(empty) == 18
  for row in empty:
    assert np.all(row["clip_N"] == -1)
    assert not any(row[name].any() for name in row if not name.startswith("clip"))
    (lost,) = row["clip_unreadable_N"]
    assert 0 <= lost < 20  # of the shard that is missing
    assert row["patch_LP"].shape == rows[0]["patch_LP"].shape


# --- batches


def hosts(latents, count, batch_size=4, state=None):
  iterators = [
    Batches(packed(latents), batch_size, process_index=i, process_count=count)
    for i in range(count)
  ]
  for iterator in iterators if state else ():
    iterator.set_state(state)
  return iterators


def test_batches_are_the_elements(latents):
  dataset = packed(latents)
  got = take(Batches(packed(latents), 4), 12)
  # The epochs of this data set differ in size, and the batches cross them.
  sizes = [dataset.elements_per_epoch(e) for e in range(4)]
  assert len(set(sizes)) > 1 and sum(sizes[:3]) < 48, sizes
  for b, batch in enumerate(got):
    for r in range(4):
      assert_equal({k: v[r] for k, v in batch.items()}, dataset[4 * b + r])


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_a_batch(latents, count):
  want = take(*hosts(latents, 1), 12)
  got = rows_of([take(it, 12) for it in hosts(latents, count)])
  for a, b in zip(got, want, strict=True):
    assert_equal(a, b)


@pytest.mark.parametrize("before, after", [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("steps", [0, 3, 7, 11])
def test_resume_is_exact_on_any_number_of_hosts(latents, before, after, steps):
  want = take(*hosts(latents, 1), steps + 4)[steps:]
  iterators = hosts(latents, before)
  for iterator in iterators:
    for _ in range(steps):
      next(iterator)
  states = [json.loads(json.dumps(it.get_state())) for it in iterators]
  assert all(state == states[0] for state in states)
  for iterator in iterators:
    iterator.close()
  got = rows_of([take(it, 4) for it in hosts(latents, after, state=states[0])])
  for a, b in zip(got, want, strict=True):
    assert_equal(a, b)


def test_going_back_in_the_same_iterator(latents):
  batches = Batches(packed(latents), 4)
  next(batches)
  state = batches.get_state()
  first = [next(batches) for _ in range(8)]
  batches.set_state(state)
  for a, b in zip(first, take(batches, 8), strict=True):
    assert_equal(a, b)


def test_resume_makes_no_plan_of_past_epochs(latents, monkeypatch):
  (batches,) = hosts(latents, 1)
  for _ in range(10):
    next(batches)
  state = batches.get_state()
  batches.close()
  assert len(state["epoch_starts"]) > 2
  planned = []
  make = PackedDataset._plan
  monkeypatch.setattr(
    PackedDataset,
    "_plan",
    lambda self, epoch: planned.append(epoch) or make(self, epoch),
  )
  take(*hosts(latents, 1, state=state), 1)
  assert min(planned) == len(state["epoch_starts"]) - 1


def test_another_data_set_on_resume_is_logged(latents, caplog):
  (batches,) = hosts(latents, 1)
  state = batches.get_state()
  batches.close()
  other = Batches(packed(latents, seed=8), 4)
  other.set_state({**state, "global_next_index": 8, "epoch_starts": [0, 3]})
  assert "not the one of the checkpoint" in caplog.text
  assert_equal(take(other, 1)[0], take(Batches(packed(latents, seed=8), 4), 3)[2])


def test_captions_that_are_cut_are_counted(latents, caplog):
  source, clips = latents
  words = tokenizer.Tokenizer(f"{source}/tokenizer.model")
  captions = [caption for clip in clips for caption in clip.captions]
  whole = [len(words.encode(caption, 1000)) for caption in captions]
  most = sorted(whole)[len(whole) // 2]
  warn_of_cut(CaptionIds(words, max(whole)), clips, "config.dit.max_text_tokens")
  assert not caplog.text
  warn_of_cut(CaptionIds(words, most), clips, "config.dit.max_text_tokens")
  cut = sum(length > most for length in whole)
  assert 0 < cut < len(whole)
  said = f"{cut} of {len(whole)} captions have more than the {most} tokens of config."
  assert said in caplog.text and f"longest has {max(whole)}" in caplog.text
  # Behind the token of a style one token less is left.
  caplog.clear()
  warn_of_cut(StyledCaptionIds(words, max(whole) + 1, 512), clips, "config.x")
  assert not caplog.text
  warn_of_cut(StyledCaptionIds(words, max(whole), 512), clips, "config.x")
  assert f"the longest has {max(whole) + 1}" in caplog.text


@pytest.mark.slow
def test_workers_change_nothing(latents):
  want = take(*hosts(latents, 1), 14)
  batches = Batches(packed(latents), 4, workers=2)
  for b in want[:7]:
    assert_equal(next(batches), b)
  state = batches.get_state()
  batches.close()
  # Saved with workers, resumed without.
  for a, b in zip(take(*hosts(latents, 1, state=state), 7), want[7:], strict=True):
    assert_equal(a, b)


def test_first_batches(latents):
  heldout = packed(latents, split="heldout")
  want = take(Batches(heldout, 2), 3)
  got = first_batches(packed(latents, split="heldout"), 2, 3)
  for a, b in zip(got, want, strict=True):
    assert_equal(a, b)
  shared = [
    first_batches(heldout, 2, 3, process_index=i, process_count=2) for i in range(2)
  ]
  for a, b in zip(rows_of(shared), want, strict=True):
    assert_equal(a, b)


def test_hosts_that_cannot_share(latents):
  with pytest.raises(ValueError, match="batch_size 4 is not divisible by 3"):
    Batches(packed(latents), 4, process_count=3)
  with pytest.raises(ValueError, match="batch_size 4 is not divisible by 3"):
    first_batches(packed(latents), 4, 1, process_count=3)


def test_what_workers_need_imports_no_jax():
  code = (
    "import sys\n"
    "from sora_jax.data import clip_dataset, packed_dataset, tokenizer\n"
    "from sora_jax.packing import packed_row, planner\n"
    "sys.exit('jax' in sys.modules)\n"
  )
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_synthetic_captions_resume_exactly(latents):
  folder, clips = latents
  written = [
    dataclasses.replace(clip, synthetic=min(1, len(clip.captions))) for clip in clips
  ]

  def batches(share=0.5):
    return Batches(packed((folder, written), synthetic_captions=share), 4)

  whole = take(batches(), 14)
  begun = batches()
  for _ in range(5):
    next(begun)
  state = json.loads(json.dumps(begun.get_state()))
  begun.close()
  resumed = batches()
  resumed.set_state(state)
  for a, b in zip(take(resumed, 9), whole[5:], strict=True):
    assert_equal(a, b)
  prints = {
    packed(latents).fingerprint,
    packed(latents, synthetic_captions=0.1).fingerprint,  # there are none
    packed((folder, written), synthetic_captions=0.1).fingerprint,
    packed((folder, written), synthetic_captions=0.2).fingerprint,
  }
  assert len(prints) == 3


def test_the_share_of_synthetic_captions_is_drawn(latents):
  folder, clips = latents
  both = [dataclasses.replace(c, synthetic=1) for c in clips if len(c.captions) == 2]
  for share in (0.0, 1.0):
    dataset = packed((folder, both), synthetic_captions=share, caption_dropout=0.0)
    for epoch in range(2):
      plan = dataset._epoch_plan(epoch)
      drawn = {caption for i in range(len(plan)) for _, _, caption, _ in plan[i]}
      assert drawn == {int(share)}
