"""What the commands share: flags, logging, and errors of a user as one line.

Flags are defined when a command starts and never by an import, so that a program which
imports sora_jax has its own flags to itself.
"""

import dataclasses
import errno
import os
import pathlib
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import sora_jax
from sora_jax.run import recipe as recipes
from sora_jax.run import replay, stages
from sora_jax.runtime import hosts, quiet
from sora_jax.training import loop
from sora_jax.weights.discover import NETWORKS

# Errors of a disk, which say all that a user needs: it is full, or may not be written.
_OF_THE_DISK = (
  errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EIO,
  errno.ESTALE,
)  # fmt: skip

# The flags belong to the command that calls, so that its --help shows them.
flags.disclaim_key_flags()


def define_flags() -> None:
  """Defines the flags of a command that reads a config: `--config`, `--workdir`, ..."""
  config_flags.DEFINE_config_file(
    "config", None, "Recipe, such as configs/quickstart.py.", lock_config=True
  )
  flags.DEFINE_string(
    "workdir", None, "Folder of the run; runs/<name of the config> by default."
  )
  define_host_flags()
  flags.DEFINE_integer(
    "preempted_code", 0, "Exit code once a signal came and the state is saved."
  )


def define_host_flags() -> None:
  """Defines the flags of a command that may run on several hosts at once."""
  flags.DEFINE_bool(
    "distributed", False, "Run on several hosts: this command on each of them."
  )
  # Where jax finds out itself (TPU, GKE, Slurm), none of these is needed.
  flags.DEFINE_string("coordinator", None, "Address:port of process 0.")
  flags.DEFINE_integer("processes", None, "Number of processes.", 1)
  flags.DEFINE_integer("process", None, "Which of them this is, from 0.", 0)


def start_logging() -> None:
  """Shows our own lines at level INFO, and only warnings of the libraries."""
  quiet.install()
  logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
  own = (os.path.dirname(sora_jax.__file__), os.path.abspath(sys.argv[0]))
  logging.get_absl_logger().addFilter(
    lambda record: (
      record.levelno >= 30 or os.path.abspath(record.pathname).startswith(own)
    )
  )


def command(*names: str) -> None:
  """Runs stages (those of config.stages if none is named) as a program with flags."""
  define_flags()
  flags.mark_flag_as_required("config")
  run_app(lambda argv: run_stages(argv, *names))


def run_stages(argv: list[str], *names: str) -> None:
  """Runs the stages of the flags' config; what `command` does once they are parsed."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  start_logging()
  args = flags.FLAGS
  if args.distributed:
    hosts.start(args.coordinator, args.processes, args.process)
  recipe = recipes.read(args.config)
  hosts.check_alike({**dataclasses.asdict(recipe), "workdir": workdir()})
  if recipe.replay:
    return replay.run(names or recipe.stages, recipe, workdir())
  stages.run(names or recipe.stages, recipe, workdir())


def start_copying(argv: list[str]) -> flags.FlagValues:
  """The flags of a command that copies networks between files, checked.

  Raises:
    ValueError: for other arguments, and networks of --only that there are not.
  """
  start_logging()
  args = flags.FLAGS
  if len(argv) > 1:
    raise ValueError(f"unexpected arguments {argv[1:]}")
  if unknown := set(args.only) - set(NETWORKS):
    raise ValueError(f"--only: {sorted(unknown)} are none of {NETWORKS}")
  # Files in, files out: an accelerator, and the other hosts of a pod, are not needed.
  jax.config.update("jax_platforms", "cpu")
  return args


def workdir() -> str:
  """The flag, or runs/<name of the config file>[-<variant>]."""
  if flags.FLAGS.workdir:
    return flags.FLAGS.workdir
  file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(
    ":"
  )
  name = pathlib.Path(file).stem
  return os.path.join("runs", f"{name}-{variant}" if variant else name)


def run_app(main: Callable) -> None:
  """app.run, with a user's errors as one line and not as a stack trace."""

  def guarded(argv):
    try:
      return main(argv)
    except loop.Preempted:
      sys.exit(flags.FLAGS.preempted_code)
    except (ValueError, OSError) as error:
      if logging.level_debug() or (
        isinstance(error, OSError) and error.errno not in _OF_THE_DISK
      ):
        raise
      logging.error("%s (--verbosity=1 shows where)", error)
      sys.exit(1)

  with hosts.leave_on_error():
    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv):
  """Parses flags; wrong keys and files of a config are one line, too."""
  try:
    rest = app.parse_flags_with_usage(argv)
    if "config" in flags.FLAGS:
      getattr(flags.FLAGS.config, "keys", None)  # raises if the file was not loaded
    return rest
  # config_flags lets these through; the first two hold no more than the wrong key.
  except (AttributeError, KeyError) as error:
    while isinstance(error.args[0], Exception):
      error = error.args[0]
    reason = "; ".join(str(error.args[0]).splitlines())
    names = [arg.lstrip("-").split("=")[0] for arg in argv]
    key = reason.split("'")[1] if "'" in reason else ""
    name = next((name for name in names if key in name.split(".")), "config")
    sys.exit(f"FATAL Flags parsing error: --{name}: the config has no key {reason}")
  except OSError as error:
    sys.exit(f"FATAL Flags parsing error: {' '.join(str(error).split())}")
