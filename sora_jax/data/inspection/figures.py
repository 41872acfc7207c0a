"""Figures of a manifest, in one pass over it: a million rows are no list of clips."""

import array
import collections
import dataclasses
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from sora_jax.data.clips import Clip, manifest_clips, read_rows

Item = TypeVar("Item")


def _floats() -> array.array:
  return array.array("f")


@dataclasses.dataclass
class Figures:
  """What the clips of a manifest are like; all but `splits` is of those to train on.

  Attributes:
    splits: clips by split.
    images, silent: clips of one frame, and clips without a caption.
    sizes: clips by (width, height).
    seconds, fps: of videos. tokens: of each clip. caption_lengths: characters of each.
    cropped: share of the pixels of each clip that the crop to its size costs.
    borders: share that was cut off before, as black bars.
    unknown: clips whose file's own size is not known.
    misfits: clips that the config's grid of tokens does not fit.
    sample: some of the clips, in the order of the manifest.
  """

  splits: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  images: int = 0
  silent: int = 0
  sizes: collections.Counter[tuple[int, int]] = dataclasses.field(
    default_factory=collections.Counter
  )
  seconds: array.array = dataclasses.field(default_factory=_floats)
  fps: array.array = dataclasses.field(default_factory=_floats)
  tokens: array.array = dataclasses.field(default_factory=_floats)
  caption_lengths: array.array = dataclasses.field(default_factory=_floats)
  cropped: array.array = dataclasses.field(default_factory=_floats)
  borders: array.array = dataclasses.field(default_factory=_floats)
  unknown: int = 0
  misfits: int = 0
  sample: list[Clip] = dataclasses.field(default_factory=list)


def measure(
  folder: pathlib.Path, tokens_of: Callable[[int, int, int], int], sample: int
) -> Figures:
  """Reads the manifest of a run's stage "data".

  Args:
    folder: of the stage.
    tokens_of: (frames, height, width) -> tokens; ValueError where none are that size.
    sample: clips that are kept to be shown, drawn at random but always the same.
  """
  figures, chosen = Figures(), Reservoir[Clip](sample)
  sizes = _file_sizes(folder / "measured.jsonl")
  for _, clip in manifest_clips(folder / "manifest.jsonl"):
    figures.splits[clip.split] += 1
    if clip.split == "train":
      _add(figures, clip, _file_size(clip, sizes))
      chosen.add(clip)
      try:
        figures.tokens.append(tokens_of(clip.frames, clip.height, clip.width))
      except ValueError:
        figures.misfits += 1
  figures.sample = list(chosen)
  return figures


def lost_to_crop(height: int, width: int, clip: Clip) -> float:
  """Share of a picture that is lost where it is resized and cut to a clip's size."""
  top, left, bottom, right = clip.crop or (0.0,) * 4
  scales = (
    clip.height / (height * (1 - top - bottom)),
    clip.width / (width * (1 - left - right)),
  )
  return 1 - min(scales) / max(scales)


class Reservoir(Generic[Item]):
  """A few of many items, each as likely as any other, in the order that they came."""

  def __init__(self, size: int):
    self._size, self._count = size, 0
    self._kept: list[tuple[int, Item]] = []
    self._random = random.Random(0)

  def add(self, item: Item) -> None:
    """Keeps the item, in place of another one where there is no room, or does not."""
    place = self._random.randrange(self._count + 1)
    if len(self._kept) < self._size:
      self._kept.append((self._count, item))
    elif place < self._size:
      self._kept[place] = (self._count, item)
    self._count += 1

  def __iter__(self) -> Iterator[Item]:
    in_order = sorted(self._kept, key=lambda kept: kept[0])
    return iter([item for _, item in in_order])


def _add(figures, clip, size):
  figures.sizes[clip.width, clip.height] += 1
  figures.silent += not clip.training_captions
  figures.caption_lengths.extend(map(len, clip.training_captions))
  if clip.frames == 1:
    figures.images += 1
  else:
    figures.seconds.append(clip.frames / clip.fps)
    figures.fps.append(clip.fps)
  if size is None:
    figures.unknown += 1
    return
  top, left, bottom, right = clip.crop or (0.0,) * 4
  figures.cropped.append(lost_to_crop(*size, clip))
  figures.borders.append(1 - (1 - top - bottom) * (1 - left - right))


def _file_size(clip, sizes) -> tuple[int, int] | None:
  """(height, width) of a clip's file, where `prepare` or what drew it has noted it."""
  known = clip.truth or {}
  if "height" in known and "width" in known:
    return known["height"], known["width"]
  return sizes.get((clip.measured or {}).get("digest"))


def _file_sizes(ledger: pathlib.Path) -> dict[str, tuple[int, int]]:
  """(height, width) of measured files by their digest, which clips have as well."""
  sizes = {}
  if ledger.is_file():
    for _, row in read_rows(ledger):
      record = row.get("result", {}).get("record", {})
      if "info" in record and "digest" in record:
        sizes[record["digest"]] = record["info"]["height"], record["info"]["width"]
  return sizes
