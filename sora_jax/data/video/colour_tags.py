"""Images whose file says by numbers what its colours are (AVIF, HEIC), as sRGB's.

The numbers are those of ITU-T H.273, in a box `colr` of kind `nclx`. What decodes these
files makes RGB of them, and leaves the primaries and the transfer as they are.
"""

from typing import BinaryIO, NamedTuple

import numpy as np
import PIL.Image

from sora_jax.data.video import tone_mapping
from sora_jax.data.video.clip_error import ClipError

FORMATS = ("AVIF", "HEIF")
# Transfers of standard range, which browsers take for sRGB's: BT.709, unspecified,
# BT.601, sRGB, and both of BT.2020.
_STANDARD = (1, 2, 6, 13, 14, 15)
_MOST_BOXES = 64  # before the one that tells of all images, which is the second or so


class Tags(NamedTuple):
  """Numbers of H.273."""

  primaries: int
  transfer: int


def read(file: BinaryIO) -> Tags | None:
  """The first image's tags in an ISO media file, or None if it has none."""
  meta = _box(file, b"meta")
  at = meta.find(b"colrnclx")
  if at < 0 or len(meta) < at + 12:
    return None
  return Tags(*(int.from_bytes(meta[i : i + 2], "big") for i in (at + 8, at + 10)))


def _box(file, wanted) -> bytes:
  """Content of a box of the file's top level, empty if it is not there."""
  for _ in range(_MOST_BOXES):
    header = file.read(8)
    size, kind = int.from_bytes(header[:4], "big"), header[4:]
    if kind == wanted:
      return file.read(size - 8) if size else file.read()
    if size < 8:  # the end, a box of more than 4 GB, or no box at all
      break
    file.seek(size - 8, 1)
  return b""


def to_srgb(path, image: PIL.Image.Image, tags: Tags) -> PIL.Image.Image:
  """An image in sRGB: RGB, or RGBA where it has transparency.

  High dynamic range becomes what `tone_mapping` makes of it in videos.

  Raises:
    ClipError: nothing here knows its primaries or its transfer.
  """
  plain = image.convert("RGBA" if image.has_transparency_data else "RGB")
  is_high = tags.transfer in (tone_mapping.PQ, tone_mapping.HLG)
  if not is_high and tags.transfer not in _STANDARD:
    raise ClipError(path, f"its colours have transfer {tags.transfer} of H.273")
  # Those of BT.601, both kinds, differ from BT.709's by less than is seen.
  primaries = 1 if tags.primaries in (5, 6, 7) else tags.primaries
  if primaries not in tone_mapping.PRIMARIES:
    raise ClipError(path, f"its colours have primaries {primaries} of H.273")
  pixels_HWC = np.asarray(plain.convert("RGB"))
  if is_high:
    code_HWC = pixels_HWC.astype(np.uint16) * 257
    pixels_HWC = tone_mapping.to_sdr(code_HWC, tags.transfer, primaries)
  elif primaries in (1, 2):
    return plain
  else:
    pixels_HWC = tone_mapping.to_bt709(pixels_HWC, primaries)
  made = PIL.Image.fromarray(pixels_HWC)
  if plain.mode == "RGBA":
    made.putalpha(plain.getchannel("A"))
  return made
