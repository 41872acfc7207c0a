"""Updates that are left out, clips that cannot be read, and steps done once more."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training.test_loop import CONFIG, RULES, TASK, Batches, assert_equal, rows_of, run
from training.test_loop import cache as cache  # a fixture: nearly all is compilation

from sora_jax.runtime import limits, sharding
from sora_jax.training import guards, loop, optim, replay, signals, step

NAMES = [f"c{i}" for i in range(40)]


class Spoiled(Batches):
  """Batches of which some have a fault: {index: "nan" | "unreadable" | factor}."""

  def __init__(self, faults, **options):
    super().__init__(**options)
    self.faults = faults

  def __next__(self):
    index, batch = self.index, super().__next__()
    fault = self.faults.get(index)
    batch["clip_unreadable"] = np.full(self.rows, -1)
    if fault == "nan":
      batch["x"][1] = np.nan
    elif fault == "unreadable":
      batch["clip_unreadable"][:2] = 2 * index, 2 * index + 1
      batch["clip_N"][:] = -1
    elif fault is not None:
      batch["scale"] = np.float32(fault)
    return batch


@functools.cache
def built(**options):
  config = dataclasses.replace(CONFIG, **options)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return loop.build(TASK, config, mesh, RULES, seed=3), mesh


def update(state, batch, **added):
  made, mesh = built()
  batch = signals.added_to(batch, stop=False, **added)
  return made.update(state, signals.to_device(batch, mesh))


@pytest.mark.slow
@pytest.mark.parametrize(
  "batch, most_norm",
  [
    (next(Spoiled({0: "nan"})), None),
    (next(Spoiled({0: math.inf})), None),
    (next(Spoiled({0: "unreadable"})), None),
    (next(Batches()), 1e-6),
  ],
)
def test_a_skipped_update_changes_nothing_but_the_step(batch, most_norm):
  state, _ = update(built()[0].init(), next(Batches()))
  before = jax.tree.map(np.array, state)
  after, values = update(state, batch, most_norm=most_norm)
  assert values["skipped"] == 1 and after.step == 2
  assert_equal(after[1:], before[1:])
  # The next one is what it would be at that step from this state.
  again = jax.device_put(before._replace(step=np.int32(2)))
  assert_equal(update(after, next(Batches()))[0], update(again, next(Batches()))[0])


@pytest.mark.slow
def test_a_taken_update_is_that_without_guards():
  """To the bit, against the same update written without a guard.

  Both are compiled as outside of tests: another fusion rounds otherwise.
  """
  fused = {"xla_cpu_use_fusion_emitters": True}
  optimizer, _ = optim.make(CONFIG, jax.eval_shape(TASK.init, jax.random.key(0)))

  @functools.partial(jax.jit, compiler_options=fused)
  def plain(state, batch):
    batch = {**batch, "step": state.step}
    key = step.step_key(3, state.step, step.LOSS)
    gradient, values = step.gradients(TASK, state.params, batch, key, None, CONFIG)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(CONFIG.ema_decay, (1 + state.step) / (10 + state.step))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
    return step.TrainState(state.step + 1, params, ema, opt_state), values["loss"]

  made, mesh = built()
  guarded, other = made.init(), made.init()
  update = jax.jit(made.update, compiler_options=fused)
  batches = Batches()
  for _ in range(6):
    batch = next(batches)
    signalled = signals.added_to(batch, stop=False)
    guarded, values = update(guarded, signals.to_device(signalled, mesh))
    other, loss = plain(other, signals.to_device(batch, mesh))
    assert values["skipped"] == 0 and values["loss"] == loss
    assert_equal(guarded, other)


@pytest.mark.slow
def test_a_run_goes_on_and_resumes_bitwise(tmp_path, caplog):
  faults = {2: "nan", 5: "nan", 6: "unreadable", 9: math.inf}
  config = dataclasses.replace(CONFIG, save_every=6)
  whole = run(tmp_path / "whole", config, Spoiled(faults), names=NAMES)
  with pytest.raises(ValueError, match="data ended after 7"):
    run(tmp_path / "cut", config, Spoiled(faults, end=7), names=NAMES)
  assert_equal(whole, run(tmp_path / "cut", config, Spoiled(faults), names=NAMES))
  assert int(whole.step) == 12
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(whole))
  rows = [row for row in rows_of(tmp_path / "whole") if "progress" in row]
  assert {row["step"]: row.get("skipped", 0) for row in rows} == {
    2: 0, 4: 1, 6: 1, 8: 1, 10: 1, 12: 0
  }  # fmt: skip
  # What was left out is in no mean.
  assert all(row["loss"] is not None and row["loss"] < 10 for row in rows)
  log = caplog.text
  assert "step 3: loss is nan: this update is left out (1 in a row" in log
  assert "clips of its batch: ['c3']" in log  # twice, in one row
  assert "step 7: no clip of its batch could be read" in log
  assert "(2 in a row" in log and "step 10: loss is inf" in log


def spiking(begin, end):
  """Batches in which the loss is a hundred times as high for a while."""
  return Spoiled(dict.fromkeys(range(begin, end), 100.0))


@pytest.mark.slow
def test_a_loss_that_stays_high_takes_the_run_back(tmp_path, caplog):
  config = dataclasses.replace(
    CONFIG, steps=36, eval_every=0, save_every=6, keep=9, rollback_threshold=12
  )
  batches = spiking(26, 30)
  found = run(tmp_path / "back", config, batches)
  assert "since step 27: goes back to step 24 and passes over the data" in caplog.text
  # Updates 27 to 29 were seen and one more was under way: those data are passed over.
  assert batches.index == 36 + 6
  steps = [row["step"] for row in rows_of(tmp_path / "back") if "progress" in row]
  assert steps == sorted(set(steps))

  class Without(Batches):
    def __next__(self):
      if self.index == 24:
        self.index = 30
      return super().__next__()

  assert_equal(found, run(tmp_path / "without", config, Without()))
  # Killed before the next save, it comes to the same spike and goes back again.
  with pytest.raises(ValueError, match="data ended after 27"):
    run(tmp_path / "cut", config, Spoiled(batches.faults, end=33))
  assert_equal(found, run(tmp_path / "cut", config, spiking(26, 30)))


@pytest.mark.slow
def test_rollbacks_have_an_end(tmp_path):
  config = dataclasses.replace(
    CONFIG, steps=60, eval_every=0, save_every=6, rollback_threshold=12, max_rollbacks=2
  )
  with pytest.raises(loop.NonFiniteError, match=r"the run went back 2 times before"):
    run(tmp_path, config, spiking(26, 999))
  with pytest.raises(ValueError, match=r"there is of step \d+: nothing to go back"):
    run(tmp_path / "few", dataclasses.replace(config, keep=1, save_every=1),
        spiking(26, 999))  # fmt: skip


@pytest.mark.slow
def test_too_many_in_a_row_stop(tmp_path):
  config = dataclasses.replace(CONFIG, save_every=1, keep=20, max_skipped=2)
  faults = dict.fromkeys((1, 3, 4, 6, 7, 8), "nan")
  message = (
    r"loss is nan at step 9; clips of its batch: \['c3', 'c9'\], and the 2 updates "
    r"before were left out, too\. The checkpoints .*leave_out=.*replay=9"
  )
  with pytest.raises(loop.NonFiniteError, match=message):
    run(tmp_path, config, Spoiled(faults), names=NAMES)
  assert (tmp_path / "toy" / "checkpoints" / "8").is_dir()
  # The count is kept: typed again, it stops at the same step.
  with pytest.raises(loop.NonFiniteError, match="at step 9;"):
    run(tmp_path, config, Spoiled(faults), names=NAMES)
  del faults[8]
  assert int(run(tmp_path, config, Spoiled(faults), names=NAMES).step) == 12


def test_a_run_that_reads_nothing_saves_nothing(tmp_path):
  faults = dict.fromkeys(range(100), "unreadable")
  with pytest.raises(limits.UnreadableError, match="no clip of its batch.* at step 6"):
    run(tmp_path, dataclasses.replace(CONFIG, save_every=100), Spoiled(faults))
  assert not list((tmp_path / "toy" / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("steps, save_every", [(3, 100), (12, 4)])
def test_a_model_that_saw_nothing_is_not_saved(tmp_path, steps, save_every):
  config = dataclasses.replace(CONFIG, steps=steps, save_every=save_every)
  faults = dict.fromkeys(range(100), "unreadable")
  with pytest.raises(limits.UnreadableError, match="none of the [68] clips asked for"):
    run(tmp_path, config, Spoiled(faults))
  assert not list((tmp_path / "toy" / "checkpoints").iterdir())


@pytest.mark.slow
def test_too_many_unreadable_clips_end_a_run(tmp_path):
  faults = dict.fromkeys((1, 3, 5, 7), "unreadable")
  message = r"8 of 16 clips asked for so far cannot be read.*max_unreadable 0\.05.*'c2'"
  with pytest.raises(limits.UnreadableError, match=message):
    run(tmp_path, CONFIG, Spoiled(faults), names=NAMES, max_unreadable=0.05)
  state = run(tmp_path, CONFIG, Spoiled(faults), names=NAMES, max_unreadable=0.5)
  assert int(state.step) == 12


def test_limit_of_unreadable_clips():
  assert not limits.too_many(7, 7, 0.05, 7)  # a small set
  assert limits.too_many(8, 8, 0.05, 8)
  # In a part of the set, chance may bring more than the share ...
  assert not limits.too_many(16, 160, 0.05, 160)
  assert limits.too_many(17, 160, 0.05, 160)
  # ... in the whole of it there is no chance.
  assert limits.too_many(16, 160, 0.05, 161) and limits.too_many(16, 160, 0.05)
  assert not limits.too_many(8, 160, 0.05)
  assert limits.too_many(8, 100, 0.0) and not limits.too_many(100, 100, 1.0)


def test_one_bad_clip_ends_no_small_set():
  guard = guards.Guard(CONFIG, NAMES[:10], 0.05)
  for _ in range(50):  # epochs: visits of the same clip count once
    guard.asked(9.0, np.array([[-1, 4]]))


def test_spikes_are_those_far_above_the_median():
  config = dataclasses.replace(CONFIG, spike_threshold=6.0)
  guard, other = guards.Guard(config), guards.Guard(config)
  norms = 1.0 + 0.1 * np.cos(np.arange(40.0))
  for at, norm in enumerate(norms, 1):
    limit = guard.limit(at)
    known = norms[: max(0, at - 2)]
    if len(known) < 16:
      assert limit == math.inf
    else:
      deviation = 1.4826 * np.median(np.abs(known - np.median(known)))
      assert limit == pytest.approx(np.median(known) + 6 * deviation)
    values = {"loss": 1.0, "grad_norm": norm, "skipped": 0.0}
    assert not guard.skipped(at, values, {})
    if at == 20:
      other = guards.Guard(config, state=guard.state())
    elif at > 20:  # a resumed run has the same limits
      assert other.limit(at) == limit
      other.skipped(at, values, {})
  assert guards.Guard(CONFIG, state=guard.state()).limit(41) == math.inf


@pytest.mark.slow
def test_a_spike_is_left_out(tmp_path, caplog):
  config = dataclasses.replace(
    CONFIG, steps=30, spike_threshold=10.0, save_every=100, schedule="constant"
  )
  run(tmp_path, config, Spoiled({20: 1e4}), names=NAMES)
  assert "step 21: grad_norm" in caplog.text and "is above the limit of" in caplog.text
  assert sum(row.get("skipped", 0) for row in rows_of(tmp_path)) == 1


@pytest.mark.slow
def test_replay_repeats_a_step_to_the_bit(tmp_path, caplog):
  caplog.set_level("INFO", logger="absl")
  config = dataclasses.replace(CONFIG, log_every=1)
  run(tmp_path, config, Spoiled({6: "nan"}), names=NAMES)
  folder = pathlib.Path(tmp_path) / "toy"
  kept = sorted(p.relative_to(folder) for p in folder.rglob("*"))

  def replayed(at):
    setup = loop.Setup(TASK, RULES, Spoiled({6: "nan"}), names=NAMES)
    return replay.replay(setup, config, folder, built()[1], at, seed=3)

  (row,) = [row for row in rows_of(tmp_path) if row["step"] == 11 and "loss" in row]
  values = replayed(11)  # from the checkpoint of step 8
  assert "replays step 11 from step 8 on" in caplog.text
  for name in ("loss", "grad_norm", "error", "learning_rate"):
    assert values[name] == row[name]
  norms = values["gradient/hidden"], values["gradient/output"]
  assert math.hypot(*norms) == pytest.approx(values["grad_norm"], rel=1e-5)
  assert "clips of its batch: ['c3', 'c11']" in caplog.text
  assert math.isnan(replayed(7)["loss"])
  assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == kept
  with pytest.raises(ValueError, match=r"config.replay 13 must be from 1 to 12"):
    replayed(13)
