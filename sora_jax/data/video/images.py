"""Images in files: one frame [H, W, 3], upright, in sRGB, without transparency."""

import pathlib

import numpy as np
import PIL.Image
import PIL.PngImagePlugin

from sora_jax.data.video import media, pictures

# Of damaged AVIFs, and of damaged metadata, Pillow raises these, too.
_ERRORS = (*media.DECODE_ERRORS, RuntimeError, TypeError, AttributeError)


def read(path) -> np.ndarray:
  """Reads an image file: uint8 [H, W, 3].

  Raises:
    ClipError: the file is damaged, or no image.
  """
  _add_heif(path)
  try:
    source = media.opened(path)
    # Of a path Pillow maps uncompressed TIFFs into memory, those on their side wrongly.
    with open(source, "rb") if isinstance(source, str) else source as file:
      return pictures.decoded(path, file)
  except media.ClipError:
    raise
  except PIL.Image.DecompressionBombError as e:  # found before anything is allocated
    reason = str(e).partition(", could be")[0]
    raise media.ClipError(path, f"too large: {reason}") from e
  except _ERRORS as e:
    raise media.ClipError(path, f"not an image ({media.short_message(e)})") from e


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
