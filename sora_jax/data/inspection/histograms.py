"""Histograms of a manifest's figures."""

import collections

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sora_jax.data.inspection.figures import Figures

_COLOUR = "#2f6db5"
_BINS, _SIZES = 40, 12


def draw(figures: Figures) -> Figure:
  """Durations, sizes, rates, tokens, captions and what the crop costs, six in one."""
  # A Figure of its own: pyplot keeps global state and may look for a screen.
  figure = Figure(figsize=(12.0, 6.4), dpi=100, layout="constrained")
  axes = figure.subplots(2, 3)
  _histogram(axes[0, 0], figures.seconds, "seconds of a video")
  _sizes(axes[0, 1], figures.sizes)
  _histogram(axes[0, 2], figures.fps, "frames a second of a video")
  _histogram(axes[1, 0], figures.tokens, "tokens of a clip")
  _histogram(axes[1, 1], figures.caption_lengths, "characters of a caption", "captions")
  lost = 100 * np.asarray(figures.cropped)
  _histogram(axes[1, 2], lost, "% of the pixels lost to the crop")
  return figure


def _histogram(axes: Axes, values, title: str, of: str = "clips") -> None:
  values = np.asarray(values)
  axes.set_title(title, loc="left", fontsize=10)
  if not len(values):
    axes.text(0.5, 0.5, "none", horizontalalignment="center", transform=axes.transAxes)
    axes.set_axis_off()
    return
  low, high = float(values.min()), float(values.max())
  # Of one value alone, a thin bar: a wide one would show a spread that is not there.
  span = (low, high) if high > low else (low - 0.5, low + 0.5)
  axes.hist(values, bins=_BINS if high > low else _BINS + 1, range=span, color=_COLOUR)
  middle = float(np.median(values))
  axes.axvline(middle, color="black", linewidth=1)
  note = f"{low:.4g} to {high:.4g}, median {middle:.4g}"
  axes.set_xlabel(note, fontsize=9)
  axes.set_ylabel(of, fontsize=9)
  axes.tick_params(labelsize=8)


def _sizes(axes: Axes, sizes: collections.Counter[tuple[int, int]]) -> None:
  """Bars of the commonest sizes, and one of all others."""
  common = sizes.most_common(_SIZES)
  bars = [(f"{width}x{height}", count) for (width, height), count in common]
  if len(sizes) > _SIZES:
    rest = sum(sizes.values()) - sum(count for _, count in common)
    bars.append((f"{len(sizes) - _SIZES} others", rest))
  axes.set_title("width x height", loc="left", fontsize=10)
  names, counts = zip(*bars[::-1], strict=True) if bars else ((), ())
  axes.barh(names, counts, color=_COLOUR, height=0.7)
  axes.set_ylim(-0.6, max(len(bars), 4) - 0.4)
  axes.set_xlabel("clips", fontsize=9)
  axes.tick_params(labelsize=8)
