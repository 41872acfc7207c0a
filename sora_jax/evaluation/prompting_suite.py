"""How well each way of prompting keeps what it was given, in numbers.

  python -m sora_jax.evaluate --config=configs/quickstart.py --suite=prompting

All modes of one checkpoint on held-out clips of generated shapes:

  kept    PSNR of frames that were given, after decoding, against what the VAE itself
          makes of them; dB, 100 is equal.
  met     the same of frames that were given as images, which guide the video but are
          not copied into it, as the first frame of a given end does.
  equal   whether the given latents came out bit for bit as they went in.
  seam    difference of the two frames where given and sampled ones meet (of a loop of a
          text: of its last and first), over the median of neighbours elsewhere; 1 is
          what cannot be seen. step: over that of frames at the same place among the
          four of a latent frame, between which a small VAE jumps.
  identity, joined, moves on: share of videos in which what is sampled shows the objects
          of what is given, where they meet it at the same place, and moving on as they
          did, see evaluation/continuity.py. Of a connection, half of the gap is judged
          by each of the two videos; of a region, only clips count in which the object
          enters or leaves it; a loop of text, whose halves are judged by each other,
          and gaps that lead elsewhere need not move on as what is beside them.
  s       seconds a video, one after the other and without compilation.
  colour, shape, motion, count: share of videos that are as the prompt says, as measured
          by evaluation/shape_attributes.py. "real" is the clip itself after the VAE.

A loop of a text is measured for all motions, and half as long again for those that come
back by themselves. Drift is measured window by window over many extensions of clips
whose motion can go on for ever: distance of colour histograms, colour and shape as the
prompt says, identity with the clip. Clips are described and drawn in memory, so that
models are all that is needed.
"""

import collections
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from sora_jax.data.video import contact_sheet
from sora_jax.evaluation import continuity, shape_attributes
from sora_jax.evaluation.heldout import SIZE, DrawnClip, Lengths, drawn_clips, lengths
from sora_jax.evaluation.prompting_cases import Case, case_of_endless, cases_of
from sora_jax.evaluation.quality import psnr
from sora_jax.evaluation.shares import Share, percent, share_of
from sora_jax.packing.time_grid import TIME_FACTOR
from sora_jax.run import recipe as recipes
from sora_jax.runtime import files
from sora_jax.runtime.progress import track
from sora_jax.runtime.stopwatch import Stopwatch
from sora_jax.runtime.text import markdown_lines, table_lines
from sora_jax.sampling.job import Job
from sora_jax.sampling.pipeline import Sampler

# Means and shares of a mode, and the heads of their columns.
_MEANS = {"kept": "kept", "met": "met", "seam": "seam", "step": "step"}
_SHARES = {
  "identity": "identity", "joined": "joined", "moves_on": "moves on",
  "color": "colour", "shape": "shape", "motion": "motion", "count": "count",
}  # fmt: skip
_DRIFT = {
  "histogram": "colour distance", "color": "colour", "shape": "shape",
  "identity": "identity",
}  # fmt: skip
# An object that moves on leaves the frame, one that grows fills it.
_ENDLESS = ("bounce", "turn", "still")
# A still video has no differences at all: smaller medians than this many levels of
# brightness count as this one.
_LEAST_DIFFERENCE = 0.25


class Results(NamedTuple):
  """What is known of a model.

  Attributes:
    modes: name -> means and shares, as `measure` returns them.
    drift: noise on given frames -> a row for each window, as `measure_drift` does.
    shown: name -> a video of the mode.
  """

  modes: dict[str, dict]
  drift: dict[float, list[dict]]
  shown: dict[str, np.ndarray]


def run(
  recipe: recipes.Recipe,
  checkpoint: pathlib.Path,
  workdir: pathlib.Path,
  count: int = 8,
  extensions: int = 10,
) -> None:
  """Writes workdir/evaluate/prompting.{json, md, png} and logs the tables.

  Args:
    recipe: for precision and the options of sampling.
    checkpoint: folder with the models.
    workdir: where results go.
    count: clips a mode; half as many for drift.
    extensions: of each clip, to measure drift.

  Raises:
    ValueError: if the config is not for generated shapes, or these are not long enough.
  """
  if count < 2 or extensions < 1:
    raise ValueError(
      f"{count} clips and {extensions} extensions: the suite needs 2 and 1 at least"
    )
  clips = drawn_clips(recipe, count)
  endless = drawn_clips(recipe, max(2, count // 2), _ENDLESS)
  model = Sampler.from_checkpoint(checkpoint, dtype=recipe.dtype)
  long = lengths(recipe)
  results = evaluate(model, clips, endless, long, recipe.sample, extensions)
  folder = workdir / "evaluate"
  folder.mkdir(parents=True, exist_ok=True)
  buckets = model.denoiser.integrate._cache_size()
  files.write_json(
    folder / "prompting.json",
    {
      "modes": results.modes,
      "drift": results.drift,
      "compiled": buckets,
      "model": model.model_id,
    },
  )
  files.write_text(folder / "prompting.md", markdown(results))
  contact_sheet.write(
    folder / "prompting.png",
    list(results.shown.values()),
    list(results.shown),
    columns=12,
    scale=1,
  )
  for line in [*format_rows(results.modes), *format_drift(results.drift)]:
    logging.info("%s", line)
  logging.info("%d compiled functions for all of it; see %s", buckets, folder)


def evaluate(
  model: Sampler,
  clips: Sequence[DrawnClip],
  endless: Sequence[DrawnClip],
  long: Lengths,
  options: recipes.Sample,
  extensions: int,
) -> Results:
  """Measures all modes on clips, and drift on those that can go on for ever."""
  cases = collections.defaultdict(list)
  for i, clip in enumerate(clips):
    other = clips[(i + 1) % len(clips)]
    for name, case in cases_of(model, clip, other, i, long).items():
      cases[name].append(case)
  cases["loop of text, endless"] = [
    case_of_endless(clip, i, long) for i, clip in enumerate(endless)
  ]
  modes, shown = {}, {}
  for name, group in track(list(cases.items()), "measured", "modes"):
    modes[name], shown[name] = measure(model, group, options)
  drift = {
    noise: measure_drift(model, endless, long, options, extensions, noise)
    for noise in (0.0, 0.1)
  }
  return Results(modes, drift, shown)


def measure(
  model: Sampler, cases: Sequence[Case], options: recipes.Sample
) -> tuple[dict, np.ndarray]:
  """Runs the cases of a mode.

  Returns:
    The means and shares over the cases, as the module names them, with "intervals":
    name of a share -> (low, high, n), of 95 %; and the first case's video.
  """
  with Stopwatch() as watch:
    sampled = [_sampled(model, case, options) for case in cases]
  videos = [video_THWC for video_THWC, _ in sampled]
  equal = [same for _, found in sampled for same in found]
  values: dict[str, list] = collections.defaultdict(list)
  for case, video_THWC in zip(cases, videos, strict=True):
    for name, found in measures_of(case, video_THWC).items():
      values[name] += found
  shares = {name: share_of(values[name]) for name in _SHARES if name in values}
  row: dict[str, Any] = {
    **{name: float(np.mean(values[name])) for name in _MEANS if name in values},
    **{name: share.value for name, share in shares.items()},
    "intervals": {name: share[1:] for name, share in shares.items()},
    "seconds": watch.seconds / len(cases),
    "n": len(cases),
    "equal": all(equal) if equal else None,
  }
  return row, videos[0]


def _sampled(model, case, options) -> tuple[np.ndarray, list[bool]]:
  """A case's video, and of each window whether what was given is in it as it was."""
  equal: list[bool] = []

  def watch(prompt, latent_THWC):
    if prompt.given_THW is not None and prompt.given_THW.any():
      pixels = prompt.given_THW
      for dim in (1, 2):
        pixels = pixels.repeat(latent_THWC.shape[dim] // pixels.shape[dim], dim)
      equal.append(np.array_equal(latent_THWC[pixels], prompt.latent_THWC[pixels]))

  return np.concatenate(list(model.stream(case.job, options, watch=watch))), equal


def measures_of(case: Case, video_THWC: np.ndarray) -> dict[str, list]:
  """Returns what a case's result says of each measure, once or several times."""
  values = collections.defaultdict(list)
  for name, given in {"kept": case.kept, "met": case.met}.items():
    for part, wanted_THWC in given:
      values[name].append(
        psnr(video_THWC[part][:, *case.region], wanted_THWC[:, *case.region])
      )
  for at in case.seams:
    values["seam"].append(seam_ratio(video_THWC, at))
    if others := alike(len(video_THWC), case.place or at, case.seams):
      values["step"].append(seam_ratio(video_THWC, at, others))
  if case.truth:
    analysis = shape_attributes.analyse_video(video_THWC)
    for name, right in shape_attributes.score(analysis, case.truth).items():
      values[name].append(right)
  judged = collections.defaultdict(list)
  for part in case.parts:
    given = part.given
    given_THWC = video_THWC[given] if isinstance(given, slice) else given
    for name, right in continuity.judge(
      given_THWC, video_THWC[part.new], part.side, part.motions
    ).items():
      judged[name].append(right)
  return {**values, **{name: [all(rights)] for name, rights in judged.items()}}


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


def measure_drift(
  model: Sampler,
  clips: Sequence[DrawnClip],
  long: Lengths,
  options: recipes.Sample,
  extensions: int,
  noise: float,
) -> list[dict]:
  """Measures how far from its clip each of `extensions` windows after it is.

  A window is as many new frames as an extension of what is given by its own length has.

  Returns:
    A row for each window: histogram, color, shape, identity as means over the clips,
    and "intervals" and "n" as `measure` has them.
  """
  rows: list[dict] = [collections.defaultdict(list) for _ in range(extensions)]
  for seed, clip in enumerate(clips):
    own, window = clip.video_THWC[: long.given], long.given - 1
    job = Job(
      clip.caption,
      fps=clip.fps,
      seed=seed,
      size=SIZE,
      video=own,
      extend_after=window * extensions / clip.fps,
      given_noise=noise,
    )
    video_THWC = np.concatenate(list(model.stream(job, options)))
    for i, row in enumerate(rows):
      part = video_THWC[len(own) + window * i : len(own) + window * (i + 1)]
      right = shape_attributes.score(shape_attributes.analyse_video(part), clip.truth)
      row["histogram"].append(histogram_distance(part, video_THWC[: len(own)]))
      row["color"].append(right["color"])
      row["shape"].append(right["shape"])
      row["identity"].append(continuity.judge(own, part, side=0)["identity"])
  return [
    {
      **{name: float(np.mean(found)) for name, found in row.items()},
      "intervals": {
        name: share_of(row[name])[1:] for name in _DRIFT if name != "histogram"
      },
      "n": len(clips),
    }
    for row in rows
  ]


def format_rows(rows: dict) -> list[str]:
  """Returns the lines of the table of modes."""
  return table_lines(*_table(rows, lambda row, name: f"{row[name]:.0%}"))


def format_drift(drift: dict) -> list[str]:
  """Returns the lines of the table of drift: a column for each window."""
  return table_lines(*_drift_table(drift))


def markdown(results: Results) -> str:
  """Returns both tables in Markdown; shares have their 95 % intervals."""

  def share(row, name):
    return percent(Share(row[name], *row["intervals"][name]))

  modes = markdown_lines(*_table(results.modes, share))
  drift = markdown_lines(*_drift_table(results.drift))
  return "\n".join([*modes, "", *drift, ""])


def _table(rows, share) -> tuple[list[str], list[list[str]]]:
  """Head and cells of the table of modes; share: (row, name) -> the text of one."""

  def mean(row, name):
    digits = ".1f" if name in ("kept", "met") else ".2f"
    return format(row[name], digits) if name in row else "-"

  cells = []
  for name, row in rows.items():
    kept, met, *seams = (mean(row, key) for key in _MEANS)
    cells.append(
      [
        name,
        kept,
        met,
        {True: "yes", False: "NO", None: "-"}[row["equal"]],
        *seams,
        *(share(row, key) if key in row else "-" for key in _SHARES),
        f"{row['seconds']:.1f}",
        str(row["n"]),
      ]
    )
  kept, met, *seams = _MEANS.values()
  return ["mode", kept, met, "equal", *seams, *_SHARES.values(), "s", "n"], cells


def _drift_table(drift) -> tuple[list[str], list[list[str]]]:
  cells = [
    [f"drift, given_noise {noise:g}: {title}", *(f"{row[name]:.2f}" for row in rows)]
    for noise, rows in drift.items()
    for name, title in _DRIFT.items()
  ]
  windows = len(next(iter(drift.values())))
  return ["window", *map(str, range(1, windows + 1))], cells
