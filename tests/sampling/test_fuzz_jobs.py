"""Odd descriptions of a job, and of how a video was made: only ValueErrors."""

import dataclasses
import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sora_jax.diffusion.solvers import Options
from sora_jax.sampling import files
from sora_jax.sampling.job import Job

pytestmark = pytest.mark.fuzz

SCALARS = (
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
)  # fmt: skip
VALUES = SCALARS | st.lists(SCALARS | st.lists(SCALARS, max_size=2), max_size=3)


def section_of(kind):
  names = st.sampled_from([field.name for field in dataclasses.fields(kind)])
  return st.dictionaries(names | st.text(max_size=4), VALUES, max_size=4) | VALUES


SIDECARS = st.fixed_dictionaries(
  {},
  optional={
    "job": section_of(Job),
    "options": section_of(Options) | st.just({}),
    "checkpoint": SCALARS,
    "model": SCALARS,
    "files": st.dictionaries(st.text(max_size=3), SCALARS, max_size=2) | VALUES,
  },
)


@given(section_of(Job))
def test_jobs(values):
  try:
    job = Job.from_json(values)
  except ValueError:
    return
  numbers = [x for x in dataclasses.astuple(job) if isinstance(x, float)]
  assert all(map(math.isfinite, numbers))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return tmp_path_factory.mktemp("fuzz") / "x.mp4.json"


@given(SIDECARS.map(json.dumps) | st.text(max_size=20))
@example("[" * 100_000)
@example('{"job": {}, "options": {}, "checkpoint": "", "model": "", "files": {"a": 1}}')
def test_descriptions_of_videos(path, text):
  path.write_text(text, encoding="utf-8", errors="surrogatepass")
  try:
    assert "job" in files.read_sidecar(path)
  except ValueError:
    return
