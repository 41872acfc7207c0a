"""Gives all readers odd inputs for as long as is asked for, and counts them.

  python -m tests.faults.fuzz [--minutes=60] [--seed=0]

It is to be run in the root of a checkout. The tests marked `fuzz` run round after
round, each with another seed, and the last one to its end. The table has the inputs
that each test was given, and the exit code is 1 as soon as one of them ended in another
error than the documented ones; what pytest says of it is shown, with the input.
"""

import argparse
import collections
import re
import subprocess
import sys
import time

# A round; the profile is that of tests/conftest.py.
COMMAND = [
  *(sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "fuzz"),
  *("--hypothesis-profile=long", "--hypothesis-show-statistics"),
]
# The name of a test, or what one of its phases has tried.
STATISTICS = re.compile(r"^(\S+::\S+):$|(\d+) passing\b", re.M)


def inputs_of(log: str) -> collections.Counter:
  """Returns test -> inputs that were valid, by the statistics of hypothesis."""
  found: collections.Counter = collections.Counter()
  name = ""
  for match in STATISTICS.finditer(log):
    if match[1]:
      name = match[1]
    else:
      found[name] += int(match[2])
  return found


def main() -> int:
  """Runs the rounds; the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--minutes", type=float, default=60.0)
  parser.add_argument("--seed", type=int, default=0, help="of the first round")
  args = parser.parse_args()
  begin, rounds = time.monotonic(), 0
  inputs: collections.Counter = collections.Counter()
  while (minutes := (time.monotonic() - begin) / 60) < args.minutes:
    command = [*COMMAND, f"--hypothesis-seed={args.seed + rounds}"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
      print(ended.stdout)
      return 1
    inputs += inputs_of(ended.stdout)
    rounds += 1
    print(f"round {rounds}: {inputs.total()} inputs", file=sys.stderr, flush=True)
  for name, count in sorted(inputs.items()):
    print(f"{count:>9}  {name}")
  print(f"{inputs.total():>9}  in {minutes:.0f} minutes, without another error")
  return 0


if __name__ == "__main__":
  sys.exit(main())
