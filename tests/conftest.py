"""Set before jax is imported: tests run on 8 simulated devices of the CPU."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
from absl import flags  # noqa: E402

# Grain's workers read absl flags, which nothing parses under pytest.
flags.FLAGS.mark_as_parsed()


def pytest_collection_modifyitems(items):
  """Tests that run the commands are slow: the run alone takes half a minute."""
  for item in items:
    if {"commands", "tiny_run"} & set(item.fixturenames):
      item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def fast_compile():
  """For tiny programs: compiling takes nearly all of their time."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> tiny.Commands:
  """Commands as a user types them, see tiny.py."""
  base = tmp_path_factory.getbasetemp()
  # The workers' folders are in one.
  shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
  return tiny.Commands(tmp_path_factory.mktemp("commands"), shared / "compilations")


@pytest.fixture(scope="session")
def tiny_run(commands) -> tiny.Run:
  """A finished run of all stages; tests must leave its folder as it is."""
  workdir = commands.folder / "run"
  return tiny.Run(workdir, commands.main(workdir))
