"""The course of each figure over time, from the lines that measuring scripts keep.

  python launch/benchmarks/report.py                      # runs/ and the runs below it
  python launch/benchmarks/report.py runs/quickstart/benchmarks.jsonl --threshold=0.05
  python launch/benchmarks/report.py --plot=runs/benchmarks.png --fail

Prints a table for each benchmark: a row for each figure, a column for each of the last
--runs runs. Only comparable runs share a table: those of equal settings on an equal
machine. A value is compared with the median of up
to --window values before it, and marked where it differs by more than --threshold:
"worse" or "better" where the figure has a better side, else "changed". With --fail the
exit code is 1 if the last value of any figure is worse.
"""

import dataclasses
import glob
import itertools
import json
import pathlib
import statistics
import sys
from collections.abc import Iterable, Sequence

import record
from absl import app, flags

DEFAULTS = (f"runs/{record.NAME}", f"runs/*/{record.NAME}")


@dataclasses.dataclass(frozen=True)
class Point:
  """One value of a figure.

  Attributes:
    time: when it was measured, ISO 8601 in UTC.
    commit: short name of the commit; "+" after it if files differed from it.
    value: in the unit of its series.
    change: relative difference from the median of values before it; None of the first.
    mark: "worse", "better", "changed", or "" within the threshold.
  """

  time: str
  commit: str
  value: float
  change: float | None
  mark: str


@dataclasses.dataclass(frozen=True)
class Series:
  """One figure over comparable runs, oldest first."""

  benchmark: str
  settings: str
  machine: str
  figure: str
  unit: str
  points: tuple[Point, ...]


def read(paths: Iterable[pathlib.Path]) -> list[dict]:
  """The lines of all files, oldest first.

  Raises:
    ValueError: if a line is not JSON, or of another format; names file and line.
  """
  lines = []
  for path in paths:
    for number, text in enumerate(path.read_text().splitlines(), 1):
      try:
        line = json.loads(text)
        found = line["format"]
      except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}:{number} is no line of figures: {text!r}") from error
      if found != record.FORMAT:
        raise ValueError(
          f"{path}:{number} is of format {found}, this script reads {record.FORMAT}"
        )
      lines.append(line)
  return sorted(lines, key=lambda line: line["time"])


def series_of(lines: Sequence[dict], threshold: float, window: int) -> list[Series]:
  """A series for each figure of comparable lines, with changes marked.

  Args:
    lines: as `read` returns them.
    threshold: relative change beyond which a value is marked.
    window: how many values before it a value is compared with.
  """
  groups = {}
  for line in lines:
    machine = {k: v for k, v in line["machine"].items() if k != "load"}
    settings = " ".join(f"{k}={v}" for k, v in sorted(line["settings"].items()))
    for name, figure in line["figures"].items():
      key = line["benchmark"], settings, _machine_text(machine), name, figure["unit"]
      groups.setdefault(key, []).append((line, figure))
  return [
    Series(*key, tuple(_points(members, threshold, window)))
    for key, members in sorted(groups.items())
  ]


def _machine_text(machine: dict) -> str:
  text = f"{machine['cpu']}, {machine['cores']} cores"
  if machine["platform"] == "cpu" and machine["devices"] == 1:
    return text
  return f"{machine['devices']} x {machine['device']}, {text}"


def _points(members, threshold, window):
  before = []
  for line, figure in members:
    value, change, mark = figure["value"], None, ""
    if before:
      usual = statistics.median(before[-window:])
      change = (value - usual) / abs(usual) if usual else None
      # From zero any other value is a change that has no ratio.
      if abs(change) > threshold if usual else value != 0:
        mark = _mark(value > usual, figure["better"])
    before.append(value)
    commit = (line["commit"] or "-")[:9] + "+" * bool(line["dirty"])
    yield Point(line["time"], commit, value, change, mark)


def _mark(rises: bool, better: str) -> str:
  if not better:
    return "changed"
  return "better" if rises == (better == "higher") else "worse"


def table(group: Sequence[Series], runs: int) -> str:
  """The figures of one benchmark in Markdown, a column for each of the last runs.

  Args:
    group: series of equal benchmark, settings and machine.
    runs: how many of the last runs are shown.
  """
  first = group[0]
  columns = sorted({(p.time, p.commit) for series in group for p in series.points})
  columns = columns[-runs:]
  heads = [f"{time[:16].replace('T', ' ')} {commit}" for time, commit in columns]
  lines = [
    f"### {first.benchmark}",
    f"{first.machine}; {first.settings}",
    "",
    f"| figure | unit | {' | '.join(heads)} | change |",
    f"| :-- | :-- |{' --: |' * len(heads)} --: |",
  ]
  for series in group:
    found = {(p.time, p.commit): p for p in series.points}
    cells = [
      f"{found[c].value:.4g} {found[c].mark}".strip() if c in found else ""
      for c in columns
    ]
    change = series.points[-1].change
    last = "" if change is None else f"{change:+.1%}"
    lines.append(f"| {series.figure} | {series.unit} | {' | '.join(cells)} | {last} |")
  return "\n".join(lines)


def draw(path: pathlib.Path, all_series: Sequence[Series]) -> None:
  """Writes a PNG: a small plot for each series, marked values in red or green.

  Raises:
    ValueError: if there is no series.
  """
  from matplotlib.figure import Figure  # only a plot should wait for it

  if not all_series:
    raise ValueError(f"{path}: no figure to draw")
  columns = min(3, len(all_series))
  rows = -(-len(all_series) // columns)
  # A Figure of its own: pyplot keeps global state and may look for a screen.
  figure = Figure(figsize=(5 * columns, 2.8 * rows), dpi=100, layout="constrained")
  colors = {"worse": "tab:red", "better": "tab:green", "changed": "tab:orange"}
  plots = figure.subplots(rows, columns, squeeze=False).flat
  for axes, series in zip(plots, all_series, strict=False):
    values = [p.value for p in series.points]
    axes.plot(values, color="tab:blue")
    dots = [colors.get(p.mark, "tab:blue") for p in series.points]
    axes.scatter(range(len(values)), values, c=dots, zorder=3)
    axes.set_title(f"{series.benchmark}: {series.figure}", fontsize=10)
    axes.set_xlabel(f"{series.settings}\n{series.machine}", fontsize=6)
    axes.set_ylabel(series.unit)
    axes.set_xticks(
      range(len(values)), [p.commit for p in series.points], fontsize=6, rotation=30
    )
    axes.set_ylim(bottom=min(0, *values))
    axes.grid(alpha=0.3)
  for axes in list(figure.axes)[len(all_series) :]:
    axes.set_visible(False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, format="png")


def _define_flags():
  flags.DEFINE_float("threshold", 0.1, "Relative change that is marked.", 0.0)
  flags.DEFINE_integer(
    "window", 5, "Values before it that a value is compared with.", 1
  )
  flags.DEFINE_integer("runs", 5, "Last runs that tables show; the plot has all.", 1)
  flags.DEFINE_string("plot", None, "PNG to write, with a plot for each figure.")
  flags.DEFINE_list("only", [], "Benchmarks to show; all if empty.")
  flags.DEFINE_bool(
    "fail", False, "Exit with 1 if the last value of a figure is worse."
  )


def main(argv):
  args = flags.FLAGS
  given = argv[1:]
  found = given or sorted(f for pattern in DEFAULTS for f in glob.glob(pattern))
  paths = [pathlib.Path(name) for name in found]
  if missing := [str(path) for path in paths if not path.is_file()]:
    raise ValueError(f"no such file: {', '.join(missing)}")
  lines = [x for x in read(paths) if not args.only or x["benchmark"] in args.only]
  if not lines:
    where = ", ".join(given or DEFAULTS)
    raise ValueError(f"no figures in {where}: run a script of launch/benchmarks first")
  found = series_of(lines, args.threshold, args.window)
  groups = itertools.groupby(found, lambda s: (s.benchmark, s.settings, s.machine))
  print("\n\n".join(table(list(group), args.runs) for _, group in groups))
  if args.plot:
    draw(pathlib.Path(args.plot), found)
    print(f"\n{args.plot}")
  worse = [f"{s.benchmark}: {s.figure}" for s in found if s.points[-1].mark == "worse"]
  if worse:
    print(f"\nworse by more than {args.threshold:.0%}: {', '.join(worse)}")
    if args.fail:
      sys.exit(1)


def guarded(argv):
  """Runs `main`, with what a user got wrong as one line."""
  try:
    main(argv)
  except ValueError as error:
    sys.exit(str(error))


if __name__ == "__main__":
  _define_flags()
  app.run(guarded)
