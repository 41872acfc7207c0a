"""Whether samples show what their prompts say, attribute by attribute.

For clips of generated shapes, whose content is known: the colour, shape, motion and
count are read off the written files by `shape_attributes` and stand beside the level
of chance, the score of real clips that went through the VAE, which is the ceiling of
what a sample can reach, and that of the real files.
"""

import collections
import pathlib

import numpy as np

from sora_jax.data.clips import Clip
from sora_jax.evaluation import shape_attributes
from sora_jax.run import recipe as recipes
from sora_jax.runtime.text import table_lines
from sora_jax.sampling.pipeline import Sampler
from sora_jax.sampling.requests import (
  request_of,
  sample_share,
  sampling_mesh,
  write_samples,
)


def sample_captions(
  recipe: recipes.Recipe, workdir: pathlib.Path, clips: list[Clip]
) -> list[pathlib.Path]:
  """Samples the first caption of each clip at the clip's size and length.

  All processes must call it. Returns the paths of the files, which are in
  workdir/evaluate/samples.
  """
  config = recipe.sample
  requests = [
    request_of(clip, seed, config.negative_prompt) for seed, clip in enumerate(clips)
  ]
  mesh = sampling_mesh(config, len(requests))
  model = Sampler.from_checkpoint(workdir, mesh, recipe.dtype)
  folder = workdir / "evaluate" / "samples"
  return write_samples(folder, requests, sample_share(model, requests, config))


def attribute_table(
  truths: list[dict], samples: list, real: list, decoded: list[dict]
) -> dict:
  """Measures which share of samples, and of real files, has each attribute.

  Args:
    truths: what the prompts describe.
    samples: paths of the samples, in that order.
    real: paths of the clips that the prompts are of, in that order.
    decoded: scores of the real clips that went through the VAE, in any order.

  Returns:
    attribute -> {"samples", "chance", "ceiling", "real": shares, "n": number it applies
    to}. The ceiling is what the VAE leaves of real clips.
  """
  chance = shape_attributes.chance_levels(truths)
  columns = {}
  for name, paths in (("samples", samples), ("real", real)):
    scores = collections.defaultdict(list)
    for truth, path in zip(truths, paths, strict=True):
      for attribute, right in shape_attributes.score(
        shape_attributes.analyse(path), truth
      ).items():
        scores[attribute].append(right)
    columns[name] = scores
  ceiling = collections.defaultdict(list)
  for score in decoded:
    for attribute, right in score.items():
      ceiling[attribute].append(right)
  return {
    attribute: {
      "samples": float(np.mean(columns["samples"][attribute])),
      "chance": float(chance[attribute]),
      "ceiling": float(np.mean(ceiling[attribute])),
      "real": float(np.mean(rights)),
      "n": len(rights),
    }
    for attribute, rights in sorted(columns["real"].items())
  }


def format_table(table: dict) -> list[str]:
  """Returns the lines of an attribute table; +- is the samples' 95 % interval."""
  rows = []
  for name, row in table.items():
    share = row["samples"]
    error = 1.96 * np.sqrt(max(share * (1 - share), 1e-9) / row["n"])
    shares = (share, error, row["chance"], row["ceiling"], row["real"])
    rows.append([name, *(f"{value:.1%}" for value in shares), str(row["n"])])
  return table_lines(
    ["attribute", "samples", "+-", "chance", "ceiling", "real", "n"], rows
  )
