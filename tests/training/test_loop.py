"""Train step and loop with a toy task: resume, signals, evaluation, bad losses."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec

from sora_jax.runtime import sharding
from sora_jax.tasks import Task
from sora_jax.training import loop, optim, step

RULES = (
  (r".*/kernel", PartitionSpec(None, "fsdp")),
  (r".*/bias", PartitionSpec()),
)


def init(key):
  draw = jax.random.uniform(key, (14, 16), minval=-0.5)
  return {
    "hidden": {"kernel": draw[:6], "bias": jnp.zeros(16)},
    "output": {"kernel": draw[6:].reshape(16, 8), "bias": jnp.zeros(8)},
  }


def predict(params, x):
  hidden, output = params["hidden"], params["output"]
  x = jnp.tanh(x @ hidden["kernel"] + hidden["bias"])
  return x @ output["kernel"] + output["bias"]


def loss(params, batch, key):
  error = predict(params, batch["x"]) - batch["y"]
  noise = 0.01 * jax.random.uniform(key, error.shape)
  value = jnp.mean(jnp.square(error + noise)) * batch["scale"]
  return value, {"error": jnp.mean(jnp.abs(error)), "seen": batch["step"] * 1.0}


def evaluate(params, batch, key):
  del key
  return {"error": jnp.mean(jnp.abs(predict(params, batch["x"]) - batch["y"]))}


TASK = Task(init=init, loss=loss, evaluate=evaluate)
CONFIG = loop.TrainConfig(
  steps=12,
  learning_rate=1e-2,
  warmup_steps=3,
  schedule="cosine",
  weight_decay=1e-2,
  log_every=2,
  eval_every=5,
  save_every=4,
)


class Batches:
  """Deterministic batches with a resumable position."""

  def __init__(self, rows=16, bad_step=None, delay=0.0, end=10**9):
    self.index, self.rows, self.bad_step, self.delay = 0, rows, bad_step, delay
    self.end = end

  def __iter__(self):
    return self

  def __next__(self):
    if self.index == self.end:
      raise StopIteration
    time.sleep(self.delay)
    rng = np.random.default_rng([7, self.index])
    x = rng.normal(size=(self.rows, 6)).astype(np.float32)
    y = np.sin(x @ np.ones((6, 8), np.float32))
    if self.index == self.bad_step:
      x[1] = np.nan
    self.index += 1
    clip = np.full((self.rows, 2), -1)
    clip[:2, 0] = self.index, 3
    return {"x": x, "y": y, "scale": np.float32(1.0), "clip_N": clip}

  def get_state(self):
    return {"index": self.index}

  def set_state(self, state):
    self.index = state["index"]


def run(
  workdir, config=CONFIG, batches=None, mesh=None, rules=RULES, profile=None, **setup
):
  """Trains the toy in workdir/toy. setup: further fields of a loop.Setup."""
  return loop.train(
    loop.Setup(TASK, rules, batches or Batches(), **setup),
    config,
    pathlib.Path(workdir) / "toy",
    mesh or sharding.make_mesh(devices=jax.devices()[:1]),
    seed=3,
    profile=profile,
  )


def rows_of(workdir):
  path = pathlib.Path(workdir) / "toy" / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def assert_equal(first, second):
  paths = jax.tree_util.tree_leaves_with_path(first)
  for (path, a), b in zip(paths, jax.tree.leaves(second), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_learns_logs_and_evaluates(tmp_path):
  seen = []

  def on_eval(step, ema, writer):
    seen.append((step, writer.__class__.__name__, float(predict(ema, jnp.ones(6))[0])))

  config = dataclasses.replace(CONFIG, steps=60, save_every=100, log_every=10)
  state = run(
    tmp_path,
    config,
    eval_batches=[b for b, _ in zip(Batches(), range(3), strict=False)],
    on_eval=on_eval,
    flops_per_step=1e6,
    tokens_per_step=64,
  )
  assert int(state.step) == 60
  rows = rows_of(tmp_path)
  logged = [row for row in rows if "loss" in row]
  evaluated = [row for row in rows if "eval/error" in row]
  assert [row["step"] for row in logged] == list(range(10, 61, 10))
  assert [row["step"] for row in evaluated] == list(range(5, 61, 5))
  assert [step for step, *_ in seen] == list(range(5, 61, 5))
  assert logged[-1]["loss"] < 0.8 * logged[0]["loss"]
  assert logged[0]["seen"] == pytest.approx(4.5)  # mean of steps 0..9
  assert logged[0].keys() >= {
    "seconds_per_step", "tokens_per_second", "tflops_per_device", "data_wait",
    "grad_norm", "learning_rate", "progress", "eta_seconds",
  }  # fmt: skip
  assert "mfu" not in logged[0]  # no peak is known for a CPU
  assert (tmp_path / "toy" / "checkpoints" / "60").is_dir()


@pytest.mark.slow
def test_finished_run_returns_at_once(tmp_path):
  state = run(tmp_path)

  class Unread(Batches):
    def __next__(self):
      raise AssertionError("a finished run read data")

  again = run(tmp_path, batches=Unread())
  assert_equal(state, again)
  with pytest.raises(ValueError, match="step 12, beyond the 10 steps"):
    run(tmp_path, dataclasses.replace(CONFIG, steps=10))


@pytest.mark.slow
def test_resume_is_bitwise_equal(tmp_path):
  whole = run(tmp_path / "whole", eval_batches=[next(Batches())])
  with pytest.raises(ValueError, match="data ended after 7 of 12 steps"):
    run(
      tmp_path / "cut",
      dataclasses.replace(CONFIG, save_every=1),
      batches=Batches(end=7),
      eval_batches=[next(Batches())],
    )
  resumed = run(tmp_path / "cut", eval_batches=[next(Batches())])
  assert_equal(whole, resumed)
  timeless = [
    [
      {k: v for k, v in row.items() if not re.match("goodput|data_wait|.*second", k)}
      for row in rows_of(tmp_path / name)
    ]
    for name in ("whole", "cut")
  ]
  assert timeless[0] == timeless[1]


@pytest.mark.slow
@pytest.mark.parametrize("bad_step", [0, 6])
def test_non_finite_loss_stops(tmp_path, bad_step):
  config = dataclasses.replace(CONFIG, save_every=1, keep=20, max_skipped=0)
  clips = ", ".join(f"'c{i}'" for i in sorted({3, bad_step + 1}))
  message = rf"loss is nan at step {bad_step + 1}; clips of its batch: \[{clips}\]"
  with pytest.raises(loop.NonFiniteError, match=message):
    run(
      tmp_path,
      config,
      batches=Batches(bad_step=bad_step),
      names=[f"c{i}" for i in range(20)],
    )
  saved = {int(p.name) for p in (tmp_path / "toy" / "checkpoints").iterdir()}
  assert saved == set(range(1, bad_step + 1))
  state = run(tmp_path, config)  # without the bad batch it goes on
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def finish(*processes):
  """Logs of processes that must exit with code 0."""
  try:
    logs = [process.communicate(timeout=600)[1] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0] * len(logs), logs
  return logs


def cache_compilations(folder):
  """Most of the time of these tests would be compiling the same few functions."""
  jax.config.update("jax_compilation_cache_dir", folder and str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0 if folder else 1)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
  folder = tmp_path_factory.mktemp("cache")
  cache_compilations(folder)
  yield folder
  cache_compilations(None)


def start_process(*arguments, script=__file__, devices=1):
  tests = pathlib.Path(__file__).parents[1]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    # Otherwise compiled as here: results are compared bit for bit.
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
    f"--xla_force_host_platform_device_count={devices}",
    "PYTHONPATH": f"{tests.parent}:{tests}",
  }
  command = [sys.executable, script, *map(str, arguments)]
  return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def main(workdir, steps, delay, cache=None):
  """A run in a process of its own, with a save under way most of the time."""
  logging.set_verbosity(logging.INFO)
  if cache:
    cache_compilations(cache)
  config = dataclasses.replace(CONFIG, steps=int(steps), save_every=3)
  state = run(workdir, config, batches=Batches(delay=float(delay)))
  np.savez(pathlib.Path(workdir) / "state.npz", *jax.tree.leaves(state))


def wait_for_step(workdir, step):
  path = pathlib.Path(workdir) / "toy" / "metrics.jsonl"
  for _ in range(3000):
    if path.exists() and any(row["step"] >= step for row in rows_of(workdir)):
      return
    time.sleep(0.01)
  raise AssertionError(f"no step {step} in {path}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp("undisturbed")
  main(folder, 60, 0)
  with np.load(folder / "state.npz") as arrays:
    return dict(arrays)


@pytest.mark.slow
def test_killed_run_goes_on_bitwise_equal(tmp_path, undisturbed, cache):
  process = start_process(tmp_path, 60, 0.03, cache)
  wait_for_step(tmp_path, 10)
  time.sleep(np.random.default_rng().uniform(0, 0.5))
  process.kill()
  process.communicate()
  assert not (tmp_path / "state.npz").exists()
  assert any((tmp_path / "toy" / "checkpoints").iterdir())
  main(tmp_path, 60, 0)
  with np.load(tmp_path / "state.npz") as arrays:
    for name, expected in undisturbed.items():
      np.testing.assert_array_equal(arrays[name], expected)
  assert [row["step"] for row in rows_of(tmp_path)] == list(range(2, 61, 2))


@pytest.mark.slow
def test_sigterm_saves_and_exits(tmp_path, undisturbed, cache):
  process = start_process(tmp_path, 60, 0.03, cache)
  wait_for_step(tmp_path, 4)
  process.terminate()
  (log,) = finish(process)
  stopped = int(log.split("stopped by a signal; step ")[1].split()[0])
  checkpoints = {int(p.name) for p in (tmp_path / "toy" / "checkpoints").iterdir()}
  assert 4 <= stopped < 60 and stopped == max(checkpoints)
  main(tmp_path, 60, 0)
  with np.load(tmp_path / "state.npz") as arrays:
    for name, expected in undisturbed.items():
      np.testing.assert_array_equal(arrays[name], expected)


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 12])
def test_sigint_finishes_the_step(tmp_path, step):
  class Interrupted(Batches):
    def __next__(self):
      if self.index == step - 1:
        signal.raise_signal(signal.SIGINT)
      return super().__next__()

  before = signal.getsignal(signal.SIGINT)
  evaluation = {"eval_batches": [next(Batches())]}
  with pytest.raises(loop.Preempted) as error:
    run(tmp_path, batches=Interrupted(), **evaluation)
  assert error.value.code == 0
  assert signal.getsignal(signal.SIGINT) is before
  assert (tmp_path / "toy" / "checkpoints" / str(step)).is_dir()
  assert int(run(tmp_path, **evaluation).step) == 12
  evaluated = [row["step"] for row in rows_of(tmp_path) if "eval/error" in row]
  # The evaluation that the interrupted step owed is made up for, the last one's too.
  assert evaluated == [5, 10, 12]


def update_once(config, batch):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  built = loop.build(TASK, config, mesh, RULES, seed=3)
  state = built.init()
  batch = {k: v for k, v in batch.items() if not k.startswith("clip")}
  return built.update(state, sharding.shard_batch(batch, mesh))


@pytest.mark.slow
def test_gradient_accumulation_equals_the_whole_batch(monkeypatch):
  batch = next(Batches())

  def quiet(params, batch, key):
    del key
    value = jnp.mean(jnp.square(predict(params, batch["x"]) - batch["y"]))
    return value, {"rows": jnp.float32(len(batch["x"]))}

  monkeypatch.setattr(sys.modules[__name__], "TASK", TASK._replace(loss=quiet))
  whole, metrics = update_once(CONFIG, batch)
  config = dataclasses.replace(CONFIG, grad_accumulation=4)
  parts, metrics_of_parts = update_once(config, batch)
  assert metrics_of_parts["rows"] == 4 and metrics["rows"] == 16
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose(metrics[name], metrics_of_parts[name], rtol=1e-6)
  # Adam's first update is the gradient's sign, so compare the moments.
  for a, b in zip(
    jax.tree.leaves(whole.opt_state), jax.tree.leaves(parts.opt_state), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)
  with pytest.raises(ValueError, match="16 rows does not split into 3"):
    update_once(dataclasses.replace(CONFIG, grad_accumulation=3), batch)


def test_accumulation_keeps_one_copy_of_the_gradients():
  """Microbatches of scanned layers add to it in place, layer by layer."""
  kernel = np.zeros((8, 64, 64), np.float32)

  def loss(params, batch, key):
    x, _ = jax.lax.scan(
      lambda x, kernel: (jnp.tanh(x @ kernel), None), batch["x"], params["kernel"]
    )
    return jnp.mean(x), {}

  def temporaries(parts):
    config = dataclasses.replace(CONFIG, grad_accumulation=parts)
    built = loop.build(
      Task(lambda key: {"kernel": jnp.asarray(kernel)}, loss, evaluate),
      config,
      sharding.make_mesh(devices=jax.devices()[:1]),
      [("kernel", PartitionSpec())],
      seed=0,
    )
    batch = {"x": jax.ShapeDtypeStruct((2 * parts, 64), jnp.float32)}
    lowered = built.update.lower(built.abstract, batch)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporaries(4) < temporaries(1) + 0.1 * kernel.nbytes


@pytest.mark.slow
def test_ema_warms_up():
  state, _ = update_once(CONFIG, next(Batches()))
  before = init(step.step_key(3, 0, step.INIT))
  for old, new, ema in zip(
    *map(jax.tree.leaves, (before, state.params, state.ema)), strict=True
  ):
    np.testing.assert_allclose(ema, 0.1 * old + 0.9 * new, atol=1e-6)


def config_of(**options):
  return dataclasses.replace(CONFIG, steps=100, warmup_steps=10, **options)


def test_schedules():
  rates = {
    name: np.array(
      jax.vmap(optim.make_schedule(config_of(schedule=name, decay_steps=20), 2.0))(
        jnp.arange(100)
      )
    )
    for name in optim.SCHEDULES
  }
  for rate in rates.values():
    np.testing.assert_allclose(rate[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
  np.testing.assert_allclose(rates["constant"][10:], 2.0)
  np.testing.assert_allclose(rates["cosine"][55], 1.0, rtol=1e-5)
  assert 0 < rates["cosine"][-1] < 1e-2
  np.testing.assert_allclose(rates["wsd"][10:81], 2.0)
  np.testing.assert_allclose(rates["wsd"][[90, 99]], [1.0, 0.1], rtol=1e-5)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"schedule": "linear"}, "'linear' is none of"),
    ({"schedule": "wsd"}, "needs decay_steps"),
    ({"schedule": "wsd", "decay_steps": 95}, "10 and decay_steps 95 do not fit"),
    ({"learning_rates": (("nothing", 1.0),)}, r"name no param: \['nothing'\]"),
  ],
)  # fmt: skip
def test_wrong_optimizer_settings(options, message):
  with pytest.raises(ValueError, match=message):
    optim.make(config_of(**options), jax.eval_shape(init, jax.random.key(0)))


def test_only_kernels_and_embeddings_decay():
  params = {
    "scanned": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))},
    "norm": {"scale": jnp.ones((3, 2))},
    "table": {"embedding": jnp.ones((5, 2))},
  }
  optimizer, _ = optim.make(config_of(schedule="constant", weight_decay=0.5), params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
  moved = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    if np.any(leaf)
  }
  assert moved == {"scanned/kernel", "table/embedding"}


def test_discriminator_has_its_own_rate_and_clipping():
  params = {
    "generator": {"kernel": jnp.ones(4)},
    "discriminator": {"kernel": jnp.ones(4)},
  }
  config = config_of(
    schedule="constant",
    clip_norm=1.0,
    weight_decay=0.0,
    learning_rates=((r"discriminator/.*", 4e-2),),
  )
  optimizer, _ = optim.make(config, params)
  gradients = {
    "generator": {"kernel": jnp.full(4, 0.1)},
    "discriminator": {"kernel": jnp.full(4, 1e6)},
  }
  state = optimizer.init(params)
  updates, state = jax.jit(optimizer.update)(gradients, state, params)
  # Update 0 of a warm-up of 10; Adam's first update is the sign of the gradient.
  np.testing.assert_allclose(updates["generator"]["kernel"], -1e-3, rtol=1e-4)
  np.testing.assert_allclose(updates["discriminator"]["kernel"], -4e-3, rtol=1e-4)
  moments = {
    name: optax.tree_utils.tree_get(state.inner_states[name], "mu")[part]["kernel"][0]
    for name, part in (("rest", "generator"), (r"discriminator/.*", "discriminator"))
  }
  np.testing.assert_allclose(moments["rest"], 0.1 * 0.1, rtol=1e-5)  # not clipped
  np.testing.assert_allclose(moments[r"discriminator/.*"], 0.1 * 0.5, rtol=1e-5)


if __name__ == "__main__":
  main(*sys.argv[1:])
