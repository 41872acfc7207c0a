"""Requests of a run: which there are, who makes them, and where they are written."""

import dataclasses
import json
import pathlib
import re

import jax

from sora_jax.data.clips import read_manifest
from sora_jax.data.video import contact_sheet, reader, writer
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding
from sora_jax.sampling.conditioning import Request


def sampling_mesh(config, requests: int) -> jax.sharding.Mesh:
  """Of this process, for its share of so many requests, config.rows rows at once."""
  mine = -(-requests // jax.process_count())
  return sharding.sampling_mesh(min(config.rows or mine, mine))


def sample_share(model, requests, config) -> list:
  """Videos of the requests that are this process's to make; None for the others."""
  videos = [None] * len(requests)
  mine = range(jax.process_index(), len(requests), jax.process_count())
  if mine:
    made = model.sample([requests[i] for i in mine], config, rows=config.rows)
    for i, video_THWC in zip(mine, made, strict=True):
      videos[i] = video_THWC
  return videos


def write_samples(folder, requests, videos, shown: int = 16) -> list[pathlib.Path]:
  """Writes a file each, samples.jsonl and a sheet of up to `shown`; the paths.

  All processes must call it, with None in place of the videos that others write.
  """
  paths, rows = [], []
  for i, (request, video_THWC) in enumerate(zip(requests, videos, strict=True)):
    words = re.sub(r"\W+", "-", request.prompt.lower()).strip("-")[:60]
    suffix = ".png" if request.frames == 1 else ".mp4"
    paths.append(folder / f"{i:03d}-{words}{suffix}")
    rows.append({"file": paths[-1].name, **dataclasses.asdict(request)})
    if video_THWC is not None:
      metadata = {"comment": request.prompt}
      writer.write(paths[-1], video_THWC, request.fps, metadata=metadata)
  sharding.sync("samples")
  if jax.process_index() == 0:
    chosen = range(0, len(videos), -(-len(videos) // shown))
    contact_sheet.write(
      folder / "contact_sheet.png",
      [reader.read(paths[i]) if videos[i] is None else videos[i] for i in chosen],
      [requests[i].prompt for i in chosen],
    )
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return paths


def requests_of(recipe: recipes.Recipe, workdir, count=8) -> list[Request]:
  """The prompts of config.sample, or else first captions of `count` held-out clips."""
  if not recipe.sample.prompts:
    clips = read_manifest(pathlib.Path(workdir) / "data" / "manifest.jsonl")
    heldout = [clip for clip in clips if clip.split == "heldout"][:count]
    return [
      Request(
        *(clip.captions[:1] or ("",)),
        *(clip.width, clip.height, clip.frames, clip.fps, i),
        recipe.sample.negative_prompt,
      )
      for i, clip in enumerate(heldout)
    ]
  return [
    Request(
      *(prompt, width, height, frames, fps or recipe.dit.reference_fps, seed),
      recipe.sample.negative_prompt,
    )
    for seed, (prompt, (width, height), frames, fps) in enumerate(recipe.sample.prompts)
  ]
