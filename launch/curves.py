"""A line plot of the runs of a sweep, by matplotlib."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


def draw(
  path,
  curves: Mapping[str, Sequence[tuple[float, float]]],
  title: str = "",
  size: tuple[int, int] = (960, 540),
) -> None:
  """Writes a PNG of curves with a legend; a curve of one point is a dot.

  Args:
    path: of the file.
    curves: name -> points (x, y). Points that are not finite are left out.
    title: over the plot.
    size: (width, height) of the picture in pixels.

  Raises:
    ValueError: if there is no point to draw.
  """
  finite = {
    name: sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
    for name, points in curves.items()
  }
  if not any(finite.values()):
    raise ValueError(f"{path}: no finite point to draw, of {len(curves)} curves")
  # A Figure of its own: pyplot keeps global state and may look for a screen.
  figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, layout="constrained")
  axes = figure.subplots()
  for name, points in finite.items():
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.plot(xs, ys, marker="o" if len(points) == 1 else None, label=name)
  axes.set_title(title)
  axes.grid(alpha=0.3)
  axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
  figure.savefig(path, format="png")
