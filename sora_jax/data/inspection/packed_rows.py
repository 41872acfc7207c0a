"""Training rows as the DiT sees them: what is in their tokens, and how that looks."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.data.inspection import pictures
from sora_jax.data.records import LatentClip
from sora_jax.packing import patches, time_grid
from sora_jax.packing.packed_row import PackedRow

# Latents [t, h, w, C] of a row -> uint8 [T, H, W, 3].
Decode = Callable[[np.ndarray], np.ndarray]

COLOURS = ((47, 109, 181), (217, 128, 50), (58, 145, 92), (150, 80, 160), (181, 65, 58))
GIVEN = (255, 214, 0)
_PADDING = (225, 225, 225)
_BAR_WIDTH, _BAR_HEIGHT, _HEIGHT, _BORDER, _FRAMES = 1000, 22, 96, 4, 12


class SeenSegment(NamedTuple):
  """One segment of a row, taken out of its tokens again.

  Attributes:
    clip: that it was made of.
    latent_THWC: of the clip. images_NHWC: of the images that were appended.
    given_THW: which patches of the clip are given; those of the images all are.
    tokens: of both.
    text_S: ids of its text; None where the row holds features.
  """

  clip: LatentClip
  latent_THWC: np.ndarray
  images_NHWC: np.ndarray
  given_THW: np.ndarray
  tokens: int
  text_S: np.ndarray | None


def segments_of(
  row: PackedRow, clips: Sequence[LatentClip], patch_size: tuple[int, int, int]
) -> list[SeenSegment]:
  """The segments of a row, in its order; nothing but the row says what is in them.

  clips: that `clip_N` of the row counts in.
  """
  found = []
  for slot, index in enumerate(row["clip_N"]):
    if index < 0:
      continue
    clip, here_L = clips[int(index)], row["segment_L"] == slot + 1
    patch_LP, given_L = row["patch_LP"][here_L], row["group_L"][here_L] % 2 == 1
    grid = patches.grid_shape(clip.shape, patch_size)
    length, image = int(np.prod(grid)), grid[1] * grid[2]
    image_NLP = patch_LP[length:].reshape(-1, image, patch_LP.shape[1])
    images = patches.unpatchify(image_NLP, (1, *grid[1:]), patch_size)
    text_S = (
      row["text_S"][row["text_segment_S"] == slot + 1] if "text_S" in row else None
    )
    found.append(
      SeenSegment(
        clip,
        patches.unpatchify(patch_LP, grid, patch_size),
        images[:, 0],
        given_L[:length].reshape(grid),
        len(patch_LP),
        text_S,
      )
    )
  return found


def bar(row: PackedRow) -> np.ndarray:
  """All tokens of a row in one line: segments by colour, given ones yellow below."""
  place_X = np.arange(_BAR_WIDTH) * len(row["segment_L"]) // _BAR_WIDTH
  segment_X = row["segment_L"][place_X]
  given_X = row["group_L"][place_X] % 2 == 1
  colours = np.array(COLOURS, np.uint8)[(segment_X - 1) % len(COLOURS)]
  colours[segment_X == 0] = _PADDING
  image = np.repeat(colours[None], _BAR_HEIGHT, axis=0)
  # The border is drawn where a segment begins, so that equal colours are two, too.
  image[:, 1:][:, segment_X[1:] != segment_X[:-1]] = 0
  image[-_BAR_HEIGHT // 3 :, given_X & (segment_X > 0)] = GIVEN
  return image


def picture(segment: SeenSegment, number: int, decode: Decode) -> np.ndarray:
  """A strip of a segment in the colour that it has in the bar, with a border around.

  It has a frame for each latent frame, at most twelve, and then the images. Given
  patches have a yellow line around them.

  number: of the segment in its row, from 0.
  """
  video_THWC = decode(segment.latent_THWC)
  count = len(segment.latent_THWC)
  shown = np.linspace(0, count - 1, min(count, _FRAMES)).round().astype(int)
  # All patches are one latent frame long, see the check of the patch size.
  frames = [
    _marked(video_THWC[time_grid.frame_at(int(t))], segment.given_THW[t]) for t in shown
  ]
  whole_HW = np.ones_like(segment.given_THW[0])
  for latent_HWC in segment.images_NHWC:
    frames.append(_marked(decode(latent_HWC[None])[0], whole_HW))
  colour = COLOURS[number % len(COLOURS)]
  return _framed(pictures.strip(frames, _HEIGHT), colour)


def _marked(frame_HWC, given_HW) -> np.ndarray:
  """A frame with a yellow line around what is given."""
  frame_HWC = pictures.resized(frame_HWC, _HEIGHT)
  height, width = frame_HWC.shape[:2]
  rows = np.arange(height) * given_HW.shape[0] // height
  columns = np.arange(width) * given_HW.shape[1] // width
  given = np.pad(given_HW[rows][:, columns], 2)
  inside = given.copy()
  for axis in (0, 1):
    for step in (-1, 1, -2, 2):
      inside &= np.roll(given, step, axis)
  edge = (given & ~inside)[2:-2, 2:-2]
  return np.where(edge[..., None], np.array(GIVEN, np.uint8), frame_HWC)


def _framed(image_HWC, colour) -> np.ndarray:
  wide = ((_BORDER, _BORDER), (_BORDER, _BORDER), (0, 0))
  framed = np.pad(image_HWC, wide)
  border = np.pad(np.zeros(image_HWC.shape[:2], bool), wide[:2], constant_values=True)
  framed[border] = colour
  return framed
