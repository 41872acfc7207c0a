"""Breaks real runs and prints what is left of them, as a table.

  python -m tests.faults [--flips=100] [--kills=50] [--terms=20] [--only=NAME,...]
    [--work=FOLDER] [--seed=0]

It is to be run in the root of a checkout. A small run of the real main job is made once
(a minute), and for each try a copy of it is broken and gone on with by the same
command. The table has a row for each fault: tries; those that went on by themselves;
those that were refused with an error of one line; most steps that were made again;
those whose params equal the uninterrupted run's, bit for bit; those that ended well,
with other params; and the most seconds that a run took to end, once it was broken.
"Silently wrong" has to be 0. The exit code is 1 if it is not.
Logs of all runs stay in the folder. Full and read-only disks need root, jumps of the
clock libfaketime (apt install faketime), a slow store a C compiler: what cannot be
tried is said.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for tests/tiny.py

from faults import machines, stores  # noqa: E402, F401 (register their faults)
from faults.catalogue import FAULTS  # noqa: E402
from faults.runs import Runs  # noqa: E402

from sora_jax.runtime import text  # noqa: E402

HEAD = ("fault", "tries", "went on", "refused", "most steps lost", "bitwise equal",
        "silently wrong", "most seconds")  # fmt: skip


def main() -> int:
  """Runs the faults; the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--work", default="faults", help="folder of runs and logs")
  parser.add_argument("--only", default=",".join(FAULTS), help="names of faults")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--flips", type=int, default=100)
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--terms", type=int, default=20)
  args = parser.parse_args()
  runs = Runs(pathlib.Path(args.work).absolute(), args.seed)
  runs.prepare()
  rows: dict[str, list] = {}
  for name in args.only.split(","):
    tries = {"sigkill": args.kills, "sigterm": args.terms}.get(name, args.flips)
    for row, outcome in FAULTS[name](runs, tries):
      rows.setdefault(row, []).append(outcome)
      print(f"{row}: {outcome}", file=sys.stderr, flush=True)
  for line in text.table_lines(HEAD, (_row(*item) for item in rows.items())):
    print(line)
  return int(any(o.silently_wrong for found in rows.values() for o in found))


def _row(name, outcomes) -> tuple[str, ...]:
  went_on = [outcome for outcome in outcomes if outcome.went_on]
  seconds = [o.seconds for o in outcomes if o.seconds is not None]
  lost = max((outcome.lost for outcome in went_on), default=None)
  return (
    name,
    str(len(outcomes)),
    str(len(went_on)),
    str(sum(outcome.refused for outcome in outcomes)),
    "-" if lost is None else str(lost),
    f"{sum(bool(outcome.equal) for outcome in went_on)} of {len(went_on)}",
    str(sum(outcome.silently_wrong for outcome in outcomes)),
    f"{max(seconds):.1f}" if seconds else "-",
  )


if __name__ == "__main__":
  sys.exit(main())
