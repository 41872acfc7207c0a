"""Training goes on with more steps than it was begun with."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from training import test_loop as toy

from sora_jax.training import loop, optim

CONSTANT = dataclasses.replace(
  toy.CONFIG, schedule="constant", save_every=0, keep=1, log_every=1
)
WSD = dataclasses.replace(CONSTANT, schedule="wsd", decay_steps=4)
COSINE = dataclasses.replace(CONSTANT, schedule="cosine")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
  toy.cache_compilations(tmp_path_factory.mktemp("cache"))
  yield
  toy.cache_compilations(None)


def run(folder, config, steps):
  return toy.run(folder, dataclasses.replace(config, steps=steps))


def checkpoints(folder):
  return sorted(int(path.name) for path in (folder / "toy" / "checkpoints").iterdir())


def rates(folder):
  return [row["learning_rate"] for row in toy.rows_of(folder)]


@pytest.mark.parametrize(
  "config",
  [CONSTANT, pytest.param(WSD, marks=pytest.mark.slow)],
  ids=["constant", "wsd"],
)
def test_more_steps_equal_a_run_that_had_them_from_the_start(tmp_path, config):
  whole = run(tmp_path / "whole", config, 16)
  for steps in (8, 12, 16):
    extended = run(tmp_path / "extended", config, steps)
  toy.assert_equal(whole, extended)
  assert rates(tmp_path / "whole") == rates(tmp_path / "extended")
  assert checkpoints(tmp_path / "whole") == checkpoints(tmp_path / "extended")


def test_wsd_begins_again_before_its_decay(tmp_path, caplog):
  run(tmp_path, WSD, 8)
  # Though no checkpoint but the last was asked for.
  assert checkpoints(tmp_path) == [4, 8]
  with caplog.at_level("INFO", logger="absl"):
    run(tmp_path, WSD, 16)
  assert "toy: from 8 to 16 steps: begins again at step 4, before the decay" in (
    caplog.messages
  )
  assert checkpoints(tmp_path) == [12, 16]


def test_wsd_interrupted_in_the_longer_run_goes_on_there(tmp_path):
  whole = run(tmp_path / "whole", WSD, 16)
  folder = tmp_path / "extended"
  run(folder, WSD, 8)
  longer = dataclasses.replace(WSD, steps=16, save_every=1)
  with pytest.raises(ValueError, match="data ended after 7 of 16"):
    toy.run(folder, longer, toy.Batches(end=7))
  # The checkpoint of step 8 was of the decay, and would have been the newest.
  assert checkpoints(folder) == [7]
  toy.assert_equal(whole, run(folder, WSD, 16))


@pytest.mark.parametrize("config", [WSD, COSINE], ids=["wsd", "cosine"])
def test_a_learning_rate_that_jumps_is_said(tmp_path, caplog, config):
  run(tmp_path, config, 8)
  if config is WSD:
    shutil.rmtree(tmp_path / "toy" / "checkpoints" / "4")
  state = run(tmp_path, config, 16)
  (line,) = [m for m in caplog.messages if "not what 16 steps" in m]
  assert f"from 8 to 16 steps changes schedule {config.schedule!r}" in line
  assert int(state.step) == 16
  old, new = (
    optim.make_schedule(dataclasses.replace(config, steps=steps), 1e-2)
    for steps in (8, 16)
  )
  expected = jax.numpy.concatenate(
    [jax.vmap(old)(np.arange(8)), jax.vmap(new)(np.arange(8, 16))]
  )
  np.testing.assert_allclose(rates(tmp_path), expected, rtol=1e-6)


def test_fewer_steps_than_were_planned(tmp_path):
  """Possible as long as no more were made."""
  with pytest.raises(ValueError, match="data ended after 7 of 16"):
    config = dataclasses.replace(CONSTANT, steps=16, save_every=6)
    toy.run(tmp_path / "cut", config, toy.Batches(end=7))
  with pytest.raises(ValueError, match="a checkpoint of step 6, beyond the 5 steps"):
    run(tmp_path / "cut", CONSTANT, 5)
  cut = run(tmp_path / "cut", CONSTANT, 12)
  toy.assert_equal(run(tmp_path / "whole", CONSTANT, 12), cut)


@pytest.mark.parametrize("config", [CONSTANT, WSD], ids=["constant", "wsd"])
def test_checkpoints_that_do_not_say_their_steps(tmp_path, caplog, config):
  """Those of version 0.1.0."""
  run(tmp_path, config, 8)
  for path in pathlib.Path(tmp_path).glob("toy/checkpoints/*/host/metadata"):
    host = json.loads(path.read_text())
    assert host.pop("steps") == 8
    path.write_text(json.dumps(host))
  assert int(run(tmp_path, config, 16).step) == 16
  said = [m for m in caplog.messages if "does not say for how many steps" in m]
  assert len(said) == (config is WSD)


def test_a_finished_run_with_the_same_steps_is_left_alone(tmp_path):
  state = run(tmp_path, WSD, 8)
  again = toy.run(tmp_path, dataclasses.replace(WSD, steps=8), toy.Batches(end=0))
  toy.assert_equal(state, again)


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
@pytest.mark.parametrize("steps", [20, 40, 60])
def test_common_updates(schedule, steps):
  config = loop.TrainConfig(steps=40, warmup_steps=5, schedule=schedule, decay_steps=10)
  ours, theirs = (
    jax.vmap(optim.make_schedule(dataclasses.replace(config, steps=n), 1.0))(
      np.arange(20)
    )
    for n in (40, steps)
  )
  common = min(optim.common_updates(config, steps), 20)
  np.testing.assert_array_equal(ours[:common], theirs[:common])
  if steps != 40 and schedule == "cosine":
    assert common == 5 and ours[7] != theirs[7]
