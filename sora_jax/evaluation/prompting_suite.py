"""How well each way of prompting keeps what it was given, in numbers.

  python -m sora_jax.evaluate --config=configs/quickstart.py --suite=prompting

All modes of one checkpoint on held-out clips of generated shapes:

  kept    PSNR of frames that were given, after decoding, against what the VAE itself
          makes of them; dB, 100 is equal. In brackets: given at a time between those of
          latents, as images that guide the video but are not copied into it.
  equal   whether the given latents came out bit for bit as they went in.
  seam    difference of the two frames where given and sampled ones meet (of a loop: of
          its last and first), over the median difference of neighbours elsewhere; 1 is
          what cannot be seen. step: over that of frames at the same place among the
          four of a latent frame, between which a small VAE jumps.
  colour, shape, count: share of videos that are as the prompt says, as measured by
          evaluation/shape_attributes.py.
"""

import collections
import pathlib
import time

import numpy as np
from absl import logging

from sora_jax.data.clips import read_manifest
from sora_jax.data.video import contact_sheet
from sora_jax.evaluation import shape_attributes
from sora_jax.evaluation.prompting_cases import (
  FRAMES,
  SIZE,
  cases_of,
  first_frames,
)
from sora_jax.evaluation.quality import psnr
from sora_jax.packing.time_grid import TIME_FACTOR
from sora_jax.run import recipe as recipes
from sora_jax.runtime import files
from sora_jax.runtime.progress import track
from sora_jax.runtime.text import table_lines
from sora_jax.sampling.job import Job
from sora_jax.sampling.pipeline import Sampler

# A still video has no differences at all: smaller medians than this many levels of
# brightness count as this one.
_LEAST_DIFFERENCE = 0.25


def run(recipe: recipes.Recipe, workdir, count: int = 8, extensions: int = 10) -> None:
  """Writes workdir/evaluate/prompting.json and a contact sheet, and logs the tables.

  Args:
    recipe: for precision and the options of sampling.
    workdir: of a finished run.
    count: clips a mode.
    extensions: of each clip, to measure drift.

  Raises:
    ValueError: without held-out clips of known content that are long enough.
  """
  folder = pathlib.Path(workdir) / "evaluate"
  clips = _long_clips(workdir)[:count]
  model = Sampler.from_checkpoint(workdir, dtype=recipe.dtype)
  cases = collections.defaultdict(list)
  for i, clip in enumerate(clips):
    for name, case in cases_of(model, clip, clips[(i + 1) % len(clips)], i).items():
      cases[name].append(case)
  rows, shown = {}, {}
  for name, group in track(list(cases.items()), "measured", "modes"):
    rows[name], shown[name] = measure(model, group, recipe.sample)
  drift = {
    noise: _drift(model, clips[: max(2, count // 2)], recipe.sample, extensions, noise)
    for noise in (0.0, 0.1)
  }
  buckets = model.denoiser.integrate._cache_size()
  results = {"modes": rows, "drift": drift, "compiled": buckets}
  folder.mkdir(parents=True, exist_ok=True)
  files.write_json(folder / "prompting.json", results)
  contact_sheet.write(
    folder / "prompting.png", list(shown.values()), list(shown), columns=12, scale=1
  )
  for line in [*format_rows(rows), *format_drift(drift)]:
    logging.info("%s", line)
  logging.info("%d compiled functions for all of it; see %s", buckets, folder)


def _long_clips(workdir) -> list:
  """Returns the held-out clips whose content is known and that have FRAMES frames."""
  clips = read_manifest(pathlib.Path(workdir) / "data" / "manifest.jsonl")
  clips = [c for c in clips if c.split == "heldout" and c.truth and c.frames >= FRAMES]
  if len(clips) < 2:
    raise ValueError(
      f"{workdir}: the suite needs 2 held-out clips of known content with {FRAMES} or "
      f"more frames, not {len(clips)}"
    )
  return clips


def measure(model, cases, options) -> tuple[dict, np.ndarray]:
  """Runs the cases of a mode.

  Returns:
    The means over the cases, as the module names them, and the first case's video.
  """
  values: dict[str, list] = collections.defaultdict(list)
  videos: list[np.ndarray] = []
  equal: list[bool] = []
  begin = 0.0
  for i, case in enumerate(cases):

    def watch(prompt, latent_THWC):
      if prompt.given_THW is not None and prompt.given_THW.any():
        pixels = prompt.given_THW
        for dim in (1, 2):
          pixels = pixels.repeat(latent_THWC.shape[dim] // pixels.shape[dim], dim)
        equal.append(np.array_equal(latent_THWC[pixels], prompt.latent_THWC[pixels]))

    # The first one compiles.
    begin = time.monotonic() if i == 1 else begin
    video_THWC = np.concatenate(list(model.stream(case.job, options, watch=watch)))
    videos = videos or [video_THWC]
    for part, wanted_THWC in case.kept:
      values["kept"].append(
        psnr(video_THWC[part][:, *case.region], wanted_THWC[:, *case.region])
      )
    for at in case.seams:
      values["seam"].append(seam_ratio(video_THWC, at))
      others = alike(len(video_THWC), case.place or at, case.seams)
      values["step"].append(seam_ratio(video_THWC, at, others))
    if case.truth:
      right = shape_attributes.score(
        shape_attributes.analyse_video(video_THWC), case.truth
      )
      for name in ("color", "shape", "count"):
        values[name].append(right[name])
  row: dict = {name: float(np.mean(found)) for name, found in values.items()}
  row["seconds"] = (time.monotonic() - begin) / max(1, len(cases) - 1)
  row["n"] = len(cases)
  row |= {"equal": all(equal) if equal else None, "soft": cases[0].soft}
  return row, videos[0]


def seam_ratio(video_THWC: np.ndarray, at: int, others=None) -> float:
  """Difference of frame `at` to the one before, over the median of others.

  at 0 is the seam of a loop: the first frame after the last one. others: indices of the
  frames to compare with; all if None.
  """
  frames = video_THWC.astype(np.float64)
  change_T = np.abs(frames - np.roll(frames, 1, axis=0)).mean(axis=(1, 2, 3))
  others = range(1, len(frames)) if others is None else others
  median = np.median([change_T[i] for i in others if i != at])
  return float(change_T[at] / max(median, _LEAST_DIFFERENCE))


def alike(frames: int, at: int, seams=()) -> list[int]:
  """Frames at the same place within their latent frame as `at`, without seams."""
  first = at % TIME_FACTOR or TIME_FACTOR
  places = range(first, frames, TIME_FACTOR)
  return [i for i in places if i != at and i not in seams]


def histogram_distance(a_THWC: np.ndarray, b_THWC: np.ndarray) -> float:
  """Half the L1 distance of colour histograms of 8 x 8 x 8 bins; 0 to 1."""

  def histogram(x):
    codes = (x.reshape(-1, 3) // 32).astype(np.int64) @ np.array([64, 8, 1])
    return np.bincount(codes, minlength=512) / len(codes)

  return float(0.5 * np.abs(histogram(a_THWC) - histogram(b_THWC)).sum())


def _drift(model, clips, options, extensions, noise) -> list[dict]:
  """Measures how far from its clip each of `extensions` windows after it is."""
  rows: list[dict] = [collections.defaultdict(list) for _ in range(extensions)]
  for seed, clip in enumerate(clips):
    own = first_frames(clip)
    # With 9 of 33 frames given, a window makes 24.
    job = Job(
      clip.captions[0],
      fps=clip.fps,
      seed=seed,
      size=SIZE,
      video=own,
      extend_after=24 * extensions / clip.fps,
      given_noise=noise,
    )
    video_THWC = np.concatenate(list(model.stream(job, options)))
    for i, row in enumerate(rows):
      part = video_THWC[FRAMES + 24 * i : FRAMES + 24 * (i + 1)]
      right = shape_attributes.score(shape_attributes.analyse_video(part), clip.truth)
      row["histogram"].append(histogram_distance(part, video_THWC[:FRAMES]))
      row["color"].append(right["color"])
      row["shape"].append(right["shape"])
  return [{name: float(np.mean(v)) for name, v in row.items()} for row in rows]


def format_rows(rows: dict) -> list[str]:
  """Returns the lines of the table of modes."""

  def cell(row, key, spec):
    return format(row[key], spec) if key in row else "-"

  cells = []
  for name, row in rows.items():
    kept = cell(row, "kept", ".1f")
    cells.append(
      [
        name,
        f"({kept})" if row["soft"] else kept,
        {True: "yes", False: "NO", None: "-"}[row["equal"]],
        *(cell(row, key, ".2f") for key in ("seam", "step")),
        *(cell(row, key, ".0%") for key in ("color", "shape", "count")),
        cell(row, "seconds", ".1f"),
        str(row["n"]),
      ]
    )
  head = ["mode", "kept", "equal", "seam", "step", "colour", "shape", "count", "s", "n"]
  return table_lines(head, cells)


def format_drift(drift: dict) -> list[str]:
  """Returns the lines of the table of drift: a column for each window."""
  cells = [
    [f"drift, given_noise {noise:g}: {name}", *(f"{row[name]:.2f}" for row in rows)]
    for noise, rows in drift.items()
    for name in ("histogram", "color", "shape")
  ]
  windows = len(next(iter(drift.values())))
  return table_lines(["window", *map(str, range(1, windows + 1))], cells)
