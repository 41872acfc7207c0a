"""launch/local.py, whose processes are forks of one that has imported everything.

Arguments: how many, and then those of `sora_jax.main`.
"""

import pathlib
import subprocess
import sys
import types

import warm

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "launch"))
import local  # noqa: E402

if __name__ == "__main__":
  names = {**vars(subprocess), "Popen": warm.Forked}
  local.subprocess = types.SimpleNamespace(**names)
  processes, *arguments = sys.argv[1:]
  commands = local.commands(
    "sora_jax.main", arguments, int(processes), local.free_port()
  )
  sys.exit(local.run(commands, local.environment(devices=1), grace=20))
