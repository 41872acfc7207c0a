"""How well each way of prompting keeps what it was given, in numbers.

  python -m sora_jax.evaluate --config=configs/quickstart.py --suite=prompting

All modes of one checkpoint on held-out clips of generated shapes:

  kept    PSNR of frames that were given, after decoding, against what the VAE itself
          makes of them; dB, 100 is equal. In brackets: given at a time between those of
          latents, as images that guide the video but are not copied into it.
  equal   whether the given latents came out bit for bit as they went in.
  seam    difference of the two frames where given and made ones meet (of a loop: of its
          last and first), over the median difference of neighbours elsewhere; 1 is
          what cannot be seen. step: over that of frames at the same place among the
          four of a latent frame, between which a small VAE jumps.
  colour, shape, count: share of videos that are as the prompt says, by `attributes`.
"""

import collections
import dataclasses
import json
import pathlib
import time

import numpy as np
from absl import logging

from sora_jax.data.clips import read_manifest
from sora_jax.data.video import contact_sheet, reader
from sora_jax.evaluation import shape_attributes
from sora_jax.evaluation.quality import psnr
from sora_jax.packing import time_grid
from sora_jax.packing.time_grid import TIME_FACTOR
from sora_jax.run import recipe as recipes
from sora_jax.sampling.job import Job
from sora_jax.sampling.pipeline import Sampler

FRAMES = 17
# Median differences below this many levels are taken for it: a still video has none.
_LEAST_DIFFERENCE = 0.25


@dataclasses.dataclass(frozen=True)
class Case:
  """A mode as it is measured.

  Attributes:
    job: what to make. truth: what it should show, or None.
    kept: (slice of the result, frames that it should show). soft: they were images in
      time. seams: indices of frames that begin something new; 0 is a loop's. place: of
      a frame that the seam is alike to, where it is not its own.
    region: (rows, columns) that the kept frames are compared in.
  """

  job: Job
  truth: dict | None
  kept: tuple[tuple[slice, np.ndarray], ...] = ()
  soft: bool = False
  seams: tuple[int, ...] = ()
  place: int = 0
  region: tuple[slice, slice] = (slice(None), slice(None))


def run(recipe: recipes.Recipe, workdir, count: int = 8, extensions: int = 10) -> None:
  """Writes workdir/evaluate/prompting.json and a contact sheet, and logs the tables.

  Args:
    count: clips a mode. extensions: of each clip, to measure drift.

  Raises:
    ValueError: without held-out clips of known content that are long enough.
  """
  folder = pathlib.Path(workdir) / "evaluate"
  clips = read_manifest(pathlib.Path(workdir) / "data" / "manifest.jsonl")
  clips = [c for c in clips if c.split == "heldout" and c.truth and c.frames >= FRAMES]
  if len(clips) < 2:
    raise ValueError(
      f"{workdir}: the suite needs 2 held-out clips of known content with {FRAMES} or "
      f"more frames, not {len(clips)}"
    )
  clips = clips[:count]
  model = Sampler.from_checkpoint(workdir, dtype=recipe.dtype)
  rows, shown = {}, {}
  cases = collections.defaultdict(list)
  for i, clip in enumerate(clips):
    for name, case in _cases(model, clip, clips[(i + 1) % len(clips)], i).items():
      cases[name].append(case)
  for name, group in cases.items():
    rows[name], shown[name] = measure(model, group, recipe.sample)
    logging.info("%s", format_rows({name: rows[name]}).splitlines()[-1])
  drift = {
    noise: _drift(model, clips[: max(2, count // 2)], recipe.sample, extensions, noise)
    for noise in (0.0, 0.1)
  }
  buckets = model.denoiser.integrate._cache_size()
  results = {"modes": rows, "drift": drift, "compiled": buckets}
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "prompting.json").write_text(json.dumps(results, indent=2) + "\n")
  contact_sheet.write(
    folder / "prompting.png", list(shown.values()), list(shown), columns=12, scale=1
  )
  for line in [*format_rows(rows).splitlines(), *format_drift(drift).splitlines()]:
    logging.info("%s", line)
  logging.info("%d compiled functions for all of it; see %s", buckets, folder)


def measure(model, cases, options) -> tuple[dict, np.ndarray]:
  """(means over the cases of a mode, the first case's video); see the module."""
  values, equal, first, begin = collections.defaultdict(list), [], None, 0.0
  for i, case in enumerate(cases):

    def watch(prompt, latent_THWC):
      if prompt.given_THW is not None and prompt.given_THW.any():
        pixels = prompt.given_THW
        for dim in (1, 2):
          pixels = pixels.repeat(latent_THWC.shape[dim] // pixels.shape[dim], dim)
        equal.append(np.array_equal(latent_THWC[pixels], prompt.latent_THWC[pixels]))

    # The first one compiles.
    begin = time.monotonic() if i == 1 else begin
    made_THWC = np.concatenate(list(model.stream(case.job, options, watch=watch)))
    first = made_THWC if first is None else first
    for part, wanted_THWC in case.kept:
      values["kept"].append(
        psnr(made_THWC[part][:, *case.region], wanted_THWC[:, *case.region])
      )
    for at in case.seams:
      values["seam"].append(seam_ratio(made_THWC, at))
      others = alike(len(made_THWC), case.place or at, case.seams)
      values["step"].append(seam_ratio(made_THWC, at, others))
    if case.truth:
      right = shape_attributes.score(
        shape_attributes.analyse_video(made_THWC), case.truth
      )
      for name in ("color", "shape", "count"):
        values[name].append(right[name])
  row = {name: float(np.mean(found)) for name, found in values.items()}
  row["seconds"] = (time.monotonic() - begin) / max(1, len(cases) - 1)
  row["n"] = len(cases)
  return {**row, "equal": all(equal) if equal else None, "soft": cases[0].soft}, first


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


def _cases(model, clip, other, seed) -> dict[str, Case]:
  """All modes on a clip, and another where a mode takes two."""
  own, second = (
    reader.read(c.path, start=c.start, frames=FRAMES, fps=c.fps, size=(64, 64))
    for c in (clip, other)
  )
  fps, later = clip.fps, time_grid.latent_frames(FRAMES) - 1
  truth = {**clip.truth, "occluder": False}
  rebuilt, rebuilt_2 = (
    model.autoencoder.decode(np.repeat(model.encode(v)[None], _copies(model), 0))[0]
    for v in (own, second)
  )
  image, last = (
    model.autoencoder.decode(np.repeat(model.encode(v)[None], _copies(model), 0))[0]
    for v in (own[:1], own[-1:])
  )
  given = {"prompt": clip.captions[0], "seed": seed, "size": (64, 64), "fps": fps}

  def job(**kwargs):
    return Job(**{**given, **kwargs})

  second_time = time_grid.frame_at(later) / fps  # whole latent frames
  last_latent = time_grid.frame_at(later - 1) + 1  # where it begins, in frames
  mask = np.zeros((64, 64), bool)
  mask[:, 32:] = True
  start, all_of = ((slice(0, 1), image),), ((slice(0, FRAMES), rebuilt),)
  end = ((slice(-1, None), last),)
  gap = max(2, round(time_grid.time_of(second_time * fps + 1)))
  gap = time_grid.frame_at(gap) - 1
  gap_seams = (FRAMES, FRAMES + gap + 1 - TIME_FACTOR)
  infill = (5 / fps, 8 / fps)
  loop = {"truth": truth, "kept": all_of, "seams": (*gap_seams, 0)}
  return {
    "real": Case(job(video=own, strength=0.0), truth, all_of, seams=(5,)),
    "text": Case(job(frames=FRAMES), truth),
    "text, as a loop": Case(job(frames=FRAMES), truth, seams=(0,), place=1),
    "first image": Case(job(image=own[0], frames=FRAMES), truth, start, seams=(1,)),
    "last image": Case(
      job(last_image=own[-1], frames=FRAMES),
      truth,
      end,
      seams=(last_latent,),
    ),
    "both images": Case(
      job(image=own[0], last_image=own[-1], frames=FRAMES),
      truth,
      (*start, *end),
      seams=(1, last_latent),
    ),
    "extend after": Case(
      job(video=own, extend_after=second_time), truth, all_of, seams=(FRAMES,)
    ),
    "extend before": Case(
      job(video=own, extend_before=second_time),
      truth,
      ((slice(-FRAMES, None), rebuilt),),
      seams=(last_latent,),
    ),
    "connect": Case(
      job(video=own, connect=second, gap=second_time),
      None,
      (*all_of, (slice(-FRAMES, None), rebuilt_2)),
      seams=gap_seams,
    ),
    "infill frames": Case(
      job(video=own, infill=infill),
      truth,
      ((slice(0, 5), rebuilt[:5]), (slice(9, None), rebuilt[9:])),
      seams=(5, 9),
    ),
    "infill region": Case(
      job(video=own, mask=mask),
      truth,
      all_of,
      region=(slice(None), slice(0, 32)),
    ),
    "edit 0.6": Case(job(video=second, strength=0.6, size=(64, 64)), truth),
    "interpolate": Case(
      job(video=own, interpolate=2),
      truth,
      ((slice(0, None, 2), rebuilt),),
      soft=True,
    ),
    "loop of video": Case(job(video=own, loop=True), **loop),
    "loop, gap anew": Case(job(video=own, loop=True, gap_strength=1.0), **loop),
    "loop of text": Case(job(loop=True, frames=16), truth, seams=(0,)),
    "preview 0.6": Case(job(size=(96, 96), frames=FRAMES, preview=0.6), truth),
  }


def _copies(model):
  return model.autoencoder.batch_size(1)


def _drift(model, clips, options, extensions, noise) -> list[dict]:
  """Of each of `extensions` windows after a clip: how far from the clip it is."""
  rows = [collections.defaultdict(list) for _ in range(extensions)]
  for seed, clip in enumerate(clips):
    own = reader.read(
      clip.path, start=clip.start, frames=FRAMES, fps=clip.fps, size=(64, 64)
    )
    # With 9 of 33 frames given, a window makes 24.
    job = Job(
      clip.captions[0],
      fps=clip.fps,
      seed=seed,
      size=(64, 64),
      video=own,
      extend_after=24 * extensions / clip.fps,
      given_noise=noise,
    )
    made = np.concatenate(list(model.stream(job, options)))
    for i, row in enumerate(rows):
      part = made[FRAMES + 24 * i : FRAMES + 24 * (i + 1)]
      right = shape_attributes.score(shape_attributes.analyse_video(part), clip.truth)
      row["histogram"].append(histogram_distance(part, made[:FRAMES]))
      row["color"].append(right["color"])
      row["shape"].append(right["shape"])
  return [{name: float(np.mean(v)) for name, v in row.items()} for row in rows]


def format_rows(rows: dict) -> str:
  """Text of the table of modes."""
  head = f"{'mode':16} {'kept':>8} {'equal':>6} {'seam':>6} {'step':>6}"
  head += f" {'colour':>7} {'shape':>7} {'count':>7} {'s':>6} {'n':>3}"
  lines = [head]
  for name, row in rows.items():

    def cell(key, form, width, row=row):
      return f"{format(row[key], form) if key in row else '-':>{width}}"

    kept = cell("kept", ".1f", 6)
    kept = f"({kept.strip()})" if row["soft"] else kept
    equal = {True: "yes", False: "NO", None: "-"}[row["equal"]]
    lines.append(
      f"{name:16} {kept:>8} {equal:>6} {cell('seam', '.2f', 6)} "
      f"{cell('step', '.2f', 6)} {cell('color', '.0%', 7)} "
      f"{cell('shape', '.0%', 7)} {cell('count', '.0%', 7)} "
      f"{cell('seconds', '.1f', 6)} {row['n']:3d}"
    )
  return "\n".join(lines)


def format_drift(drift: dict) -> str:
  """Text of the tables of drift, one a noise level on given frames."""
  lines = []
  for noise, rows in drift.items():
    for name in ("histogram", "color", "shape"):
      cells = " ".join(f"{row[name]:5.2f}" for row in rows)
      lines.append(f"drift, given_noise {noise:g}: {name:10} {cells}")
  return "\n".join(lines)
