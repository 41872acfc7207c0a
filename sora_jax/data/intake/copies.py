"""Which clips show the same as those of other files: left out, or kept on one side.

Clips of one file are no copies of each other: a camera that stands still is no fault.
"""

from collections.abc import Sequence

from absl import logging

from sora_jax.data.clips import Clip
from sora_jax.data.intake import perceptual_hash

# Bits of 64 up to which two clips are taken for the same when some are held out: what
# is like a training clip says little, so strangers among them harm less than copies.
BITS = 3


def without(
  clips: Sequence[Clip], bits: int, left_out: list[tuple[str, str]]
) -> list[Clip]:
  """The clips without copies of earlier ones, which are added to `left_out`.

  bits: config.data.filter.copies; -1 keeps them all, and the log says how many.
  """
  first = leaders(clips, BITS if bits < 0 else bits)
  copies = [i for i, leader in enumerate(first) if clips[leader].path != clips[i].path]
  if bits < 0:
    if copies:
      logging.warning(
        "%d of %d clips show the same as those of other files, such as %s and %s; "
        "config.data.filter.copies=%d leaves them out",
        len(copies),
        len(clips),
        clips[first[copies[0]]].id,
        clips[copies[0]].id,
        BITS,
      )
    return list(clips)
  for i in copies:
    original = clips[first[i]].id
    reason = f"clip {clips[i].id} is a copy of {original} (config.data.filter.copies)"
    left_out.append((clips[i].path, reason))
  gone = set(copies)
  return [clip for i, clip in enumerate(clips) if i not in gone]


def groups(clips: Sequence[Clip]) -> list[tuple[str, str, str]]:
  """[clip] names of its copies: of the file, of the scene, of the clip; for `split`.

  Files that share one clip are one group, however much else they hold.
  """
  parents: dict[str, str] = {}

  def top(name):
    while parents.setdefault(name, name) != name:
      name = parents[name]
    return name

  for i, leader in enumerate(leaders(clips)):
    # The least digest names a group, whatever files are called.
    one, other = sorted((top(_figure(clips[i], "digest")),
                         top(_figure(clips[leader], "digest"))))  # fmt: skip
    parents[other] = one
  named = []
  for clip in clips:
    digest, scene = _figure(clip, "digest"), _figure(clip, "scene")
    names = top(digest), f"{digest}:{scene}", f"{digest}:{clip.start:.3f}"
    named.append(names)
  return named


def leaders(clips: Sequence[Clip], bits: int = BITS) -> list[int]:
  """[clip] index of the first clip that it is a copy of, its own for none."""
  hashes = [_figure(clip, "hash") for clip in clips]
  found = perceptual_hash.groups(hashes, bits).tolist()
  first: dict[tuple, int] = {}
  for i, clip in enumerate(clips):
    # Copies of a file are known without a picture to compare, too.
    same = (_figure(clip, "digest"), clip.start, clip.frames)
    found[i] = min(found[i], found[first.setdefault(same, i)])
  return found


def _figure(clip, name) -> str:
  return str((clip.measured or {}).get(name, ""))
