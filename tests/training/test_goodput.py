"""Goodput by a clock that only moves when told, across restarts; traces of steps."""

import dataclasses
import json

import pytest
from training import test_loop as toy

from sora_jax.training import goodput, metrics, profiling


@pytest.fixture
def clock(monkeypatch):
  """Seconds of all clocks; those of the process begin elsewhere than the wall's."""
  now = [1000.0]
  monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0] - 900)
  monkeypatch.setattr(goodput.time, "time", lambda: now[0])
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0] - 500)
  return now


def meter_of(state=None, alive=0.0):
  return metrics.Meter(
    100,
    flops_per_step=0.0,
    tokens_per_step=0,
    devices=1,
    device_kind="cpu",
    state=state,
    alive=alive,
  )


def run_a_little(meter, clock):
  """5 s to start, 20 s to compile, 10 steps with data, an evaluation; 100 s in all."""
  clock[0] += 5
  meter.compile()
  clock[0] += 20
  meter.start(1)
  for _ in range(10):
    clock[0] += 6
    meter.waited(1.0)
    meter.add({"loss": 1.0})
  with meter.pause("evaluate"):
    clock[0] += 15


def test_time_goes_to_its_cause(clock):
  meter = meter_of()
  run_a_little(meter, clock)
  row = meter.row(11)
  assert row["goodput"] == pytest.approx(0.5)
  causes = {k.split("/")[1]: v for k, v in row.items() if k.startswith("goodput/")}
  assert causes == pytest.approx(
    {"restart": 0.05, "compile": 0.2, "data": 0.1, "evaluate": 0.15}
  )
  assert meter.summary() == (
    "50.0% of 1m40s went to training; compile 20.0%, data 10.0%, evaluate 15.0%, "
    "restart 5.0%"
  )


def test_what_a_crash_costs(clock):
  meter = meter_of()
  run_a_little(meter, clock)
  with meter.pause("checkpoint"):
    clock[0] += 10
    state = json.loads(json.dumps(meter.state()))
  # 40 s of steps that no checkpoint holds, then nobody is there for 50 s.
  clock[0] += 40
  alive = clock[0]
  clock[0] += 50
  meter = meter_of(state, alive)
  run_a_little(meter, clock)
  seconds = meter._goodput.seconds()
  assert seconds["lost"] == 40 and seconds["idle"] == 50
  assert seconds["train"] == 100 + 10  # the checkpoint could not know its own time
  assert seconds["restart"] == 10 and seconds["compile"] == 40
  assert sum(seconds.values()) == clock[0] - 1000


@pytest.mark.parametrize("alive", [0.0, 1010.0, 9999.0])
def test_clocks_that_disagree_make_no_negative_time(clock, alive):
  state = {"seconds": dict.fromkeys(goodput.CAUSES, 1.0), "time": 1020.0}
  clock[0] = 1010.0
  seconds = goodput.Goodput(state, alive).seconds()
  assert seconds == dict.fromkeys(goodput.CAUSES, 1.0)


@pytest.mark.slow
def test_a_stage_logs_its_goodput_over_restarts(tmp_path, caplog):
  config = dataclasses.replace(toy.CONFIG, steps=6, save_every=2, log_every=1)
  batches = toy.Batches(end=5)
  with pytest.raises(ValueError, match="data ended after 5 of 6"):
    toy.run(tmp_path, config, batches)
  with caplog.at_level("INFO", logger="absl"):
    toy.run(tmp_path, config)
  (line,) = [text for text in caplog.messages if "went to training" in text]
  assert line.startswith("toy: ") and "idle" in line and "compile" in line
  for row in toy.rows_of(tmp_path):
    shares = [v for k, v in row.items() if k.startswith("goodput")]
    assert sum(shares) == pytest.approx(1.0) and min(shares) >= 0
  assert "goodput/idle" not in toy.rows_of(tmp_path)[0]
  assert toy.rows_of(tmp_path)[-1]["goodput/idle"] > 0


def test_the_time_until_an_extension_is_nobodys(clock, tmp_path):
  meter = meter_of()
  run_a_little(meter, clock)
  saved = meter.state()["goodput"]
  # A checkpoint; 30 s later training is complete, and 1000 s later it is extended.
  clock[0] += 30
  goodput.complete(tmp_path, meter.state()["goodput"])
  seconds = meter._goodput.seconds()
  clock[0] += 1000
  assert goodput.to_go_on_from(tmp_path, saved) == {
    "seconds": seconds,
    "time": clock[0],
  }
  # That is killed after 40 s without a checkpoint, and goes on after 50 more.
  clock[0] += 40
  alive = clock[0]
  clock[0] += 50
  state = goodput.to_go_on_from(tmp_path, saved)
  found = goodput.Goodput(state, alive).seconds()
  assert found == {**seconds, "lost": 40, "idle": 50}
  # A checkpoint of the extension knows all that itself.
  clock[0] += 10
  later = goodput.Goodput(state, alive).state()
  assert goodput.to_go_on_from(tmp_path, later) == later


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"time": "x", "seconds": {}}'])
def test_a_damaged_note_of_the_completion(tmp_path, caplog, text):
  state = goodput.Goodput().state()
  assert goodput.to_go_on_from(tmp_path, state) == state
  (tmp_path / "goodput.json").write_text(text)
  assert goodput.to_go_on_from(tmp_path, state) == state
  assert "goodput.json is damaged" in caplog.text


def seconds_of(tmp_path):
  """Seconds by cause at the completion of the toy's training."""
  return json.loads((tmp_path / "toy" / "goodput.json").read_text())["seconds"]


@pytest.fixture
def later(monkeypatch):
  """Lets the wall's clock, but no process, go on by some seconds."""
  real, ahead = goodput.time.time, [0.0]
  monkeypatch.setattr(goodput.time, "time", lambda: real() + ahead[0])

  def later(seconds):
    ahead[0] += seconds

  return later


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_an_extension_of_a_finished_training(tmp_path, later, schedule):
  def run(steps, end=10**9):
    config = dataclasses.replace(
      toy.CONFIG,
      steps=steps,
      schedule=schedule,
      decay_steps=3,
      save_every=0,
      log_every=1,
    )
    toy.run(tmp_path, config, toy.Batches(end=end))

  run(6)
  before = seconds_of(tmp_path)
  assert before["lost"] == before["idle"] == 0
  later(1e6)
  run(12)
  assert toy.rows_of(tmp_path)[-1].get("goodput/idle", 0.0) < 0.5
  extended = seconds_of(tmp_path)
  assert extended["lost"] + extended["idle"] < 1
  assert all(extended[cause] >= before[cause] for cause in before)
  assert extended["train"] > before["train"]
  # An extension that is cut before its first checkpoint: that time counts.
  later(1e6)
  with pytest.raises(ValueError, match="data ended after 14 of 18"):
    run(18, end=14)
  later(1e3)
  run(18)
  assert 1e3 < sum(seconds_of(tmp_path)[cause] for cause in ("lost", "idle")) < 1e4


@pytest.mark.slow
def test_a_training_that_was_killed_before_its_completion_was_noted(tmp_path, later):
  def run(steps):
    toy.run(tmp_path, dataclasses.replace(toy.CONFIG, steps=steps, schedule="constant"))

  run(6)
  (tmp_path / "toy" / "goodput.json").unlink()
  later(1e3)
  run(6)
  assert 1e3 <= seconds_of(tmp_path)["idle"] < 2e3
  for steps in (6, 12):
    later(1e6)
    run(steps)
  assert 1e3 <= seconds_of(tmp_path)["idle"] < 2e3


@pytest.mark.slow
@pytest.mark.parametrize("steps, traced", [(2, True), (0, False)])
def test_chosen_steps_are_traced(tmp_path, steps, traced):
  config = dataclasses.replace(toy.CONFIG, steps=6, eval_every=0, save_every=0)
  profile = profiling.Profile(start=3, steps=steps)
  toy.run(tmp_path, config, profile=profile)
  traces = list((tmp_path / "toy" / "profile").rglob("*.xplane.pb"))
  assert len(traces) == traced
  if traced:
    data = traces[0].read_bytes()
    assert b"train" in data and b"step_num" in data


def test_a_trace_holds_the_chosen_steps_and_ends_with_the_run(monkeypatch):
  calls = []
  monkeypatch.setattr(
    profiling.jax.profiler, "start_trace", lambda folder: calls.append(folder)
  )
  monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: calls.append("end"))
  tracer = profiling.Tracer(profiling.Profile(3, 2), "here")
  for step in range(2, 8):
    tracer.reached(step, lambda step=step: calls.append(step))
  tracer.close()
  assert calls == [3, "here", 5, "end"]
  calls.clear()
  tracer = profiling.Tracer(profiling.Profile(3, 2), "here")
  tracer.reached(3, lambda: None)
  tracer.close()  # the run ended, or failed, before its last traced step
  tracer.close()
  assert calls == ["here", "end"]


def test_negative_steps_to_trace():
  with pytest.raises(ValueError, match="steps -1 must not be negative"):
    profiling.Profile(steps=-1)
