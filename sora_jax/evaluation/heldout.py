"""Which clips are evaluated, and their pixels."""

import pathlib

import numpy as np

from sora_jax.data.buckets import limit_sizes
from sora_jax.data.clips import Clip, read_manifest
from sora_jax.data.video import reader
from sora_jax.run import recipe as recipes


def heldout_clips(recipe: recipes.Recipe, workdir: pathlib.Path) -> list[Clip]:
  """Returns the `config.evaluate.clips` held-out clips of a run that are evaluated.

  Their sizes are those that the stage "encode" gave them.
  """
  clips = read_manifest(workdir / "data" / "manifest.jsonl")
  clips = limit_sizes(clips, recipe.encode.max_sizes)
  clips = [clip for clip in clips if clip.split == "heldout"]
  return spread(clips, recipe.evaluate.clips)


def spread(clips: list, count: int) -> list:
  """Returns at most `count` of the clips, evenly over their order."""
  if len(clips) <= count:
    return clips
  return [clips[i * len(clips) // count] for i in range(count)]


def read_clip(clip: Clip) -> np.ndarray:
  """Returns the pixels of a clip as training sees them: uint8 [T, H, W, 3]."""
  return reader.read(
    clip.path,
    start=clip.start,
    frames=clip.frames,
    fps=clip.fps,
    size=(clip.height, clip.width),
  )
