"""Whether the files that a manifest names are there, before work begins on them."""

import os
from collections.abc import Collection, Iterable, Sequence

from absl import logging

from sora_jax.data import stored
from sora_jax.data.clips import Clip

_LOOKED_AT = 64  # media files, spread over the manifest
_NAMED = 3


def check_media(clips: Sequence[Clip]) -> None:
  """Looks for some of the media files of a manifest; logs how many are gone.

  Raises:
    ValueError: none of them is there; names their folder.
  """
  holders = dict.fromkeys(stored.holder(clip.path) for clip in clips)
  paths = [path for path in holders if path is not None]
  step = max(1, len(paths) // _LOOKED_AT)
  looked_at = paths[::step][:_LOOKED_AT]
  gone = [path for path in looked_at if not os.path.exists(path)]
  if not gone:
    return
  of_all = f"{len(looked_at)} media files looked at, of {len(paths)} in the manifest"
  if len(gone) == len(looked_at):
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    raise ValueError(
      f"{folder}: none of {of_all}, is there (first {gone[0]}); is the disk mounted? "
      "Paths are relative to the folder of the manifest, so that a run that was moved "
      "needs its media beside it"
    )
  logging.warning(
    "%d of %s, are gone, such as %s", len(gone), of_all, ", ".join(gone[:_NAMED])
  )


def check_left_out(leave_out: Iterable[str], known: Collection[str]) -> None:
  """Raises ValueError for an id of config.data.leave_out that no clip has."""
  if unknown := sorted(set(leave_out) - set(known)):
    raise ValueError(
      f"config.data.leave_out: no clip of this run has the id {unknown[0]!r}; ids are "
      "those of data/manifest.jsonl"
    )
