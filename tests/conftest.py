"""Set before jax is imported: tests run on 8 simulated devices of the CPU."""

import fcntl
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  # Most of a test is the compilation of tiny programs.
  + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
  # Eight devices share two cores: one that waits for the others for the 40 s of the
  # default need not be stuck, and the process ends there, with all of its tests.
  + " --xla_cpu_collective_call_terminate_timeout_seconds=300"
).strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
from absl import flags  # noqa: E402

# Grain's workers read absl flags, which nothing parses under pytest.
flags.FLAGS.mark_as_parsed()


# Readers are given a few odd inputs in each run, and many by (an hour)
#   python -m tests.faults.fuzz
hypothesis.settings.register_profile(
  "default", max_examples=30, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile(
  "long", max_examples=2000, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(config, items):
  """Tests that run the commands are slow: the run alone takes half a minute.

  Those that train for minutes run only where they are asked for.
  """
  if "learns" not in config.getoption("markexpr"):
    left_out = [item for item in items if item.get_closest_marker("learns")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
  for item in items:
    if {"commands", "tiny_run"} & set(item.fixturenames):
      item.add_marker(pytest.mark.slow)
  _slow_files_first(items)


def _slow_files_first(items):
  """Else one worker is left with them at the end, and the other has nothing to do.

  One file makes the run that several share, while the other worker does what is slow
  and does not need it.
  """
  slow = {item.path for item in items if item.get_closest_marker("slow")}
  sharing = {item.path: None for item in items if "tiny_run" in item.fixturenames}
  first = next(iter(sharing), None)

  def turn(item):
    if item.path not in slow:
      return 3
    return 0 if item.path == first else 2 if item.path in sharing else 1

  items.sort(key=turn)


@pytest.fixture(scope="module")
def fast_compile():
  """For tiny programs: compiling takes nearly all of their time."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> tiny.Commands:
  """Commands as a user types them, see tiny.py."""
  shared = _shared(tmp_path_factory)
  return tiny.Commands(tmp_path_factory.mktemp("commands"), shared / "compilations")


def _shared(tmp_path_factory):
  """A folder that all workers of pytest have in common."""
  base = tmp_path_factory.getbasetemp()
  return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny_run(commands, tmp_path_factory) -> tiny.Run:
  """A finished run of all stages; tests must leave its folder as it is.

  The first worker that wants it makes it, and the other waits.
  """
  workdir = _shared(tmp_path_factory) / "tiny_run"
  log = workdir.with_suffix(".log")
  with open(workdir.with_suffix(".lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not log.exists():
      log.write_text(commands.main(workdir))
  return tiny.Run(workdir, log.read_text())
