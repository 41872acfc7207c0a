"""Videos of jobs as files, each beside a .json from which it can be made again."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from sora_jax.data.video import writer
from sora_jax.diffusion.solvers import Options
from sora_jax.language import expansion
from sora_jax.runtime import files as whole_files
from sora_jax.sampling import modes
from sora_jax.sampling.conditioning import Request
from sora_jax.sampling.job import GIVEN, Job
from sora_jax.sampling.pipeline import Sampler

SUFFIXES = (".mp4", ".webm", ".gif", ".png")


class Part(NamedTuple):
  """Frames of a job's video, in the order of its file."""

  path: pathlib.Path
  job: Job
  fps: float
  frames_THWC: np.ndarray


def write_jobs(
  model: Sampler,
  jobs: Sequence[Job],
  paths: Sequence[pathlib.Path],
  options: Options,
  source: dict,
  tile: int | None = None,
  expanded: expansion.Expansion | None = None,
) -> None:
  """Makes jobs and writes a file each, and its .json beside it.

  Args:
    model, jobs, options: what is made by what.
    paths: of the files; their suffix, one of SUFFIXES, says the format.
    source: where the model is from, for the .json.
    tile: see `Autoencoder.decode_stream`.
    expanded: what the jobs' texts were before they were made longer, for the .json.

  Raises:
    ValueError: if a video that is made of texts alone is black throughout.
  """
  parts = _parts(model, jobs, paths, options, tile)
  for _, of_path in itertools.groupby(parts, key=lambda part: part.path):
    _write(model, of_path, options, source, expanded)


def read_sidecar(path) -> dict:
  """The .json beside a video: job, options, checkpoint, model, files.

  Raises:
    ValueError: if it is none, or a file that it was made from is gone or has changed.
  """
  try:
    described = json.loads(pathlib.Path(path).read_text())
    for key in ("job", "options", "checkpoint", "model", "files"):
      described[key]
    job, files = Job.from_json(described["job"]), dict(described["files"])
    Options(**described["options"])
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(f"--from={path} is no description of a video ({error})") from error
  now = job.files()
  for file, digest in files.items():
    if now.get(file) != digest:
      raise ValueError(f"--from={path}: {file} has changed since")
  return described


def _parts(model, jobs, paths, options, tile) -> Iterator[Part]:
  """What a model makes of jobs: texts all at once, others in turn and in chunks."""
  if len(jobs) > 1 and jobs[0].is_plain:
    requests = [_text_request(job) for job in jobs]
    videos = model.sample(requests, options)
    for path, job, request, video_THWC in zip(
      paths, jobs, requests, videos, strict=True
    ):
      yield Part(path, job, request.fps, video_THWC)
    return
  for path, job in zip(paths, jobs, strict=True):
    full = job
    if job.preview:
      small_THWC = np.concatenate(list(model.preview(job, options, tile)))
      full = model.refined(job, small_THWC)
      preview = path.with_name(f"{path.stem}-preview{path.suffix}")
      metadata = {"comment": job.prompt}
      writer.write(preview, small_THWC, modes.rate(full), metadata=metadata)
      logging.info("%s: preview", preview)
    fps = modes.rate(full)  # once: it looks into the job's first medium
    for frames_THWC in model.stream(full, options, tile):
      yield Part(path, job, fps, frames_THWC)


def _with_light(chunks, path) -> Iterator[np.ndarray]:
  """The chunks of a video; at its end a ValueError if all of it is black."""
  light = False
  for frames_THWC in chunks:
    light = light or bool(frames_THWC.any())
    yield frames_THWC
  if not light:
    raise ValueError(
      f"{path} is not written: every pixel is black, as a model or an adapter makes "
      "them whose numbers overflow. Sample without adapters, in --weights that hold "
      "more, or with another seed"
    )


def _text_request(job):
  width, height = job.size or (64, 64)
  return Request(
    prompt=job.prompt,
    width=width,
    height=height,
    frames=job.frames or 17,
    fps=job.fps or 12.0,
    seed=job.seed,
    negative_prompt=job.negative_prompt or "",
  )


def _write(model, parts, options, source, expanded):
  path, job, fps, frames_THWC = next(parts)
  kept = {**job.as_json(), "given": job.given_frames}
  if kept["given"] == GIVEN:  # as files are that were written before it went by windows
    del kept["given"]
  described = {
    "job": kept,
    "options": {
      field.name: getattr(options, field.name) for field in dataclasses.fields(Options)
    },
    **source,
    # By now the model was needed: asking earlier may load it for that alone.
    "model": model.model_id,
    "files": job.files(),
  }
  if expanded and (found := expanded.of(expansion.texts_of(job))).texts:
    described["expanded"] = found._asdict()
  metadata = {"comment": job.prompt, "sora_jax": json.dumps(described)}
  chunks = itertools.chain([frames_THWC], (part.frames_THWC for part in parts))
  if not described["files"]:
    chunks = _with_light(chunks, path)
  count = writer.write_chunks(path, chunks, fps, metadata=metadata)
  text = json.dumps(described, indent=2, ensure_ascii=False)
  whole_files.write_text(path.with_name(f"{path.name}.json"), text + "\n")
  logging.info("%s: %s, %d frames: %s", path, job.mode, count, job.prompt)
