"""Generated clips, and the analyser that must read them without knowing their truth."""

import collections
import json

import numpy as np
import pytest
from scipy import ndimage

from sora_jax.data import shape_worlds, shapes, sources
from sora_jax.data.intake.measuring import Measuring
from sora_jax.data.video import reader
from sora_jax.evaluation import shape_attributes

_HELDOUT = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("shapes")
  shapes.generate(path, num_train=24, num_heldout=_HELDOUT, seed=5)
  return path


def _rows(folder):
  return [json.loads(x) for x in (folder / "manifest.jsonl").read_text().splitlines()]


def _triples(truths):
  return {(o["color"], o["shape"], o["motion"]) for t in truths for o in t["objects"]}


@pytest.mark.slow
def test_same_seed_gives_same_bytes_and_a_half_done_folder_is_completed(tmp_path):
  a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
  shapes.generate(a, num_train=8, num_heldout=4, seed=3)
  shapes.generate(b, num_train=3, num_heldout=4, seed=3)
  times = {path: path.stat().st_mtime_ns for path in b.rglob("0*")}
  next(b.rglob("000001.*")).unlink()
  shapes.generate(b, num_train=8, num_heldout=4, seed=3)
  shapes.generate(c, num_train=8, num_heldout=4, seed=4)

  def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}

  assert content(a) == content(b) != content(c)
  kept = [path for path, when in times.items() if path.stat().st_mtime_ns == when]
  assert len(kept) == len(times) - 1
  with pytest.raises(ValueError, match="clips of seed 3, not of seed 4"):
    shapes.generate(a, num_train=8, num_heldout=4, seed=4)
  with pytest.raises(ValueError, match="-1 train"):
    shapes.generate(tmp_path / "d", num_train=-1, num_heldout=4, seed=4)


@pytest.mark.slow
def test_heldout_combinations_never_occur_in_training():
  train = [shapes.describe("train", i, 0)["truth"] for i in range(600)]
  heldout = [shapes.describe("heldout", i, 0)["truth"] for i in range(100)]
  assert _triples(heldout) == shapes.heldout_combinations()
  assert _triples(train) == set(shapes.combinations("train"))
  assert not _triples(train) & _triples(heldout)
  # Every pair of values is still seen, so held-out clips only ask to combine.
  for keep in ((0, 1), (0, 2), (1, 2)):
    pairs = [{tuple(t[i] for i in keep) for t in _triples(x)} for x in (train, heldout)]
    assert pairs[1] <= pairs[0]
  counts = collections.Counter(t["count"] for t in train)
  assert counts[1] > 350 and counts[2] > 70
  assert sum(t["frames"] == 1 for t in train) > 60
  assert sum(t["occluder"] for t in train) > 30
  assert {t["frames"] for t in train} == {1, 9, 17, 33}
  assert {t["fps"] for t in train if t["frames"] > 1} == {8, 12, 16, 24}
  assert {(t["height"], t["width"]) for t in train} == {(64, 64), (64, 96), (96, 64)}


@pytest.mark.parametrize("name, length", [("simple", (17, 12)), ("short", (9, 8))])
def test_simple_worlds_show_one_object_at_one_size_and_rate(tmp_path, name, length):
  world = shape_worlds.WORLDS[name]
  train = [shapes.describe("train", i, 0, world)["truth"] for i in range(600)]
  heldout = [shapes.describe("heldout", i, 0, world)["truth"] for i in range(100)]
  assert _triples(train) <= set(shapes.combinations("train"))
  assert not _triples(train) & _triples(heldout)
  for i, values in enumerate((shapes.COLORS, shapes.SHAPES, shapes.MOTIONS)):
    assert {triple[i] for triple in _triples(train)} == set(values)
  assert {(t["height"], t["width"], t["count"]) for t in train} == {(64, 64, 1)}
  assert {(t["frames"], t["fps"]) for t in train} == {(1, 1), length}
  assert {(t["background"], t["gradient"]) for t in train} == {("dark grey", None)}
  assert not any(t["occluder"] for t in train)
  images = sum(t["frames"] == 1 for t in train) / len(train)
  assert 0.45 < images < 0.6
  shapes.generate(tmp_path, num_train=1, num_heldout=1, seed=0, world=name)
  with pytest.raises(ValueError, match=f"seed 0 {name}, not of seed 0$"):
    shapes.generate(tmp_path, num_train=1, num_heldout=1, seed=0)
  with pytest.raises(ValueError, match="world 'flat' is none of"):
    shapes.generate(tmp_path, num_train=1, num_heldout=1, seed=0, world="flat")


def test_the_medium_world_has_two_lengths_and_bars():
  world = shape_worlds.WORLDS["medium"]
  truths = [shapes.describe("train", i, 0, world)["truth"] for i in range(600)]
  assert {t["count"] for t in truths} == {1}
  assert {(t["frames"], t["fps"]) for t in truths} == {
    (1, 1), (9, 8), (9, 12), (17, 8), (17, 12)
  }  # fmt: skip
  hidden = [t for t in truths if t["occluder"]]
  assert len(hidden) > 20 and {t["frames"] for t in hidden} == {17}
  assert {t["objects"][0]["motion"] for t in hidden} == {"left", "right"}
  for truth in truths:
    wide = truth["occluder"]
    assert (truth["height"], truth["width"]) == (64, 96 if wide else 64)
    if truth["frames"] > 1 and truth["objects"][0]["motion"] in ("left", "right"):
      x = np.array(truth["objects"][0]["trajectory"])[:, 0] * truth["width"]
      assert np.ptp(x) == pytest.approx(60 if wide else 28, abs=0.01)


def test_objects_stay_in_the_frame_and_apart():
  for index in range(300):
    truth = shapes.describe("train", index, 1)["truth"]
    height, width = truth["height"], truth["width"]
    tracks = []
    for item in truth["objects"]:
      x, y, r, _ = np.array(item["trajectory"]).T
      assert len(x) == truth["frames"]
      x, y, r = x * width, y * height, r * min(height, width)
      reach = r * shapes.SHAPES[item["shape"]]
      assert (reach > 4).all() and (r.max() > 7.9)
      assert (x - reach > 0.9).all() and (x + reach < width - 0.9).all()
      assert (y - reach > 0.9).all() and (y + reach < height - 0.9).all()
      tracks.append((x, y, reach))
    if len(tracks) == 2:
      (x0, y0, r0), (x1, y1, r1) = tracks
      apart = np.maximum(abs(x0 - x1), abs(y0 - y1)) - r0 - r1
      assert apart.min() > 1.9
      assert truth["objects"][0]["color"] != truth["objects"][1]["color"]


@pytest.mark.slow
def test_captions_name_what_is_there(folder):
  for row in _rows(folder):
    short, long = (caption.lower() for caption in row["captions"])
    for item in row["truth"]["objects"]:
      name = f"{item['color']} {item['shape']}"
      assert name in short and name in long
    assert row["truth"]["background"] in long
    assert ("bar" in short) == ("bar" in long) == row["truth"]["occluder"]
    assert ("image" in long) == (row["truth"]["frames"] == 1)


@pytest.mark.slow
def test_speed_is_in_pixels_per_second():
  speeds = collections.defaultdict(list)
  for index in range(900):
    truth = shapes.describe("train", index, 2)["truth"]
    for item in truth["objects"]:
      if item["motion"] == "right":
        x = np.array(item["trajectory"])[:, 0] * truth["width"]
        speeds[truth["fps"]].append((x[1] - x[0]) * truth["fps"])
  every = np.concatenate(list(speeds.values()))
  assert 8 <= every.min() and every.max() <= 92
  for fps, found in speeds.items():
    assert max(found) / min(found) > 1.8, fps  # speed is not tied to the frame rate


@pytest.mark.slow
def test_files_are_what_the_manifest_says(folder):
  rows = _rows(folder)
  found, rejected = sources.scan(
    folder,
    max_frames=33,
    max_pixels=64 * 96,
    size_multiple=16,
    how=Measuring(decode=False),
  )
  assert not rejected and len(found) == len(rows)
  for clip in found:
    truth = clip.truth
    assert (clip.frames, clip.height, clip.width, clip.fps) == (
      truth["frames"], truth["height"], truth["width"], truth["fps"],
    )  # fmt: skip
    assert clip.id.startswith(clip.split) and len(clip.captions) == 2


def test_the_encoder_keeps_the_picture(folder):
  quality = []
  for row in [row for row in _rows(folder) if row["truth"]["frames"] > 1][:40]:
    want = shapes.draw(row["truth"]).astype(np.float64)
    error = (reader.read(folder / row["path"]) - want) ** 2
    quality.append(10 * np.log10(255**2 / error.mean()))
  # What is lost is lost by 4:2:0 chroma; a chroma shift would cost 1.5 dB more.
  assert min(quality) > 32 and np.mean(quality) > 38, (min(quality), np.mean(quality))


def _judge(rows, read):
  """Share of clips whose attributes are read rightly, and what was confused."""
  right, confused = collections.defaultdict(list), collections.Counter()
  for row in rows:
    analysis = shape_attributes.analyse_video(read(row))
    result = shape_attributes.score(analysis, row["truth"])
    for name, value in result.items():
      right[name].append(value)
    for name in ("color", "shape", "motion"):
      if not result.get(name, True):
        wanted = [o[name] for o in row["truth"]["objects"]]
        confused[name, *wanted, "->", *[o[name] for o in analysis["objects"]]] += 1
  return {name: (np.mean(x), len(x)) for name, x in right.items()}, confused


@pytest.mark.slow
def test_analyser_reads_heldout_clips(folder):
  rows = [row for row in _rows(folder) if row["split"] == "heldout"]
  right, confused = _judge(rows, lambda row: reader.read(folder / row["path"]))
  assert set(right) == {"color", "shape", "motion", "count", "reappear", "permanence"}
  assert right["color"][1] == _HELDOUT and right["motion"][1] > 0.7 * _HELDOUT
  for name, (share, _) in right.items():
    assert share >= 0.98, (name, right, confused)


@pytest.mark.slow
def test_analyser_reads_blurred_and_noisy_clips(folder):
  rng = np.random.default_rng(0)

  def read(row):
    clip = reader.read(folder / row["path"]).astype(np.float32)
    clip = ndimage.gaussian_filter(clip, (0, 1, 1, 0)) + rng.normal(0, 6, clip.shape)
    return clip.clip(0, 255).astype(np.uint8)

  rows = [row for row in _rows(folder) if row["split"] == "heldout"][:60]
  right, confused = _judge(rows, read)
  for name, (share, _) in right.items():
    assert share >= 0.96, (name, right, confused)


def test_analyser_judges_what_it_sees(folder):
  """A clip played backwards, mirrored or recoloured is read as what it then shows."""
  rows = _rows(folder)

  def first(motion):
    for row in rows:
      items = row["truth"]["objects"]
      if [o["motion"] for o in items] == [motion] and row["truth"]["frames"] > 1:
        return reader.read(folder / row["path"])

  def motion(clip):
    (item,) = shape_attributes.analyse_video(clip)["objects"]
    return item["motion"]

  assert motion(first("right")[::-1]) == "left"
  assert motion(first("left")[:, :, ::-1]) == "right"
  assert motion(first("up")[:, ::-1]) == "down"
  assert motion(first("grow")[::-1]) == "shrink"
  assert motion(first("turn")[:1].repeat(9, axis=0)) == "still"
  swapped = shape_attributes.analyse_video(first("right")[..., [2, 1, 0]])
  assert swapped["count"] == 1
  empty = np.full((9, 64, 64, 3), 90, np.uint8)
  assert shape_attributes.analyse_video(empty) == {"count": 0, "objects": []}


def test_score():
  truth = {
    "objects": [
      {"color": "red", "shape": "circle", "motion": "up"},
      {"color": "blue", "shape": "star", "motion": "turn"},
    ],
    "count": 2, "occluder": False, "frames": 9,
  }  # fmt: skip
  items = [{**item, "reappears": False} for item in truth["objects"]]
  seen = {"count": 2, "objects": items[::-1]}  # the order does not matter
  right = {"color": True, "shape": True, "motion": True, "count": True}
  assert shape_attributes.score(seen, truth) == right
  swapped = [{**items[0], "motion": "turn"}, {**items[1], "motion": "up"}]
  swapped = shape_attributes.score({"count": 2, "objects": swapped}, truth)
  assert swapped == {**right, "motion": False}
  one = shape_attributes.score({"count": 1, "objects": items[:1]}, truth)
  assert not any(one.values())
  image = {**truth, "frames": 1}
  assert "motion" not in shape_attributes.score(seen, image)
  hidden = {**truth, "objects": truth["objects"][:1], "count": 1, "occluder": True}

  def permanence(**seen):
    analysis = {"count": 1, "objects": [{**items[0], **seen}]}
    found = shape_attributes.score(analysis, hidden)
    return found["reappear"], found["permanence"]

  assert permanence(reappears=True, identity=True) == (True, True)
  assert permanence(reappears=True, identity=False) == (True, False)
  assert permanence(reappears=False, identity=False) == (False, False)


def behind_a_bar(seed=0):
  """Truths of clips in which something passes behind a bar."""
  truths = (shapes.describe("heldout", i, seed)["truth"] for i in range(200))
  return [truth for truth in truths if truth["occluder"]][:12]


@pytest.mark.slow
def test_what_comes_out_from_behind_a_bar_is_what_went_in():
  for truth in behind_a_bar():
    (item,) = truth["objects"]
    video_THWC = shapes.draw(truth)
    (seen,) = shape_attributes.analyse_video(video_THWC)["objects"]
    assert seen["reappears"] and seen["identity"]
    # From the middle of the bar on, it is another one.
    shape = "circle" if item["shape"] == "star" else "star"
    color = "red" if item["color"] == "magenta" else "magenta"
    x_T = np.array(item["trajectory"])[:, 0]
    middle = int(np.argmin(np.abs(x_T - np.mean(truth["bar"]))))
    for change in ({"shape": shape}, {"color": color}):
      other_THWC = shapes.draw({**truth, "objects": [{**item, **change}]})
      other_THWC = np.concatenate([video_THWC[:middle], other_THWC[middle:]])
      analysis = shape_attributes.analyse_video(other_THWC)
      assert not any(seen["identity"] for seen in analysis["objects"])
      right = shape_attributes.score(analysis, truth)
      assert not right["permanence"]
      # Of another shape it is still one object that was gone and came back.
      assert right["reappear"] or "color" in change


def test_chance_levels():
  truths = [shapes.describe("heldout", i, 0)["truth"] for i in range(120)]
  levels = shape_attributes.chance_levels(truths)
  assert set(levels) == {
    "color", "shape", "motion", "count", "reappear", "permanence"
  }  # fmt: skip
  assert 0.05 < levels["color"] < 0.25 and 0.1 < levels["shape"] < 0.4
  assert 0.05 < levels["motion"] < 0.25 and 0.5 < levels["count"] < 0.9
