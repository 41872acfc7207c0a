"""Requests of a run: which there are, who makes them, and where they are written."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence

import jax
import numpy as np

from sora_jax.data.clips import Clip, read_manifest
from sora_jax.data.video import contact_sheet, reader, writer
from sora_jax.run import recipe as recipes
from sora_jax.runtime import files, sharding
from sora_jax.sampling.conditioning import Request
from sora_jax.sampling.pipeline import Sampler


def sampling_mesh(config: recipes.Sample, requests: int) -> jax.sharding.Mesh:
  """The mesh of this process for its share of so many requests.

  config.rows rows are computed at once; 0 = as many as there are.
  """
  mine = -(-requests // jax.process_count())
  return sharding.sampling_mesh(min(config.rows or mine, mine))


def sample_share(
  model: Sampler, requests: Sequence[Request], config: recipes.Sample
) -> list[np.ndarray | None]:
  """Videos of the requests that are this process's to make; None for the others."""
  videos: list[np.ndarray | None] = [None] * len(requests)
  mine = range(jax.process_index(), len(requests), jax.process_count())
  if mine:
    of_mine = model.sample([requests[i] for i in mine], config, rows=config.rows)
    for i, video_THWC in zip(mine, of_mine, strict=True):
      videos[i] = video_THWC
  return videos


def write_samples(folder, requests, videos, shown: int = 16) -> list[pathlib.Path]:
  """Writes a file each, samples.jsonl and a sheet of up to `shown`; the paths.

  All processes must call it, with None in place of the videos that others write.
  Samples that an earlier call has listed in samples.jsonl are deleted.
  """
  if jax.process_index() == 0:
    _delete_listed(folder)
  sharding.sync("samples before")
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
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files.write_text(folder / "samples.jsonl", lines)
  return paths


def _delete_listed(folder) -> None:
  """Deletes the files of samples.jsonl, which would look like they were new ones."""
  listed = folder / "samples.jsonl"
  if listed.exists():
    for line in listed.read_text().splitlines():
      (folder / json.loads(line)["file"]).unlink(missing_ok=True)
    listed.unlink()


def requests_of(recipe: recipes.Recipe, workdir, count: int = 8) -> list[Request]:
  """The prompts of config.sample, or else first captions of `count` held-out clips."""
  negative = recipe.sample.negative_prompt
  if not recipe.sample.prompts:
    clips = read_manifest(pathlib.Path(workdir) / "data" / "manifest.jsonl")
    heldout = [clip for clip in clips if clip.split == "heldout"][:count]
    return [request_of(clip, seed, negative) for seed, clip in enumerate(heldout)]
  return [
    Request(
      prompt=prompt,
      width=width,
      height=height,
      frames=frames,
      fps=fps or recipe.dit.reference_fps,
      seed=seed,
      negative_prompt=negative,
    )
    for seed, (prompt, (width, height), frames, fps) in enumerate(recipe.sample.prompts)
  ]


def request_of(clip: Clip, seed: int, negative_prompt: str = "") -> Request:
  """A clip's first caption at the clip's size, length and rate."""
  captions = clip.training_captions
  return Request(
    prompt=captions[0] if captions else "",
    width=clip.width,
    height=clip.height,
    frames=clip.frames,
    fps=clip.fps,
    seed=seed,
    negative_prompt=negative_prompt,
  )
