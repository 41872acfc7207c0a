"""Draws chain.png, the picture of the chain in README.md.

python .github/chain.py
"""

import pathlib

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

PATH = pathlib.Path(__file__).with_name("chain.png")
DATA, STAGE, MODEL = "#f1f3f5", "#dbe7f6", "#fbe3c8"
CLIPS = ("#7fb3a6", "#e0976f", "#8f9fca", "#d58fb6", "#a3c96a")
WIDTH, HEIGHT = 1.9, 0.95


def box(axes, x, y, title, text, color):
  """A rounded box with its centre at (x, y)."""
  corner = (x - WIDTH / 2, y - HEIGHT / 2)
  style = "round,pad=0,rounding_size=0.12"
  axes.add_patch(
    FancyBboxPatch(corner, WIDTH, HEIGHT, style, facecolor=color, edgecolor="#5c6670")
  )
  axes.text(x, y + 0.22, title, ha="center", va="center", weight="bold", size=10.5)
  axes.text(x, y - 0.14, text, ha="center", va="center", size=8.5, linespacing=1.3)


def arrow(axes, start, end):
  """An arrow between two points."""
  axes.annotate(
    "", end, start, arrowprops={"arrowstyle": "-|>", "color": "#5c6670", "lw": 1.4}
  )


def packed_row(axes, x, y, lengths):
  """A row of tokens: a coloured block for each clip, white for padding."""
  left, height = x - WIDTH / 2, 0.2
  for length, color in zip(lengths, CLIPS, strict=False):
    axes.add_patch(
      Rectangle((left, y), length * WIDTH, height, facecolor=color, edgecolor="white")
    )
    left += length * WIDTH
  axes.add_patch(
    Rectangle((x - WIDTH / 2, y), WIDTH, height, facecolor="none", edgecolor="#5c6670")
  )


def draw(path):
  """Writes the picture: training above, sampling below."""
  figure = Figure(figsize=(13.4, 3.9), dpi=100)
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set(xlim=(-0.5, 12.9), ylim=(-0.15, 3.75))
  axes.axis("off")
  columns = [0.55 + 2.25 * i for i in range(6)]
  above, below = 2.75, 0.75

  axes.text(-0.4, 3.5, "Training", size=12, weight="bold", color="#35506b")
  for x, title, text, color in (
    (columns[0], "your videos", "any length, size,\nframe rate; captions", DATA),
    (columns[1], "data", "cut into clips, of\ntheir own aspect ratio", STAGE),
    (columns[2], "vae", "learns to make\nvideo small and back", STAGE),
    (columns[3], "encode", "clips and captions\nto latents, once", STAGE),
    (columns[4], "packed rows", "patches of many clips\nin rows of one length", DATA),
    (columns[5], "dit", "learns to take noise\noff the patches", STAGE),
  ):
    box(axes, x, above, title, text, color)
  for left, right in zip(columns, columns[1:], strict=False):
    arrow(axes, (left + WIDTH / 2, above), (right - WIDTH / 2, above))
  packed_row(axes, columns[4], above - 0.8, (0.3, 0.12, 0.33, 0.06, 0.15))
  axes.text(
    columns[4], above - 0.93, "each colour a clip, white padding", ha="center", size=8
  )

  axes.text(-0.4, 1.5, "Sampling", size=12, weight="bold", color="#35506b")
  for x, title, text, color in (
    (columns[0], "a prompt", "text, images, videos", DATA),
    (columns[1], "packed rows", "noise, beside the\npatches that are given", DATA),
    (columns[2], "DiT", "takes noise off,\nstep by step", MODEL),
    (columns[3], "latents", "one grid for each\nvideo", DATA),
    (columns[4], "VAE decoder", "latents to frames,\nin chunks", MODEL),
    (columns[5], "sample, evaluate", "write the video,\nmeasure it", STAGE),
  ):
    box(axes, x, below, title, text, color)
  for left, right in zip(columns, columns[1:], strict=False):
    arrow(axes, (left + WIDTH / 2, below), (right - WIDTH / 2, below))
  packed_row(axes, columns[1], below - 0.8, (0.45, 0.2, 0.25))
  figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
  draw(PATH)
