"""The parts of the page, each from what is known of a run."""

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from sora_jax.data.clip_reader import read_clip
from sora_jax.data.clips import Clip
from sora_jax.data.inspection import histograms, packed_rows, page, pictures
from sora_jax.data.inspection.figures import Figures
from sora_jax.data.inspection.left_out import Example, Kind
from sora_jax.data.packed_dataset import PackedDataset
from sora_jax.data.records import LatentClip
from sora_jax.data.video import media
from sora_jax.packing.packed_row import PackedRow

_HEIGHT, _FRAMES = 96, 6
_PICTURES = 3  # of each kind of reason
_MOST_PICTURES = 30


def clips(figures: Figures) -> str:
  """Counts and histograms of the clips to train on."""
  train = figures.splits["train"]
  hours = np.sum(figures.seconds, dtype=np.float64) / 3600
  rows: list[tuple[str, object]] = [
    ("clips to train on", f"{train:,}, of which {figures.images:,} images"),
    ("held out", f"{figures.splits['heldout']:,}"),
    ("without a caption", f"{figures.silent:,}"),
    ("video", f"{hours:,.2f} hours" if hours >= 1 else f"{3600 * hours:,.1f} seconds"),
    ("tokens of all clips", f"{np.sum(figures.tokens, dtype=np.float64):,.0f}"),
    ("sizes", f"{len(figures.sizes):,}"),
    ("pixels lost by cropping to the training size", _lost(figures)),
  ]
  if figures.misfits:
    rows.append(("clips that this config makes no tokens of", f"{figures.misfits:,}"))
  image = pictures.inline_figure(histograms.draw(figures))
  return page.section("Clips to train on", page.table(rows), image)


def _lost(figures: Figures) -> str:
  """The crop's cost in words."""
  if not figures.cropped:
    return "not known: the sizes of the files were not measured"
  lost = np.asarray(figures.cropped)
  said = f"{100 * lost.mean():.1f} % on average, {100 * lost.max():.1f} % at most"
  if np.any(figures.borders):
    said += f"; before that {100 * np.mean(figures.borders):.1f} % as black borders"
  if figures.unknown:
    said += f"; of {figures.unknown:,} clips the file's size is not known"
  return said


def contact_sheet(sample: Sequence[Clip]) -> str:
  """Frames and captions of some clips, cropped and resized as training reads them."""
  shown = "".join(map(_clip, sample)) or page.note("no clips were asked for")
  how = f"{len(sample)} clips, drawn at random, as training reads them."
  return page.section("Contact sheet", page.note(how), shown)


def _clip(clip: Clip) -> str:
  """One clip; if its file is gone or broken since, the reason takes its place."""
  begin = "" if clip.frames == 1 else f", from {clip.start:.2f} s"
  lines = [
    f"{clip.id}: {clip.width}x{clip.height}, {_length(clip)}{begin}",
    *(clip.training_captions[:3] or ("(no caption)",)),
  ]
  try:
    video_THWC = read_clip(clip)
  except pictures.READ_ERRORS as error:
    reason = error.reason if isinstance(error, media.ClipError) else error
    return page.figure(page.note(f"cannot be read: {reason}"), *lines)
  frames = pictures.spread(video_THWC, _FRAMES)
  return page.figure(pictures.inline(pictures.strip(frames, _HEIGHT)), *lines)


def _length(clip: Clip | LatentClip) -> str:
  if clip.frames == 1:
    return "an image"
  return f"{clip.frames} frames at {clip.fps:g} a second"


def left_out(kinds: Sequence[Kind]) -> str:
  """How much was left out and why, then names and pictures by reason."""
  title = "What was left out"
  if not kinds:
    return page.section(title, page.note("nothing: every file is a clip"))
  rows = [(f"{kind.count:,}", kind.stage, kind.reason) for kind in kinds]
  total = f"{sum(kind.count for kind in kinds):,} files or clips."
  parts = [page.note(total), page.table(rows, ("count", "stage", "reason"))]
  room = _MOST_PICTURES
  for kind in kinds:
    shown: list[str] = []
    for example in kind.examples:
      frame = _frame(example) if len(shown) < min(_PICTURES, room) else None
      if frame is not None:
        shown.append(page.figure(frame, example.name))
    room -= len(shown)
    names = [(example.name, example.reason) for example in kind.examples]
    parts.append(f"<h3>{page.text(kind.reason)}: {kind.count:,}</h3>")
    parts += [*shown, page.table(names)]
  return page.section(title, *parts)


def _frame(example: Example) -> str | None:
  """The first frame of a file that was left out, if there is one."""
  if example.path is None:
    return None
  frame = pictures.first_frame(example.path, example.reason)
  if frame is None:
    return None
  return pictures.inline(pictures.resized(frame, _HEIGHT))


def fill(
  dataset: PackedDataset,
  tokens: int,
  rows: int,
  steps: int,
  seconds_per_step: float | None,
) -> str:
  """How full the rows of the first epoch are, and how far the steps of a config go.

  Args:
    dataset: of the rows to train on.
    tokens: of a row, with padding. rows: of a batch. steps: of the training.
    seconds_per_step: of the training, where it has begun.
  """
  count, full = dataset.elements_per_epoch(0), dataset.fill(0)
  time = "not known before training; python -m sora_jax.plan estimates it"
  if seconds_per_step is not None:
    minutes = count / rows * seconds_per_step / 60
    time = f"{minutes:,.1f} minutes, at the {seconds_per_step:.3g} s of the last steps"
  lines = [
    ("rows of an epoch", f"{count:,} of {tokens:,} tokens"),
    ("how full they are", f"{100 * full:.1f} %"),
    ("tokens of an epoch", f"{full * count * tokens:,.0f}"),
    ("steps of an epoch", f"{count / rows:,.1f} of {rows} rows"),
    ("epochs of the training", f"{steps * rows / count:,.1f}, in {steps:,} steps"),
    ("time of an epoch", time),
  ]
  return page.table(lines)


def packed_row(
  number: int,
  dataset: PackedDataset,
  clips: Sequence[LatentClip],
  patch_size: tuple[int, int, int],
  decode: packed_rows.Decode,
  text_of: Callable[[np.ndarray], str],
) -> str:
  """A row: its tokens in one line, then each segment as the VAE decodes it.

  text_of: ids of a caption -> what they say.
  """
  row = cast(PackedRow, dataset[number])
  segments = packed_rows.segments_of(row, clips, patch_size)
  length = len(row["segment_L"])
  padding = length - sum(segment.tokens for segment in segments)
  parts = [
    f"<h3>Row {number}: {len(segments)} segments, {padding} of {length} tokens are "
    "padding</h3>",
    pictures.inline(packed_rows.bar(row), "png"),
    "<div>",
  ]
  for n, segment in enumerate(segments):
    image = pictures.inline(packed_rows.picture(segment, n, decode))
    parts.append(page.figure(image, *_said(segment, text_of)))
  return "\n".join([*parts, "</div>"])


def _said(segment: packed_rows.SeenSegment, text_of) -> list[str]:
  """What stands below a segment: its size, what is given, and its text."""
  clip, images = segment.clip, len(segment.images_NHWC)
  given = f"{100 * segment.given_THW.mean():.0f} % given"
  facts = f"{clip.id}: {segment.tokens} tokens, {_length(clip)}"
  if images:
    given += f"; images behind it: {images}"
  if segment.text_S is None:
    text = "features of one of: " + " | ".join((*clip.captions, "(the empty text)"))
  else:
    text = text_of(segment.text_S) or "(the empty text)"
  return [f"{facts}, {given}", text]
