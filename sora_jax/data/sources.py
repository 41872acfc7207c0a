"""Turns a folder of videos and images into a list of clips to train on."""

import collections
import dataclasses
import hashlib
import math
import os
import pathlib
from collections.abc import Callable

from absl import logging

from sora_jax.data.clips import Clip, read_rows
from sora_jax.data.video import media, probe
from sora_jax.packing import time_grid

MANIFEST = "manifest.jsonl"


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
  heldout_share: float = 0.0,
  min_frames: int = 5,
  watch: Callable = lambda items, *_: items,
) -> tuple[list[Clip], list[tuple[str, str]]]:
  """Finds, measures and cuts the media files under a folder.

  Captions and splits come from `manifest.jsonl` in the folder (rows with "path",
  "caption" or "captions", and optionally "split" and "truth"), which then also says
  which files to use; else from a .txt beside each file, one caption a line. Files
  without captions are used without.

  Args:
    folder: searched with its subfolders; suffixes may have any case.
    max_frames: longest clip; longer videos become several clips, one after the other.
    max_pixels: largest height x width of a clip.
    size_multiple: height and width become multiples of this.
    fps: sample faster videos at this rate; None keeps every video's own.
    heldout_share: share of files held out where no manifest says; whole files, chosen
      by name, so that adding files moves none.
    min_frames: a video, or the rest of one, with fewer frames is left out.
    watch: (items, what is done to each, what they are) -> the same items, as
      `runtime.progress.track`; shows nothing by default.

  Returns:
    clips, sorted by path, and the rejected files as a list of (path, reason).

  Raises:
    ValueError: missing or empty folder, a wrong manifest or caption, nothing usable.
  """
  folder = pathlib.Path(folder).absolute()
  if max_frames < 1:
    raise ValueError(f"at least 1 frame is needed, not {max_frames}")
  max_frames = time_grid.round_down(max_frames)
  min_frames = min(min_frames, max_frames)
  files = _files(folder)
  ids, found, rejected = _ids(files), [], []
  for name, row in watch(sorted(files.items()), "measured", "files"):
    path = folder / name
    split = row.get("split") or _split(name, heldout_share)
    try:
      info = probe.probe(path)
      pieces = _cut(path, info, fps, max_frames, min_frames)
    except media.ClipError as e:
      rejected.append((str(path), e.reason))
      continue
    size = legal_size(info.height, info.width, max_pixels, size_multiple)
    clip = Clip(
      id=ids[name],
      path=str(path),
      start=0.0,
      frames=0,
      fps=_rate(info, fps),
      height=size[0],
      width=size[1],
      captions=tuple(row["captions"]),
      split=split,
      truth=row.get("truth"),
    )
    found += _numbered(clip, pieces)
  _report(folder, files, found, rejected)
  return found, rejected


def _files(folder):
  """Media files of a folder by relative path. ValueError if there are none."""
  if not folder.is_dir():
    raise ValueError(f"{folder}: no such folder")
  manifest = folder / MANIFEST
  files = _from_manifest(folder) if manifest.exists() else _from_tree(folder)
  if not files:
    wanted = " ".join(media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES)
    raise ValueError(f"{folder}: no media files in it; looked for {wanted}")
  return files


def _ids(files):
  """Id of each file: its path without the suffix, but with it where two are alike."""
  stems = collections.Counter(os.path.splitext(name)[0] for name in files)
  named = {name: os.path.splitext(name)[0] for name in files}
  return {name: name if stems[stem] > 1 else stem for name, stem in named.items()}


def _numbered(clip, pieces):
  """The clips of a file's (start, frames) pieces, numbered if there are several."""
  return [
    dataclasses.replace(
      clip,
      id=clip.id if len(pieces) == 1 else f"{clip.id}#{number}",
      start=start,
      frames=frames,
    )
    for number, (start, frames) in enumerate(pieces)
  ]


def _report(folder, files, found, rejected):
  """Logs what was found and left out. ValueError if nothing can be used."""
  for path, reason in rejected[:20]:
    logging.warning("left out %s: %s", path, reason)
  if not found:
    path, reason = rejected[0]
    raise ValueError(
      f"{folder}: none of {len(files)} media files can be used; first {path}: {reason}"
    )
  silent = sum(not clip.captions for clip in found)
  logging.info(
    "%s: %d clips (%d without a caption) of %d files, %d files left out",
    folder, len(found), silent, len(files), len(rejected),
  )  # fmt: skip


def _rate(info, fps):
  """Frames a second that a file is sampled at: its own, or fewer; 1 of an image."""
  return 1.0 if info.frames == 1 else min(info.fps, fps or info.fps)


def _cut(path, info, fps, max_frames, min_frames):
  """[(start, frames)] of consecutive clips; the rest of a video may be left out."""
  if info.frames == 1:
    return [(0.0, 1)]
  rate = _rate(info, fps)
  # Frame k is on screen from k / rate; rounded headers must not add one.
  total = math.ceil(info.duration * rate - 0.3)
  if total < min_frames:
    raise media.ClipError(
      path, f"too short: {total} frames at {rate:g} fps, {min_frames} needed"
    )
  pieces = []
  for first in range(0, total, max_frames):
    left = min(total - first, max_frames)
    if left >= min_frames:
      pieces.append((first / rate, time_grid.round_down(left)))
  return pieces


def _split(name, heldout_share):
  """Split of a file, drawn by its name."""
  draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
  return "heldout" if draw < heldout_share else "train"


def _from_tree(folder):
  """Finds all media files and their .txt captions: {relative path: {"captions"}}."""
  files = {}
  for path in folder.rglob("*"):
    suffixes = media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES
    if path.suffix.lower() in suffixes and not path.name.startswith("."):
      files[path.relative_to(folder).as_posix()] = {"captions": _sidecar(path)}
  return files


def _sidecar(path):
  """Captions of the .txt file beside a media file; none without one."""
  text = path.with_suffix(".txt")
  if not text.is_file():
    return []
  try:
    lines = text.read_text(encoding="utf-8").splitlines()
  except UnicodeDecodeError as e:
    raise ValueError(f"{text}: captions must be UTF-8 ({e})") from e
  return [line.strip() for line in lines if line.strip()]


def _from_manifest(folder):
  """Reads and checks the manifest: {relative path: row}, "captions" being a list."""
  files = {}
  for number, row in read_rows(folder / MANIFEST):
    where = f"{folder / MANIFEST}:{number}"
    name = row.get("path")
    if not isinstance(name, str) or not name:
      raise ValueError(f'{where}: "path" must be a file name, not {name!r}')
    if name in files:
      raise ValueError(f"{where}: {name} occurs twice")
    if not (folder / name).is_file():
      raise ValueError(f"{where}: no such file: {folder / name}")
    captions = row.get("captions", [])
    if "caption" in row:
      captions = [row["caption"]]
    good = isinstance(captions, list) and all(isinstance(c, str) for c in captions)
    if not good:
      raise ValueError(
        f'{where}: "caption" must be a text, "captions" a list of texts, '
        f"not {captions!r}"
      )
    if row.get("split", "train") not in ("train", "heldout"):
      raise ValueError(
        f'{where}: "split" must be "train" or "heldout", not {row["split"]!r}'
      )
    files[name] = {**row, "captions": [c.strip() for c in captions if c.strip()]}
  return files
