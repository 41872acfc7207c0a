"""A short part of the fault harness; `python -m tests.faults` is all of it."""

import random
import shutil

import pytest
from faults import catalogue, fuzz, stores
from faults.runs import Runs


@pytest.mark.parametrize("what", ["checkpoint", "model", "shard"])
def test_no_flipped_bit_is_read_as_another_value(tiny_run, tmp_path, what):
  work = tmp_path / "run"
  shutil.copytree(tiny_run.workdir, work)
  chosen = random.Random(what)
  options = {"overrides": {"dit.train.keep": 2}} if what == "checkpoint" else {}
  outcomes = list(getattr(catalogue, f"flipped_{what}")(work, chosen, 12, **options))
  assert len(outcomes) >= 12
  assert not [o for _, o in outcomes if o.silently_wrong]
  found = [o for name, o in outcomes if o.refused]
  # A bit of what nobody reads changes nothing.
  assert len(found) >= len(outcomes) // 2


def test_a_run_whose_media_are_gone(tiny_run, tmp_path):
  """By a process of its own, as all of the harness starts them."""
  runs = Runs(tmp_path, seed=0)
  runs.whole = tiny_run.workdir
  name, outcome = next(stores.media_gone(runs, 1))
  assert name == "all media gone before the VAE trains"
  assert outcome.refused and not outcome.went_on and outcome.note == "code 1"


def test_inputs_of_fuzzing_are_counted():
  """As hypothesis says them, of two tests; one has tried twice."""
  log = """
tests/data/test_fuzz_data.py::test_records:

  - during generate phase (0.04 seconds):
    - Typical runtimes: < 1ms
    - 30 passing, 0 failing, and 3 invalid test cases

tests/run/test_fuzz_configs.py::test_overrides:

  - during reuse phase (0.01 seconds):
    - 2 passing, 0 failing, and 0 invalid test cases
  - during generate phase (0.04 seconds):
    - 28 passing, 0 failing, and 2 invalid test cases
"""
  assert fuzz.inputs_of(log) == {
    "tests/data/test_fuzz_data.py::test_records": 30,
    "tests/run/test_fuzz_configs.py::test_overrides": 30,
  }
