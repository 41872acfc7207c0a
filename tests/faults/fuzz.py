"""Gives all readers odd inputs for as long as is asked for, and counts them.

  python -m tests.faults.fuzz [--minutes=60] [--seed=0] [--guided]

It is to be run in the root of a checkout. The tests marked `fuzz` run round after
round, each with another seed, and the last one to its end. The table has the inputs
that each test was given, and the exit code is 1 as soon as one of them ended in another
error than the documented ones; what pytest says of it is shown, with the input.
With --guided each test gets its share of the time once, and inputs that lead to new
branches, in a process whose memory is limited: see guided.py, which needs atheris.
"""

import argparse
import collections
import os
import re
import subprocess
import sys
import time

PYTEST = (sys.executable, "-m", "pytest", "-n", "0")
LIST = [*PYTEST, "-q", "--collect-only", "-m", "fuzz"]
# A round; the profile is that of tests/conftest.py.
ROUND = [
  *(*PYTEST, "-q", "-m", "fuzz"),
  *("--hypothesis-profile=long", "--hypothesis-show-statistics"),
]
GUIDED = [*PYTEST, "-s", "-p", "faults.guided"]
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


def rounds(minutes: float, seed: int) -> tuple[collections.Counter, str]:
  """(test -> inputs, "" or the log of the round in which a test failed)."""
  begin, count = time.monotonic(), 0
  inputs: collections.Counter = collections.Counter()
  while time.monotonic() - begin < 60 * minutes:
    command = [*ROUND, f"--hypothesis-seed={seed + count}"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
      return inputs, ended.stdout
    inputs += inputs_of(ended.stdout)
    count += 1
    print(f"round {count}: {inputs.total()} inputs", file=sys.stderr, flush=True)
  return inputs, ""


def guide(minutes: float) -> tuple[collections.Counter, str]:
  """(test -> inputs, "" or the log of the first test that failed)."""
  listed = subprocess.run(LIST, stdout=subprocess.PIPE, text=True, check=True).stdout
  tests = [line for line in listed.splitlines() if "::" in line]
  environment = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")]),
    "GUIDED_SECONDS": str(max(1, round(60 * minutes / len(tests)))),
  }
  inputs: collections.Counter = collections.Counter()
  for test in tests:
    ended = subprocess.run(
      [*GUIDED, test],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
      check=False,
    )
    if ended.returncode:
      return inputs, ended.stdout
    runs = re.search(r"^Done (\d+) runs", ended.stdout, re.M)
    inputs[test] += int(runs[1]) if runs else 0  # none of a test without strategies
    print(f"{test}: {inputs[test]} inputs", file=sys.stderr, flush=True)
  return inputs, ""


def main() -> int:
  """Gives the inputs, and says how many; the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--minutes", type=float, default=60.0)
  parser.add_argument("--seed", type=int, default=0, help="of the first round")
  parser.add_argument("--guided", action="store_true", help="by atheris")
  args = parser.parse_args()
  begin = time.monotonic()
  inputs, fault = (
    guide(args.minutes) if args.guided else rounds(args.minutes, args.seed)
  )
  if fault:
    print(fault)
    return 1
  minutes = (time.monotonic() - begin) / 60
  for name, count in sorted(inputs.items()):
    print(f"{count:>9}  {name}")
  print(f"{inputs.total():>9}  in {minutes:.0f} minutes, without another error")
  return 0


if __name__ == "__main__":
  sys.exit(main())
