"""What a checkpoint is sampled with where nothing else is said."""

import dataclasses
import json

import numpy as np
import pytest

from sora_jax.diffusion.solvers import Options
from sora_jax.sampling import defaults
from sora_jax.sampling.conditioning import Request
from sora_jax.sampling.defaults import Defaults
from sora_jax.sampling.job import Job

OWN = Defaults(
  Options(
    steps=7, method="heun", shift=3.0, guidance_scale=2.0, guidance_interval=(0.1, 0.9)
  ),
  (96, 64),
  33,
  8.0,
  25,
)
IMAGE_HWC = np.zeros((32, 32, 3), np.uint8)


def stage(folder, prompts, **sample):
  (folder / "sample").mkdir(parents=True, exist_ok=True)
  config = {"seed": 0, "sample": {**sample, "prompts": prompts}}
  text = json.dumps({"complete": True, "config": config, "inputs": {}})
  (folder / "sample" / "stage.json").write_text(text)


def test_what_a_user_leaves_open_is_filled():
  assert OWN.fill(Job("x")) == Job("x", size=(96, 64), frames=33, fps=8.0, window=25)
  said = Job("x", size=(64, 64), frames=1, fps=12.0, window=0)
  assert OWN.fill(said) == said
  # Media say their own.
  image = OWN.fill(Job("x", image="a.png"))
  assert image == Job("x", image="a.png", frames=33, fps=8.0, window=25)
  array = OWN.fill(Job("x", key_frames=((0.5, IMAGE_HWC),)))
  assert (array.size, array.frames) == (None, 33)
  longer = Job("x", video="a.mp4", extend_after=1.0)
  assert OWN.fill(longer) == dataclasses.replace(longer, window=25)
  # What leads to something given needs more room.
  assert OWN.fill(Job("x", loop=True)) == Job("x", loop=True, size=(96, 64), fps=8.0)
  assert OWN.fill(Job("x", image="a.png", last_image="b.png")).window is None


def test_a_shipped_checkpoint_says_them(tmp_path):
  (tmp_path / defaults.NAME).write_text(json.dumps(OWN.to_json()))
  assert defaults.read(tmp_path) == OWN


def test_a_run_has_those_of_its_recipe(tmp_path):
  options = {"steps": 7, "guidance_interval": [0.1, 0.9], "negative_prompt": "x"}
  still = ["b", [32, 32], 1, 4.0]
  stage(tmp_path, [still, ["a", [96, 64], 33, 8.0], ["c", [64, 64], 17, 4.0]],
        **options)  # fmt: skip
  expected = Options(steps=7, guidance_interval=(0.1, 0.9))
  of_recipe = Defaults(expected, (96, 64), 33, 8.0, negative_prompt="x")
  assert defaults.read(tmp_path) == of_recipe
  stage(tmp_path, [still])
  assert defaults.read(tmp_path) == Defaults(Options(), (32, 32), 1, 4.0)
  stage(tmp_path, [], steps=5)
  assert defaults.read(tmp_path) == Defaults(Options(steps=5))


def test_a_run_without_prompts_has_those_of_the_clips_that_it_showed(tmp_path):
  stage(tmp_path, [], steps=5)
  still = Request("b", 64, 96, 1, 0.0, seed=0)
  video = Request("a", 256, 144, 29, 16.0, seed=1)
  rows = [{"file": "x", **dataclasses.asdict(each)} for each in (still, video)]
  listed = tmp_path / "sample" / "samples.jsonl"
  listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
  expected = Defaults(Options(steps=5), (256, 144), 29, 16.0, 29)
  assert defaults.read(tmp_path) == expected
  listed.write_text("{")
  with pytest.raises(ValueError, match="stage.json: "):
    defaults.read(tmp_path)


@pytest.mark.parametrize(("frames", "window"), [(1, 33), (9, 9), (17, 17), (193, 33)])
def test_windows_are_no_longer_than_a_small_models_videos(tmp_path, frames, window):
  stage(tmp_path, [["a", [64, 64], frames, 8.0], ["b", [64, 64], 1, 8.0]])
  assert defaults.read(tmp_path).window == window


@pytest.mark.parametrize(("given", "window"), [(1, 9), (8, 9), (9, 13), (20, 24)])
def test_a_window_holds_more_than_what_is_said_to_be_given(given, window):
  job = Defaults(frames=9, window=9).fill(Job("x", given=given))
  assert (job.window, job.given) == (window, given)
  assert 0 < job.windows.given < job.windows.length


def test_a_rate_of_0_is_that_of_training(tmp_path):
  stage(tmp_path, [["a", [96, 64], 33, 0.0]])
  model = tmp_path / "dit" / "model" / "model.json"
  model.parent.mkdir(parents=True)
  model.write_text(json.dumps({"params": "params-0", "meta": {"reference_fps": 24.0}}))
  assert defaults.read(tmp_path).fps == 24.0


def test_other_checkpoints_have_those_of_the_package(tmp_path):
  assert (
    defaults.read(tmp_path) == Defaults() == Defaults(Options(), (64, 64), 17, 12.0)
  )
  assert defaults.read(tmp_path / "none") == Defaults()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"version": 2}, "sample.json: version is 2, but this sora_jax reads 1 at most"),
    ({"version": None}, "sample.json: version is None"),
    ({"size": None}, "sample.json: damaged"),
    ({"options": {"steps": 0}}, "sample.json: sampling steps 0 is not at least 1"),
  ],
)
def test_what_cannot_be_is_named(tmp_path, change, message):
  text = json.dumps({**OWN.to_json(), **change})
  (tmp_path / defaults.NAME).write_text(text)
  with pytest.raises(ValueError, match=message):
    defaults.read(tmp_path)


def test_damaged_files_are_named(tmp_path):
  (tmp_path / defaults.NAME).write_text("{")
  with pytest.raises(ValueError, match="sample.json: "):
    defaults.read(tmp_path)
  (tmp_path / defaults.NAME).write_text("{}")
  with pytest.raises(ValueError, match="sample.json: damaged .KeyError"):
    defaults.read(tmp_path)
