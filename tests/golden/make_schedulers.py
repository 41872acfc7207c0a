"""Makes schedulers.npz: whole trajectories of diffusers' schedulers.

  python tests/golden/make_schedulers.py

Made with torch 2.13.0 and diffusers 0.42.1. In place of a network stands `model`, a
smooth function of the state and the level, so that both sides can evaluate it.
"""

import pathlib

import numpy as np
import torch
from diffusers import (
  DDIMScheduler,
  DDPMScheduler,
  DPMSolverMultistepScheduler,
  FlowMatchEulerDiscreteScheduler,
  UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

FLOW = dict(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
LINEAR = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
COSINE = dict(beta_schedule="squaredcos_cap_v2")
UNIPC = dict(solver_order=2, solver_type="bh2", predict_x0=True)
# Our method, process, target; steps; eta; diffusers' scheduler.
CASES = {
  "euler": ("flow", 12, 0.0, FlowMatchEulerDiscreteScheduler(shift=3.0)),
  "unipc": ("flow", 9, 0.0, UniPCMultistepScheduler(**UNIPC, **FLOW)),
  "dpmpp_2m": ("flow", 9, 0.0, DPMSolverMultistepScheduler(**FLOW)),
  "unipc-eps": ("ddpm_linear", 10, 0.0, UniPCMultistepScheduler(**UNIPC, **LINEAR)),
  "dpmpp_2m-eps": (
    "ddpm_linear",
    20,
    0.0,
    DPMSolverMultistepScheduler(final_sigmas_type="zero", **LINEAR),
  ),
  "ddpm-eps": (
    "ddpm_linear",
    20,
    0.0,
    DDPMScheduler(clip_sample=False, variance_type="fixed_small", **LINEAR),
  ),
  "ddpm-v": (
    "ddpm_cosine",
    25,
    0.0,
    DDPMScheduler(
      clip_sample=False,
      variance_type="fixed_small",
      prediction_type="v_prediction",
      **COSINE,
    ),
  ),
  "ddim-eps": ("ddpm_linear", 10, 0.0, DDIMScheduler(clip_sample=False, **LINEAR)),
  "ddim-v-eta": (
    "ddpm_cosine",
    10,
    0.7,
    DDIMScheduler(clip_sample=False, prediction_type="v_prediction", **COSINE),
  ),
}


def model(x, t):
  return np.sin(1.5 * x) * (0.3 + t) + 0.5 * x - 0.2 * t


def levels_of_schedules():
  """sigmas and timesteps at several steps and shifts, of the schedulers of flows."""
  golden = {}
  for steps, shift in ((1, 3.0), (4, 8.0), (8, 3.0), (30, 3.3), (50, 5.0), (77, 1.0)):
    for name, scheduler in (
      ("flow_match_euler", FlowMatchEulerDiscreteScheduler(shift=shift)),
      (
        "flow_unipc",
        UniPCMultistepScheduler(**UNIPC, **{**FLOW, "flow_shift": shift}),
      ),
    ):
      scheduler.set_timesteps(steps)
      key = f"schedule/{name}/{steps}/{shift:g}"
      golden[f"{key}/level"] = scheduler.sigmas.numpy()
      golden[f"{key}/timestep"] = scheduler.timesteps.numpy()
  return golden


def main():
  golden = levels_of_schedules()
  for name, (process, steps, eta, scheduler) in CASES.items():
    rng = np.random.default_rng(len(name))
    draws = rng.standard_normal((steps + 1, 2, 3, 4)).astype(np.float32)
    noise = iter(draws[1:])
    for module in (scheduling_ddim, scheduling_ddpm):
      module.randn_tensor = lambda *args, **kwargs: torch.from_numpy(next(noise))  # noqa: B023
    scheduler.set_timesteps(steps)
    if process == "flow":
      levels = scheduler.sigmas.numpy().astype(np.float64)
    else:
      levels = np.append((scheduler.timesteps.numpy() + 1.0) / 1000, 0.0)
    x, states = torch.from_numpy(draws[0]), []
    options = {"eta": eta} if eta else {}
    for t, level in zip(scheduler.timesteps, levels[:-1], strict=True):
      out = torch.from_numpy(model(x.numpy(), np.float32(level)))
      x = scheduler.step(out, t, x, **options).prev_sample
      states.append(x.numpy())
    golden[f"{name}/levels"] = levels
    golden[f"{name}/draws"] = draws
    golden[f"{name}/states"] = np.stack(states)
  path = pathlib.Path(__file__).parent / "schedulers.npz"
  np.savez_compressed(path, **golden)


if __name__ == "__main__":
  main()
