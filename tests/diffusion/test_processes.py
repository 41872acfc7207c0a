"""Which noise process, target and sampler go together: each trains, and samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_params import random_params

from sora_jax.diffusion import noise_process, schedules, solvers
from sora_jax.models.caption_encoder import TextEncoderConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.packing.packed_row import RowSize
from sora_jax.packing.planner import Budget
from sora_jax.sampling import integrate, sample_batch
from sora_jax.tasks import dit as dit_task

MODEL = DiTConfig(
  width=16, depth=1, heads=2, mlp_width=16, channels=2, text_width=8, frequency_width=8
)
TEXT = TextEncoderConfig(vocab_size=300, width=8, depth=1, heads=2)
SEGMENTS = 2
ALL = solvers.METHODS
# process, target: the methods that sample what it has learnt.
TABLE = {
  ("flow", "velocity"): ALL,
  ("flow", "eps"): (),  # at t = 1 there is no data in x, nor in a prediction of eps
  ("flow", "x0"): ALL,
  ("flow", "v"): ALL,
  ("ddpm_linear", "velocity"): ALL,
  ("ddpm_linear", "eps"): ALL,
  ("ddpm_linear", "x0"): ALL,
  ("ddpm_linear", "v"): ALL,
  ("ddpm_cosine", "velocity"): ALL,
  ("ddpm_cosine", "eps"): ALL,
  ("ddpm_cosine", "x0"): ALL,
  ("ddpm_cosine", "v"): ALL,
}
# These two have the DiT, the others two layers: what goes together does not hang on the
# network.
WITH_DIT = (("flow", "velocity"), ("ddpm_linear", "x0"))


def rows():
  """One row: a clip of 6 tokens with a given one, one of 3, and padding."""
  rng = np.random.default_rng(0)
  segment_L = np.array([1] * 6 + [2] * 3 + [0])
  packed = {
    "patch_LP": rng.standard_normal((10, MODEL.patch_width)).astype(np.float32),
    "segment_L": segment_L,
    "group_L": np.array([1] + [0] * 5 + [2] * 3 + [0]),
    "position_L3": rng.integers(0, 3, (10, 3)).astype(np.float32),
    "text_S": rng.integers(3, 300, 4),
    "text_segment_S": np.array([1, 1, 2, 0]),
    "text_position_S": np.array([0, 1, 0, 0]),
  }
  names = ("text_S", "text_segment_S", "text_position_S")
  size = RowSize(Budget(10, 4, SEGMENTS), MODEL.patch_width)
  sampling = sample_batch.empty_batch(1, size).row(0).sampling
  start_LP = rng.standard_normal(packed["patch_LP"].shape).astype(np.float32)
  sampling |= {
    "start_LP": start_LP,
    "seed_L": segment_L.astype(np.uint32),
    "token_L": np.arange(10, dtype=np.uint32),
    "guidance_scale_N": np.full(SEGMENTS, 2.0, np.float32),
  }
  negative = {name: packed[name] for name in names}
  batch = sample_batch.SampleBatch(packed, negative, sampling)
  return jax.tree.map(lambda x: jnp.asarray(x)[None], batch)


def task_of(process, target, **kwargs):
  config = dit_task.DiTLossConfig(process=process, target=target, **kwargs)
  return dit_task.make(MODEL, TEXT, config, SEGMENTS)


@functools.cache
def params(seed):
  init = task_of("flow", "velocity").init
  return random_params(init, jax.random.key(0), seed=seed, scale=0.3)


def two_layers(config, params, x_BLP, t_BG, context, dtype, *_, **__):
  """What `dit_task.predict` does, by a network that compiles in no time."""
  embed, head = params["dit"]["patch_embed"], params["dit"]["head"]
  t_BL1 = jnp.take_along_axis(t_BG, context.group_BL, axis=1)[..., None]
  hidden_BLD = x_BLP @ embed["kernel"] + t_BL1 + context.text_BSE.mean()
  return jnp.cos(hidden_BLD + embed["bias"]) @ head["kernel"] + head["bias"]


@pytest.fixture
def network(monkeypatch, process, target):
  """Replaces the DiT by two layers, but for the pairs of `WITH_DIT`."""
  if (process, target) not in WITH_DIT:
    monkeypatch.setattr(dit_task, "predict", two_layers)


def test_the_table_is_whole():
  assert set(TABLE) == {
    (p, t) for p in noise_process.PROCESSES for t in noise_process.TARGETS
  }


@pytest.mark.slow
@pytest.mark.parametrize("process, target", TABLE)
@pytest.mark.usefixtures("network")
def test_trains(process, target):
  """A step down the gradient lowers the loss."""
  timesteps = {"flow": "mode", "ddpm_linear": "discrete", "ddpm_cosine": "uniform"}
  task = task_of(
    process,
    target,
    timesteps=timesteps[process],
    shift=2.0,
    shift_tokens=4,
    min_snr_gamma=5.0,
  )
  step = jax.jit(
    jax.value_and_grad(
      lambda p: task.loss(p, rows().packed, jax.random.key(1)), has_aux=True
    )
  )
  (before, values), gradients = step(params(0))
  size = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
  lower = jax.tree.map(lambda p, g: p - 1e-2 * g / size, params(0), gradients)
  (after, _), _ = step(lower)
  assert np.isfinite(before) and after < before
  np.testing.assert_allclose(values["given"], 1 / 9, rtol=1e-5)


@functools.cache
def program(process, target):
  return jax.jit(
    functools.partial(
      integrate.integrate,
      integrate.Networks(MODEL, TEXT, jnp.float32, process, target),
    ),
    static_argnames="options",
  )


def sampled(process, target, method, params=None, **kwargs):
  # Five calls each, so that methods share a program.
  steps = 3 if method == "heun" else 5
  options = solvers.Options(steps=steps, method=method, **kwargs)
  options.check(process, target)
  levels = schedules.uniform(steps, np.ones((1, SEGMENTS)))
  table = solvers.make_table(method, levels, process, options.eta)
  # The program of the random methods does for all: the others have noise of size 0.
  options = solvers.Options(method="ddpm", **kwargs)
  run = program(process, target)
  return np.asarray(run(params, rows(), table, options=options))


@pytest.mark.slow
@pytest.mark.parametrize("process, target", TABLE)
@pytest.mark.usefixtures("network")
def test_samples(process, target):
  if not TABLE[process, target]:
    with pytest.raises(ValueError, match="starts from noise alone"):
      sampled(process, target, "euler", params(0))
    return
  batch = {k: np.asarray(v) for k, v in (rows().packed | rows().sampling).items()}
  real, given = batch["segment_L"] > 0, batch["group_L"] % 2 == 1
  methods = TABLE[process, target]
  whole = {m: sampled(process, target, m, params(0)) for m in methods}
  for method, out in whole.items():
    assert np.all(np.isfinite(out[real])), method
    np.testing.assert_array_equal(out[given], batch["start_LP"][given])
  found = {m: out[real] for m, out in whole.items()}
  for out in found.values():
    same = [m for m in found if np.array_equal(found[m], out)]
    assert len(same) == 1 or set(same) == {"euler", "ddim"}, same


@pytest.mark.slow
def test_a_network_that_says_zero():
  """Samples follow by hand."""
  zeros = jax.tree.map(np.zeros_like, params(0))
  noise = np.asarray(rows().sampling["start_LP"])
  real = np.asarray(rows().packed["segment_L"])[..., None] > 0
  # A velocity of zero leaves the noise as it is; data of zero ends in zero.
  stay = sampled("flow", "velocity", "euler", zeros)
  np.testing.assert_allclose(stay, np.where(real, noise, 0), atol=1e-6)
  given = np.asarray(rows().packed["group_L"])[..., None] % 2 == 1
  out = sampled("ddpm_linear", "x0", "ddpm", zeros)
  np.testing.assert_array_equal(out, np.where(given, noise, 0))


@pytest.mark.slow
def test_cfg_zero_stays_still_for_whole_steps(monkeypatch):
  """Heun asks twice a step: three calls are one still step and half of the next."""
  packed, _, sampling = jax.tree.map(np.asarray, rows())
  noise = sampling["start_LP"]
  noisy = (packed["group_L"] % 2 == 0) & (packed["segment_L"] > 0)
  levels = schedules.uniform(3, np.ones((1, SEGMENTS)))
  monkeypatch.setattr(dit_task, "predict", two_layers)
  run = program.__wrapped__("flow", "velocity")

  def moved(method, calls):
    options = solvers.Options(method=method, cfg_zero=True)
    table = solvers.make_table(method, levels)
    table = jax.tree.map(lambda c: c[:calls], table)
    out = np.asarray(run(params(0), rows(), table, options=options))
    return np.abs(out - noise)[noisy].max()

  assert moved("heun", 2) < 1e-6 < 1e-2 < moved("heun", 3)
  assert moved("euler", 1) < 1e-6 < 1e-2 < moved("euler", 2)


@pytest.mark.slow
def test_ddpm_learns_and_samples():
  """Algorithms 1 and 2 of arXiv:2006.11239: a network learns tokens of a Gaussian."""
  mean, deviation, count = 1.0, 0.5, 16
  tokens = ("_L", "LP", "L2", "L3")
  one = jax.tree_util.tree_map_with_path(
    lambda path, v: v[:, :9] if path[-1].key.endswith(tokens) else v, rows()
  )
  rows_B = jax.tree.map(lambda v: jnp.tile(v, (count, *[1] * (v.ndim - 1))), one)
  batch = rows_B.packed
  batch["group_L"] = 2 * (batch["segment_L"] - 1)  # none is given
  task = task_of("ddpm_linear", "eps", timesteps="discrete")
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 800))

  def update(state, step):
    params, moments = state
    data_key, key = jax.random.split(jax.random.fold_in(jax.random.key(0), step))
    shape = batch["patch_LP"].shape
    data = {"patch_LP": mean + deviation * jax.random.normal(data_key, shape)}
    (loss, _), gradients = jax.value_and_grad(task.loss, has_aux=True)(
      params, {**batch, **data}, key
    )
    updates, moments = optimizer.update(gradients, moments)
    return (optax.apply_updates(params, updates), moments), loss

  @jax.jit
  def train(params):
    start = params, optimizer.init(params)
    (params, _), losses = jax.lax.scan(update, start, jnp.arange(800))
    return params, losses

  trained, losses = train(jax.jit(task.init)(jax.random.key(0)))
  assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])
  table = solvers.make_table(
    "ddpm", schedules.uniform(1000, np.ones((count, SEGMENTS))), "ddpm_linear"
  )
  key = jax.random.key(1)
  sampling = rows_B.sampling
  sampling["start_LP"] = jax.random.normal(key, sampling["start_LP"].shape)
  sampling["seed_L"] += jnp.arange(count, dtype=jnp.uint32)[:, None] * 100
  options = solvers.Options(method="ddpm", guidance_scale=0.0)
  run = program("ddpm_linear", "eps")
  samples = np.asarray(run(trained, rows_B, table, options=options))
  assert abs(samples.mean() - mean) < 0.1 * deviation
  assert abs(samples.std() / deviation - 1) < 0.1
