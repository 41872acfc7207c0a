"""Solvers, as pure functions of a network's prediction of the data.

Every solver here is linear in what it has seen: the state, the state before it, and
the last three predictions. So a method is a table of coefficients, made in float64 from
the noise levels, and one scan runs them all. Levels may differ from clip to clip.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sora_jax.diffusion import noise_process
from sora_jax.diffusion.schedules import SCHEDULES

METHODS = ("euler", "heun", "ddpm", "ddim", "dpmpp_2m", "unipc")


def _field(default, help: str, **more):
  """A field with the help text that a command shows for it."""
  return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass(frozen=True)
class Options:
  """How to sample.

  Attributes:
    steps: of the solver.
    method: one of METHODS.
    eta: noise of the method ddim; 0 = none, 1 = about as much as ddpm.
    schedule: of the noise levels, one of SCHEDULES, see `diffusion.schedules`.
    shift, shift_tokens: of the levels, see `noise_process.resolution_shift`.
    guidance_scale: of classifier-free guidance (arXiv:2207.12598); 1 = none.
    guidance_scale_2: that of the second expert of a model which has two, for the lower
      noise levels; 0 = the same.
    guidance_interval: (low, high) noise levels where it acts (arXiv:2404.07724).
    guidance_rescale: share of the guided prediction brought back to the standard
      deviation of the conditional one (arXiv:2305.08891, section 3.4).
    cfg_zero: project the unconditional prediction on the conditional one first, and
      stay still for the first `zero_steps` steps (CFG-Zero*, arXiv:2503.18886).
    reuse: of what the blocks of the network added in an earlier step, while what enters
      them has changed by less than this share since; see
      `models.dit_cache.Reuse`. 0 = never.
  """

  steps: int = _field(32, "Steps of the solver.", least=1)
  method: str = _field("euler", "Solver.", choices=METHODS)
  eta: float = _field(0.0, "Noise of ddim, 0 to 1.")
  schedule: str = _field("uniform", "Noise levels of the steps.", choices=SCHEDULES)
  shift: float = _field(1.0, "Above 1: more steps at much noise.")
  shift_tokens: int = _field(
    0, "Tokens that `shift` is for; others get more or less. 0 = all."
  )
  guidance_scale: float = _field(3.0, "Classifier-free guidance; 1 = none.")
  guidance_scale_2: float = _field(
    0.0, "That of the second expert, of models with two; 0 = the same."
  )
  guidance_interval: tuple[float, float] = _field(
    (0.0, 1.0), "LOW,HIGH: noise levels where it acts.", form="LOW,HIGH"
  )
  guidance_rescale: float = _field(0.0, "Against too much contrast, 0 to 1.")
  cfg_zero: bool = _field(False, "CFG-Zero* guidance.")
  zero_steps: int = _field(1, "Its still first steps.")
  reuse: float = _field(
    0.0, "Share of change up to which blocks are skipped; 0 = never."
  )

  def __post_init__(self):
    low, high = self.guidance_interval
    for name, ok, allowed in (
      ("steps", self.steps >= 1, "at least 1"),
      ("method", self.method in METHODS, f"one of {METHODS}"),
      ("eta", 0 <= self.eta <= 1, "between 0 and 1"),
      ("schedule", self.schedule in SCHEDULES, f"one of {SCHEDULES}"),
      ("shift", self.shift > 0, "above 0"),
      ("shift_tokens", self.shift_tokens >= 0, "at least 0"),
      ("guidance_scale_2", self.guidance_scale_2 >= 0, "at least 0"),
      ("guidance_interval", 0 <= low <= high <= 1, "two rising numbers from 0 to 1"),
      ("guidance_rescale", 0 <= self.guidance_rescale <= 1, "between 0 and 1"),
      ("zero_steps", self.zero_steps >= 0, "at least 0"),
      ("reuse", self.reuse >= 0, "at least 0"),
    ):
      if not ok:
        raise ValueError(f"sampling {name} {getattr(self, name)!r} is not {allowed}")
    if self.eta and self.method != "ddim":
      raise ValueError(f"sampling eta {self.eta} is for ddim, not {self.method}")
    if self.reuse and self.guidance_interval != (0.0, 1.0):
      raise ValueError(
        f"sampling reuse {self.reuse} needs guidance everywhere or nowhere, not in the "
        f"guidance_interval {self.guidance_interval}"
      )

  @property
  def stochastic(self) -> bool:
    """Whether steps draw noise."""
    return self.method == "ddpm" or self.eta > 0

  def check(self, process: str, target: str, negative_prompt: str = "") -> None:
    """Raises ValueError if a model of this process and target cannot be sampled so."""
    if self.guidance_scale == 1.0:
      for name, idle in (
        ("guidance_interval", self.guidance_interval == (0.0, 1.0)),
        ("guidance_rescale", not self.guidance_rescale),
        ("cfg_zero", not self.cfg_zero),
        ("negative_prompt", not negative_prompt),
      ):
        if not idle:
          raise ValueError(f"{name} does nothing without guidance: guidance_scale is 1")
    if process != "flow" and self.schedule != "uniform":
      raise ValueError(f"schedule {self.schedule!r} is for a flow, not for {process}")
    if process == "flow" and target == "eps":
      raise ValueError(
        "a flow starts from noise alone, where a prediction of eps says nothing about "
        "the data: train it with the target velocity, v or x0 to sample"
      )
    if self.cfg_zero and (process, target) != ("flow", "velocity"):
      raise ValueError(
        f"cfg_zero is for the velocity of a flow, not {target} of {process}"
      )


class Table(NamedTuple):
  """Coefficients of a method; R calls of the network, then any axes of the levels.

  Attributes:
    level [R, ...]: noise level of the state that the network is asked about.
    time [R, ...]: level that the network is told, which may be a rounded one.
    correct [R, 5, ...]: of (state, state before, data now, one ago, two ago) in the
      state after the call.
    predict [R, 3, ...]: of (that state, data now, one ago) in the next state.
    noise [R, ...]: standard deviation of what is added to it.
  """

  level: np.ndarray
  time: np.ndarray
  correct: np.ndarray
  predict: np.ndarray
  noise: np.ndarray


def make_table(
  method: str, levels, process: str = "flow", eta: float = 0.0, times=None
) -> Table:
  """Coefficients of a solver from levels[0] to levels[-1] = 0.

  Args:
    method: "euler" and "heun" solve dx = x0 dalpha + eps dsigma, one and two calls a
      step; "ddpm" samples the posterior (arXiv:2006.11239, algorithm 2, with its
      smaller variance) and "ddim" (arXiv:2010.02502) a narrower one; "dpmpp_2m" is
      DPM-Solver++(2M) (arXiv:2211.01095), "unipc" UniPC-2 with B(h) = e^h - 1
      (arXiv:2302.04867).
    levels: decreasing noise levels [steps + 1, ...].
    process: one of noise_process.PROCESSES.
    eta: of ddim.
    times: that the network is told in place of levels[:-1].

  Raises:
    ValueError: for an unknown method.
  """
  if method not in METHODS:
    raise ValueError(f"sampling method {method!r} is not one of {METHODS}")
  levels = np.asarray(levels, np.float64)
  times = levels if times is None else np.asarray(times, np.float64)
  alpha, sigma = noise_process.alpha_sigma(process, levels, np)
  # The ends may have no logarithm: their steps are of first order.
  with np.errstate(divide="ignore", invalid="ignore"):
    log_snr = np.log(alpha) - np.log(sigma)
  rows, steps = [], len(levels) - 1
  for i in range(steps):
    correct, noise = _keep(levels[i]), np.zeros_like(levels[i])
    if method == "euler":
      predict = _euler(alpha, sigma, i)
    elif method == "heun":
      predict = _euler(alpha, sigma, i)
      if i + 1 < steps:
        rows.append((levels[i], times[i], correct, predict, noise))
        stay = np.stack([1.0 + noise, noise, noise])
        here = levels[i + 1], times[i + 1]
        rows.append((*here, _trapezoid(alpha, sigma, i), stay, noise))
        continue
    elif method == "ddpm":
      predict, noise = _posterior(alpha, sigma, i)
    elif method == "ddim":
      predict, noise = _ddim(alpha, sigma, i, eta)
    else:
      order = 1 if i in (0, steps - 1) else 2
      predict = _multistep(alpha, sigma, log_snr, i, order)
      if method == "unipc" and i > 0:
        correct = _unipc_correct(alpha, sigma, log_snr, i, 1 if i == 1 else 2)
    rows.append((levels[i], times[i], correct, predict, noise))
  columns = (np.stack(c).astype(np.float32) for c in zip(*rows, strict=True))
  return Table(*columns)


class State(NamedTuple):
  """What the next call depends on, each like the state itself.

  Attributes:
    x: the state that the network is asked at.
    before: the corrected state of the call before.
    data_1, data_2: data that the last two calls predicted.
  """

  x: Array
  before: Array
  data_1: Array
  data_2: Array


def start(x: Array) -> State:
  """Before the first call; tables give what is not there yet no weight."""
  zeros = jnp.zeros_like(x)
  return State(x, zeros, zeros, zeros)


def step(
  state: State,
  row: Table,
  data: Array,
  noise: Array | None = None,
  expand: Callable[[Any], Any] = lambda c: c,
) -> State:
  """The state after a call of the network.

  Args:
    state: at which the network was asked.
    row: of the table, for this call.
    data: what the network predicts of the data that the state comes from.
    noise: standard normal, for methods that need it.
    expand: a coefficient [...] -> something that broadcasts against the state.
  """

  def combine(coefficients, values):
    terms = zip(coefficients, values, strict=True)
    return sum(expand(c) * value for c, value in terms)

  x, before, data_1, data_2 = state
  corrected = combine(row.correct, (x, before, data, data_1, data_2))
  following = combine(row.predict, (corrected, data, data_1))
  if noise is not None:
    following += expand(row.noise) * noise
  return State(following, corrected, data, data_1)


def scan(call: Callable[[Any, Table, Array], Any], carry: Any, table: Table) -> Any:
  """Runs carry = call(carry, row of the table, its index) over the whole table."""
  table = jax.tree.map(jnp.asarray, table)
  rows = (table, jnp.arange(len(table.level)))
  return jax.lax.scan(lambda carry, row: (call(carry, *row), None), carry, rows)[0]


def integrate(
  predict: Callable[[Array, Any, Array], Array],
  x: Array,
  table: Table,
  noise: Callable[[Array], Array] | None = None,
  expand: Callable[[Any], Any] = lambda c: c,
) -> Array:
  """Runs a solver.

  Args:
    predict: (state, level as in the table, index of the call) -> data that the state
      comes from, like x.
    x: state at the first level.
    table: of the method.
    noise: index of the call -> standard normal noise like x; for methods that need it.
    expand: as for `step`.
  """

  def call(state, row, index):
    data = predict(state.x, row.level, index)
    return step(state, row, data, noise(index) if noise else None, expand)

  return scan(call, start(x), table).x


def _keep(level):
  return np.stack([1.0 + 0.0 * level] + [0.0 * level] * 4)


def _euler(alpha, sigma, i):
  ratio = sigma[i + 1] / sigma[i]
  return np.stack([ratio, alpha[i + 1] - alpha[i] * ratio, 0.0 * ratio])


def _trapezoid(alpha, sigma, i):
  """The state at i + 1 from both ends of the step: Heun's second half."""
  (a, b), (s, r) = alpha[i : i + 2], sigma[i : i + 2]
  da, ds = 0.5 * (b - a), 0.5 * (r - s)
  return np.stack([ds / r, 1.0 + ds / s, da - ds * b / r, da - ds * a / s, 0.0 * s])


def _posterior(alpha, sigma, i):
  """x_{i+1} given x_i and data: coefficients and standard deviation."""
  (a, b), (s, r) = alpha[i : i + 2], sigma[i : i + 2]
  ratio = a / b
  fresh = s**2 - ratio**2 * r**2  # variance that the step i + 1 -> i adds
  predict = np.stack([ratio * r**2 / s**2, b * fresh / s**2, 0.0 * s])
  return predict, np.sqrt(np.maximum(fresh, 0.0)) * r / s


def _ddim(alpha, sigma, i, eta):
  (a, b), (s, r) = alpha[i : i + 2], sigma[i : i + 2]
  noise = eta * _posterior(alpha, sigma, i)[1]
  ratio = np.sqrt(np.maximum(r**2 - noise**2, 0.0)) / s
  return np.stack([ratio, b - a * ratio, 0.0 * s]), noise


def _multistep(alpha, sigma, log_snr, i, order):
  """Exponential integrator over the data: DPM-Solver++ and UniPC's predictor."""
  h = log_snr[i + 1] - log_snr[i]
  weight = -alpha[i + 1] * np.expm1(-h)
  bend = 0.0 * weight
  if order == 2:
    bend = 0.5 * weight * h / (log_snr[i] - log_snr[i - 1])
  return np.stack([sigma[i + 1] / sigma[i], weight + bend, -bend])


def _unipc_correct(alpha, sigma, log_snr, i, order):
  """The state at i again, from i - 1, with the data predicted at i."""
  h = log_snr[i] - log_snr[i - 1]
  weight = -alpha[i] * np.expm1(-h)
  none = np.zeros_like(h)  # h is infinite where the state is noise alone
  new, old = none + 0.5, none
  if order == 2:
    ratio = (log_snr[i - 2] - log_snr[i - 1]) / h  # negative
    phi_1 = np.expm1(-h)
    phi_2 = -phi_1 / h - 1.0
    phi_3 = -phi_2 / h - 0.5
    # rho_1 + rho_2 = b_1 and ratio rho_1 + rho_2 = b_2, arXiv:2302.04867, eq. 9.
    b_1, b_2 = phi_2 / phi_1, 2.0 * phi_3 / phi_1
    rho_1 = (b_1 - b_2) / (1.0 - ratio)
    new, old = b_1 - rho_1, rho_1 / ratio
  return np.stack(
    [
      none,
      sigma[i] / sigma[i - 1],
      weight * new,
      weight * (1.0 - new - old),
      weight * old,
    ]
  )
