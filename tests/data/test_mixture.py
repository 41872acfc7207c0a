"""Mixtures in exact shares, and schedules of sizes: what is visited when."""

import collections
import pickle

import numpy as np
import pytest
from data.batch_checks import assert_equal, rows_of, take

from sora_jax.data import buckets, mixture, records, tokenizer
from sora_jax.data.batches import Batches
from sora_jax.data.caption_texts import CaptionIds
from sora_jax.data.clip_dataset import ClipDataset
from sora_jax.data.clips import Clip
from sora_jax.data.packed_dataset import Choice, PackedDataset, PackedOptions
from sora_jax.data.schedule import Scheduled
from sora_jax.packing import planner

SHARES = {"films": 0.7, "photos": 0.1, "tfds": 0.2}
SIZES = {"films": 50, "photos": 7, "tfds": 200}
SOURCES = [source for source, size in SIZES.items() for _ in range(size)]


# --- what rounds visit


def test_shares_are_exact_and_clips_come_once_an_epoch():
  mixed = mixture.Mixture(SOURCES, SHARES, seed=3)
  assert mixed.counts == {"films": 717, "photos": 102, "tfds": 205}  # of 1024
  seen = collections.defaultdict(list)
  for number in range(9):
    clip_V, epoch_V = mixed.of_round(number)
    count = collections.Counter(SOURCES[clip] for clip in clip_V)
    assert count == mixed.counts
    for clip, epoch in zip(clip_V.tolist(), epoch_V.tolist(), strict=True):
      seen[SOURCES[clip], epoch].append(clip)
  for (source, epoch), visited in seen.items():
    here = [i for i, other in enumerate(SOURCES) if other == source]
    whole = (epoch + 1) * len(here) <= 9 * mixed.counts[source]
    assert len(set(visited)) == len(visited)
    if whole:
      assert sorted(visited) == here
    else:  # the epoch that is under way
      assert epoch == 9 * mixed.counts[source] // len(here)
  assert seen["films", 0] != seen["films", 1]


def test_a_round_is_a_function_of_seed_and_number():
  mixed, same, other = (mixture.Mixture(SOURCES, SHARES, seed) for seed in (3, 3, 4))
  mixed.of_round(0)
  for a, b in zip(mixed.of_round(5), same.of_round(5), strict=True):
    np.testing.assert_array_equal(a, b)
  assert (mixed.of_round(5)[0] != other.of_round(5)[0]).any()


@pytest.mark.parametrize(
  "weights, total, want",
  [
    ([1, 1, 1], 10, [4, 3, 3]),
    ([0.5, 0.25, 0.25], 4, [2, 1, 1]),
    ([1e6, 1, 1, 0], 10, [8, 1, 1, 0]),
    ([3, 3, 3, 3e-9, 3e-9], 6, [1, 2, 1, 1, 1]),
  ],
)
def test_apportion(weights, total, want):
  made = mixture.apportion(np.array(weights, float), total)
  assert made.sum() == total and sorted(made) == sorted(want)


def test_a_source_without_clips_is_said(caplog):
  mixed = mixture.Mixture(["films"] * 5, SHARES, 0)
  assert mixed.counts == {"films": 1024, "photos": 0, "tfds": 0}
  assert "no clips are left of the sources photos, tfds" in caplog.text
  assert len(mixed.of_round(0)[0]) == 1024
  with pytest.raises(ValueError, match="source 'books', but config.data.mixture has"):
    mixture.Mixture(["books"], SHARES, 0)


def test_names_of_sources():
  known = {
    "/a/films": "films", "/b/films/": "films-2", "tfds:ucf101?video=x": "ucf101",
    "tfds:/p/toy/1.0.0": "toy", "gs://b/x": "x", "/a/y-{000..041}.tar": "y",
    "https://h/list.parquet": "list", "/c/*.tar": "c", "/7/*": "source",
    "tfds:laion/small:1.0.0": "small",
  }  # fmt: skip
  assert mixture.names(list(known)) == list(known.values())
  for wrong, message in (
    ((("a", 1.0), ("a", 2.0)), "a is there twice"),
    ((("a", 0.0),), "the share of a must be more than 0, not 0"),
    ((("shapes", 1.0),), "'shapes' cannot be a part"),
  ):
    with pytest.raises(ValueError, match=message):
      mixture.check(wrong)


# --- data sets


def clip_of(number, source):
  frames = 1 if source == "photos" else 9
  return Clip(f"{source}/{number}", "", 0.0, frames, 8.0, 32, 32, source=source)


def test_windows_of_clips_are_mixed(monkeypatch):
  monkeypatch.setattr(
    "sora_jax.data.clip_dataset.read_clip",
    lambda clip, first, t: np.zeros((t, 32, 32, 3), np.uint8),
  )
  clips = [clip_of(n, source) for n, source in enumerate(SOURCES)]
  dataset = ClipDataset(clips, (5, 32, 32), 0, shares=SHARES)
  assert dataset.elements_per_epoch() == 1024
  visited = [int(dataset[i]["clip"]) for i in range(1024, 2048)]
  count = collections.Counter(SOURCES[clip] for clip in visited)
  assert count == {"films": 717, "photos": 102, "tfds": 205}
  plain = ClipDataset(clips, (5, 32, 32), 0)
  assert plain.fingerprint != dataset.fingerprint
  assert sorted(int(plain[i]["clip"]) for i in range(257)) == list(range(257))


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
  """40 films, 10 photos, each at two sizes, and a tokenizer."""
  folder = tmp_path_factory.mktemp("latents")
  rng = np.random.default_rng(0)

  def make(number, size):
    source = "photos" if number % 5 == 0 else "films"
    t, edge = (1 if source == "photos" else 2 + size), 2 + 2 * size
    return {
      "id": str(number),
      "latent_THWC": rng.standard_normal((t, edge, edge, 3)),
      "extras_NHWC": np.zeros((0, edge, edge, 3)),
      "extras": [],
      "fps": 8.0,
      "captions": [f"clip {number}"],
      "split": "train",
      "frames": 1 + 4 * (t - 1),
      "height": 8 * edge,
      "width": 8 * edge,
      "source": source,
      "budget": size,
    }

  clips = []
  for size in range(2):
    made = [make(number, size) for number in range(50)]
    clips += records.write_shard(str(folder / f"{size}.array_record"), made, "vae 1")
  tokenizer.train([c for clip in clips for c in clip.captions], str(folder / "words"))
  return folder, clips


def packed(latents, vae="", **options):
  folder, clips = latents
  texts = CaptionIds(tokenizer.Tokenizer(str(folder / "words")), 12)
  budget = planner.Budget(tokens=64, text_tokens=200, segments=16)
  reader = records.LatentReader(str(folder), vae)
  return PackedDataset(
    clips, reader, texts, PackedOptions(budget, (1, 2, 2), 16.0), 7, Choice(**options)
  )


def visits_of(dataset, clips, elements):
  return [clips[n] for i in elements for n in dataset[i]["clip_N"].tolist() if n >= 0]


def test_rows_are_mixed(latents, caplog):
  caplog.set_level("INFO", logger="absl")
  clips = latents[1]
  dataset = packed(latents, shares={"films": 0.5, "photos": 0.5})
  assert "films 50.0 % (512 visits of 40 clips), photos 50.0 % (512" in caplog.text
  visits = visits_of(dataset, clips, range(dataset.elements_per_epoch()))
  assert collections.Counter(clip.source for clip in visits) == {
    "films": 512, "photos": 512,
  }  # fmt: skip
  of_each = collections.Counter(clip.id for clip in visits)
  # 512 visits of 40 films are 12 epochs and 32 more; of 10 photos 51 and 2.
  assert set(of_each.values()) == {12, 13, 51, 52}
  assert dataset.fill() > 0.97
  # Two visits of a clip in a round are in two epochs, and have draws of their own.
  entries = dataset._epoch_plan(0)
  pairs = [tuple(visit[:2]) for i in range(len(entries)) for visit in entries[i]]
  assert len(set(pairs)) == len(pairs) == 1024


@pytest.mark.slow
def test_a_share_of_images(latents):
  clips = latents[1]
  for share, images in ((0.25, 256), (0.0, 0), (1.0, 1024)):
    dataset = packed(latents, image_share=share)
    visits = visits_of(dataset, clips, range(dataset.elements_per_epoch()))
    assert sum(clip.frames == 1 for clip in visits) == images
    assert {clip.budget for clip in visits} == {1}
  shares = {"films": 0.9, "photos": 0.1}
  dataset = packed(latents, shares=shares, image_share=0.25)
  visits = visits_of(dataset, clips, range(dataset.elements_per_epoch()))
  assert sum(clip.source == "photos" for clip in visits) == 256
  films = (latents[0], [clip for clip in clips if clip.source == "films"])
  with pytest.raises(ValueError, match="images is to be 0.5, but there are no images"):
    packed(films, image_share=0.5)


def scheduled(latents):
  """Four rows a step: the first size for three steps, then the second."""
  parts = [
    packed(latents, size=0),
    packed(latents, shares={"films": 0.8, "photos": 0.2}, image_share=0.5, size=1),
  ]
  return Scheduled(parts, [0, 12])


def test_sizes_change_at_their_step(latents):
  clips, dataset = latents[1], scheduled(latents)
  first = {clip.budget for clip in visits_of(dataset, clips, range(12))}
  then = {clip.budget for clip in visits_of(dataset, clips, range(12, 40))}
  assert (first, then) == ({0}, {1})
  shapes = [{k: (v.shape, v.dtype) for k, v in dataset[i].items()} for i in (0, 12)]
  assert shapes[0] == shapes[1]  # one program for both
  assert_equal(dataset[12], packed_part(dataset)[0])
  with pytest.raises(ValueError, match="no clip of split 'train' is encoded at bud"):
    packed(latents, size=2)


def packed_part(dataset):
  return pickle.loads(pickle.dumps(dataset)).last()


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_run_resumes_exactly_on_any_number_of_hosts(latents, steps):
  """2 -> 4 -> 1 hosts, before, at and behind the step where sizes change."""
  want = take(Batches(scheduled(latents), 4), steps + 6)

  def run(hosts, count, state):
    made, states = [], []
    for host in range(hosts):
      batches = Batches(scheduled(latents), 4, process_index=host, process_count=hosts)
      if state:
        batches.set_state(state)
      made.append([next(batches) for _ in range(count)])
      states.append(batches.get_state())
      batches.close()
    assert all(state == states[0] for state in states)
    return rows_of(made), states[0]

  got, state = run(2, steps, None)
  more, state = run(4, 2, state)
  last, _ = run(1, 4, state)
  for one, other in zip(got + more + last, want, strict=True):
    assert_equal(one, other)


@pytest.mark.slow
def test_workers_change_nothing(latents):
  want = take(Batches(scheduled(latents), 4), 6)
  for one, other in zip(take(Batches(scheduled(latents), 4, workers=2), 6), want,
                        strict=True):  # fmt: skip
    assert_equal(one, other)


def test_latents_of_another_vae_are_refused(latents):
  packed(latents, vae="vae 1")[0]
  with pytest.raises(records.OtherVAEError, match=r"\(vae 1\) than this run's \(vae 2"):
    packed(latents, vae="vae 2")[0]
  path = str(latents[0] / "0.array_record")
  assert records.read_shard_clips(path, "vae 1") == records.read_shard_clips(path)
  with pytest.raises(records.OtherVAEError, match="0.array_record: latents of another"):
    records.read_shard_clips(path, "vae 2")


def test_clips_within_a_budget():
  clips = [clip_of(n, "films") for n in range(40)]
  big = [
    Clip(f"{n}", "", 1.0, 33, 8.0, 64, 96, fps_of) for n, fps_of in enumerate([()])
  ]
  (small,) = buckets.at_budget(big, 32 * 48, 17, 16, 0)
  assert (small.height, small.width, small.frames, small.id) == (32, 48, 17, "0")
  assert buckets.at_budget(big, 64 * 96, 33, 16, 0) == big
  # Parts of longer clips, on their frames, anywhere, and always the same.
  parts = buckets.at_budget(clips, 32 * 32, 5, 16, 0)
  starts = {clip.start for clip in parts}
  assert starts == {first / 8 for first in range(5)}
  assert parts[::-1] == buckets.at_budget(clips[::-1], 32 * 32, 5, 16, 0)
  assert {clip.frames for clip in parts} == {5}
