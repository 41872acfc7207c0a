"""Marks for tests with many cases: a few of them quick, all of them in the whole."""

import pytest


def slow_but(cases, quick):
  """Cases for `parametrize`; all but those in `quick` are marked as slow."""
  return [
    pytest.param(
      *(case if isinstance(case, tuple) else (case,)),
      marks=[] if case in quick else pytest.mark.slow,
    )
    for case in cases
  ]
