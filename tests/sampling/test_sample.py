"""Sampling: a packed video equals the video alone, seeds, the command and its files."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
import sealed
from absl import flags
from absl.testing import flagsaver

from sora_jax import sample
from sora_jax.data.video import probe, reader
from sora_jax.diffusion.solvers import Options
from sora_jax.models.meta import Noise
from sora_jax.run import cli
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding
from sora_jax.sample import Request
from sora_jax.sampling.requests import sampling_mesh

STEPS = 2


@pytest.fixture(scope="module")
def sampler(tiny_run):
  """The tiny model with random params, so that every input has a say."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  made = sample.Sampler.from_checkpoint(tiny_run.workdir, mesh)
  rng = np.random.default_rng(0)
  made.params = jax.tree.map(
    lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), made.params
  )
  return made


def make(sampler, *requests, **options):
  rows = options.pop("rows", 4)
  options = Options(**{"steps": STEPS, **options})
  return sampler.sample(requests, options, rows=rows)


def difference(a_THWC, b_THWC):
  assert a_THWC.shape == b_THWC.shape and a_THWC.dtype == b_THWC.dtype == np.uint8
  return np.abs(a_THWC.astype(int) - b_THWC).max()


def brightness_error(a_THWC, b_THWC):
  """Mean difference of what the codecs keep at full resolution."""
  weights = np.array([0.2126, 0.7152, 0.0722])
  return np.abs(a_THWC @ weights - b_THWC @ weights).mean()


# Together they fill one row, so that alone they are computed in the same shapes.
FILM = Request("a red circle moves right", 64, 64, 9, 12.0, seed=4)
WIDE = Request("a blue star", 64, 32, 9, 16.0, seed=5)
IMAGE = Request("white noise", 48, 32, 1, 8.0, seed=6)


@pytest.fixture(scope="module")
def film(sampler):
  (made,) = make(sampler, FILM)
  return made


# --- what is made


@pytest.mark.parametrize(
  "rows, requests, hosts, fsdp",
  [(4, 16, 1, 4), (1, 16, 1, 1), (0, 16, 1, 8), (4, 2, 1, 2), (4, 2, 2, 1)],
)
def test_the_stages_mesh(monkeypatch, rows, requests, hosts, fsdp):
  monkeypatch.setattr(jax, "process_count", lambda: hosts)
  mesh = sampling_mesh(recipes.Sample(rows=rows), requests)
  assert (mesh.shape["fsdp"], mesh.shape["context"]) == (fsdp, 8 // fsdp)


@pytest.mark.parametrize("rows", [1, 2])
def test_eight_devices_make_the_same(sampler, tiny_run, rows):
  """One video that all devices share, and two that four share each."""
  many = sample.Sampler.from_checkpoint(tiny_run.workdir, sharding.sampling_mesh(rows))
  many.params = jax.tree.map(
    lambda p, new: jax.device_put(np.asarray(new), p.sharding),
    many.params,
    sampler.params,
  )
  films = [dataclasses.replace(FILM, seed=seed) for seed in range(rows)]
  wanted = make(sampler, *films)
  for a, b in zip(make(many, *films), wanted, strict=True):
    assert difference(a, b) <= 1


def test_a_video_alone_is_that_of_a_packed_row(sampler, film):
  wide, packed, image = make(sampler, WIDE, FILM, IMAGE)
  assert wide.shape == (9, 32, 64, 3) and image.shape == (1, 32, 48, 3)
  assert difference(packed, film) <= 1
  assert difference(make(sampler, IMAGE)[0], image) <= 1
  assert np.std(film) > 5  # it is not all one grey


def test_equal_requests_give_equal_videos(sampler, film):
  np.testing.assert_array_equal(make(sampler, FILM)[0], film)
  twice = make(sampler, dataclasses.replace(WIDE), WIDE)
  assert difference(*twice) <= 1


@pytest.mark.parametrize(
  "change", [{"seed": 5}, {"prompt": "a blue square"}, {"fps": 96.0}], ids=str
)
def test_all_of_a_request_has_a_say(sampler, film, change):
  (other,) = make(sampler, dataclasses.replace(FILM, **change))
  assert difference(other, film) > 3


def test_more_videos_than_rows(sampler):
  """Four rows of one video, two rows at once, in the order of the requests."""
  requests = [dataclasses.replace(FILM, seed=seed, frames=17) for seed in range(3)]
  videos = make(sampler, *requests, rows=2)
  alone = make(sampler, requests[1], rows=2)[0]
  assert [video.shape for video in videos] == [(17, 64, 64, 3)] * 3
  assert difference(videos[1], alone) <= 1
  assert difference(videos[0], videos[1]) > 3 < difference(videos[1], videos[2])


def test_noise_and_statistics_of_a_clip_do_not_depend_on_the_row(sampler):
  options = {
    "method": "ddim",
    "eta": 1.0,
    "cfg_zero": True,
    "zero_steps": 0,
    "guidance_rescale": 0.5,
    "guidance_interval": (0.3, 1.0),
    "shift_tokens": 16,
  }
  together = make(sampler, WIDE, FILM, IMAGE, **options)
  (alone,) = make(sampler, FILM, **options)
  assert difference(together[1], alone) <= 1
  (again,) = make(sampler, dataclasses.replace(FILM, seed=9), **options)
  assert difference(again, alone) > 20


def test_negative_prompt(sampler):
  """Led away from its own prompt, guidance has no effect."""
  own = dataclasses.replace(FILM, negative_prompt=FILM.prompt)
  strong = make(sampler, own, guidance_scale=8.0)[0]
  assert difference(strong, make(sampler, FILM, guidance_scale=1.0)[0]) <= 2
  other = dataclasses.replace(FILM, negative_prompt="a blue star that turns")
  plain = make(sampler, FILM, guidance_scale=8.0)[0]
  assert difference(make(sampler, other, guidance_scale=8.0)[0], plain) > 2


def test_a_model_is_sampled_by_its_own_noise_process(sampler):
  meta = dataclasses.replace(sampler.meta, noise=Noise("ddpm_linear", "eps"))
  parts = (sampler.params, meta, sampler.autoencoder, sampler.vocabulary)
  made = sample.Sampler(*parts, sampler.dtype)
  (ours,), (flow,) = make(made, FILM), make(sampler, FILM)
  assert difference(ours, flow) > 20
  with pytest.raises(ValueError, match="cfg_zero is for the velocity of a flow"):
    make(made, FILM, cfg_zero=True)


def test_heun_and_guidance(sampler, film):
  (heun,) = make(sampler, FILM, method="heun")
  (stronger,) = make(sampler, FILM, guidance_scale=6.0)
  assert difference(heun, film) > 1 < difference(stronger, film)


def test_without_guidance_and_longer_than_a_row_of_training(sampler):
  # 9 latent frames of 16 tokens, where a row of training had 96.
  request = dataclasses.replace(FILM, frames=33)
  assert sampler.meta.tokens == 96
  (longer,) = make(sampler, request, guidance_scale=1.0)
  assert longer.shape == (33, 64, 64, 3)


def test_sizes_off_the_grid_are_cut_from_the_next_larger_one(sampler, caplog):
  caplog.set_level("INFO", logger="absl")
  request = Request("a star", width=70, height=5, frames=8, fps=12.0)
  legal = sampler.legal(request)
  assert (legal.width, legal.height, legal.frames) == (80, 16, 9)
  assert "70x5, 8 frames is off" in caplog.text
  assert "cut from 80x16, 9 frames" in caplog.text
  caplog.clear()
  assert sampler.legal(FILM) == FILM
  assert not caplog.text


# --- checkpoints that do not do


@pytest.fixture
def models(tiny_run, tmp_path):
  """A copy of the finished models."""
  for stage in ("vae", "dit"):
    shutil.copytree(tiny_run.workdir / stage / "model", tmp_path / stage / "model")
  return tmp_path


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_an_unfinished_run_is_an_error(models, stage):
  (models / stage / "model" / "model.json").unlink()
  with pytest.raises(ValueError, match=f"{stage}/model: no complete model here"):
    sample.Sampler.from_checkpoint(models)


def test_the_vae_of_another_run_is_an_error(models):
  path = models / "vae" / "model" / "model.json"
  meta = json.loads(path.read_text())["meta"]
  sealed.rewrite(path, meta={**meta, "id": "another"})
  with pytest.raises(ValueError, match="another VAE than vae/model .*and another"):
    sample.Sampler.from_checkpoint(models)


def test_a_dit_is_no_vae(models):
  shutil.rmtree(models / "vae")
  shutil.copytree(models / "dit", models / "vae")
  with pytest.raises(ValueError, match="not a VAE"):
    sample.Sampler.from_checkpoint(models)


def test_a_model_without_its_tokenizer_is_an_error(models):
  (models / "dit" / "model" / "tokenizer.model").unlink()
  with pytest.raises(ValueError, match="tokenizer.model: no such tokenizer"):
    sample.Sampler.from_checkpoint(models)


# --- the command


@pytest.fixture(scope="module")
def command(sampler):
  """Runs the command in this process, with the model that is loaded already."""
  values = flags.FLAGS
  if "checkpoint" not in values:
    cli.define_flags()
    sample._define_flags()

  def run(*arguments):
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
      patch.setattr(sample.Sampler, "from_checkpoint", lambda *_, **__: sampler)
      rest = values(
        ["sample", "--checkpoint=runs/tiny", f"--steps={STEPS}", *arguments]
      )
      sample._main(rest)

  return run


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_formats(command, film, tmp_path, suffix):
  out = tmp_path / "new" / f"x{suffix}"
  command(f"--prompt={FILM.prompt}", "--frames=9", "--seed=4", f"--out={out}")
  read = reader.read(out)
  assert read.shape == film.shape
  info = probe.probe(out)
  assert info.fps == pytest.approx(12, rel=0.05)
  assert brightness_error(read, film) < 4
  names = sorted(path.name for path in out.parent.iterdir())
  assert names == [out.name, f"{out.name}.json"]


def test_an_image(command, sampler, tmp_path):
  out = tmp_path / "x.png"
  command("--prompt=white noise", "--size=48x32", "--fps=8", "--seed=6", f"--out={out}")
  assert difference(reader.read(out), make(sampler, IMAGE)[0]) == 0
  with PIL.Image.open(out) as image:
    assert image.text["comment"] == "white noise"


def test_several_prompts(command, film, tmp_path):
  prompts, out = tmp_path / "prompts.txt", tmp_path / "x.mp4"
  prompts.write_text(f"\n{FILM.prompt}\n  \n ein Würfel, 立方体 \n")
  sheet = tmp_path / "sheet.png"
  command(
    "--prompt=first",
    f"--prompts_file={prompts}",
    "--frames=9",
    "--seed=3",
    f"--out={out}",
    f"--sheet={sheet}",
  )
  names = [f"x-00{n}.mp4" for n in range(3)]
  assert sorted(path.name for path in tmp_path.glob("*.mp4")) == names
  videos = [reader.read(tmp_path / name) for name in names]
  # The second prompt has the second seed, and is what it is by itself.
  assert brightness_error(videos[1], film) < 4 < brightness_error(videos[0], film)
  assert difference(videos[0], videos[2]) > 3
  with PIL.Image.open(sheet) as image:
    assert image.height > 3 * 128


def test_an_odd_size_is_said(command, tmp_path, caplog):
  out = tmp_path / "x.png"
  caplog.set_level("INFO", logger="absl")
  command("--prompt=white noise", "--size=47x33", "--seed=6", f"--out={out}")
  assert reader.read(out).shape == (1, 33, 47, 3)
  assert "47x33 is off the model's grid of 16 pixels: made at 48x48" in caplog.text


def test_as_a_user_types_it(tiny_run, commands, tmp_path):
  prompts, sheet = tmp_path / "prompts.txt", tmp_path / "sheet.png"
  prompts.write_text("a red circle moves right\na blue star moves left\n")
  log = commands.run(
    "sample",
    f"--checkpoint={tiny_run.workdir}",
    f"--prompts_file={prompts}",
    "--size=60x70",
    "--frames=10",
    f"--steps={STEPS}",
    f"--out={tmp_path / 'x.mp4'}",
    f"--sheet={sheet}",
  )
  assert "60x70, 10 frames is off the model's grid" in log
  for n in range(2):
    assert reader.read(tmp_path / f"x-00{n}.mp4").shape == (10, 70, 60, 3)
  assert sheet.exists()
