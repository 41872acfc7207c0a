"""Training goes on with more steps than it was begun with."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from runtime.test_train_checkpoints import FullDisk
from training import test_loop as toy

from sora_jax.runtime import train_checkpoints
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
  # Threads of a save that failed may still write into its partial folder, which the
  # next start removes.
  return train_checkpoints.steps_in(folder / "toy" / "checkpoints")


def rates(folder):
  return [row["learning_rate"] for row in toy.rows_of(folder)]


@pytest.mark.slow
@pytest.mark.parametrize(
  "config",
  [CONSTANT, WSD],
  ids=["constant", "wsd"],
)
def test_more_steps_equal_a_run_that_had_them_from_the_start(tmp_path, config):
  whole = run(tmp_path / "whole", config, 16)
  for steps in (8, 12, 16):
    extended = run(tmp_path / "extended", config, steps)
  toy.assert_equal(whole, extended)
  assert rates(tmp_path / "whole") == rates(tmp_path / "extended")
  assert checkpoints(tmp_path / "whole") == checkpoints(tmp_path / "extended")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_fewer_steps_than_were_planned(tmp_path):
  """Possible as long as no more were made."""
  with pytest.raises(ValueError, match="data ended after 7 of 16"):
    config = dataclasses.replace(CONSTANT, steps=16, save_every=6)
    toy.run(tmp_path / "cut", config, toy.Batches(end=7))
  with pytest.raises(ValueError, match="a checkpoint of step 6, beyond the 5 steps"):
    run(tmp_path / "cut", CONSTANT, 5)
  cut = run(tmp_path / "cut", CONSTANT, 12)
  toy.assert_equal(run(tmp_path / "whole", CONSTANT, 12), cut)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONSTANT, WSD], ids=["constant", "wsd"])
def test_checkpoints_that_do_not_say_their_steps(tmp_path, caplog, config):
  """Those of version 0.1.0."""
  run(tmp_path, config, 8)
  for path in pathlib.Path(tmp_path).glob("toy/checkpoints/*/host/metadata"):
    host = json.loads(path.read_text())["host"]  # they had no checksums, either
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


# --- past damage

EVERY_2 = dataclasses.replace(
  CONSTANT, steps=8, save_every=2, keep=3, eval_every=2, log_every=0
)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
  """A run that ended after step 7, with checkpoints 2, 4, 6; state of a whole one."""
  folder = tmp_path_factory.mktemp("cut")
  with pytest.raises(ValueError, match="data ended after 7 of 8"):
    toy.run(folder / "cut", EVERY_2, toy.Batches(end=7))
  return folder / "cut", toy.run(folder / "whole", EVERY_2)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def arrays_of(checkpoint):
  """The files that hold the arrays of a checkpoint, and their index."""
  return [path for path in checkpoint.rglob("d/*") if path.stat().st_size]


def each(change, checkpoint):
  for path in arrays_of(checkpoint):
    change(path)


DAMAGE = {
  "a bit of the state": lambda c: each(flip, c / "6"),
  "a bit of the host": lambda c: flip(c / "6" / "host" / "metadata"),
  "truncated": lambda c: each(lambda path: os.truncate(path, 100), c / "6"),
  "emptied": lambda c: each(lambda path: path.write_bytes(b""), c / "6"),
  "partly deleted": lambda c: shutil.rmtree(c / "6" / "state"),
  "an empty folder": lambda c: (shutil.rmtree(c / "6"), (c / "6").mkdir()),
  "host of another step": lambda c: shutil.copyfile(
    c / "2" / "host" / "metadata", c / "6" / "host" / "metadata"
  ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_costs_steps_and_nothing_else(cut, tmp_path, damage, caplog):
  shutil.copytree(cut[0], tmp_path, dirs_exist_ok=True)
  DAMAGE[damage](tmp_path / "toy" / "checkpoints")
  caplog.clear()
  toy.assert_equal(cut[1], toy.run(tmp_path, EVERY_2))
  (said,) = [m for m in caplog.messages if "damaged" in m]
  assert said.startswith("toy: the checkpoint of step 6 is damaged (")
  aside = tmp_path / "toy" / "damaged"
  assert f"moved to {aside}: training goes on from step 4, 2 steps are made" in said
  assert "\n" not in said and len(said) < 600
  assert [path.name for path in aside.iterdir()] == ["6"]


@pytest.mark.slow
def test_several_damaged_ones_and_then_all(cut, tmp_path, caplog):
  shutil.copytree(cut[0], tmp_path, dirs_exist_ok=True)
  folder = tmp_path / "toy" / "checkpoints"
  for step in (4, 6):
    each(flip, folder / str(step))
  with pytest.raises(ValueError, match="data ended after 3 of 8"):
    toy.run(tmp_path, EVERY_2, toy.Batches(end=3))
  for lost in (4, 2):
    assert f"goes on from step 2, {lost} steps are made again" in caplog.text
  each(flip, folder / "2")
  message = f"no checkpoint is whole; .* in {tmp_path}/toy/damaged.* copy .* or delete"
  for _ in range(2):  # nor does the next try begin from the start, as if nothing was
    with pytest.raises(ValueError, match=message) as error:
      toy.run(tmp_path, EVERY_2)
    assert "\n" not in str(error.value)
  shutil.move(tmp_path / "toy" / "damaged" / "4", folder)
  shutil.copytree(cut[0] / "toy/checkpoints/4", folder / "4", dirs_exist_ok=True)
  toy.assert_equal(cut[1], toy.run(tmp_path, EVERY_2))


def test_another_config_is_no_damage(cut, tmp_path):
  shutil.copytree(cut[0], tmp_path, dirs_exist_ok=True)
  with pytest.raises(ValueError, match="opt_state/.* by the config"):
    toy.run(tmp_path, dataclasses.replace(EVERY_2, optimizer="adafactor"))
  assert checkpoints(tmp_path) == [2, 4, 6]
  assert not (tmp_path / "toy" / "damaged").exists()


@pytest.mark.slow
def test_a_full_disk_does_not_end_a_training(cut, tmp_path, monkeypatch, caplog):
  disk = FullDisk(monkeypatch)

  class Filling(toy.Batches):
    def __init__(self, folder):
      super().__init__()
      self.saved = folder / "toy" / "checkpoints" / "2"

    def __next__(self):
      if self.index == 3:
        while not self.saved.exists():  # a thread saves step 2, too
          time.sleep(0.01)
      if self.index == 5:
        assert disk.failed.wait(60)  # the save of step 4
      disk.full = self.index in (3, 4)
      return super().__next__()

  toy.assert_equal(cut[1], toy.run(tmp_path, EVERY_2, Filling(tmp_path)))
  (said,) = [m for m in caplog.messages if "the save at step" in m]
  assert "the save at step 4 failed" in said and "No space left" in said
  assert checkpoints(tmp_path) == [2, 6, 8]
  disk.failed.clear()
  one = dataclasses.replace(EVERY_2, save_failures=1)
  with pytest.raises(ValueError, match="1 saves in a row failed, the last at step 4"):
    toy.run(tmp_path / "one", one, Filling(tmp_path / "one"))


@pytest.mark.slow
def test_the_best_checkpoint_stays(tmp_path):
  config = dataclasses.replace(EVERY_2, keep=1, keep_every=4, keep_best="eval/error")
  evaluated = {"eval_batches": [next(toy.Batches())]}
  toy.run(tmp_path, config, **evaluated)
  rows = {row["step"]: row["eval/error"] for row in toy.rows_of(tmp_path)}
  assert checkpoints(tmp_path) == sorted({4, 8, min(rows, key=rows.get)})
  worst = dataclasses.replace(config, keep_best="-eval/error")
  toy.run(tmp_path / "worst", worst, **evaluated)
  assert checkpoints(tmp_path / "worst") == sorted({4, 8, max(rows, key=rows.get)})
  with pytest.raises(ValueError, match=r"keep_best: 'eval/x' is none of .*eval/error"):
    toy.run(
      tmp_path / "x", dataclasses.replace(config, keep_best="eval/x"), **evaluated
    )


@pytest.mark.parametrize(
  "options, message",
  [
    ({"keep": 0}, "keep is 0"),
    ({"save_failures": 0}, "save_failures 0"),
    ({"keep_every": 3}, "keep_every 3 is no multiple of save_every 2"),
    ({"save_every": 0, "keep_every": 3}, "keep_every 3 is no multiple of save_every 0"),
    ({"keep_best": "eval/x", "eval_every": 3}, "eval_every 3 and save_every 2 must be"),
    ({"keep_best": "eval/x", "eval_every": 0}, "eval_every 0 and save_every 2 must be"),
  ],
)
def test_what_cannot_be_kept(options, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(EVERY_2, **options)


def test_sigusr1_saves_and_ends(tmp_path):
  class Interrupted(toy.Batches):
    def __next__(self):
      if self.index == 4:
        signal.raise_signal(signal.SIGUSR1)
      return super().__next__()

  before = signal.getsignal(signal.SIGUSR1)
  with pytest.raises(loop.Preempted):
    toy.run(tmp_path, EVERY_2, Interrupted())
  assert signal.getsignal(signal.SIGUSR1) is before
  assert checkpoints(tmp_path)[-1] == 5
