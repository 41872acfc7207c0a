"""A plugin of pytest that gives a fuzz test inputs which lead to new branches.

  pip install atheris
  PYTHONPATH=tests python -m pytest -p faults.guided -s -n 0 \\
    tests/weights/test_fuzz_weights.py::test_headers

atheris (libFuzzer) makes bytes, hypothesis makes the test's inputs of them, and those
that reach code of the package that no others have reached are changed further. It ends
after GUIDED_SECONDS (60); also, with the input, if a test fails, if one input takes 60
seconds, or if the process comes to hold GUIDED_MEGABYTES (2048).
"""

import inspect
import os
import sys

import atheris
import hypothesis
import pytest

# Modules that are imported from now on report their branches.
atheris.instrument_imports(include=["sora_jax"]).__enter__()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
  """Takes the place of hypothesis; the process ends with the fuzzing."""
  test = getattr(pyfuncitem.obj, "hypothesis", None)
  if test is None:
    return
  names = pyfuncitem._fixtureinfo.argnames
  fixtures = {name: pyfuncitem.funcargs[name] for name in names}
  inputs = test._given_kwargs

  def call(**values):
    test.inner_test(**fixtures, **values)

  kind = inspect.Parameter.KEYWORD_ONLY
  call.__signature__ = inspect.Signature(
    [inspect.Parameter(name, kind) for name in inputs]
  )
  limits = [
    f"-max_total_time={os.environ.get('GUIDED_SECONDS', '60')}",
    f"-rss_limit_mb={os.environ.get('GUIDED_MEGABYTES', '2048')}",
    "-timeout=60",
  ]
  fuzz = hypothesis.given(**inputs)(call).hypothesis.fuzz_one_input
  atheris.Setup([sys.argv[0], *limits], fuzz)
  atheris.Fuzz()
