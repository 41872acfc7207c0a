"""Checkpoints that come with the package: small trained models, found by their name."""

import os
import pathlib
from importlib import resources

SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))


def folder() -> pathlib.Path:
  """Where they are; a folder each."""
  return pathlib.Path(str(resources.files("sora_jax"))) / "shipped"


def names() -> list[str]:
  """Names of those that there are."""
  return sorted(path.parents[1].name for path in folder().glob("[!._]*/dit/model"))


def find(checkpoint: str | os.PathLike) -> pathlib.Path:
  """The folder of a checkpoint: a path, or the name of one that is shipped.

  A folder of that name comes first. What has a separator in it is always a path, which
  may or may not exist.

  Raises:
    ValueError: for a name of which there is neither; says which names there are.
  """
  text = os.fspath(checkpoint)
  if pathlib.Path(text).exists() or any(s in text for s in SEPARATORS):
    return pathlib.Path(text)
  if text in (known := names()):
    return folder() / text
  listed = f"those are: {', '.join(known)}" if known else "there is none of those"
  raise ValueError(
    f"{text}: no such folder, and no checkpoint that comes with sora_jax ({listed})"
  )
