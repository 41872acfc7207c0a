"""Numbers and tables as people read them, in plain text."""

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

# A log has no width: no line of a table is ever broken.
_WIDTH = 1000


def format_seconds(seconds: float) -> str:
  """'2d03h', '1h05m', '3m20s' or '12s'."""
  seconds = round(seconds)
  for name, size, low, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60),
                                ("m", 60, "s", 1)):  # fmt: skip
    if seconds >= size:
      return f"{seconds // size}{name}{seconds % size // part:02d}{low}"
  return f"{seconds}s"


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """Returns the lines of a table: a head, a rule, and a line for each row.

  The first column is aligned to the left, and the others, which hold numbers, to the
  right. No line ends in blanks.

  Raises:
    ValueError: if a row has not as many cells as the head.
  """
  return _lines(Table(box=box.SIMPLE, pad_edge=False, show_edge=False), head, rows)


def markdown_lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """Returns the lines of the same table in Markdown."""
  lines = _lines(Table(box=box.MARKDOWN), head, rows)
  # Markdown has a sign for what is aligned to the right.
  first, *others = lines[1].strip("|").split("|")
  return [
    lines[0],
    "|".join(["", first, *(f"{x[:-1]}:" for x in others), ""]),
    *lines[2:],
  ]


def _lines(table: Table, head, rows) -> list[str]:
  for i, name in enumerate(head):
    table.add_column(name, justify="right" if i else "left", no_wrap=True)
  for row in rows:
    if len(row) != len(head):
      raise ValueError(f"a row of {len(row)} cells in a table of {len(head)}: {row}")
    table.add_row(*row)
  out = io.StringIO()
  # Neither a terminal's colours nor markup such as "[bold]" belong into a log.
  console = Console(file=out, width=_WIDTH, color_system=None, force_terminal=False,
                    markup=False, highlight=False)  # fmt: skip
  console.print(table)
  lines = (line.rstrip() for line in out.getvalue().splitlines())
  return [line for line in lines if line]
