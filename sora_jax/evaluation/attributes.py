"""Whether samples show what their prompts say, attribute by attribute.

For clips of generated shapes, whose content is known: the colour, shape, motion and
count are read off the written files by `shape_attributes` and stand beside the level
of chance, the score of real clips that went through the VAE, which is the ceiling of
what a sample can reach, and that of the real files.
"""

import collections
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.data.clip_reader import read_clip
from sora_jax.data.clips import Clip
from sora_jax.data.video import reader
from sora_jax.evaluation import shape_attributes
from sora_jax.evaluation.quality import psnr
from sora_jax.evaluation.shares import Share, share_of
from sora_jax.run import recipe as recipes
from sora_jax.runtime.progress import track
from sora_jax.runtime.stopwatch import Stopwatch
from sora_jax.runtime.text import table_lines
from sora_jax.sampling.conditioning import Request
from sora_jax.sampling.pipeline import Sampler
from sora_jax.sampling.requests import (
  request_of,
  sample_share,
  sampling_mesh,
  write_samples,
)

# PSNR in dB from which on a sample counts as its clip made again.
_ALIKE = 25.0
# Of a sample: which attributes of it are right, see `shape_attributes.score`.
Score = dict[str, bool]


class Sampled(NamedTuple):
  """Files of samples, and seconds that one of them took, without compilation."""

  paths: list[pathlib.Path]
  seconds: float


def requests_of_captions(
  clips: Sequence[Clip], seeds: int, negative_prompt: str = ""
) -> list[Request]:
  """Returns requests of the clips' first captions: all of them `seeds` times.

  No seed occurs twice: two clips may have one caption.
  """
  return [
    request_of(clip, turn * len(clips) + i, negative_prompt)
    for turn in range(seeds)
    for i, clip in enumerate(clips)
  ]


def sample_captions(
  recipe: recipes.Recipe, workdir: pathlib.Path, clips: list[Clip]
) -> Sampled:
  """Samples `requests_of_captions` of the clips, at their sizes and lengths.

  All processes must call it. The files are in workdir/evaluate/samples.
  """
  config = recipe.sample
  requests = requests_of_captions(clips, recipe.evaluate.seeds, config.negative_prompt)
  mesh = sampling_mesh(config, len(requests))
  model = Sampler.from_checkpoint(workdir, mesh, recipe.dtype)
  with Stopwatch() as watch:
    videos = sample_share(model, requests, config)
  paths = write_samples(workdir / "evaluate" / "samples", requests, videos)
  return Sampled(paths, watch.seconds / len(requests))


def likeness(clips: Sequence[Clip], sampled: Sampled) -> dict:
  """Compares samples of captions that were trained on with the clips of the captions.

  A model that has memorised its clips makes them again.

  Returns:
    "psnr": the mean in dB; "alike": how many have 25 dB or more; "n": samples.
  """
  shown = [clip for _, clip in zip(sampled.paths, itertools.cycle(clips), strict=False)]
  decibels = [
    psnr(read_clip(clip), reader.read(path))
    for clip, path in zip(shown, sampled.paths, strict=True)
  ]
  alike = sum(value >= _ALIKE for value in decibels)
  return {"psnr": float(np.mean(decibels)), "alike": alike, "n": len(decibels)}


def scores_of_files(paths: Sequence, truths: Iterable[dict]) -> list[Score]:
  """Returns the scores of files of which it is known what they should show."""
  files = list(zip(paths, truths, strict=True))
  return [
    shape_attributes.score(shape_attributes.analyse(path), truth)
    for path, truth in track(files, "measured", "files")
  ]


def shares_of(scores: Iterable[Score]) -> dict[str, Share]:
  """Returns the share that is right of each attribute, of the scores that have it."""
  found: dict[str, list[bool]] = collections.defaultdict(list)
  for score in scores:
    for attribute, right in score.items():
      found[attribute].append(right)
  return {attribute: share_of(found[attribute]) for attribute in sorted(found)}


def attribute_table(
  truths: list[dict], samples: list[Score], real: list[Score], decoded: list[Score]
) -> dict:
  """Measures which share of samples, and of real files, has each attribute.

  Args:
    truths: what the prompts describe.
    samples, real: scores of samples of these prompts, and of files.
    decoded: scores of the real clips that went through the VAE.

  Returns:
    attribute -> {"samples", "chance", "ceiling", "real": shares, "n": samples it
    applies to, "low", "high": their 95 % interval, "real_n": real files}. The ceiling
    is what the VAE leaves of real clips. It and "real" are None where no real clip has
    the attribute.
  """
  chance = shape_attributes.chance_levels(truths)
  known, ceiling = shares_of(real), shares_of(decoded)

  def value(shares, attribute):
    return shares[attribute].value if attribute in shares else None

  return {
    attribute: {
      "samples": share.value,
      "low": share.low,
      "high": share.high,
      "chance": float(chance[attribute]),
      "ceiling": value(ceiling, attribute),
      "real": value(known, attribute),
      "n": share.n,
      "real_n": known[attribute].n if attribute in known else 0,
    }
    for attribute, share in shares_of(samples).items()
  }


def format_table(table: dict) -> list[str]:
  """Returns the lines of an attribute table, with the samples' 95 % intervals."""

  def percent(value):
    return "-" if value is None else f"{value:.1%}"

  rows = []
  for name, row in table.items():
    interval = f"{100 * row['low']:.1f}-{percent(row['high'])}"
    others = (percent(row[column]) for column in ("chance", "ceiling", "real"))
    rows.append([name, percent(row["samples"]), interval, *others, str(row["n"])])
  return table_lines(
    ["attribute", "samples", "95 %", "chance", "ceiling", "real", "n"], rows
  )
