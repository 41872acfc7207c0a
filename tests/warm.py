"""Starts commands in processes that have imported everything already.

Importing takes a command three seconds, and tests run more than a hundred. So a server
(Python's own, of `multiprocessing`) imports all modules once, and each command is a
fork of it: a process of its own, with arguments, signals and an exit code as any other.
"""

import atexit
import multiprocessing
import os
import pathlib
import pkgutil
import runpy
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from unittest import mock

import sora_jax

# The package's top level is its commands.
COMMANDS = [
  info.name for info in pkgutil.iter_modules(sora_jax.__path__) if not info.ispkg
]

_context = multiprocessing.get_context("forkserver")


class Process:
  """`python -m MODULE ARGUMENTS` as a fork: what tests need of `subprocess.Popen`.

  MODULE may be a script's path, too.
  """

  def __init__(
    self, module: str, arguments: Sequence[str], environment: Mapping[str, str]
  ):
    """Starts it. JAX's variables are those of the first process that was started."""
    self._log = tempfile.NamedTemporaryFile("rb", suffix=".log")
    _context.set_forkserver_preload([f"sora_jax.{name}" for name in COMMANDS])
    arguments = [str(module), *map(str, arguments)]
    self._process = _context.Process(
      target=_run, args=(arguments, environment, self._log.name)
    )
    with mock.patch.dict(os.environ, environment):
      self._process.start()

  def poll(self) -> int | None:
    """Exit code, or None while it runs."""
    return self._process.exitcode

  @property
  def returncode(self) -> int | None:
    """The same."""
    return self.poll()

  def send_signal(self, number: int) -> None:
    """Sends a signal, if it still runs."""
    if self.poll() is None:
      os.kill(self._process.pid, number)

  def communicate(self, timeout: float) -> tuple[None, str]:
    """(None, what it wrote) once it has ended.

    Raises:
      TimeoutError: with what it wrote, if it does not end in time; it is killed.
    """
    self._process.join(timeout)
    if self.poll() is None:
      self._process.kill()
      raise TimeoutError(f"no end after {timeout} s: {self._read()}")
    return None, self._read()

  def _read(self) -> str:
    return pathlib.Path(self._log.name).read_text()


class Forked:
  """`subprocess.Popen` of `python -m MODULE ARGUMENTS`, as a fork of this process."""

  def __init__(self, command: Sequence[str], env: Mapping[str, str], **options):
    """Starts it, in a session of its own, writing to the pipe `stdout`."""
    del options  # those of launch/local.py
    arguments = list(command[2:])
    assert list(command[:2]) == [sys.executable, "-m"], command
    read, write = os.pipe()
    self.returncode: int | None = None
    self._pid = os.fork()
    if not self._pid:
      os.setsid()
      code = 1
      try:
        _become(arguments, env, write)
        code = 0
      except SystemExit as error:
        code = error.code if isinstance(error.code, int) else bool(error.code)
      except BaseException:
        traceback.print_exc()
      finally:
        sys.stderr.flush()
        os._exit(code)
    os.close(write)
    self.stdout = os.fdopen(read, errors="replace")

  def poll(self) -> int | None:
    """Exit code, below 0 for a signal, or None while it runs."""
    if self.returncode is None:
      pid, status = os.waitpid(self._pid, os.WNOHANG)
      if pid:
        self.returncode = os.waitstatus_to_exitcode(status)
    return self.returncode

  def send_signal(self, number: int) -> None:
    """Sends a signal."""
    os.kill(self._pid, number)


def _run(arguments, environment, log):
  """Becomes the command, as `python -m` starts one."""
  with open(log, "wb") as file:
    _become(arguments, environment, file.fileno())


def _become(arguments, environment, output):
  os.environ.clear()
  os.environ.update(environment)
  with open(os.devnull, "r+b") as null:
    for target, source in ((0, null.fileno()), (1, output), (2, output)):
      os.dup2(source, target)
  sys.argv = arguments
  try:
    if arguments[0].endswith(".py"):
      sys.path.insert(0, os.path.dirname(arguments[0]))
      runpy.run_path(arguments[0], run_name="__main__")
    else:
      runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
  finally:
    atexit._run_exitfuncs()
