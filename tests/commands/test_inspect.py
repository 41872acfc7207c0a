"""The page of a run, before and after its latents are there."""

import json
import re
import shutil

import pytest
import tiny
from data.media_samples import numbered

from sora_jax import inspect, prepare
from sora_jax.data.clips import Clip, write_lines, write_manifest
from sora_jax.data.video import writer
from sora_jax.run import recipe as recipes
from sora_jax.run import stages

RECIPE = recipes.read(tiny.get_config())


@pytest.fixture
def prepared(tmp_path, monkeypatch):
  """A run of which the stage "data" is complete."""
  media = tmp_path / "media"

  def run(recipe, workdir):
    writer.write(media / "a.mp4", numbered(9), 8)
    writer.write(media / "short.mp4", numbered(3), 8)
    captions = ("<script>alert('x')</script>", 'a "quoted" cat')
    path = str(media / "a.mp4")
    found = [Clip(f"a#{i}", path, 0.0, 9, 8.0, 48, 64, captions) for i in range(3)]
    write_manifest(workdir / "data" / "manifest.jsonl", found)
    rejected = {"path": str(media / "short.mp4"), "reason": "too short: 3 frames"}
    write_lines(workdir / "data" / "rejected.jsonl", [json.dumps(rejected)])

  monkeypatch.setattr(prepare, "run", run)
  workdir = tmp_path / "run"
  stages.run(["data"], RECIPE, workdir)
  return workdir


@pytest.mark.slow
def test_before_anything_is_trained(prepared, monkeypatch):
  monkeypatch.setattr(inspect, "Autoencoder", None)  # is not loaded
  out = prepared.parent / "page.html"
  before = sorted(prepared.rglob("*"))
  inspect.write_page(RECIPE, prepared, out, clips=2)
  assert sorted(prepared.rglob("*")) == before
  text = out.read_text()
  # One page by itself: all that it shows is in it, and nothing in it is run.
  assert not re.search(r"<script|src=\"(?!data:)|href|https?:", text)
  assert "&lt;script&gt;" in text and "a &quot;quoted&quot; cat" in text
  assert "rows: run the stage encode first: python -m sora_jax.encode" in text
  assert "run the stage vae first: python -m sora_jax.train_vae" in text
  assert "3, of which 0 images" in text
  assert "too short: N frames: 1" in text and "short.mp4" in text
  # Histograms, two clips, and the file that was left out.
  assert text.count("<img") == 1 + 2 + 1


def test_without_clips(tmp_path):
  message = "first run python -m sora_jax.prepare with the same --config"
  with pytest.raises(ValueError, match=message):
    inspect.write_page(RECIPE, tmp_path, tmp_path / "page.html")
  assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
def test_another_config_is_said(prepared):
  config = tiny.get_config()
  config.data.max_frames = 9
  out = prepared.parent / "page.html"
  inspect.write_page(recipes.read(config), prepared, out, clips=0)
  text = out.read_text()
  assert "of another config" in text and "config.data.max_frames" in text


# --- a finished run


def test_rows_as_the_model_sees_them(tiny_run, commands, tmp_path):
  out = tmp_path / "page.html"
  flags = [*tiny.tiny_flags(tiny_run.workdir), f"--out={out}", "--rows=2", "--clips=3"]
  log = commands.run("inspect", *flags)
  assert f"the page is {out}" in log
  text = out.read_text()
  assert "Row 0:" in text and "Row 1:" in text and "Row 2:" not in text
  assert "how full they are" in text and "minutes, at the" in text
  assert "of another config" not in text and "first: python" not in text
  segments = sum(map(int, re.findall(r"Row \d: (\d+) segments", text)))
  # Histograms, two bars, their segments, three clips.
  assert text.count("<img") == 1 + 2 + segments + 3


def test_rows_are_counted_without_a_vae(tiny_run, tmp_path, monkeypatch):
  """The latents are enough for that; the tokenizer is made anew and not kept."""
  for stage in ("data", "encode"):
    shutil.copytree(tiny_run.workdir / stage, tmp_path / stage)
  monkeypatch.setattr(inspect, "Autoencoder", None)
  inspect.write_page(RECIPE, tmp_path, tmp_path / "page.html", clips=0)
  text = (tmp_path / "page.html").read_text()
  assert "how full they are" in text and "not known before training" in text
  assert "rows are not decoded: run the stage vae first" in text
  assert not (tmp_path / "dit").exists()
