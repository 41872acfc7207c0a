"""Stage "data": finds or makes the clips and writes workdir/data/manifest.jsonl.

python -m sora_jax.prepare --config=configs/quickstart.py
"""

import dataclasses
import json
import pathlib

from absl import logging

from sora_jax.data import clips, shapes, sources, tfds_source
from sora_jax.data.intake import workers
from sora_jax.data.intake.measuring import Measuring
from sora_jax.run import cli
from sora_jax.run import recipe as recipes
from sora_jax.runtime.progress import track


def run(recipe: recipes.Recipe, workdir) -> None:
  """Writes the manifest of clips, and rejected.jsonl with the files left out.

  Raises:
    ValueError: if the source cannot be used, or leaves no clip to train on.
  """
  data, folder = recipe.data, pathlib.Path(workdir) / "data"
  source, generated = data.source, data.source == "shapes"
  rows = None
  if source.startswith(tfds_source.PREFIX):
    source, rows = tfds_source.rows(source, data.fps)
  if generated:
    source = folder / "shapes"
    shapes.generate(
      source,
      num_train=data.train_clips,
      num_heldout=data.heldout_clips,
      seed=recipe.seed,
      world=data.world,
      watch=track,
    )
  found, rejected = sources.scan(
    source,
    max_frames=data.max_frames,
    max_pixels=data.max_pixels,
    size_multiple=data.size_multiple,
    fps=data.fps or None,
    cut_threshold=data.cut_threshold,
    crop_borders=data.crop_borders,
    heldout_share=data.heldout_share,
    heldout_min=data.heldout_min if data.heldout_share else 1,
    limits=data.filter,
    # What was drawn just now is known to be whole, and each clip is one scene.
    how=Measuring(decode=False) if generated else _measuring(data, folder),
    allow_outside=data.allow_outside,
    rows=rows,
    watch=track,
  )
  found = _with_both_splits(found, source)
  clips.write_lines(
    folder / "rejected.jsonl",
    (json.dumps({"path": path, "reason": reason}) for path, reason in rejected),
  )
  clips.write_manifest(folder / "manifest.jsonl", found)
  logging.info(
    "%s: %d clips to train on, %d held out, %d files left out",
    folder / "manifest.jsonl",
    sum(clip.split == "train" for clip in found),
    sum(clip.split == "heldout" for clip in found),
    len(rejected),
  )
  if not any(clip.captions for clip in found):
    logging.warning("no clip has a caption: the model will be unconditional")


def _measuring(data, folder) -> Measuring:
  """On all cores, going on from what was measured before."""
  return Measuring(
    decode=data.measure,
    score_fn=data.score_fn,
    processes=workers.cores(),
    ledger=folder / "measured.jsonl",
  )


def _with_both_splits(found, source):
  """Training needs a clip and so does evaluation; few files may leave one without."""
  if {clip.split for clip in found} == {"train", "heldout"}:
    return found
  if len(found) == 1:
    raise ValueError(f"{source}: one clip only; training needs another to evaluate on")
  logging.warning(
    "all clips are of split %r: holding out the last one, %s",
    found[0].split,
    found[-1].id,
  )
  return [
    *(dataclasses.replace(clip, split="train") for clip in found[:-1]),
    dataclasses.replace(found[-1], split="heldout"),
  ]


if __name__ == "__main__":
  cli.command("data")
