"""What is in an open image file: one frame [H, W, 3], upright, in sRGB."""

from typing import BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps

from sora_jax.data.video import colour_profile, colour_tags
from sora_jax.data.video.clip_error import ClipError

_BITS = 258  # TIFF's tag of bits of a sample


def decoded(path, file: BinaryIO) -> np.ndarray:
  """Reads an image: uint8 [H, W, 3].

  Args:
    path: of the file, for messages.
    file: open, at its beginning; see `images.read`.

  Raises:
    ClipError: no picture can be made of it; and what Pillow raises if it is damaged.
  """
  with PIL.Image.open(file) as image:
    _check_still(path, image)
    image.load()
    file.seek(0)
    tags = colour_tags.read(file) if image.format in colour_tags.FORMATS else None
    image = PIL.ImageOps.exif_transpose(image)
    image = _to_srgb(path, _in_8_bits(path, image), tags)
    pixels = np.asarray(image)
    return over_white(pixels) if image.mode == "RGBA" else pixels


def _in_8_bits(path, image) -> PIL.Image.Image:
  """Grey of 16 bits as one of 8, which Pillow would clip; others as they are."""
  if image.mode in ("F", "I"):
    raise ClipError(path, f"its numbers have 32 bits (mode {image.mode}), no range")
  if not image.mode.startswith("I;16"):
    return image
  if (bits := getattr(image, "tag_v2", {}).get(_BITS, (16,)))[0] != 16:
    raise ClipError(path, f"grey of {bits[0]} bits")
  levels = np.asarray(image).astype(np.float32) / 257
  grey = PIL.Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
  grey.info.update(image.info)
  return grey


def _to_srgb(path, image, tags):
  """By the image's profile, which says more, else by its tags."""
  if tags is None or image.info.get("icc_profile"):
    return colour_profile.to_srgb(path, image)
  return colour_tags.to_srgb(path, image, tags)


def _check_still(path, image) -> None:
  """Raises ClipError for a file of several pictures, of which one would be taken.

  Further ones of a phone's .jpg and .heic are depth maps and previews.
  """
  count = getattr(image, "n_frames", 1)
  if count > 1 and image.format not in ("MPO", "HEIF"):
    raise ClipError(path, f"{count} pictures in it, an animation or pages")


def over_white(rgba: np.ndarray) -> np.ndarray:
  """Lays uint8 [..., 4] over white: uint8 [..., 3]."""
  alpha = rgba[..., 3:].astype(np.uint16)
  rgb = rgba[..., :3] * alpha + 255 * (255 - alpha)
  return ((rgb + 127) // 255).astype(np.uint8)
