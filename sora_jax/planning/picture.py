"""A plan as a picture: what fills a chip's memory, and what a step's time goes to."""

from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sora_jax.planning.report import GB, PARTS, line

_MEMORY_COLOURS = ("#2f6db5", "#d98032", "#e4e4e4")
_TIME_COLOURS = ("#2f6db5", "#d98032", "#8a8a8a", "#b5413a")
_WIDTH, _BAR_HEIGHT, _TITLE_HEIGHT = 9.0, 1.1, 0.6  # inches


class _Bar(NamedTuple):
  """One bar: its parts lie side by side and fill `total`."""

  title: str
  parts: dict[str, float]
  colours: tuple[str, ...]
  unit: str
  total: float


def draw(planned: dict) -> Figure:
  """Returns a bar of each program's memory, and one of its seconds where known."""
  bars = [bar for program in planned["programs"] for bar in _bars(program)]
  # A Figure of its own: pyplot keeps global state and may look for a screen.
  size = (_WIDTH, _TITLE_HEIGHT + _BAR_HEIGHT * len(bars))
  figure = Figure(figsize=size, dpi=100, layout="constrained")
  figure.suptitle(_title(planned), x=0.01, horizontalalignment="left", fontsize=11)
  rows = figure.subplots(len(bars), squeeze=False)
  for axes, bar in zip(rows[:, 0], bars, strict=True):
    _draw_bar(axes, bar)
  return figure


def _title(planned):
  mesh = line({axis: n for axis, n in planned["mesh"].items() if n > 1})
  title = f"{planned['slices']} x {planned['topology']}, {mesh}, "
  title += f"remat {planned['remat']}"
  if planned.get("speed"):
    title += f": MFU {planned['speed']['mfu']:.1%}"
  return title


def _bars(program) -> list[_Bar]:
  name, peak, hbm = program["name"], program["peak"] / GB, program["hbm"] / GB
  arguments = program["arguments"] / GB
  memory = {
    "arguments": arguments,
    "temporaries": max(peak - arguments, 0.0),
    "free": max(hbm - peak, 0.0),
  }
  title = f"{name}: peak {peak:.1f} of {hbm:.1f} GB"
  title += "" if program["fits"] else " - DOES NOT FIT"
  bars = [_Bar(title, memory, _MEMORY_COLOURS, "GB", max(hbm, peak))]
  if "seconds" in program:
    seconds = {part: program["seconds"][part] for part in PARTS}
    total = program["seconds"]["total"]
    title = f"{name}: estimated {total:.3g} s"
    bars.append(_Bar(title, seconds, _TIME_COLOURS, "s", total))
  return bars


def _draw_bar(axes: Axes, bar: _Bar) -> None:
  left = 0.0
  for (name, value), colour in zip(bar.parts.items(), bar.colours, strict=True):
    label = f"{name} {value:.3g} {bar.unit}"
    axes.barh(0, value, left=left, color=colour, label=label)
    left += value
  axes.set_title(bar.title, loc="left", fontsize=10)
  axes.set_xlim(0, bar.total)
  axes.set_axis_off()  # the legend has the numbers
  axes.legend(
    loc="upper left",
    bbox_to_anchor=(0, 0),
    ncols=len(bar.parts),
    frameon=False,
    fontsize=9,
    borderaxespad=0,
    handlelength=1,
    handleheight=1,
  )
