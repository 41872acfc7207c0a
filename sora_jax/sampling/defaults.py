"""What a checkpoint is sampled with where a user does not say: its recipe's choice.

A run keeps that in sample/stage.json, the record of its stage "sample". A checkpoint
that was shipped keeps it in sample.json. Of a published model that was imported, and of
what was trained from it, the DiT's meta says it. Others have the package's defaults.
"""

import dataclasses
import json
import pathlib
from typing import Any

from sora_jax.diffusion.solvers import Options
from sora_jax.models.meta import DiTMeta
from sora_jax.packing import time_grid
from sora_jax.runtime import checkpoint
from sora_jax.sampling.job import Job

NAME = "sample.json"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Defaults:
  """Options, and what a job without media is of.

  Attributes:
    options: of the solver and of guidance.
    size: (width, height) in pixels.
    frames: of a video.
    fps: frames per second.
    window: frames that are made at once: no more than the model has seen in training.
    negative_prompt: what guidance leads away from, where there is guidance.
  """

  options: Options = Options()
  size: tuple[int, int] = (64, 64)
  frames: int = 17
  fps: float = 12.0
  window: int = 33
  negative_prompt: str = ""

  def fill(self, job: Job, options: Options | None = None) -> Job:
    """The job with what neither it nor media say.

    options: that it will be made with, if they are not those of the defaults.
    """
    known: dict[str, Any] = {}
    if job.negative_prompt is None and self.negative_prompt:
      guided = (options or self.options).guidance_scale != 1.0
      known["negative_prompt"] = self.negative_prompt if guided else ""
    media = (job.image, job.last_image, job.video, job.key_frames or None)
    if job.size is None and all(medium is None for medium in media):
      known["size"] = self.size
    if job.frames is None and job.mode in ("text", "image"):
      known["frames"] = self.frames
    if job.fps is None and job.video is None:
      known["fps"] = self.fps
    if job.window is None and _is_open(job):
      known["window"] = self.window
      if job.given is not None and 0 < self.window <= job.given:
        # Whoever says how much is taken over has said nothing of windows: it is the
        # shortest that makes something of its own, since the model has seen no longer.
        known["window"] = job.given + time_grid.TIME_FACTOR
    return dataclasses.replace(job, **known)

  def to_json(self) -> dict[str, Any]:
    """What sample.json holds."""
    return {"version": VERSION, **dataclasses.asdict(self)}


def _is_open(job: Job) -> bool:
  """Returns whether a job leads to nothing that is given.

  A short window has no room for what it takes over and for where it leads to as well,
  so all others have those of the package.
  """
  leads = job.last_image is not None or job.key_frames
  return job.mode in ("text", "image", "extend") and not leads


def read(folder) -> Defaults:
  """The defaults of a checkpoint's folder.

  Raises:
    ValueError: if they are damaged or of a newer version; names the file.
  """
  folder = pathlib.Path(folder)
  for path, parse in (
    (folder / NAME, _of_json),
    (folder / "sample" / "stage.json", _of_stage),
  ):
    if path.is_file():
      try:
        return parse(json.loads(path.read_text()), folder)
      except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
      except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error!r})") from error
  return _of_model(folder)


def _of_model(folder) -> Defaults:
  """Of the published model that the DiT is, or was trained from."""
  model = folder / "dit" / "model"
  if not (model / "model.json").is_file():
    return Defaults()
  meta = DiTMeta.from_json(checkpoint.load_meta(model), model)
  if not (sampling := meta.sampling):
    return Defaults()
  names = ("method", "schedule", "shift", "steps", "guidance_scale", "guidance_scale_2")
  return Defaults(
    Options(**{name: getattr(sampling, name) for name in names}),
    sampling.size,
    sampling.frames,
    meta.reference_fps,
    sampling.frames,
    sampling.negative_prompt,
  )


def _of_json(values, folder) -> Defaults:
  del folder
  if (version := values["version"]) not in range(1, VERSION + 1):
    raise ValueError(
      f"version is {version!r}, but this sora_jax reads {VERSION} at most: the "
      "checkpoint is of a newer one"
    )
  width, height = values["size"]
  return Defaults(
    _options(values["options"]),
    (int(width), int(height)),
    int(values["frames"]),
    float(values["fps"]),
    int(values.get("window", Defaults.window)),
    str(values.get("negative_prompt", "")),
  )


def _of_stage(values, folder) -> Defaults:
  """Of the stage's config: its options, and the first prompt that is a video's."""
  section = values["config"]["sample"]
  options = _options(section)
  negative = section.get("negative_prompt", "")
  if not (prompts := section.get("prompts")):
    usual = _of_model(folder)
    # Unless a published model says its own, they are those of the clips it has shown.
    prompts = _sampled(folder) if usual == Defaults() else []
    if not prompts:
      return dataclasses.replace(usual, options=options, negative_prompt=negative)
  _, (width, height), frames, fps = min(prompts, key=lambda prompt: prompt[2] == 1)
  # As the stage has it: 0 is the rate that the model was trained at.
  fps = fps or checkpoint.load_meta(folder / "dit" / "model")["reference_fps"]
  # The longest prompt tells how long a small model's videos are. Long prompts are made
  # in windows, so they say nothing.
  longest = max(prompt[2] for prompt in prompts)
  window = longest if 5 <= longest < Defaults.window else Defaults.window
  return Defaults(options, (width, height), frames, fps, window, negative)


def _sampled(folder) -> list:
  """What the stage has made, as config.sample.prompts has it; nothing before it ran."""
  listed = folder / "sample" / "samples.jsonl"
  if not listed.is_file():
    return []
  rows = map(json.loads, listed.read_text().splitlines())
  return [(r["prompt"], (r["width"], r["height"]), r["frames"], r["fps"]) for r in rows]


def _options(values) -> Options:
  names = [field.name for field in dataclasses.fields(Options)]
  known: dict[str, Any] = {name: values[name] for name in names if name in values}
  if "guidance_interval" in known:
    known["guidance_interval"] = tuple(known["guidance_interval"])
  return Options(**known)
