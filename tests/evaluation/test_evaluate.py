"""Evaluation: PSNR and SSIM of known pairs, attributes of real and of wrong files."""

import json
import types

import numpy as np
import pytest
from golden import make_ssim

from sora_jax.data import shapes, sources
from sora_jax.data.clips import Clip, read_rows
from sora_jax.data.video import writer
from sora_jax.evaluation import attributes, heldout, quality, shape_attributes
from sora_jax.evaluation.reconstruction import log_figures, reconstruction
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
    for _, row in read_rows(folder / sources.MANIFEST)
  ]


def test_attributes_of_real_and_of_shuffled_files(heldout_rows):
  """Real files score near 100 %, those of other prompts near chance."""
  groups = [
    [r for r in heldout_rows if (r["truth"]["frames"] == 1) == s] for s in (1, 0)
  ]
  rows = [row for group in groups for row in group]
  wrong = [row for group in groups for row in group[1:] + group[:1]]
  table = attributes.attribute_table(
    [row["truth"] for row in rows],
    [row["path"] for row in wrong],
    [row["path"] for row in rows],
    [
      shape_attributes.score(shape_attributes.analyse(row["path"]), row["truth"])
      for row in rows
    ],
  )
  assert set(table) == {"color", "shape", "motion", "count", "reappear"}
  assert table["color"]["n"] == len(rows) == 40
  assert table["motion"]["n"] == len(groups[1]) < 40
  for name, row in table.items():
    assert row["real"] >= 0.95, (name, row)
    assert row["ceiling"] == row["real"]
    # 2.5 times the largest standard deviation of a share of so few.
    assert abs(row["samples"] - row["chance"]) < 1.25 / np.sqrt(row["n"]), (name, row)
  for name in ("color", "motion"):
    assert table[name]["samples"] < 0.5


def test_attributes_of_files_that_show_nothing(heldout_rows, tmp_path):
  """What an untrained model makes has no attribute right, and is not an error."""
  path = tmp_path / "grey.mp4"
  writer.write(path, np.full((9, 64, 64, 3), 90, np.uint8), 12)
  row = next(row for row in heldout_rows if row["truth"]["frames"] > 1)
  scores = [
    dict.fromkeys(("color", "shape", "motion", "count", "reappear"), right)
    for right in (True, False)
  ]
  table = attributes.attribute_table([row["truth"]], [path], [row["path"]], scores)
  assert {column["samples"] for column in table.values()} == {0.0}
  assert {column["ceiling"] for column in table.values()} == {0.5}
  assert {column["real"] for column in table.values()} == {1.0}


def test_format_table():
  row = {"samples": 0.5, "chance": 0.125, "ceiling": 0.75, "real": 1.0, "n": 64}
  table = {"color": row}
  head, _, line = attributes.format_table(table)
  names = ["attribute", "samples", "+-", "chance", "ceiling", "real", "n"]
  assert head.split() == names
  # 1.96 sqrt(0.25 / 64)
  shares = ["50.0%", "12.2%", "12.5%", "75.0%", "100.0%"]
  assert line.split() == ["color", *shares, "64"]


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
