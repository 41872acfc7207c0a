"""What a training clip is, and the manifest that lists clips."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator

from sora_jax.data.text_file import UTF16
from sora_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class SyntheticCaption:
  """A caption that a model has written, and where it is from.

  Attributes:
    text: of the caption.
    style: that was asked for, such as "descriptive".
    by: the model. prompt: hash of the prompt that it was given; "" if it takes none.
  """

  text: str
  style: str
  by: str
  prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Clip:
  """A piece of one media file, with the size it will be decoded to.

  An image is a clip of one frame. Times are in seconds from the file's first frame.
  """

  id: str  # unique in its manifest: relative path without suffix, "#k" for a cut
  path: str  # absolute; written relative to the manifest's folder
  start: float
  frames: int  # 1 + 4k, the causal VAE's grid in time
  fps: float  # the rate to sample at; 1.0 for images
  height: int  # size after resize and centre crop
  width: int
  captions: tuple[str, ...] = ()  # of whoever the clip is from
  split: str = "train"  # "train" or "heldout"
  truth: dict | None = None  # what was drawn, for generated clips
  # (top, left, bottom, right) shares of the upright picture that are cut off first.
  crop: tuple[float, float, float, float] | None = None
  source: str = ""  # in a mixture, see data/mixture.py
  # What `prepare` has measured; it describes the clip and does not make it another one.
  measured: dict | None = dataclasses.field(default=None, compare=False)
  synthetic: tuple[SyntheticCaption, ...] = ()  # of `recaption`

  @property
  def training_captions(self) -> tuple[str, ...]:
    """All captions that training draws from: the own ones, then the synthetic ones."""
    return (*self.captions, *(caption.text for caption in self.synthetic))


def recaption_summary(manifest) -> pathlib.Path:
  """The file beside a manifest that says what `recaption` has written into it."""
  return pathlib.Path(manifest).with_name("recaption.json")


def write_manifest(path, clips):
  """Writes one JSON object a line, atomically; media paths become relative."""
  path = pathlib.Path(path)
  folder = os.path.abspath(path.parent)
  lines = []
  for clip in clips:
    row = dataclasses.asdict(clip)
    row["path"] = os.path.relpath(clip.path, folder)
    if not clip.synthetic:
      del row["synthetic"]
    lines.append(json.dumps(row, ensure_ascii=False))
  write_lines(path, lines)


def read_manifest(path) -> list[Clip]:
  """Reads what `write_manifest` wrote.

  Raises:
    ValueError: no such file, a line is no clip, or an id occurs twice; names the line.
  """
  clips, seen = [], set()
  for number, clip in manifest_clips(path):
    if clip.id in seen:
      raise ValueError(f"{path}:{number}: id {clip.id!r} occurs twice")
    seen.add(clip.id)
    clips.append(clip)
  return clips


def manifest_clips(path) -> Iterator[tuple[int, Clip]]:
  """Yields (line number, clip) one by one, for manifests that are only counted.

  Raises:
    ValueError: as `read_manifest`, but ids may occur twice.
  """
  path, folder = pathlib.Path(path), ""
  for number, row in read_rows(path):
    try:
      folder = folder or _folder_of(path, row["path"])
      row["path"] = os.path.normpath(os.path.join(folder, row["path"]))
      clip = clip_of_row(row)
    except (KeyError, TypeError, ValueError) as e:
      raise ValueError(f"{path}:{number}: not a clip ({e})") from e
    yield number, clip


def _folder_of(path, name) -> str:
  """The folder that media are relative to, as one of them shows.

  The manifest of a stage that is linked from another run is beside that one's media.
  """
  folders = [os.path.abspath(path.parent), os.path.realpath(path.parent)]
  paths = (os.path.normpath(os.path.join(folder, name)) for folder in folders)
  return folders[1] if [*map(os.path.exists, paths)] == [False, True] else folders[0]


def clip_of_row(row: dict) -> Clip:
  """The clip of a row of JSON. KeyError, TypeError or ValueError if it is none."""
  captions, crop = row["captions"], row.get("crop")
  written = tuple(SyntheticCaption(**caption) for caption in row.get("synthetic", ()))
  clip = Clip(**{
    **row,
    "captions": tuple(captions),
    "crop": tuple(crop) if crop else None,
    "synthetic": written,
  })  # fmt: skip
  texts = (clip.id, clip.path, clip.split, *clip.training_captions)
  sizes = (clip.frames, clip.height, clip.width)
  numbers = (clip.start, clip.fps, *(clip.crop or ()))
  if not isinstance(captions, (list, tuple)):
    raise TypeError(f"captions are {captions!r}, not a list")
  if wrong := [text for text in texts if not isinstance(text, str)]:
    raise TypeError(f"{wrong[0]!r} is no text")
  if wrong := [n for n in sizes if type(n) is not int or n < 1]:
    raise ValueError(f"{wrong[0]!r} is no number of frames or pixels")
  if wrong := [n for n in numbers if type(n) not in (int, float) or not 0 <= n < 1e9]:
    raise ValueError(f"{wrong[0]!r} is no time, rate or share")
  if clip.fps <= 0 or (clip.crop and len(clip.crop) != 4):
    raise ValueError(f"fps {clip.fps!r} or crop {clip.crop!r}")
  return clip


def read_rows(path):
  """Yields (line number, object) of a JSON lines file; skips blank lines.

  Raises:
    ValueError: no such file, or a line that is not a JSON object; names file:line.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"{path}: no such manifest")
  with open(path, "rb") as f:
    lines = _utf16_lines(path) if f.peek(2)[:2] in UTF16 else f
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except (ValueError, RecursionError) as e:  # bad JSON or UTF-8, deep brackets
        raise ValueError(f"{path}:{number}: not JSON ({e})") from e
      if not isinstance(row, dict):
        kind = type(row).__name__
        raise ValueError(f"{path}:{number}: a JSON object is needed, not {kind}")
      yield number, row


def _utf16_lines(path):
  """Lines of a file that Windows programs have written, as UTF-8."""
  try:
    text = path.read_text(encoding="utf-16")
  except UnicodeDecodeError as e:
    raise ValueError(f"{path}: not UTF-8, and not UTF-16 either ({e})") from e
  return (line.encode() for line in text.split("\n"))


def write_lines(path, lines):
  """Writes text lines (UTF-8) to a file that appears when all are in it."""
  with files.replacing(path) as partial, open(partial, "w", encoding="utf-8") as f:
    f.writelines(line + "\n" for line in lines)
