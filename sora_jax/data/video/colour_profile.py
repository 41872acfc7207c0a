"""Images whose file says by a profile (ICC) what its numbers mean, in sRGB's numbers.

Photographs of phones are in Display P3, those of cameras often in Adobe RGB: taken for
sRGB, their colours are paler than a browser shows them.
"""

import io

import PIL.Image
from absl import logging
from PIL import ImageCms

# What a profile's numbers are -> the mode of an image that holds them.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_GRID = range(0, 256, 51)


def to_srgb(path, image: PIL.Image.Image) -> PIL.Image.Image:
  """An image in sRGB: RGB, or RGBA where it has transparency.

  One without a profile, or whose profile is sRGB's, keeps its numbers. So does one
  whose profile is broken, with a warning for the first such file of a process.
  """
  plain = image.convert("RGBA" if image.has_transparency_data else "RGB")
  profile = image.info.get("icc_profile")
  if not profile:
    return plain
  try:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = _MODES[source.profile.xcolor_space.strip()]
    if mode != "RGB" and image.mode not in (mode, f"{mode}A"):
      raise ValueError(f"a profile of {mode}, and pixels of {image.mode}")
    transform = ImageCms.buildTransform(
      source, ImageCms.createProfile("sRGB"), mode, "RGB"
    )
    if mode == "RGB" and _keeps(transform):
      return plain
    # A grey picture may have a profile of RGB, and transparent ones have colours, too.
    colours = plain.convert("RGB") if mode == "RGB" else _without_alpha(image, mode)
    made = _applied(transform, colours)
  # Pillow tells of some faults of a profile by an OSError or a TypeError.
  except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError) as e:
    logging.log_first_n(
      logging.WARNING,
      "%s: its colour profile cannot be used (%s): its colours are taken for sRGB, and "
      "so are those of other files with such a fault",
      1, path, e,
    )  # fmt: skip
    return plain
  if plain.mode == "RGBA":
    made.putalpha(plain.getchannel("A"))
  return made


def _without_alpha(image, mode):
  return image.getchannel("L") if mode == "L" else image


def _applied(transform, image) -> PIL.Image.Image:
  made = ImageCms.applyTransform(image, transform)
  assert made is not None  # as it is with a transform in place
  return made


def _keeps(transform) -> bool:
  """Whether a transform of RGB changes numbers by no more than their rounding."""
  colours = bytes(n for r in _GRID for g in _GRID for b in _GRID for n in (r, g, b))
  grid = PIL.Image.frombytes("RGB", (len(_GRID) ** 3, 1), colours)
  after = _applied(transform, grid).tobytes()
  return all(abs(a - b) <= 2 for a, b in zip(after, colours, strict=True))
