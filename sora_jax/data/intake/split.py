"""Which clips are held out: a share of them, with all copies of one on one side."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

from absl import logging

from sora_jax.data.clips import Clip


def hold_out(
  clips: Sequence[Clip],
  groups: Sequence[Sequence[str]],
  share: float,
  least: int,
) -> list[Clip]:
  """Sets the split of clips by their content.

  A group of clips that show the same is on one side. It is held out if a number drawn
  from its content is below `share`, so that files that are added or renamed move none.
  If fewer than `least` clips are (but at most a quarter of all), the groups with the
  next numbers are, too, and a video if there are several and none is held out. A group
  with more than half of all clips, such as a film among short videos, is trained on.

  Args:
    clips: whose split is to be set.
    groups: [clip][level] names from coarse to fine: of all that is a copy of the clip's
      file, of its scene, of itself. Finer ones are used where there is one group only.
    share: 0 to 1. least: number of clips; 0 with a share of 0 holds out none.
  """
  if not clips or (not share and not least):
    return [dataclasses.replace(clip, split="train") for clip in clips]
  level = next((i for i in range(3) if len({g[i] for g in groups}) > 1), 2)
  if level and len(clips) > 1:
    logging.warning(
      "all clips are of one video or its copies: held out are %s of it, which training "
      "sees the like of", ("", "scenes", "clips")[level],
    )  # fmt: skip
  members: dict[str, list[int]] = {}
  for i, group in enumerate(groups):
    members.setdefault(group[level], []).append(i)
  order = sorted(members, key=_draw)
  wanted = max(1, min(least, len(clips) // 4)) if least else 0
  chosen = _choose(order, members, clips, share, wanted)
  held = {i for group in chosen for i in members[group]}
  logging.info(
    "held out by content: %d of %d clips (%.1f %%, config.data.heldout_share %.1f %%), "
    "in %d of %d groups of copies",
    len(held), len(clips), 100 * len(held) / len(clips), 100 * share, len(chosen),
    len(order),
  )  # fmt: skip
  return [
    dataclasses.replace(clip, split="heldout" if i in held else "train")
    for i, clip in enumerate(clips)
  ]


def follow(
  clips: Sequence[Clip], marks: Sequence[str | None], leaders: Sequence[int]
) -> list[str | None]:
  """Marks of clips, where those without one take that of what they are a copy of.

  A clip of which one copy is held out and another is trained on is held out. Where it
  is marked itself it stays what it is, and a warning names both.

  Args:
    clips: that were found.
    marks: the split of each that a manifest says, or None.
    leaders: see `copies.leaders`.
  """
  sides: dict[int, dict[str, int]] = {}
  for i, (mark, leader) in enumerate(zip(marks, leaders, strict=True)):
    if mark:
      sides.setdefault(leader, {}).setdefault(mark, i)
  both = [i for i, leader in enumerate(leaders)
          if marks[i] == "train" and "heldout" in sides[leader]]  # fmt: skip
  for i in both[:5]:
    other = clips[sides[leaders[i]]["heldout"]]
    logging.warning(
      "%s is marked to be trained on, but shows the same as %s, which is held out",
      clips[i].path, other.path,
    )  # fmt: skip
  if both:
    logging.warning(
      "%d clips are trained on that show the same as held-out ones: what is measured "
      "on those is too good; mark copies alike, or leave their marks away", len(both),
    )  # fmt: skip
  # Of the two, "heldout" is the lesser by name.
  made = [
    mark or min(sides.get(leader, ()), default=None)
    for mark, leader in zip(marks, leaders, strict=True)
  ]
  followed = sum(a == "heldout" and not b for a, b in zip(made, marks, strict=True))
  if followed:
    logging.info("%d unmarked clips are copies of held-out ones: held out", followed)
  return made


def _choose(order, members, clips, share, wanted) -> list[str]:
  """Groups to hold out, of those in the order of their numbers; never all of them."""
  if len(order) > 1:
    order = [group for group in order if 2 * len(members[group]) <= len(clips)]
  trained = len(members) > len(order)
  chosen = [group for group in order if _draw(group) < share]
  rest = [group for group in order if group not in set(chosen)]
  while rest and sum(len(members[group]) for group in chosen) < wanted:
    chosen.append(rest.pop(0))

  def is_video(group):
    return any(clips[i].frames > 1 for i in members[group])

  videos = [group for group in order if is_video(group)]
  several = sum(map(is_video, members)) > 1
  if wanted and several and videos and not set(videos) & set(chosen):
    chosen.append(videos[0])
  if len(chosen) == len(order) and len(order) > 1 and not trained:
    chosen = chosen[:-1]  # training needs some
  return chosen


def _draw(group: str) -> float:
  """A number from 0 to 1, by the name of a group."""
  first = hashlib.sha256(group.encode()).digest()[:8]
  return math.ldexp(int.from_bytes(first, "big"), -64)
