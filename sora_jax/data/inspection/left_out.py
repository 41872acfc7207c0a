"""What of a run was left out, counted by kind of reason."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from sora_jax.data.clips import read_rows
from sora_jax.data.inspection.figures import Reservoir

# Further kinds are one row: a page of a thousand reasons is none that is read.
_KINDS = 40
_OTHERS = "other reasons"


class Example(NamedTuple):
  """A file, or a clip by its id, and the whole reason. path: None for an id."""

  name: str
  reason: str
  path: str | None


@dataclasses.dataclass(frozen=True)
class Kind:
  """Reasons that differ in their numbers and names only."""

  stage: str
  reason: str
  count: int
  examples: list[Example]


def kinds(workdir: pathlib.Path, examples: int = 6) -> list[Kind]:
  """What the stages of a run have left out so far, the most frequent kinds first."""
  counts: dict[tuple[str, str], int] = {}
  shown: dict[tuple[str, str], Reservoir[Example]] = {}
  for stage, example in _left_out(workdir):
    key = stage, kind_of(example.reason)
    if key not in counts and len(counts) >= _KINDS:
      key = stage, _OTHERS
    counts[key] = counts.get(key, 0) + 1
    shown.setdefault(key, Reservoir(examples)).add(example)
  found = [Kind(*key, counts[key], list(shown[key])) for key in counts]
  return sorted(found, key=lambda kind: -kind.count)


def kind_of(reason: str) -> str:
  """A reason without what is of one file only: numbers, names and paths."""
  reason = re.sub(r"^clip .*?: ", "", reason, flags=re.S)
  reason = re.sub(
    r"'[^']*'|\"[^\"]*\"|(?<!\S)\S*/\S+", "\N{HORIZONTAL ELLIPSIS}", reason
  )
  return re.sub(r"(?<![\w-])\d+(\.\d+)?", "N", reason)[:200]


def _left_out(workdir) -> Iterator[tuple[str, Example]]:
  rejected = workdir / "data" / "rejected.jsonl"
  if rejected.is_file():
    for _, row in read_rows(rejected):
      yield "data", Example(row["path"], row["reason"], row["path"])
  for stage in ("vae", "encode", "dit"):
    path, seen = workdir / stage / "bad_clips.jsonl", set()
    for _, row in read_rows(path) if path.is_file() else ():
      if row["id"] not in seen:  # several processes may have noted the same clip
        seen.add(row["id"])
        yield stage, Example(row["id"], row["reason"], None)
