"""Which shards of latents there are to be, of how many bytes, and their checksums."""

import json
import pathlib
from collections.abc import Iterable

from sora_jax.data import records
from sora_jax.runtime import checksums, files

NAME, MANIFEST = "shards.json", "latents.jsonl"


def describe(path: pathlib.Path) -> dict:
  """Name, size and SHA-256 of a shard that was just written; kept beside it."""
  size = path.stat().st_size
  shard = {"name": path.name, "bytes": size, "sha256": checksums.of_file(path)}
  files.write_json(_note(path), checksums.seal(shard))
  return shard


def described(path: pathlib.Path, listed: dict[str, dict]) -> dict:
  """What `describe` said of a shard, which is read only where nothing is kept of it.

  listed: what `read` gave.
  """
  known = listed.get(path.name, {})
  if not known and (note := _sealed(_note(path))):
    known = checksums.unsealed(note)
  return known if known.get("bytes") == path.stat().st_size else describe(path)


def write(folder: pathlib.Path, shards: Iterable[dict]) -> None:
  """Writes folder/shards.json: what `describe` says of all shards; removes notes."""
  listed = sorted(shards, key=lambda shard: shard["name"])
  files.write_json(folder / NAME, checksums.seal({"shards": listed}))
  for shard in listed:
    _note(folder / shard["name"]).unlink(missing_ok=True)


def read(folder: pathlib.Path) -> dict[str, dict]:
  """What `write` wrote, by name; {} if there is none that is whole."""
  return _read(folder) or {}


def lost(folder: pathlib.Path, thorough: bool = False) -> dict[str, str]:
  """Files of an encoded folder that are not what was written, with the reason.

  A folder of an older version has no shards.json; then a shard only has to be there.

  thorough: reads every byte; else files only need to be there, of their size.
  """
  faults = {}
  manifest = folder / MANIFEST
  if not manifest.is_file():
    faults[MANIFEST] = "is missing"
  listed = _read(folder)
  if listed is None:
    faults[NAME] = "is damaged"
  elif not listed and not faults:
    clips = records.read_latents_manifest(str(manifest))
    listed = {clip.shard: {} for clip in clips}
  for name, shard in sorted((listed or {}).items()):
    if fault := _fault(folder / name, shard, thorough):
      faults[name] = fault
  return faults


def check(folder: pathlib.Path) -> None:
  """Raises ValueError if a file is missing or of another size; says what to do."""
  if faults := lost(folder):
    (name, fault), count = next(iter(faults.items())), len(faults)
    more = f", and {count - 1} more files are lost" if count > 1 else ""
    raise ValueError(
      f"{folder / name} {fault}{more}: python -m sora_jax.encode with the same flags "
      "makes what is lost again"
    )


def _read(folder) -> dict[str, dict] | None:
  """What `write` wrote, by name; {} if there is no such file, None if it is damaged."""
  path = folder / NAME
  if not path.exists():
    return {}
  listed = _sealed(path)
  return listed and {shard["name"]: shard for shard in listed["shards"]}


def _sealed(path) -> dict | None:
  """A sealed JSON object; None if there is none, or it is damaged."""
  try:
    values = json.loads(path.read_text())
    return values if checksums.is_whole(values) else None
  except (OSError, ValueError, AttributeError):
    return None


def _note(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f"{path.name}.json")


def _fault(path, known: dict, thorough: bool) -> str | None:
  if not path.is_file():
    return "is missing"
  size = path.stat().st_size
  if size != known.get("bytes", size) or not size:
    return f"has {size} bytes" + (f", not {known['bytes']}" if known else "")
  if thorough and known and checksums.of_file(path) != known["sha256"]:
    return "is damaged: its bytes are not those that were written"
  return None
