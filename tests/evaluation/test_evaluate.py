"""Evaluation: PSNR and SSIM of known pairs, attributes of real and of wrong files."""

import json
import types

import numpy as np
import pytest
import tiny
from golden import make_ssim

from sora_jax.data import shapes
from sora_jax.data.clips import Clip, read_rows
from sora_jax.data.video import writer
from sora_jax.evaluation import attributes, heldout, quality, sampling_suite
from sora_jax.evaluation.reconstruction import log_figures, reconstruction
from sora_jax.evaluation.shares import share_of
from sora_jax.run import recipe as recipes


@pytest.mark.parametrize("name", make_ssim.cases())
def test_ssim_is_that_of_scikit_image(name):
  """See golden/make_ssim.py."""
  expected = json.loads(make_ssim.PATH.read_text())[name]
  assert quality.ssim(*make_ssim.cases()[name]) == pytest.approx(expected, abs=1e-6)


def test_psnr():
  a_THWC = np.full((2, 16, 16, 3), 100, np.uint8)
  # Both ways round: the difference must not be taken in uint8.
  for value in (110, 90):
    assert quality.psnr(a_THWC, np.full_like(a_THWC, value)) == pytest.approx(
      20 * np.log10(255 / 10)
    )
  one_off = a_THWC.copy()
  one_off[0, 0, 0, 0] += 1
  expected = 10 * np.log10(255**2 * a_THWC.size)
  assert quality.psnr(a_THWC, one_off) == pytest.approx(expected)
  assert quality.psnr(a_THWC, a_THWC) == 100


def test_ssim_needs_frames_as_large_as_its_window():
  narrow_THWC = np.zeros((2, 11, 10, 3), np.uint8)
  with pytest.raises(ValueError, match=r"at least 11x11, not \(11, 10\)"):
    quality.ssim(narrow_THWC, narrow_THWC)


def test_spread():
  assert heldout.spread(list("abc"), 5) == list("abc")
  assert heldout.spread(list(range(10)), 4) == [0, 2, 5, 7]
  assert heldout.spread(list(range(10)), 10) == list(range(10))


@pytest.fixture(scope="module")
def heldout_rows(tmp_path_factory):
  """Held-out rows of generated clips, each with its file."""
  folder = tmp_path_factory.mktemp("shapes")
  shapes.generate(folder, num_train=0, num_heldout=40, seed=11)
  return [
    {**row, "path": folder / row["path"]}
    for _, row in read_rows(folder / "manifest.jsonl")
  ]


NAMES = {"color", "shape", "motion", "count", "reappear", "permanence"}


def scores(rows, shown):
  return attributes.scores_of_files(
    [row["path"] for row in shown], [row["truth"] for row in rows]
  )


@pytest.mark.slow
def test_attributes_of_real_and_of_shuffled_files(heldout_rows):
  """Real files score near 100 %, those of other prompts near chance."""
  groups = [
    [r for r in heldout_rows if (r["truth"]["frames"] == 1) == s] for s in (1, 0)
  ]
  rows = [row for group in groups for row in group]
  wrong = [row for group in groups for row in group[1:] + group[:1]]
  real = scores(rows, rows)
  table = attributes.attribute_table(
    [row["truth"] for row in rows], scores(rows, wrong), real, real
  )
  assert set(table) == NAMES
  assert table["color"]["n"] == len(rows) == 40
  assert table["motion"]["n"] == len(groups[1]) < 40
  for name, row in table.items():
    assert row["real"] >= 0.95, (name, row)
    assert row["ceiling"] == row["real"] and row["real_n"] == row["n"]
    # 2.5 times the largest standard deviation of a share of so few.
    assert abs(row["samples"] - row["chance"]) < 1.25 / np.sqrt(row["n"]), (name, row)
    assert row["low"] <= row["samples"] <= row["high"]
  for name in ("color", "motion"):
    assert table[name]["samples"] < 0.5


def test_attributes_of_files_that_show_nothing(heldout_rows, tmp_path):
  """What an untrained model makes has no attribute right, and is not an error."""
  path = tmp_path / "grey.mp4"
  writer.write(path, np.full((9, 64, 64, 3), 90, np.uint8), 12)
  row = next(row for row in heldout_rows if row["truth"]["frames"] > 1)
  decoded = [dict.fromkeys(NAMES, right) for right in (True, False)]
  table = attributes.attribute_table(
    [row["truth"]],
    scores([row], [{"path": path}]),
    scores([row], [row]),
    decoded,
  )
  assert {column["samples"] for column in table.values()} == {0.0}
  assert {column["ceiling"] for column in table.values()} == {0.5}
  assert {column["real"] for column in table.values()} == {1.0}


def test_likeness_of_samples_and_the_clips_of_their_captions(heldout_rows):
  """A clip is just like itself; a sample of another one is not alike."""
  rows = [row for row in heldout_rows if row["truth"]["frames"] == 17]
  size = {(row["truth"]["height"], row["truth"]["width"]): row for row in rows}
  rows = [row for row in rows if row["truth"]["height"] == next(iter(size))[0]]
  rows = [row for row in rows if row["truth"]["width"] == next(iter(size))[1]][:2]
  clips = [
    Clip(
      id=str(i),
      path=str(row["path"]),
      start=0.0,
      frames=17,
      fps=float(row["truth"]["fps"]),
      height=row["truth"]["height"],
      width=row["truth"]["width"],
      captions=(),
      split="train",
      truth=row["truth"],
    )
    for i, row in enumerate(rows)
  ]
  a, b = (row["path"] for row in rows)
  # Two seeds: the second turn of the paths is of the same clips again.
  result = attributes.likeness(clips, attributes.Sampled([a, b, b, a], 0.0))
  assert result["alike"] == 2 and result["n"] == 4
  assert 50 < result["psnr"] < 65  # 100 dB for what is equal, and little for the rest


def test_attributes_that_no_real_clip_has():
  """More prompts than clips: something is hidden in the samples alone."""
  truths = [shapes.describe("heldout", i, 0)["truth"] for i in range(60)]
  samples = [dict.fromkeys(("color", "permanence"), True)] * 3
  known = [{"color": True}, {"color": False}]
  table = attributes.attribute_table(truths, samples, known, known)
  assert table["color"]["real"] == 0.5 and table["color"]["n"] == 3
  row = table["permanence"]
  assert row["real"] is None and row["ceiling"] is None and row["real_n"] == 0
  assert attributes.format_table(table)[3].split()[4:6] == ["-", "-"]


def test_format_table():
  row = {"samples": 0.5, "chance": 0.125, "ceiling": 0.75, "real": 1.0, "n": 64}
  table = {"color": {**row, "low": 0.3805, "high": 0.6195}}
  head, _, line = attributes.format_table(table)
  assert head.split() == [
    "attribute", "samples", "95", "%", "chance", "ceiling", "real", "n"
  ]  # fmt: skip
  shares = ["50.0%", "38.0-62.0%", "12.5%", "75.0%", "100.0%"]
  assert line.split() == ["color", *shares, "64"]


@pytest.mark.parametrize("count, n", [(32, 64), (0, 8), (8, 8), (487, 512)])
def test_intervals_are_those_of_wilson(count, n):
  share = share_of([True] * count + [False] * (n - count))
  p, z2 = count / n, 1.959964**2
  middle = (p + z2 / (2 * n)) / (1 + z2 / n)
  half = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
  assert share == pytest.approx((p, middle - half, middle + half, n), abs=1e-6)


# --- more prompts than clips, more samples than prompts


def recipe_of(**evaluate):
  config = tiny.get_config()
  config.evaluate.update(evaluate)
  config.data.heldout_clips = 3
  return recipes.read(config)


def test_prompts_go_on_where_the_clips_end():
  recipe = recipe_of(clips=40)
  clips = [heldout.described(recipe, i) for i in range(3)]
  prompts = heldout.prompts(recipe, clips)
  assert prompts[:3] == clips and len(prompts) == len({c.id for c in prompts}) == 40
  # In the tiny config nothing is longer than 17 frames, or larger than 64x64.
  for index, clip in enumerate(prompts):
    row = shapes.describe("heldout", index, recipe.seed)
    assert clip.captions == tuple(row["captions"]) and clip.truth == row["truth"]
    assert clip.frames == min(row["truth"]["frames"], 17) and clip.fps > 0
    assert clip.height * clip.width <= 64 * 64
  assert heldout.described_prompts(recipe) == prompts
  assert heldout.prompts(recipe_of(clips=2), clips) == clips


def test_of_a_folder_there_are_no_more_prompts():
  config = tiny.get_config()
  config.data.source = "videos"
  config.evaluate.clips = 5
  recipe = recipes.read(config)
  assert heldout.prompts(recipe, []) == []
  with pytest.raises(ValueError, match="must be 'shapes', not 'videos'"):
    heldout.described_prompts(recipe)
  with pytest.raises(ValueError, match="must be 'shapes', not 'videos'"):
    heldout.drawn_clips(recipe, 2)


def test_each_sample_has_a_seed_of_its_own():
  clips = heldout.described_prompts(recipe_of(clips=4))
  requests = attributes.requests_of_captions(clips, 3, "fog")
  assert [request.seed for request in requests] == list(range(12))
  assert [request.prompt for request in requests] == [c.captions[0] for c in clips] * 3
  assert {request.negative_prompt for request in requests} == {"fog"}
  with pytest.raises(ValueError, match="config.evaluate.seeds must be at least 1"):
    recipe_of(seeds=0)


@pytest.mark.slow
def test_drawn_clips_go_on_behind_what_is_given():
  recipe = recipe_of()
  clips = heldout.drawn_clips(recipe, 3)
  for clip in clips:
    assert clip.video_THWC.shape == (33, 64, 64, 3)
    assert not clip.truth["occluder"]
    assert all(o["color"] in clip.caption for o in clip.truth["objects"])
  (still,) = heldout.drawn_clips(recipe, 1, ("still", "turn"))
  assert {o["motion"] for o in still.truth["objects"]} <= {"still", "turn"}
  with pytest.raises(ValueError, match="0 are 64x64 with 33 frames"):
    heldout.drawn_clips(recipe, 1, ("fly",))


# --- the sampler's settings


def test_settings_of_the_sampler():
  config = recipes.Sample(
    steps=16, guidance_scale=4.0, guidance_rescale=0.7, negative_prompt="fog"
  )
  settings = sampling_suite.settings_of(config, (1.0, 4.0), (8, 16))
  assert [(s.guidance_scale, s.steps) for s in settings] == [(1, 16), (4, 16), (4, 8)]
  assert settings[1] == config
  assert settings[0].guidance_rescale == 0 and not settings[0].negative_prompt
  for options in settings:
    options.check("flow", "velocity", options.negative_prompt)
  with pytest.raises(ValueError, match="steps 0 is not at least 1"):
    sampling_suite.settings_of(config, (), (0,))


@pytest.mark.slow
def test_a_setting_is_measured_on_all_prompts_and_seeds():
  """A sampler that draws what the prompt says is right; one that ignores it is not."""
  clips = heldout.described_prompts(recipe_of(clips=12))

  def model(turn):
    def sample(requests, options, rows):
      assert [r.seed for r in requests] == list(range(24)) and rows == options.rows
      return [shapes.draw(clips[(r.seed + turn) % 12].truth) for r in requests]

    return types.SimpleNamespace(sample=sample)

  row = sampling_suite.measure(model(0), clips, recipes.Sample(), seeds=2)
  assert row["samples"] == 24 and row["prompts"] == 12 and row["seeds"] == 2
  assert {share["value"] for share in row["attributes"].values()} == {1.0}
  assert row["attributes"]["color"]["n"] == 24
  assert row["attributes"]["color"]["low"] == pytest.approx(0.862, abs=1e-3)
  wrong = sampling_suite.measure(model(1), clips, recipes.Sample(), seeds=2)
  assert wrong["attributes"]["color"]["value"] < 0.5
  head, cells = sampling_suite.table([row, wrong])
  assert head[:2] == ["guidance", "steps"] and head[-1] == "n"
  assert cells[0][:3] == ["3", "32", "100% (86-100)"] and cells[0][-1] == "24"


# --- reconstruction, with an autoencoder that does nothing but count


def make_clip(path, frames=9, height=32, width=32):
  rng = np.random.default_rng(frames)
  writer.write(path, rng.integers(0, 256, (frames, height, width, 3), np.uint8), 8)
  return Clip(path.stem, str(path), 0.0, frames, 8.0, height, width)


def copies(batches, change=lambda x: x):
  def decode(x):
    batches.append(x.shape)
    return change(x)

  return types.SimpleNamespace(
    batch_size=lambda wanted: wanted,
    encode=lambda x: x,
    decode=decode,
    config=types.SimpleNamespace(space_factor=8),
  )


def test_reconstruction(tmp_path):
  clips = [make_clip(tmp_path / f"{n}.mp4", frames) for n, frames in enumerate((9, 5))]
  clips.append(make_clip(tmp_path / "image.png", 1))
  broken = make_clip(tmp_path / "broken.mp4")
  (tmp_path / "broken.mp4").write_bytes(b"no video")
  config = recipes.Encode(batch_size=2, frame_buckets=(1, 9))
  batches = []
  result = reconstruction([*clips, broken], copies(batches), config)
  figures = dict(result.figures)
  latents = figures.pop("latents")
  perfect = {"psnr": 100.0, "ssim": pytest.approx(1.0)}
  assert figures == {
    **perfect,
    "psnr_moving": 100.0,
    "images": {**perfect, "clips": 1},
    "videos": {**perfect, "clips": 2},
    "borders": 1.0,
    "clips": 3,
    "unread": 1,
  }
  assert latents["channels"] == len(latents["eigenvalues"]) == 3
  assert 1.0 < latents["effective_rank"] <= 3.0
  assert not result.scores  # nobody knows what these show
  assert sorted(batches) == [(2, 1, 32, 32, 3), (2, 9, 32, 32, 3)]

  # Only the clip's own frames count, not those that a shorter one is padded with.
  def spoil_the_end(x):
    return np.where(np.arange(x.shape[1])[:, None, None, None] < 5, x, 0)

  figures = reconstruction([clips[1]], copies([], spoil_the_end), config).figures
  assert figures["psnr"] == 100.0 and figures["images"] is None
  figures = reconstruction([clips[0]], copies([], spoil_the_end), config).figures
  assert figures["psnr"] < 20


def test_reconstruction_of_known_content(heldout_rows):
  """The ceiling is read off what was decoded; blocks show, and so do dead channels."""
  row = next(row for row in heldout_rows if row["truth"]["frames"] == 9)
  truth = row["truth"]
  size = (9, 8.0, truth["height"], truth["width"])
  clip = Clip("a", str(row["path"]), 0.0, *size, truth=truth)
  config = recipes.Encode(frame_buckets=(9,))
  result = reconstruction([clip], copies([]), config)
  assert result.scores == [dict.fromkeys(result.scores[0], True)]
  assert result.figures["borders"] == 1.0

  def grey(x):
    return np.full_like(x, 90)

  result = reconstruction([clip], copies([], grey), config)
  assert not any(result.scores[0].values())
  assert result.figures["psnr_moving"] < result.figures["psnr"]

  def in_blocks(x):
    return x[:, :, ::8, ::8].repeat(8, axis=2).repeat(8, axis=3)

  assert reconstruction([clip], copies([], in_blocks), config).figures["borders"] > 50


@pytest.mark.parametrize("in_use, warnings", [(16, 0), (15, 1)])
def test_dead_channels_are_said(in_use, warnings, caplog):
  figures = {
    **{"psnr": 30.0, "ssim": 0.9, "clips": 2, "psnr_moving": None, "borders": 1.0},
    **{"images": None, "videos": {"psnr": 30.0, "ssim": 0.9, "clips": 2}},
    "latents": {"channels": 16, "effective_rank": 14.5, "channels_in_use": in_use},
  }
  # Other tests set how much absl says.
  with caplog.at_level("INFO", logger="absl"):
    log_figures(figures)
  assert "effective rank 14.5 of 16 channels" in caplog.text
  assert sum("only 15 of 16" in record.message for record in caplog.records) == warnings


def test_reconstruction_without_a_readable_clip(tmp_path):
  broken = make_clip(tmp_path / "broken.mp4")
  (tmp_path / "broken.mp4").write_bytes(b"no video")
  with pytest.raises(ValueError, match="none of 1 held-out clips could be read"):
    reconstruction([broken], copies([]), recipes.Encode())
