"""Turns a folder of videos and images into a list of clips to train on."""

import collections
import dataclasses
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from absl import logging

from sora_jax.data import listing
from sora_jax.data.clips import Clip
from sora_jax.data.intake import copies, filters, find, measuring, split
from sora_jax.data.intake import windows as cutting
from sora_jax.data.intake.captions import LeftOut
from sora_jax.data.intake.filters import Filter
from sora_jax.data.intake.ledger import Ledger, version
from sora_jax.data.intake.measuring import Measuring
from sora_jax.data.intake.windows import Windows
from sora_jax.data.listing import Listing
from sora_jax.data.video import media, probe

_LIMITS, _HOW = Filter(), Measuring()


def legal_size(
  height: int, width: int, max_pixels: int, multiple: int
) -> tuple[int, int]:
  """Size nearest in shape that fits `max_pixels`, in multiples of `multiple`.

  Never larger than the source, except to reach the next multiple.

  Raises:
    ValueError: not even one multiple x multiple square fits.
  """
  if multiple * multiple > max_pixels:
    raise ValueError(
      f"max_pixels {max_pixels} is less than one {multiple}x{multiple} square"
    )
  scale = min(1.0, math.sqrt(max_pixels / (height * width)))
  ideal = height * scale / multiple, width * scale / multiple

  def near(x):
    return {max(1, math.floor(x)), max(1, math.ceil(x))}

  def badness(size):
    h, w = size
    shape = abs(math.log(h * width / (w * height)))
    return shape + 0.5 * abs(math.log(h * w / (ideal[0] * ideal[1]))), -h * w

  fits = lambda h, w: h * w * multiple * multiple <= max_pixels  # noqa: E731
  sizes = [(h, w) for h in near(ideal[0]) for w in near(ideal[1]) if fits(h, w)]
  if not sizes:  # a strip so thin that its short side is below one multiple
    longest = max_pixels // (multiple * multiple)
    sizes = [(1, longest) if width > height else (longest, 1)]
  h, w = min(sizes, key=badness)
  return h * multiple, w * multiple


def scan(
  folder,
  *,
  max_frames: int,
  max_pixels: int,
  size_multiple: int,
  fps: float | None = None,
  min_frames: int = 5,
  cut_threshold: float = 3.0,
  crop_borders: bool = False,
  heldout_share: float = 0.0,
  heldout_min: int = 0,
  limits: Filter = _LIMITS,
  how: Measuring = _HOW,
  allow_outside: bool = False,
  listed: Listing | None = None,
  watch: Callable = lambda items, *_: items,
) -> tuple[list[Clip], list[tuple[str, str]]]:
  """Finds, measures, cuts and filters the media files under a folder.

  Captions and splits come from `manifest.jsonl` or `manifest.parquet` in the folder
  (rows with "path", "caption" or "captions", and optionally "split" and "truth"), which
  then also says which files to use; else from a .txt beside each file, one caption a
  line. Files without captions are used without.

  Args:
    folder: searched with its subfolders, see `intake.find`; suffixes may have any case.
    max_frames: longest clip; longer scenes become several clips, one after the other.
    max_pixels: largest height x width of a clip.
    size_multiple: height and width become multiples of this.
    fps: sample faster videos at this rate; None keeps every video's own.
    min_frames: a scene, or the rest of one, with fewer frames is left out.
    cut_threshold: changes this many times as large as those of the frames around them
      are cuts, where one scene ends; 0 cuts nowhere.
    crop_borders: cut off black bars.
    heldout_share, heldout_min: see `intake.split`; where a manifest does not say.
    limits: what is left out. how: files are measured.
    allow_outside: captions and files of a manifest may be outside of the folder.
    listed: the media of another source, in place of the folder's; `folder` is then
      what messages call it.
    watch: (items, what is done to each, what they are) -> the same items, as
      `runtime.progress.track`; shows nothing by default.

  Returns:
    clips, sorted by path, and all else in the folder as a list of (path, reason).

  Raises:
    ValueError: missing or empty folder, a wrong manifest, nothing usable.
  """
  windows = Windows(max_frames, fps, min_frames, cut_threshold, crop_borders)
  if listed is None:
    folder = pathlib.Path(folder).absolute()
    listed = listing.of_folder(folder, allow_outside)
  source, folder = folder, listed.folder
  rows, left_out = listed.rows, list(listed.left_out)
  ids, found, seconds = _ids(listed), [], 0.0
  with Ledger(how.ledger, version()) as ledger:
    for name, result in measuring.measure_files(folder, rows, how, ledger, watch):
      try:
        clip = Clip(ids[name], str(folder / name), 0.0, 0, 0.0, 0, 0,
                    source=listed.sources.get(name, ""))  # fmt: skip
        clip = _described(clip, rows[name], limits)
        pieces = _clips(clip, result, windows, max_pixels, size_multiple)
      except (media.ClipError, LeftOut) as e:
        left_out.append((clip.path, getattr(e, "reason", str(e))))
        continue
      seconds += result["record"]["info"]["duration"] * (pieces[0].frames > 1)
      found += _kept(pieces, limits, left_out)
    found = copies.without(found, limits.copies, left_out)
    if how.score_fn:
      found = _scored(found, how, ledger, watch, limits, left_out)
  _report(source, rows, listed.texts, found, left_out)
  used = sum(clip.frames / clip.fps for clip in found if clip.frames > 1)
  logging.info(
    "%.1f of %.1f s of video are in clips; others are left out, or ends of scenes with "
    "fewer than %d frames, or than the next 4", used, seconds, min_frames,
  )  # fmt: skip
  return _with_split(found, rows, folder, heldout_share, heldout_min), left_out


def _ids(listed: Listing) -> dict[str, str]:
  """Id of each file: its name without the suffix, but with it where that is no one's.

  Clips of a file are numbered id#0, id#1, so no file has an id that ends like that.
  Files of one name, of tar files of one name or of one server, have a mark behind it.
  """
  names = {path: listed.names.get(path, path) for path in listed.rows}
  stems = collections.Counter(os.path.splitext(name)[0] for name in names.values())
  whole = collections.Counter(names.values())
  taken, ids = set(names.values()), {}
  for path, name in names.items():
    stem = os.path.splitext(name)[0]
    alone = stems[stem] == 1 and stem not in taken and not re.search(r"#\d+$", stem)
    ids[path] = stem if alone else name
    if whole[name] > 1:
      ids[path] += "~" + hashlib.sha256(path.encode()).hexdigest()[:8]
  return ids


def _described(clip, row, limits) -> Clip:
  """A clip with the captions that stay, truth and split of its row."""
  texts, reason = filters.captions(limits, row["captions"])
  if reason:
    raise LeftOut(reason)
  split_of = row.get("split") or clip.split
  return dataclasses.replace(
    clip, captions=tuple(texts), split=split_of, truth=row.get("truth")
  )


def _clips(clip, result, windows, max_pixels, multiple) -> list[Clip]:
  """The clips that a measured file is cut into. LeftOut, or ClipError, if none."""
  if "reason" in result:
    raise LeftOut(result["reason"])
  record = result["record"]
  info = probe.Info(**record["info"])
  crop = cutting.crop(record, windows)
  top, left, bottom, right = crop or (0.0,) * 4
  height, width = legal_size(
    max(1, round(info.height * (1 - top - bottom))),
    max(1, round(info.width * (1 - left - right))),
    max_pixels,
    multiple,
  )
  pieces, rate = cutting.pieces(clip.path, record, windows), windows.rate(info)
  return [
    dataclasses.replace(
      clip,
      id=clip.id if len(pieces) == 1 else f"{clip.id}#{number}",
      start=piece.start,
      frames=piece.frames,
      fps=rate,
      height=height,
      width=width,
      crop=crop,
      measured=cutting.measured(record, piece, rate, crop is not None),
    )
    for number, piece in enumerate(pieces)
  ]


def _kept(clips, limits, left_out) -> list[Clip]:
  """The clips within the limits; the others are added to `left_out`."""
  kept = []
  for clip in clips:
    reason = filters.reason(limits, clip.measured, clip.frames == 1)
    if reason:
      left_out.append((clip.path, f"clip {clip.id}: {reason}"))
    else:
      kept.append(clip)
  return kept


def _scored(clips, how, ledger, watch, limits, left_out) -> list[Clip]:
  """The clips with their scores, without those below the limits."""
  kept = []
  for clip, result in measuring.score_clips(clips, how, ledger, watch):
    scores: dict[str, Any] = result.get("record", {})
    reason = result.get("reason") or filters.score_reason(limits, scores)
    if reason:
      left_out.append((clip.path, f"clip {clip.id}: {reason}"))
    else:
      measured = {**(clip.measured or {}), "scores": scores}
      kept.append(dataclasses.replace(clip, measured=measured))
  return kept


def _with_split(clips, rows, folder, share, least) -> list[Clip]:
  """The clips with the split that the manifest says, or one by content."""
  said = {str(folder / name): row.get("split") for name, row in rows.items()}
  marks = [said[clip.path] for clip in clips]
  if any(marks):
    least = 0  # the manifest holds out what it wants to
    marks = split.follow(clips, marks, copies.leaders(clips))
  open_ones = [i for i, mark in enumerate(marks) if not mark]
  free = [clips[i] for i in open_ones]
  clips = [
    dataclasses.replace(clip, split=mark) if mark else clip
    for clip, mark in zip(clips, marks, strict=True)
  ]
  for i, clip in zip(open_ones, split.hold_out(free, copies.groups(free), share, least),
                     strict=True):  # fmt: skip
    clips[i] = clip
  return clips


def _report(folder, rows, texts, clips, left_out):
  """Logs what was found and left out. ValueError if nothing can be used."""
  of_media = [
    (path, reason)
    for path, reason in left_out
    if path.lower().endswith(media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES)
  ]
  for path, reason in of_media[:20]:
    logging.warning("left out %s: %s", find.shown(path), find.shown(reason))
  if not clips:
    path, reason = (of_media or left_out)[0]
    raise ValueError(
      f"{folder}: none of {max(len(rows), len(of_media))} media files can be used; "
      f"first {find.shown(path)}: {find.shown(reason)}"
    )
  silent = sum(not clip.captions for clip in clips)
  logging.info(
    "%s: %d clips (%d without a caption) of %d media files; %d files or clips left out",
    folder, len(clips), silent, len(rows), len(left_out),
  )  # fmt: skip
  used = {clip.path for clip in clips}
  counts = collections.Counter(_suffix(path) for path in used)
  gone = collections.Counter(
    _suffix(path) for path in {path for path, _ in left_out} - used
  )
  logging.info(
    "files by suffix, used and left out: %s%s",
    ", ".join(f"{s} {counts[s]} and {gone[s]}" for s in sorted({*counts, *gone})),
    f"; {texts} files of captions" if texts else "",
  )


def _suffix(path) -> str:
  return find.shown(os.path.splitext(path)[1].lower()) or "no suffix"
