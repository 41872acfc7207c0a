"""What the sampler's settings do to samples: guidance, and the number of steps.

  python -m sora_jax.evaluate --config=configs/quickstart.py --suite=sampling

The same held-out prompts with the same seeds are sampled with several guidance scales
at the recipe's steps, and with several numbers of steps at the recipe's guidance. How
many prompts and seeds: config.evaluate. Of each setting the table has the share of
samples that are as the prompt says, attribute by attribute with 95 % intervals, and
the seconds that a sample took, in packed rows and without compilation.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging

from sora_jax.data.clips import Clip
from sora_jax.evaluation import shape_attributes
from sora_jax.evaluation.attributes import requests_of_captions, shares_of
from sora_jax.evaluation.heldout import described_prompts
from sora_jax.evaluation.shares import Share, percent
from sora_jax.run import recipe as recipes
from sora_jax.runtime import files
from sora_jax.runtime.progress import track
from sora_jax.runtime.stopwatch import Stopwatch
from sora_jax.runtime.text import markdown_lines, table_lines
from sora_jax.sampling.pipeline import Sampler
from sora_jax.sampling.requests import sampling_mesh

GUIDANCE, STEPS = (1.0, 2.0, 4.0, 6.0), (8, 16, 32)


def run(
  recipe: recipes.Recipe,
  checkpoint: pathlib.Path,
  workdir: pathlib.Path,
  guidance: Sequence[float] = GUIDANCE,
  steps: Sequence[int] = STEPS,
) -> None:
  """Writes workdir/evaluate/{sampling.json, sampling.md} and logs the table.

  Args:
    recipe: the options of sampling that are not swept, prompts, seeds, precision.
    checkpoint: folder with the models.
    workdir: where results go.
    guidance: scales; 1 is none.
    steps: of the solver.

  Raises:
    ValueError: if the config is not for generated shapes, or a setting is out of range.
  """
  clips, config = described_prompts(recipe), recipe.sample
  settings = settings_of(config, guidance, steps)
  mesh = sampling_mesh(config, len(clips) * recipe.evaluate.seeds)
  model = Sampler.from_checkpoint(checkpoint, mesh, recipe.dtype)
  rows = [
    measure(model, clips, options, recipe.evaluate.seeds)
    for options in track(settings, "measured", "settings")
  ]
  folder = workdir / "evaluate"
  folder.mkdir(parents=True, exist_ok=True)
  files.write_json(folder / "sampling.json", {"model": model.model_id, "rows": rows})
  head, cells = table(rows)
  files.write_text(
    folder / "sampling.md", "\n".join(markdown_lines(head, cells)) + "\n"
  )
  for line in table_lines(head, cells):
    logging.info("%s", line)
  logging.info("results are in %s", folder / "sampling.json")


def settings_of(
  config: recipes.Sample, guidance: Sequence[float], steps: Sequence[int]
) -> list[recipes.Sample]:
  """Returns the options of sampling with each guidance, then with each number of steps.

  None is there twice. What would do nothing without guidance is left out there.
  """
  without: dict[str, Any] = {
    "guidance_interval": (0.0, 1.0),
    "guidance_rescale": 0.0,
    "cfg_zero": False,
    "negative_prompt": "",
  }
  pairs = [(scale, config.steps) for scale in guidance]
  pairs += [(config.guidance_scale, count) for count in steps]
  return [
    dataclasses.replace(
      config, guidance_scale=scale, steps=count, **(without if scale == 1.0 else {})
    )
    for scale, count in dict.fromkeys(pairs)
  ]


def measure(
  model: Sampler, clips: Sequence[Clip], options: recipes.Sample, seeds: int
) -> dict:
  """Samples the clips' captions and measures what the samples show.

  Returns:
    guidance_scale, steps, prompts, seeds, samples, seconds_a_sample, and attributes:
    {name: {"value", "low", "high", "n"}}, see `Share`.
  """
  requests = requests_of_captions(clips, seeds, options.negative_prompt)
  with Stopwatch() as watch:
    videos = model.sample(requests, options, rows=options.rows)
  truths = [clip.truth for clip in clips] * seeds
  shares = shares_of(
    shape_attributes.score(shape_attributes.analyse_video(video_THWC), truth)
    for video_THWC, truth in zip(videos, truths, strict=True)
  )
  return {
    "guidance_scale": options.guidance_scale,
    "steps": options.steps,
    "prompts": len(clips),
    "seeds": seeds,
    "samples": len(videos),
    "seconds_a_sample": watch.seconds / len(videos),
    "attributes": {name: share._asdict() for name, share in shares.items()},
  }


def table(rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
  """Returns the head and the cells of the table: a line for each setting."""
  names = list(rows[0]["attributes"])
  cells = [
    [
      f"{row['guidance_scale']:g}",
      str(row["steps"]),
      *(percent(Share(**row["attributes"][name])) for name in names),
      f"{row['seconds_a_sample']:.2f}",
      str(row["samples"]),
    ]
    for row in rows
  ]
  return ["guidance", "steps", *names, "s a sample", "n"], cells
