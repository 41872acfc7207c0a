"""How a published pipeline samples: its scheduler_config.json and model_index.json."""

import dataclasses
import pathlib
from typing import Any

from absl import logging

from sora_jax.models.dit import DiTConfig
from sora_jax.models.meta import Sampling
from sora_jax.weights import json_file

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"

# What Wan's own repository leads away from (its sample_neg_prompt).
NEGATIVE_PROMPT = (
  "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
  "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
  "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_WAN_2_1 = Sampling(
  method="unipc",
  schedule="flow_unipc",
  shift=3.0,
  steps=50,
  guidance_scale=5.0,
  negative_prompt=NEGATIVE_PROMPT,
  size=(832, 480),
  frames=81,
)
_WAN_2_2_TI2V = dataclasses.replace(
  _WAN_2_1, shift=5.0, size=(1280, 704), frames=121, expand_timesteps=True
)
_WAN_2_1_I2V = dataclasses.replace(_WAN_2_1, steps=40)
_WAN_2_1_FLF2V = dataclasses.replace(_WAN_2_1, shift=16.0)
# Of models with two experts, by whether they begin with an image. The guidance is that
# of the expert for much noise, then that of the one for little.
_WAN_2_2_T2V = dataclasses.replace(
  _WAN_2_1,
  shift=12.0,
  steps=40,
  guidance_scale=4.0,
  guidance_scale_2=3.0,
  size=(1280, 720),
)
_WAN_2_2_I2V = dataclasses.replace(
  _WAN_2_2_T2V, shift=5.0, guidance_scale=3.5, guidance_scale_2=3.5
)


@dataclasses.dataclass(frozen=True)
class _Scheduler:
  """A class of schedulers: our name of it, and the keys of its config.

  fixed: key -> the only value of it that is known; others say nothing of a flow.
  """

  method: str
  schedule: str
  shift: str
  fixed: dict[str, Any]


_COMMON = {
  "num_train_timesteps": 1000,
  "use_karras_sigmas": False,
  "use_exponential_sigmas": False,
  "use_beta_sigmas": False,
  "use_dynamic_shifting": False,
  "shift_terminal": None,
}
_SCHEDULERS = {
  "UniPCMultistepScheduler": _Scheduler(
    "unipc",
    "flow_unipc",
    "flow_shift",
    {
      **_COMMON,
      "prediction_type": "flow_prediction",
      "use_flow_sigmas": True,
      "solver_order": 2,
      "solver_type": "bh2",
      "predict_x0": True,
      "lower_order_final": True,
      "disable_corrector": [],
      "final_sigmas_type": "zero",
      "thresholding": False,
      "solver_p": None,
    },
  ),
  "FlowMatchEulerDiscreteScheduler": _Scheduler(
    "euler",
    "flow_match_euler",
    "shift",
    {**_COMMON, "invert_sigmas": False, "stochastic_sampling": False},
  ),
}
# Of the fixed ones, those whose default in diffusers is another value.
_NEEDED = ("prediction_type", "use_flow_sigmas")


def family(
  config: DiTConfig, expands: bool | None = None, boundary: float = 0.0
) -> tuple[Sampling, float]:
  """How Wan's models of a kind are sampled, as published, and their frames a second.

  expands: whether their pipeline expands timesteps, which those do that also begin with
    an image; by default those of the 48 channels of Wan 2.2's VAE.
  boundary: noise level at which two experts change; 0 for one network.
  """
  expands = config.channels == 48 if expands is None else expands
  if expands:
    return _WAN_2_2_TI2V, 24.0
  if boundary:
    return _WAN_2_2_I2V if config.condition_channels else _WAN_2_2_T2V, 16.0
  if config.image_positions:
    return _WAN_2_1_FLF2V, 16.0
  return _WAN_2_1_I2V if config.condition_channels else _WAN_2_1, 16.0


def usual_boundary(config: DiTConfig) -> float:
  """Noise level below which Wan 2.2 A14B asks its second expert."""
  return 0.9 if config.condition_channels else 0.875


def read(
  folder: pathlib.Path, config: DiTConfig, boundary: float = 0.0
) -> tuple[Sampling, float]:
  """How the transformer of a folder is sampled, and its frames a second.

  What is in no file (steps, guidance, size, length, rate and the negative prompt), and
  all of a folder that is not in a pipeline's, is as Wan publishes it for the family.

  Args:
    folder: of the transformer, in that of its pipeline.
    config: of the transformer.
    boundary: noise level at which two experts change; 0 for one network.

  Raises:
    ValueError: for a scheduler that is not one of ours; names the file and the key.
  """
  pipeline, expands = folder.parent, None
  if (path := pipeline / INDEX).is_file():
    expands = json_file.read(path).get("expand_timesteps", False)
    if not isinstance(expands, bool):
      raise ValueError(f"{path}: expand_timesteps is {expands!r}, not true or false")
  sampling, fps = family(config, expands, boundary)
  said = "as is usual for Wan"
  if (path := pipeline / SCHEDULER).is_file():
    sampling, said = _of_scheduler(json_file.read(path), path, sampling), f"by {path}"
  logging.info(
    "sampled, where no flag says otherwise, with %s, %s levels, shift %g %s; as is "
    "usual for Wan: %d steps, guidance %s, %d frames of %dx%d, %g a second, negative "
    "prompt %s",
    *(sampling.method, sampling.schedule, sampling.shift, said, sampling.steps),
    *(_guidance(sampling), sampling.frames, *sampling.size, fps),
    sampling.negative_prompt,
  )
  return sampling, fps


def _guidance(sampling):
  """For the log; of a model with two experts, that of either."""
  scales = (sampling.guidance_scale, sampling.guidance_scale_2)
  return " and ".join(f"{scale:g}" for scale in scales if scale)


def _of_scheduler(config, path, usual: Sampling) -> Sampling:
  kind = config.get("_class_name")
  if kind not in _SCHEDULERS:
    raise ValueError(
      f"{path}: {kind!r} is none of {', '.join(_SCHEDULERS)}; without the folder "
      "scheduler/ the model is sampled as is usual for Wan"
    )
  known = _SCHEDULERS[kind]
  for key, value in known.fixed.items():
    found = config.get(key, None if key in _NEEDED else value)
    if found != value:
      raise ValueError(f"{path}: {key} is {found!r}, only {value!r} is known")
  shift = config.get(known.shift, 1.0)
  if not isinstance(shift, (int, float)) or not shift > 0:
    raise ValueError(f"{path}: {known.shift} is {shift!r}, not a number above 0")
  return dataclasses.replace(
    usual, method=known.method, schedule=known.schedule, shift=float(shift)
  )


def scheduler_json(sampling: Sampling) -> dict[str, Any]:
  """The scheduler_config.json of a model.

  Raises:
    ValueError: if it is sampled in a way that no known scheduler of diffusers does.
  """
  for name, known in _SCHEDULERS.items():
    if (known.method, known.schedule) == (sampling.method, sampling.schedule):
      return {"_class_name": name, **known.fixed, known.shift: sampling.shift}
  raise ValueError(
    f"diffusers has no scheduler for {sampling.method} with {sampling.schedule} levels"
  )
