"""Sweeps: which overrides of a config its runs have.

A sweep is a function of the config that yields one dict of overrides for each run:

  from sora_jax.run import sweeps

  def sweep(config):
    yield from sweeps.grid({
      "dit.train.learning_rate": [1e-3, 2e-3, 4e-3],
      "dit.model.depth": [4, config.dit.model.depth * 2],
    })

launch/sweep.py runs them. A list of dicts is a sweep, too; grid and random make some.
"""

import collections
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Overrides = dict[str, Any]  # key without "config.", such as "dit.rows" -> value


def grid(values: Mapping[str, Sequence]) -> Iterator[Overrides]:
  """Every combination of the values of each key; the last key changes fastest."""
  for chosen in itertools.product(*values.values()):
    yield dict(zip(values, chosen, strict=True))


def random(
  count: int, draws: Mapping[str, Callable | Sequence], seed: int = 0
) -> Iterator[Overrides]:
  """`count` runs of independent draws; always the same ones for a seed.

  draws: key -> a sequence to choose from, or a function of a np.random.Generator, such
  as `uniform` and `log_uniform` return.
  """
  for index in range(count):
    # Of each run and key its own, so that more runs or keys change no earlier draw.
    overrides = {}
    for key, draw in draws.items():
      rng = np.random.default_rng([seed, index, *key.encode()])
      if callable(draw):
        overrides[key] = draw(rng)
      else:
        overrides[key] = draw[int(rng.integers(len(draw)))]
    yield overrides


def uniform(low: float, high: float) -> Callable:
  """A draw between low and high, to 4 digits."""
  return lambda rng: _rounded(rng.uniform(low, high))


def log_uniform(low: float, high: float) -> Callable:
  """A draw whose logarithm is uniform, for learning rates and the like; to 4 digits."""
  if not 0 < low <= high:
    raise ValueError(f"log_uniform({low}, {high}): needs 0 < low <= high")
  return lambda rng: _rounded(math.exp(rng.uniform(math.log(low), math.log(high))))


def product(*sweeps) -> Iterator[Overrides]:
  """Every combination of runs of several sweeps; of a key in two the last counts."""
  for parts in itertools.product(*[list(sweep) for sweep in sweeps]):
    yield {key: value for part in parts for key, value in part.items()}


def names(runs: Sequence[Overrides]) -> list[str]:
  """A folder name for each run: its overrides, so that it stays when the sweep grows.

  Raises:
    ValueError: if two runs are the same.
  """
  keys = {key for overrides in runs for key in overrides}
  last = {key: key.rsplit(".", 1)[-1] for key in keys}
  often = collections.Counter(last.values())
  short = {key: last[key] if often[last[key]] == 1 else key for key in keys}
  names = []
  for overrides in runs:
    text = ",".join(f"{short[key]}={value}" for key, value in overrides.items())
    name = re.sub(r"[^\w.,=+-]+", "_", text) or "base"
    if len(name) > 100 or name != (text or "base"):
      name = f"{name[:90]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if name in names:
      raise ValueError(f"two runs of the sweep are the same: {overrides}")
    names.append(name)
  return names


def _rounded(value: float) -> float:
  return float(f"{value:.4g}")
