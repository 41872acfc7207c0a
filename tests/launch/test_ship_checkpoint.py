"""A run is shipped: one folder, loaded by path and by name, that samples the same."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
import sealed
import tiny

from sora_jax import sample
from sora_jax.data.video import probe, reader
from sora_jax.encoders.autoencoder import Autoencoder
from sora_jax.models.meta import DiTMeta, VAEMeta
from sora_jax.runtime import checkpoint, portable, sharding, shipped
from sora_jax.sampling import defaults

sys.path.insert(0, str(tiny.ROOT / "launch"))
import ship_checkpoint  # noqa: E402

ORIGIN = ship_checkpoint.Origin("python -m sora_jax.main --config=x.py", "2 CPU cores")
PLACES = [f"{name}/model" for name in ("vae", "dit")]


pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
  """The tiny run, shipped."""
  out = tmp_path_factory.mktemp("shipped") / "toy"
  return ship_checkpoint.ship(tiny_run.workdir, out, ORIGIN)


@pytest.fixture
def run(tiny_run, tmp_path):
  """A copy of what is read of the run, to be broken."""
  for name in ("data", "vae", "dit", "sample", "evaluate", "encode"):
    (tmp_path / "run" / name).mkdir(parents=True)
    for path in (tiny_run.workdir / name).glob("*.json*"):
      shutil.copy(path, tmp_path / "run" / name)
  for place in PLACES:
    shutil.copytree(tiny_run.workdir / place, tmp_path / "run" / place)
  return tmp_path / "run"


def mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


# --- what is in the folder


def test_the_folder_holds_the_model_and_nothing_else(folder, tiny_run):
  files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
  assert files == [
    "README.md",
    "dit/model/model.json",
    "dit/model/params.safetensors",
    "dit/model/tokenizer.model",
    "sample.json",
    "vae/model/model.json",
    "vae/model/params.safetensors",
  ]
  assert [path.name for path in folder.parent.iterdir()] == ["toy"]
  text = "".join((folder / name).read_text() for name in files if "." + name[-4:] in
                 (".json", "E.md"))  # fmt: skip
  assert str(tiny_run.workdir) not in text


def test_params_are_those_of_the_run_rounded(folder, tiny_run):
  for place in PLACES:
    ours, _ = checkpoint.load_model(folder / place)
    theirs, _ = checkpoint.load_model(tiny_run.workdir / place)
    jax.tree.map(np.testing.assert_array_equal, ours, portable.rounded(theirs))


def test_metas_are_of_the_rounded_weights(folder, tiny_run):
  vae, dit = (
    kind.from_json(checkpoint.load_meta(folder / place), folder)
    for kind, place in zip((VAEMeta, DiTMeta), PLACES, strict=True)
  )
  params, _ = checkpoint.load_model(folder / "vae/model")
  assert vae.id == dit.vae == checkpoint.fingerprint(params)
  before = checkpoint.load_meta(tiny_run.workdir / "vae/model")
  assert vae.id != before["id"]
  assert vae == VAEMeta.from_json({**before, "id": vae.id}, folder)
  assert dit.steps == tiny.STEPS and dit.text_encoder.vocab_size == 300


def test_defaults_are_those_of_the_run(folder, tiny_run):
  made = defaults.read(folder)
  assert made == defaults.read(tiny_run.workdir)
  assert (made.size, made.frames, made.fps) == ((64, 64), 17, 12.0)
  assert made.options.steps == 2


def test_the_card(folder, tiny_run):
  text = (folder / "README.md").read_text()
  results = json.loads((tiny_run.workdir / "evaluate" / "results.json").read_text())
  assert text.startswith("# toy\n")
  for part in (
    ORIGIN.command,
    "| Hardware | 2 CPU cores |",
    "generated clips of moving shapes, world 'whole': 7 to train with, 3 held out, of "
    "at most 4096",
    f"million params, {tiny.STEPS} steps, ",
    "| Sampled with | 2 steps of euler, shift 1, guidance 3; 64x64, 17 frames, 12 fps",
    f"| psnr | {results['vae']['psnr']:.4g} |",
    "| attributes | samples | low | high | chance | ceiling | real | n |",
  ):
    assert part in text, part
  row = results["attributes"]["color"]
  shares = (row[name] for name in ("samples", "low", "high", "chance"))
  assert f"| color | {' | '.join(f'{share:.1%}' for share in shares)} | " in text


def test_the_card_of_attributes_that_no_real_clip_has():
  row = {"samples": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1, "n": 64, "real_n": 0}
  table = {"permanence": {**row, "ceiling": None, "real": None}}
  lines = ship_checkpoint._figures({"attributes": table})
  assert lines[-1] == "| permanence | 50.0% | 40.0% | 60.0% | 10.0% | - | - | 64 |"


# --- what it makes


def test_it_samples_as_the_run_with_rounded_params(folder, tiny_run):
  ours = sample.Sampler.from_checkpoint(folder, mesh())
  theirs = sample.Sampler.from_checkpoint(tiny_run.workdir, mesh())
  assert ours.defaults == theirs.defaults and ours.model_id != theirs.model_id
  image_HWC = np.full((64, 64, 3), 200, np.uint8)
  before = theirs.video("a red circle moves right", image=image_HWC, seed=3)
  residency = theirs.autoencoder.residency
  for name in ("dit", "vae"):
    params = residency.get(name)
    rounded = portable.rounded(params)
    placed = jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), rounded, params)
    residency.put(name, lambda placed=placed: placed)
  videos = [
    model.video("a red circle moves right", image=image_HWC, seed=3)
    for model in (ours, theirs)
  ]
  assert videos[0].shape == (17, 64, 64, 3)
  np.testing.assert_array_equal(*videos)
  assert np.abs(videos[0].astype(int) - before).mean() < 2


def test_by_name(folder, monkeypatch, tmp_path):
  monkeypatch.setattr(shipped, "folder", lambda: folder.parent)
  monkeypatch.chdir(tmp_path)
  model = sample.Sampler.from_checkpoint("toy", mesh())
  assert model.meta == sample.Sampler.from_checkpoint(folder, mesh()).meta
  assert Autoencoder("toy", mesh()).meta == model.autoencoder.meta
  with pytest.raises(ValueError, match="toys: no such folder.*those are: toy"):
    sample.Sampler.from_checkpoint("toys")
  with pytest.raises(ValueError, match="runs/toy: no such checkpoint folder"):
    sample.Sampler.from_checkpoint("runs/toy")


def test_as_a_user_types_it(folder, commands, tmp_path):
  """Without any flag the video is as the run's recipe has it."""
  out = tmp_path / "x.mp4"
  commands.run(
    "sample", f"--checkpoint={folder}", "--prompt=a red circle", f"--out={out}"
  )
  assert reader.read(out).shape == (17, 64, 64, 3)
  assert probe.probe(out).fps == pytest.approx(12)
  described = json.loads((tmp_path / "x.mp4.json").read_text())
  assert described["options"]["steps"] == 2
  assert described["job"] == {
    "prompt": "a red circle", "size": [64, 64], "frames": 17, "fps": 12.0,
    "window": 17,
  }  # fmt: skip


# --- what cannot be shipped, and what cannot be loaded


def fails(run, out, message, **kwargs):
  with pytest.raises(ValueError, match=message):
    ship_checkpoint.ship(run, out, ORIGIN, **kwargs)
  assert not out.exists() and not list(out.parent.glob(".*"))


def test_a_checkpoint_that_is_too_large(tiny_run, tmp_path):
  fails(
    *(tiny_run.workdir, tmp_path / "x", r"has 0.\d MB, more than 0.1: of them dit/mod"),
    limit_mb=0.1,
  )


def test_nothing_is_overwritten(tiny_run, tmp_path):
  (tmp_path / "x").mkdir()
  with pytest.raises(ValueError, match="x is there already"):
    ship_checkpoint.ship(tiny_run.workdir, tmp_path / "x", ORIGIN)


def test_an_unfinished_run(run, tmp_path):
  path = run / "evaluate" / "stage.json"
  sealed.rewrite(path, complete=False)
  fails(run, tmp_path / "x", "stage evaluate is not complete; run it .*sora_jax.eval")
  sealed.rewrite(path, complete=True)
  sealed.delete(run / "dit" / "stage.json")
  fails(run, tmp_path / "x", "stage dit is not complete; .*sora_jax.train_dit")


def test_figures_of_another_model(run, tmp_path):
  path = run / "dit" / "stage.json"
  sealed.rewrite(path, made="another")
  fails(run, tmp_path / "x", "results.json is of another dit than .*evaluate again")


def test_a_part_that_is_missing_or_damaged_is_named(folder, tmp_path):
  broken = tmp_path / "toy"
  shutil.copytree(folder, broken)
  path = broken / "dit" / "model" / "params.safetensors"
  path.write_bytes(path.read_bytes()[:-1] + b"x")
  with pytest.raises(ValueError, match="dit/model/params.safetensors is damaged"):
    sample.Sampler.from_checkpoint(broken, mesh())
  path.unlink()
  with pytest.raises(ValueError, match="dit/model/params.safetensors is missing"):
    sample.Sampler.from_checkpoint(broken, mesh())
  path = broken / "vae" / "model" / "model.json"
  newer = json.loads(path.read_text())
  sealed.rewrite(path, meta={**newer["meta"], "version": 9})
  with pytest.raises(ValueError, match="vae/model/model.json: meta.version is 9"):
    sample.Sampler.from_checkpoint(broken, mesh())
  path.unlink()
  with pytest.raises(ValueError, match="vae/model: no complete model here"):
    sample.Sampler.from_checkpoint(broken, mesh())
