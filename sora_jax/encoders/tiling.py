"""Tiles of a large frame that overlap, and their blending: pure numpy.

Positions are in latent pixels, so that a tile of pixels and one of latents match.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Equal tiles that cover a grid; neighbours overlap, evenly.

  Attributes:
    grid, size: (H, W) of the grid, and of a tile. rows, columns: where tiles begin.
  """

  grid: tuple[int, int]
  size: tuple[int, int]
  rows: tuple[int, ...]
  columns: tuple[int, ...]

  def __len__(self):
    return len(self.rows) * len(self.columns)

  def cut(self, x_BTHWC, scale: int = 1) -> list:
    """The tiles of an array with `scale` values a latent pixel, row by row."""
    h, w = (n * scale for n in self.size)
    return [
      x_BTHWC[:, :, y * scale : y * scale + h, x * scale : x * scale + w]
      for y in self.rows
      for x in self.columns
    ]

  def blend(self, tiles, scale: int = 1) -> np.ndarray:
    """One array of the tiles, weighted by linear ramps over the overlaps."""
    B, T, *_, C = tiles[0].shape
    h, w = (n * scale for n in self.size)
    out = np.zeros((B, T, *(n * scale for n in self.grid), C), np.float32)
    weights = [
      (y * scale, x * scale, weight_H[:, None, None] * weight_W[:, None])
      for y, weight_H in zip(self.rows, _weights(self.rows, h, scale), strict=True)
      for x, weight_W in zip(
        self.columns, _weights(self.columns, w, scale), strict=True
      )
    ]
    for tile, (y, x, weight_HW1) in zip(tiles, weights, strict=True):
      out[:, :, y : y + h, x : x + w] += weight_HW1 * tile
    dtype = tiles[0].dtype
    return np.round(out).astype(dtype) if np.issubdtype(dtype, np.integer) else out


def plan(grid: tuple[int, int], tile: int) -> Tiles:
  """Square tiles of a (H, W) grid, that overlap by a quarter at least.

  Raises:
    ValueError: if the tile is under 2, so that tiles cannot overlap.
  """
  if tile < 2:
    raise ValueError(f"a tile has {tile} latent pixels a side, it needs 2 to overlap")
  height, width = (min(tile, n) for n in grid)
  rows, columns = _starts(grid[0], height), _starts(grid[1], width)
  return Tiles((grid[0], grid[1]), (height, width), rows, columns)


def _starts(length, tile):
  # Even steps, so that the last tile is as large as the others: one compilation.
  step = max(1, tile - max(1, tile // 4))
  count = 1 + math.ceil((length - tile) / step)
  last = length - tile
  return tuple(round(i * last / max(1, count - 1)) for i in range(count))


def _weights(starts, length, scale):
  """Weights [length] of each tile along one axis; where tiles overlap they sum to 1."""
  place = np.arange(length) + 0.5
  weights = []
  for i, start in enumerate(starts):
    weight = np.ones(length)
    if i > 0:
      overlap = length - (start - starts[i - 1]) * scale
      weight = np.minimum(weight, place / overlap)
    if i + 1 < len(starts):
      overlap = length - (starts[i + 1] - start) * scale
      weight = np.minimum(weight, (length - place) / overlap)
    weights.append(weight.astype(np.float32))
  total = np.zeros(starts[-1] * scale + length, np.float32)
  for start, weight in zip(starts, weights, strict=True):
    total[start * scale : start * scale + length] += weight
  return [
    weight / total[start * scale : start * scale + length]
    for start, weight in zip(starts, weights, strict=True)
  ]
