"""Images in files: one frame [H, W, 3], upright, in sRGB, without transparency."""

import pathlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.PngImagePlugin

from sora_jax.data.video import colour_profile, colour_tags, media


def read(path) -> np.ndarray:
  """Reads an image file: uint8 [H, W, 3].

  Raises:
    ClipError: the file is damaged, or no image.
  """
  _add_heif(path)
  source = media.opened(path)
  try:
    with PIL.Image.open(source) as image:
      _check_still(path, image)
      image.load()
      tags = _tags(source) if image.format in colour_tags.FORMATS else None
      image = PIL.ImageOps.exif_transpose(image)
      if image.mode.startswith("I"):  # 16 bit grey, which Pillow would clip
        levels = np.asarray(image).astype(np.float32) / 257
        grey = PIL.Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
        grey.info.update(image.info)
        image = grey
      image = _to_srgb(path, image, tags)
      pixels = np.asarray(image)
      return over_white(pixels) if image.mode == "RGBA" else pixels
  except media.ClipError:
    raise
  except PIL.Image.DecompressionBombError as e:  # found before anything is allocated
    reason = str(e).partition(", could be")[0]
    raise media.ClipError(path, f"too large: {reason}") from e
  except media.DECODE_ERRORS as e:
    raise media.ClipError(path, f"not an image ({media.short_message(e)})") from e


def _tags(source) -> colour_tags.Tags | None:
  """What a file says of its colours by numbers; `source` is from `media.opened`."""
  if isinstance(source, str):
    with open(source, "rb") as file:
      return colour_tags.read(file)
  source.seek(0)
  return colour_tags.read(source)


def _to_srgb(path, image, tags):
  """By the image's profile, which says more, else by its tags."""
  if tags is None or image.info.get("icc_profile"):
    return colour_profile.to_srgb(path, image)
  return colour_tags.to_srgb(path, image, tags)


def _add_heif(path) -> None:
  """Has Pillow read .heic. ClipError if what does that is not installed.

  FFmpeg would read these files, too, but of a phone's, which are tiles, only the first.
  """
  if pathlib.Path(path).suffix.lower() not in (".heic", ".heif"):
    return
  try:
    import pillow_heif
  except ImportError as e:
    raise media.ClipError(path, "reading it needs `pip install pillow-heif`") from e
  pillow_heif.register_heif_opener()


def _check_still(path, image) -> None:
  """Raises ClipError for a file of several pictures, of which one would be taken.

  Further ones of a phone's .jpg and .heic are depth maps and previews.
  """
  count = getattr(image, "n_frames", 1)
  if count > 1 and image.format in ("WEBP", "TIFF", "AVIF", "PNG"):
    raise media.ClipError(path, f"{count} pictures in it, an animation or pages")


def over_white(rgba: np.ndarray) -> np.ndarray:
  """Lays uint8 [..., 4] over white: uint8 [..., 3]."""
  alpha = rgba[..., 3:].astype(np.uint16)
  rgb = rgba[..., :3] * alpha + 255 * (255 - alpha)
  return ((rgb + 127) // 255).astype(np.uint8)


def write(path: pathlib.Path, frame_HWC: np.ndarray, metadata: dict[str, str]) -> None:
  """Writes a frame as .png or .jpg; only a PNG keeps the metadata."""
  image = PIL.Image.fromarray(np.ascontiguousarray(frame_HWC))
  if path.suffix.lower() == ".png":
    info = PIL.PngImagePlugin.PngInfo()
    for name, text in metadata.items():
      info.add_itxt(name, text)
    image.save(path, pnginfo=info)
  else:
    image.save(path, quality=95, subsampling=0)
