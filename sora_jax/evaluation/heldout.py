"""Which clips are evaluated, their pixels, and prompts beyond the clips that there are.

A clip of generated shapes is a function of its number. So there are as many held-out
prompts with known content as are wanted, and clips to prompt with: they need no files.
"""

import pathlib
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from sora_jax.data import shape_worlds, shapes, sources
from sora_jax.data.buckets import limit_sizes
from sora_jax.data.clips import Clip, read_manifest
from sora_jax.packing import time_grid
from sora_jax.run import recipe as recipes

SIZE = (64, 64)  # height and width of drawn clips
_LONGEST_SAMPLE = 17  # frames
_SEARCHED = 2000  # descriptions for each clip that is drawn


class Lengths(NamedTuple):
  """Frames of the clips that a world of shapes prompts with.

  Attributes:
    whole: of a clip, the longest that the world has.
    given: of it, where a video is given: half, so that it is known how it goes on.
    sampled: of a video of text or images: no longer than clips are, nor than 17.
  """

  whole: int
  given: int
  sampled: int


class DrawnClip(NamedTuple):
  """A held-out clip in memory: video_THWC is uint8, of `lengths.whole` frames."""

  caption: str
  fps: float
  truth: dict
  video_THWC: np.ndarray


def heldout_clips(recipe: recipes.Recipe, workdir: pathlib.Path) -> list[Clip]:
  """Returns the `config.evaluate.clips` clips of a run that are evaluated.

  They are held-out ones, or those of `config.evaluate.split`, in the sizes that the
  stage "encode" gave them.
  """
  clips = read_manifest(workdir / "data" / "manifest.jsonl")
  clips = limit_sizes(clips, recipe.encode.max_sizes)
  clips = [clip for clip in clips if clip.split == recipe.evaluate.split]
  return spread(clips, recipe.evaluate.clips)


def spread(clips: list, count: int) -> list:
  """Returns at most `count` of the clips, evenly over their order."""
  if len(clips) <= count:
    return clips
  return [clips[i * len(clips) // count] for i in range(count)]


def described(recipe: recipes.Recipe, index: int) -> Clip:
  """Returns held-out clip number `index` of the generated ones, by its description.

  It has no file. Its size and length are those that the stage "data" would give it.
  """
  row, data = _describe(recipe, index), recipe.data
  truth = row["truth"]
  height, width = sources.legal_size(
    truth["height"], truth["width"], data.max_pixels, data.size_multiple
  )
  rate = min(truth["fps"], data.fps or truth["fps"])
  frames = 1 + int((truth["frames"] - 1) * rate / truth["fps"])
  return Clip(
    id=f"described/{index:06d}",
    path="",
    start=0.0,
    frames=time_grid.round_down(min(frames, data.max_frames)),
    fps=float(rate),
    height=height,
    width=width,
    captions=tuple(row["captions"]),
    split="heldout",
    truth=truth,
  )


def prompts(recipe: recipes.Recipe, clips: list[Clip]) -> list[Clip]:
  """Returns the clips, and of held-out ones as many as `config.evaluate.clips` wants.

  Those beyond the clips are described ones, with numbers from that on which the run's
  own end at. Of a folder of videos there are no more than the clips.
  """
  if recipe.data.source != "shapes" or recipe.evaluate.split != "heldout":
    return clips
  more = range(recipe.evaluate.clips - len(clips))
  return clips + [described(recipe, recipe.data.heldout_clips + i) for i in more]


def described_prompts(recipe: recipes.Recipe) -> list[Clip]:
  """Returns `config.evaluate.clips` described clips from the first one on.

  Raises:
    ValueError: if the config is not for generated shapes.
  """
  check_generated(recipe)
  return [described(recipe, i) for i in range(recipe.evaluate.clips)]


def lengths(recipe: recipes.Recipe) -> Lengths:
  """Returns how long the clips are that a world prompts with."""
  whole = max(shape_worlds.WORLDS[recipe.data.world].frames)
  return Lengths(whole, whole // 2 + 1, min(whole, _LONGEST_SAMPLE))


def drawn_clips(
  recipe: recipes.Recipe, count: int, motions: Collection[str] = shapes.MOTIONS
) -> list[DrawnClip]:
  """Returns held-out clips to prompt with, drawn in memory.

  They are SIZE large and as long as the world's clips get, and nothing is hidden in
  them.

  motions: what objects may do.

  Raises:
    ValueError: if the config is not for generated shapes, or too few are like that.
  """
  check_generated(recipe)
  wanted = (*SIZE, False, lengths(recipe).whole)
  found: list[DrawnClip] = []
  for index in range(_SEARCHED * count):
    row = _describe(recipe, index)
    truth = row["truth"]
    kind = tuple(truth[key] for key in ("height", "width", "occluder", "frames"))
    if kind == wanted and all(item["motion"] in motions for item in truth["objects"]):
      video_THWC = shapes.draw(truth)
      found.append(
        DrawnClip(row["captions"][0], float(truth["fps"]), truth, video_THWC)
      )
    if len(found) == count:
      return found
  raise ValueError(
    f"of {_SEARCHED * count} held-out clips {len(found)} are {SIZE[1]}x{SIZE[0]} with "
    f"{wanted[-1]} frames and {sorted(motions)}, and {count} are needed"
  )


def _describe(recipe: recipes.Recipe, index: int) -> dict:
  """The row of a generated held-out clip: the one place that asks for it."""
  return shapes.describe(
    "heldout", index, recipe.seed, shape_worlds.WORLDS[recipe.data.world]
  )


def check_generated(recipe: recipes.Recipe) -> None:
  """Raises ValueError if nobody can say what held-out clips show."""
  if recipe.data.source != "shapes":
    raise ValueError(
      "a suite needs clips of known content, which are generated: config.data.source "
      f"must be 'shapes', not {recipe.data.source!r}"
    )
