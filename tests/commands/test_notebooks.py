"""Notebooks run from top to bottom, shortened by their parameters."""

import base64
import os
import re
import subprocess
import sys

import av
import nbclient
import nbformat
import numpy as np
import pytest
import tiny
import tiny_captioner

from sora_jax.data import html

FOLDER = tiny.ROOT / "notebooks"
NAMES = ("captions", "packing", "sampling", "training")


def read(name):
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def parameters_cell(notebook) -> int:
  (index,) = (
    i
    for i, cell in enumerate(notebook.cells)
    if "parameters" in cell.metadata.get("tags", ())
  )
  return index


def execute(name, commands, checks: str, **parameters):
  """Runs a notebook with other parameters, and then what `checks` asserts."""
  notebook = read(name)
  values = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
  index = parameters_cell(notebook)
  for key in parameters:
    assert f"\n{key} = " in f"\n{notebook.cells[index].source}"
  notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(values))
  notebook.cells.append(nbformat.v4.new_code_cell(checks))
  client = nbclient.NotebookClient(
    notebook,
    timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": str(FOLDER)}},
  )
  paths = [
    str(tiny.ROOT),
    str(tiny.ROOT / "tests"),
    *filter(None, [os.environ.get("PYTHONPATH")]),
  ]
  environment = {**commands.environment(), "PYTHONPATH": os.pathsep.join(paths)}
  client.execute(env=environment)
  return notebook


def shown(notebook) -> str:
  """All HTML and Markdown that cells show."""
  outputs = (o for c in notebook.cells for o in c.get("outputs", ()))
  return "\n".join(
    text
    for output in outputs
    for kind, text in output.get("data", {}).items()
    if kind in ("text/html", "text/markdown")
  )


# --- what git holds


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_cleared(name):
  notebook = read(name)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      assert not cell.outputs and cell.execution_count is None, cell.source


def test_the_hook_clears_outputs(tmp_path):
  script = tiny.ROOT / ".github" / "clear_notebooks.py"
  path, held = tmp_path / "packing.ipynb", FOLDER / "packing.ipynb"
  notebook = read("packing")
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = [nbformat.v4.new_output("stream", text="x")]
      cell.execution_count, cell.metadata["scrolled"] = 3, True
  nbformat.write(notebook, path)
  for code in (1, 0):  # it says that it changed the file, and then that it is clean
    assert (
      subprocess.run([sys.executable, script, path], check=False).returncode == code
    )
    assert path.read_bytes() == held.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_come_before_all_other_code(name):
  notebook = read(name)
  kinds = [cell.cell_type for cell in notebook.cells]
  assert kinds.index("code") == parameters_cell(notebook) == 1


def test_all_notebooks_are_tested():
  assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


# --- what they do


@pytest.mark.notebook
def test_packing(commands):
  checks = """
assert sorted(np.concatenate(rows)) == list(range(CLIPS))
padded, come, planned = fills.values()
assert padded < come < planned and planned > 0.97, fills
assert max(packed_error) < 1e-4 and min(erased_error) > 0.05
real_L = row["segment_L"] > 0
inside_LL = np.equal.outer(row["segment_L"], row["segment_L"])
assert np.array_equal((weight_LL > 0)[real_L], inside_LL[real_L])
np.testing.assert_allclose(weight_LS[real_L].sum(-1), 1, rtol=1e-5)
"""
  notebook = execute("packing", commands, checks, CLIPS=1000)
  images = [
    output
    for cell in notebook.cells
    for output in cell.get("outputs", ())
    if "image/png" in output.get("data", {})
  ]
  assert len(images) == 4


@pytest.mark.notebook
def test_sampling(commands, tiny_run, tmp_path):
  checks = """
shapes_of = {name: video.shape for name, video in made.items()}
film = (17, 64, 64, 3)
assert shapes_of["a white square moves left"] == (17, 60, 60, 3)
assert shapes_of["a cyan triangle"] == (1, 64, 64, 3)
assert shapes_of["preview"][1:] == (64, 64, 3)
assert shapes_of["full size"][1:] == (128, 128, 3)
assert shapes_of["shots"] == shapes_of["blend"] == (33, 64, 64, 3)
# As long as the model's own videos, which the given one is, too.
images = ("first image", "last image", "first and last image")
assert all(shapes_of[name] == film for name in images)
assert shapes_of["key frame in the middle"] == film
same = ("strength 0.4", "right half anew", "turn into", "infill")
assert all(shapes_of[name] == film for name in same)
# Half a second of the tiny run's 12 frames a second is two latent frames.
assert len(made["extend after"]) == len(made["extend before"]) == 25
assert len(made["extend both"]) == 33 and len(made["long"]) == 33
assert len(made["connect"]) > 34 and len(made["loop of a video"]) > 17
assert len(made["loop of a text"]) == 16 and len(made["interpolate"]) == 33
assert all(video.std() > 1 for video in made.values())
assert list(given_T) == [True] * 3 + [False] * 2 and kept  # one window
moved = np.abs(made["strength 0.8"].astype(int) - made["strength 0.4"]).mean()
assert moved > 1
"""
  html = shown(
    execute(
      "sampling",
      commands,
      checks,
      CHECKPOINT=str(tiny_run.workdir),
      FAST=True,
      SHEET=str(tmp_path / "sheet.png"),
    )
  )
  assert html.count("<video") >= 25 and html.count("<img") == 1
  assert "steps of training: 8. **It is untrained: its samples are noise.**" in html


@pytest.mark.notebook
def test_captions(commands, tmp_path):
  """The stage, its checkpoint, captions and figures; nothing is learnt."""
  checks = """
import json

assert stages.left_to_do(run.stages, run, workdir) is None
rows = (workdir / "captioner" / "metrics.jsonl").read_text().splitlines()
assert {"eval/caption_loss", "eval/contrastive_loss"} <= {
  name for row in rows for name in json.loads(row)
}
assert captioner.meta.styles == ("any", *styles) and captioner.meta.steps == 3
assert [len(texts) for texts in said.values()] == [len(films)] * 2 == [3, 3]
results = json.loads((workdir / "evaluate" / "captioner.json").read_text())
assert results["clips"] == results["attributes"]["descriptive"]["all"]["n"] == 2
assert similarity_NN.shape == (3, 3) and (abs(similarity_NN) < 1 + 1e-5).all()
"""
  html = shown(
    execute(
      "captions",
      commands,
      checks,
      FAST=False,
      CONFIG=tiny_captioner.__file__,
      WORKDIR=str(tmp_path / "run"),
    )
  )
  assert html.count("<figcaption>0. ") == 2


@pytest.mark.notebook
def test_training(commands, tmp_path):
  checks = f"""
steps, losses = curve("dit", "loss")
assert steps == list(range(1, {tiny.STEPS} + 1)) and np.isfinite(losses).all()
assert again.shape == film.shape and again.dtype == np.uint8
assert 5 < psnr < 100
assert [len(video) for video in videos.values()] == [17, 1]
"""
  html = shown(
    execute(
      "training",
      commands,
      checks,
      FAST=False,
      CONFIG=tiny.__file__,
      WORKDIR=str(tmp_path / "run"),
    )
  )
  assert "<figcaption>a red circle moves right</figcaption>" in html
  assert "reconstruction, " in html


# --- videos in a page


def test_html_holds_the_videos(tmp_path):
  frames = np.zeros((9, 32, 48, 3), np.uint8)
  frames[:, :, :24] = 200
  text = html.videos_html({"a < b": frames, "one": frames[:1]}, fps=8.0)
  assert "<figcaption>a &lt; b</figcaption>" in text
  (data,) = re.findall('src="data:video/mp4;base64,([^"]+)"', text)
  path = tmp_path / "x.mp4"
  path.write_bytes(base64.b64decode(data))
  with av.open(str(path)) as container:
    read = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
  assert read.shape == frames.shape
  assert np.abs(read.astype(int) - frames).mean() < 3
  assert text.count("data:image/png;base64,") == 1
