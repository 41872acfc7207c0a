"""A line plot as a picture, drawn with PIL: enough to compare the runs of a sweep."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

_COLORS = (
  "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2",
  "#17becf", "#7f7f7f", "#bcbd22",
)  # fmt: skip
_LEFT, _TOP, _BOTTOM, _LINE = 70, 30, 40, 16


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
    size: (width, height) of the picture in pixels; taller where the legend needs it.

  Raises:
    ValueError: if there is no point to draw.
  """
  curves = {
    name: sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
    for name, points in curves.items()
  }
  every = [point for points in curves.values() for point in points]
  if not every:
    raise ValueError(f"{path}: no finite point to draw, of {len(curves)} curves")
  font = ImageFont.load_default(12)
  legend = 40 + round(max(font.getlength(name) for name in curves))
  width, height = size[0] + legend, max(size[1], _TOP + _LINE * (len(curves) + 2))
  image = Image.new("RGB", (width, height), "white")
  canvas = ImageDraw.Draw(image)
  box = (_LEFT, _TOP, size[0] - 10, height - _BOTTOM)
  xs, ys = _range([x for x, _ in every]), _range([y for _, y in every])

  def place(x, y):
    return (
      box[0] + (x - xs[0]) / (xs[1] - xs[0]) * (box[2] - box[0]),
      box[3] - (y - ys[0]) / (ys[1] - ys[0]) * (box[3] - box[1]),
    )

  for y in _ticks(*ys):
    left, at = place(xs[0], y)
    canvas.line((left, at, box[2], at), fill="#dddddd")
    canvas.text((left - 6, at), f"{y:g}", fill="black", font=font, anchor="rm")
  for x in _ticks(*xs):
    at, low = place(x, ys[0])
    canvas.line((at, box[1], at, low), fill="#dddddd")
    canvas.text((at, low + 6), f"{x:g}", fill="black", font=font, anchor="mt")
  canvas.rectangle(box, outline="black")
  canvas.text((box[0], 8), title, fill="black", font=font)
  for i, (name, points) in enumerate(curves.items()):
    color, placed = _COLORS[i % len(_COLORS)], [place(*point) for point in points]
    if len(placed) > 1:
      canvas.line(placed, fill=color, width=2)
    for x, y in placed[-1:]:
      canvas.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
    at = _TOP + _LINE * (i + 0.5)
    canvas.line((size[0] + 4, at, size[0] + 24, at), fill=color, width=3)
    canvas.text((size[0] + 30, at), name, fill="black", font=font, anchor="lm")
  image.save(path, "PNG")


def _range(values):
  low, high = min(values), max(values)
  margin = 0.04 * (high - low) or 0.5 * abs(low) or 1.0
  return low - margin, high + margin


def _ticks(low, high, count=6):
  """Round numbers between low and high."""
  step = 10 ** math.floor(math.log10((high - low) / count))
  step *= next(n for n in (1, 2, 5, 10) if (high - low) / (n * step) <= count)
  first = math.ceil(low / step)
  return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]
