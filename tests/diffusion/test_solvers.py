"""Solvers: order of convergence, an analytic Gaussian, guidance, schedule."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import guidance, noise_process, schedules, solvers

DIM = 6
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "schedulers.npz"


def solve(velocity, x, levels, method="euler", noise=None):
  """Solves dx/dt = velocity(x, t) of a flow."""

  def data(x, t, _):
    return noise_process.to_x0(velocity(x, t), x, t)

  return solvers.integrate(data, x, solvers.make_table(method, levels), noise)


def gaussian():
  """Mean, basis and variances along it: anisotropic (condition 100) and rotated."""
  rng = np.random.default_rng(3)
  basis, _ = np.linalg.qr(rng.standard_normal((DIM, DIM)))
  return rng.standard_normal(DIM), basis, np.geomspace(0.04, 4.0, DIM)


@functools.partial(jax.jit, static_argnums=(1, 2))
def solve_gaussian(x_BD, steps, method):
  """Samples by E[eps - x0 | x_t] of Gaussian data: the best that can be learnt."""
  mean, basis, variance = (jnp.asarray(x, jnp.float32) for x in gaussian())

  def velocity(x_BD, t):
    # x_t has variance (1 - t)^2 v + t^2 along each direction of the basis.
    y_BD = (x_BD - (1 - t) * mean) @ basis / ((1 - t) ** 2 * variance + t**2)
    x0_BD = mean + (1 - t) * (variance * y_BD) @ basis.T
    eps_BD = t * y_BD @ basis.T
    return eps_BD - x0_BD

  return solve(velocity, x_BD, schedules.uniform(steps), method)


def whiten(covariance):
  """Identity if it is the covariance of `gaussian`, relative in every direction."""
  _, basis, variance = gaussian()
  return basis.T @ covariance @ basis / np.sqrt(variance[:, None] * variance)


@pytest.mark.parametrize(
  "method, tolerance",
  # The multistep methods end with a step of first order.
  [("euler", 3e-2), ("heun", 2e-3), ("ddim", 3e-2), ("dpmpp_2m", 5e-3)]
  + [("unipc", 5e-3)],
)
def test_solves_a_gaussian(method, tolerance):
  """The flow is affine, x -> A x + b, so N(0, I) goes to exactly N(b, A A^T)."""
  corners = np.concatenate([np.zeros((1, DIM)), np.eye(DIM)]).astype(np.float32)
  out = np.asarray(solve_gaussian(corners, 200, method), np.float64)
  b, A = out[0], (out[1:] - out[0]).T
  np.testing.assert_allclose(b, gaussian()[0], atol=tolerance)
  np.testing.assert_allclose(whiten(A @ A.T), np.eye(DIM), atol=tolerance)


def test_samples_have_the_moments_of_a_gaussian():
  mean, basis, variance = gaussian()
  count = 4096
  noise = jax.random.normal(jax.random.key(0), (count, DIM))
  samples = np.asarray(solve_gaussian(noise, 64, "heun"), np.float64)
  error = (samples.mean(0) - mean) @ basis / np.sqrt(variance)
  assert np.abs(error).max() < 4 / np.sqrt(count)
  whitened = whiten(np.cov(samples.T))
  assert np.abs(whitened - np.eye(DIM)).max() < 6 * np.sqrt(2 / count)


def slopes(method, levels_of, steps, exact):
  """Orders of convergence on dx/dt = x cos(3 t), between each two numbers of steps."""

  def error(n):
    out = solve(lambda x, t: x * jnp.cos(3 * t), jnp.ones(()), levels_of(n), method)
    return abs(float(out) - exact)

  errors = np.array([error(n) for n in steps])
  return np.log2(errors[:-1] / errors[1:])


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order):
  exact = np.exp(-np.sin(3.0) / 3)  # from t = 1 to 0
  found = slopes(method, schedules.uniform, (32, 64, 128), exact)
  np.testing.assert_allclose(found, order, atol=0.3)


@pytest.mark.parametrize("method", ["dpmpp_2m", "unipc"])
def test_multistep_methods_are_of_second_order_at_least(method):
  # Without the ends, where their steps in log(alpha / sigma) are infinite.
  exact = np.exp((np.sin(0.3) - np.sin(2.7)) / 3)
  found = slopes(method, lambda n: np.linspace(0.9, 0.1, n + 1), (16, 32, 64), exact)
  assert np.all(found > 1.7)


@pytest.mark.parametrize("method", sorted(set(solvers.METHODS) - {"ddpm"}))
def test_straight_paths_need_one_step(method):
  noise, data = jnp.arange(3.0), jnp.array([5.0, -1.0, 2.0])
  out = solve(lambda x, t: noise - data, noise, schedules.uniform(1, 3.0), method)
  np.testing.assert_allclose(out, data, atol=1e-6)


@pytest.mark.parametrize("method, calls", [("euler", 4), ("heun", 7)])
def test_network_is_never_asked_about_clean_data(method, calls):
  levels = []

  def velocity(x, t):
    jax.debug.callback(lambda t: levels.append(float(t)), t)
    return jnp.zeros_like(x)

  solve(velocity, jnp.zeros(2), schedules.uniform(4), method)
  jax.effects_barrier()
  assert len(levels) == calls
  assert min(levels) == pytest.approx(0.25) and max(levels) == 1.0


def test_unknown_method():
  with pytest.raises(ValueError, match="'rk4' is not one of"):
    solvers.make_table("rk4", schedules.uniform(2))


def test_guidance():
  conditional, unconditional = jnp.array([1.0, 2.0]), jnp.array([0.5, 4.0])
  for scale, expected in [(0, [0.5, 4.0]), (1, [1.0, 2.0]), (3, [2.0, -2.0])]:
    np.testing.assert_allclose(
      guidance.guide(conditional, unconditional, scale), expected, atol=1e-6
    )


def test_schedule():
  levels = np.asarray(schedules.uniform(8))
  np.testing.assert_allclose(levels, np.linspace(1, 0, 9), atol=1e-7)
  shifted = np.asarray(schedules.uniform(8, 3.0))
  assert shifted.dtype == np.float64 and shifted.shape == (9,)
  assert shifted[0] == 1.0 and shifted[-1] == 0.0
  assert np.all(np.diff(shifted) < 0)
  np.testing.assert_allclose(shifted, 3 * levels / (1 + 2 * levels), atol=1e-6)


@pytest.mark.parametrize("name", ["flow_match_euler", "flow_unipc"])
@pytest.mark.parametrize(
  "steps, shift", [(1, 3.0), (4, 8.0), (8, 3.0), (30, 3.3), (50, 5.0), (77, 1.0)]
)
def test_levels_equal_diffusers(name, steps, shift):
  with np.load(GOLDEN) as golden:
    key = f"schedule/{name}/{steps}/{shift:g}"
    level, timestep = golden[f"{key}/level"], golden[f"{key}/timestep"]
  ours = schedules.levels(name, steps, shift)
  np.testing.assert_allclose(ours.level, level, rtol=2e-7, atol=0)
  np.testing.assert_allclose(1000 * ours.time, timestep, rtol=2e-7)
  if name == "flow_unipc":  # whole ones; near 1 the share of the data is small
    np.testing.assert_array_equal(np.rint(1000 * ours.time), timestep)
    np.testing.assert_array_equal(ours.level.astype(np.float32), level)


def test_schedules_differ_from_clip_to_clip():
  shift, start = np.array([3.0, 5.0, 3.0]), np.array([1.0, 1.0, 0.6])
  for name in schedules.SCHEDULES:
    made = schedules.levels(name, 7, shift, start)
    assert made.level.shape == (8, 3) and made.time.shape == (7, 3)
    for i in range(2):
      alone = schedules.levels(name, 7, shift[i])
      np.testing.assert_array_equal(made.level[:, i], alone.level)
      np.testing.assert_array_equal(made.time[:, i], alone.time)
    assert np.all(np.diff(made.level, axis=0) < 0)
    np.testing.assert_allclose(made.level[0], start, atol=2e-6)
    assert np.all(made.level[-1] == 0)


# What golden/make_schedulers.py ran: process, target, eta.
GOLDEN_CASES = {
  "euler": ("flow", "velocity", 0.0),
  "unipc": ("flow", "velocity", 0.0),
  "dpmpp_2m": ("flow", "velocity", 0.0),
  "unipc-eps": ("ddpm_linear", "eps", 0.0),
  "dpmpp_2m-eps": ("ddpm_linear", "eps", 0.0),
  "ddpm-eps": ("ddpm_linear", "eps", 0.0),
  "ddpm-v": ("ddpm_cosine", "v", 0.0),
  "ddim-eps": ("ddpm_linear", "eps", 0.0),
  "ddim-v-eta": ("ddpm_cosine", "v", 0.7),
}


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_trajectory_equals_diffusers(name):
  process, target, eta = GOLDEN_CASES[name]
  with np.load(GOLDEN) as golden:
    levels, draws, states = (
      golden[f"{name}/{k}"] for k in ("levels", "draws", "states")
    )
  method = name.split("-")[0]
  table = solvers.make_table(method, levels, process, eta)
  stochastic = solvers.Options(method=method, eta=eta).stochastic

  seen = []

  def data(x, t, _):
    jax.debug.callback(seen.append, x, ordered=True)
    predicted = jnp.sin(1.5 * x) * (0.3 + t) + 0.5 * x - 0.2 * t
    return noise_process.to_x0(predicted, x, t, target, process)

  noise = (lambda i: jnp.asarray(draws[1:])[i]) if stochastic else None
  out = solvers.integrate(data, jnp.asarray(draws[0]), table, noise)
  jax.effects_barrier()
  for ours, state in zip([*seen[1:], out], states, strict=True):
    assert np.linalg.norm(ours - state) <= 1e-5 * np.linalg.norm(state)


@pytest.mark.slow
def test_levels_of_their_own_for_each_clip():
  x = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
  shift = np.array([1.0, 4.0])

  def velocity(x, t):
    return x * jnp.cos(3 * t)

  def data(x, t, _):
    return noise_process.to_x0(velocity(x, t[:, None]), x, t[:, None])

  for method in ("heun", "unipc"):
    table = solvers.make_table(method, schedules.uniform(7, shift))
    out = solvers.integrate(data, x, table, expand=lambda c: c[:, None])
    for i in range(2):
      alone = solve(velocity, x[i], schedules.uniform(7, shift[i]), method)
      np.testing.assert_allclose(out[i], alone, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("process", ["ddpm_linear", "ddpm_cosine"])
@pytest.mark.parametrize("method, eta", [("ddpm", 0.0), ("ddim", 1.0)])
def test_ancestral_samples_have_the_moments_of_the_data(process, method, eta):
  """Algorithm 2 of arXiv:2006.11239, all steps, with the best eps of Gaussian data."""
  mean, deviation, count = 1.5, 0.4, 8192

  def data(x, t, _):
    alpha, sigma = noise_process.alpha_sigma(process, t)
    variance = alpha**2 * deviation**2 + sigma**2
    eps = sigma * (x - alpha * mean) / variance
    return noise_process.to_x0(eps, x, t, "eps", process)

  table = solvers.make_table(method, schedules.uniform(1000), process, eta)
  x = jax.random.normal(jax.random.key(0), (count,))

  def noise(i):
    return jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (count,))

  samples = np.asarray(solvers.integrate(data, x, table, noise))
  assert abs(samples.mean() - mean) < 4 * deviation / np.sqrt(count)
  assert abs(samples.std() / deviation - 1) < 0.04


def two_clips():
  """Predictions of two clips in a row and padding, and the mean over each clip."""
  rng = np.random.default_rng(0)
  conditional, unconditional = rng.standard_normal((2, 1, 9, 4)).astype(np.float32)
  clips = [slice(0, 5), slice(5, 8)]

  def clip_mean(x_BL):
    means = [jnp.full_like(x_BL[:, c], x_BL[:, c].mean()) for c in clips]
    return jnp.concatenate([*means, jnp.zeros_like(x_BL[:, 8:])], axis=1)

  return conditional, unconditional, clips, clip_mean


def test_rescaled_guidance_has_the_deviation_of_the_conditional():
  conditional, unconditional, clips, clip_mean = two_clips()
  options = solvers.Options(guidance_rescale=1.0)
  out = guidance.guide(conditional, unconditional, 5.0, options, clip_mean)
  plain = guidance.guide(conditional, unconditional, 5.0)
  half = guidance.guide(
    conditional, unconditional, 5.0, solvers.Options(guidance_rescale=0.5), clip_mean
  )
  for clip in clips:
    expected = plain[:, clip] * conditional[:, clip].std() / plain[:, clip].std()
    np.testing.assert_allclose(out[:, clip], expected, rtol=1e-4)
    np.testing.assert_allclose(
      half[:, clip], 0.5 * (plain + out)[:, clip], rtol=1e-4, atol=1e-6
    )


def test_cfg_zero_projects_each_clip():
  conditional, unconditional, clips, clip_mean = two_clips()
  options = solvers.Options(cfg_zero=True)
  out = guidance.guide(conditional, unconditional, 3.0, options, clip_mean)
  for clip in clips:
    c, u = conditional[:, clip], unconditional[:, clip]
    projected = np.sum(c * u) / np.sum(u * u) * u
    expected = projected + 3.0 * (c - projected)
    np.testing.assert_allclose(out[:, clip], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["heun", "unipc"])
def test_steps_one_by_one_are_the_whole(method):
  x = jnp.array([1.1, -0.3, 0.7])

  def data(x, t, index):
    return jnp.sin(3 * x) * (1 + t) + index

  table = solvers.make_table(method, schedules.uniform(5))
  state = solvers.start(x)
  for index in range(len(table.level)):
    row = jax.tree.map(lambda c, index=index: jnp.asarray(c[index]), table)
    state = solvers.step(state, row, data(state.x, row.level, index))
  whole = solvers.integrate(data, x, table)
  np.testing.assert_allclose(state.x, whole, rtol=1e-5)


@pytest.mark.parametrize(
  "options, process, target, message",
  [
    ({}, "flow", "eps", "starts from noise alone"),
    ({"cfg_zero": True}, "ddpm_linear", "velocity", "cfg_zero is for the velocity"),
    ({"cfg_zero": True}, "flow", "v", "cfg_zero is for the velocity"),
    ({"schedule": "flow_unipc"}, "ddpm_linear", "eps", "is for a flow"),
    ({"guidance_scale": 1.0, "cfg_zero": True}, "flow", "velocity", "cfg_zero does no"),
    (
      {"guidance_scale": 1.0, "guidance_rescale": 0.5},
      *("flow", "velocity", "guidance_rescale does nothing"),
    ),
    (
      {"guidance_scale": 1.0, "guidance_interval": (0.2, 1.0)},
      *("flow", "velocity", "guidance_interval does nothing"),
    ),
  ],
)
def test_options_that_make_no_sense_together(options, process, target, message):
  with pytest.raises(ValueError, match=message):
    solvers.Options(**options).check(process, target)


def test_a_negative_prompt_needs_guidance():
  solvers.Options().check("flow", "velocity", "blurry")
  with pytest.raises(ValueError, match="negative_prompt does nothing"):
    solvers.Options(guidance_scale=1.0).check("flow", "velocity", "blurry")


@pytest.mark.parametrize(
  "wrong",
  [
    {"steps": 0},
    {"method": "rk4"},
    {"eta": 2.0, "method": "ddim"},
    {"eta": 0.5},
    {"shift": 0.0},
    {"schedule": "karras"},
    {"guidance_interval": (0.6, 0.4)},
    {"guidance_rescale": 1.5},
    {"zero_steps": -1},
    {"reuse": -0.1},
    {"reuse": 0.1, "guidance_interval": (0.2, 1.0)},
  ],
)
def test_options_out_of_range(wrong):
  with pytest.raises(ValueError, match=f"sampling {next(iter(wrong))}"):
    solvers.Options(**wrong)


def test_a_row_is_one_clip_by_default():
  conditional, unconditional, _, _ = two_clips()
  options = solvers.Options(cfg_zero=True)

  def row_mean(x_BL):
    return jnp.full_like(x_BL, x_BL.mean())

  out = guidance.guide(conditional, unconditional, 3.0, options)
  expected = guidance.guide(conditional, unconditional, 3.0, options, row_mean)
  np.testing.assert_allclose(out, expected, rtol=1e-5)
