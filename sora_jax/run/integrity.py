"""What of a run's folder is whole, and what is lost: every byte that has a checksum."""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax
from etils import epath

from sora_jax.data import clips as clip_manifest
from sora_jax.data import records, stored
from sora_jax.run import latent_shards, recipe, stage_file, stages
from sora_jax.runtime import checkpoint, checksums, lazy_arrays, train_checkpoints

WHOLE, UNCHECKED, LOST = "whole", "not checked", "lost"


@dataclasses.dataclass(frozen=True)
class Finding:
  """A thing of a run and its state: WHOLE, UNCHECKED (no checksum is known) or LOST.

  remedy: how to get it back, where it is lost.
  """

  thing: str
  state: str
  note: str = ""
  remedy: str = ""


def examine(workdir: pathlib.Path) -> Iterator[Finding]:
  """Yields a finding for each thing of a run, stage by stage; changes nothing.

  A stage that was never begun has none. Arrays are read block by block, so that memory
  does not grow with their size.
  """
  for name in recipe.STAGES:
    folder = workdir / name
    if not folder.exists():
      continue
    stage, finding = _stage(workdir, name)
    yield finding
    if name == "data":
      yield from _clips(workdir, stage)
    if name in ("vae", "dit"):
      yield from _checkpoints(workdir, name)
      yield from _model(workdir, name, stage)
    if name == "encode":
      yield from _shards(workdir)


def _again(name) -> str:
  return f"python -m sora_jax.{stages.STAGES[name].module} with the flags of the run"


def _stage(workdir, name) -> tuple[dict, Finding]:
  """What stage.json says ({} if it is lost), and how it is."""
  folder, thing = workdir / name, f"{name}/{stage_file.NAME}"
  faults, found = [], []
  names = (stage_file.NAME, stage_file.SPARE)
  if not any((folder / file).exists() for file in names):
    return {}, Finding(thing, UNCHECKED, "there is none: imported, or lost")
  for file in names:
    try:
      found.append(stage_file.read(folder / file))
    except ValueError as error:
      faults.append(f"{file}: {error}")
  if not found:
    remedy = (
      f"put a copy back; or delete both files and run {_again(name)}: it takes over"
    )
    return {}, Finding(thing, LOST, "; ".join(faults), remedy)
  done = "complete" if found[0]["complete"] else "not complete"
  if not faults:
    return found[0], Finding(thing, WHOLE, done)
  if not (folder / stage_file.SPARE).exists():
    return found[0], Finding(thing, UNCHECKED, f"{done}; of an older version")
  remedy = f"copy {name}/{stage_file.SPARE} over it, or the other way round"
  return found[0], Finding(thing, LOST, "; ".join(faults), remedy)


def _clips(workdir, stage) -> Iterator[Finding]:
  """The manifest, and whether the media files of its clips are there."""
  thing, path = "data/manifest.jsonl", workdir / "data" / "manifest.jsonl"
  try:
    clips = clip_manifest.read_manifest(path)
  except ValueError as error:
    if stage.get("complete"):
      yield Finding(thing, LOST, str(error), f"delete data/ and run {_again('data')}")
    return
  if stage.get("made") and stages.identity("data", workdir) != stage["made"]:
    note = "it is not the one that the stage wrote: damaged, or changed by hand"
    yield Finding(thing, LOST, note, "put a copy back; else only a new run fits it")
  else:
    yield Finding(thing, WHOLE if stage.get("made") else UNCHECKED)
  files = sorted({clip.path for clip in clips})
  gone = [file for file in files if not _has_bytes(file)]
  if gone:
    note = f"{len(gone)} of {len(files)} are missing or empty, such as {gone[0]}"
    yield Finding("data: media files", LOST, note, "mount or copy them back")
  else:
    yield Finding("data: media files", WHOLE, f"{len(files)} are there")


def _has_bytes(file) -> bool:
  holder = stored.holder(file)
  if holder is None:  # remote, so that nothing is known here
    return True
  try:
    return pathlib.Path(holder).stat().st_size > 0
  except OSError:
    return False


def _checkpoints(workdir, name) -> Iterator[Finding]:
  folder = workdir / name / "checkpoints"
  steps = train_checkpoints.steps_in(folder) if folder.exists() else []
  faults = {step: _checkpoint_fault(folder / str(step), step) for step in steps}
  good = [step for step, (state, _) in faults.items() if state != LOST]
  for step, (state, note) in faults.items():
    remedy = _other_checkpoint(name, step, good) if state == LOST else ""
    yield Finding(f"{name}/checkpoints/{step}", state, note, remedy)
  aside = workdir / name / "damaged"
  for place in sorted(aside.iterdir()) if aside.exists() else ():
    note = "a damaged checkpoint that a run has moved aside"
    yield Finding(f"{name}/damaged/{place.name}", UNCHECKED, note)


def _other_checkpoint(name, step: int, good: list[int]) -> str:
  """What to do about a lost checkpoint, with the steps of whole ones."""
  if good and good[-1] > step:
    return f"nothing is needed, since step {good[-1]} is newer and whole"
  if good:
    return f"put a copy back; else training goes on from step {good[-1]} by itself"
  return (
    f"put a copy back; else delete {name}/checkpoints, and training begins from the "
    "start"
  )


def _checkpoint_fault(folder, step) -> tuple[str, str]:
  """(state, note) of a checkpoint."""
  folder = folder.absolute()  # Orbax finds no metadata by a relative path
  try:
    rows = train_checkpoints.read_sealed(epath.Path(folder), step)["arrays"]
    with lazy_arrays.checkpointer() as reader:
      saved = reader.metadata(folder / "state").item_metadata.tree
      args = jax.tree.map(lambda _: lazy_arrays.restore_args(), saved)
      state = reader.restore(folder / "state", restore_args=args)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
      running = checksums.Running()
      for block in leaf.blocks():
        running.add(block)
      found[checksums.path_of(path)] = checksums.row(leaf, running.sums())
  except Exception as error:  # noqa: BLE001 (Orbax raises what its backends raise)
    return LOST, checksums.one_line(error)
  if rows is None:
    return UNCHECKED, f"{len(found)} arrays, of a version without checksums"
  if fault := checksums.difference(rows, found):
    return LOST, fault
  return WHOLE, f"{len(found)} arrays"


def _model(workdir, name, stage) -> Iterator[Finding]:
  folder, thing = workdir / name / "model", f"{name}/model"
  if not (folder / "model.json").exists() and not stage.get("complete"):
    return
  trained = train_checkpoints.steps_in(workdir / name / "checkpoints")
  remedy = f"put a copy back; or delete {name}/ and run {_again(name)}"
  if trained:
    remedy = (
      f"delete {name}/model and {name}/stage.json* and run {_again(name)}: it is made "
      f"of the checkpoint of step {trained[-1]}"
    )
  try:
    checkpoint.check_model(folder)
    there = stages.identity(name, workdir)
    if stage.get("made") not in (None, there):
      raise ValueError(f"it is {there}, and the stage made {stage['made']}")
  except ValueError as error:
    yield Finding(
      thing, LOST, str(error).removeprefix(f"{folder.absolute()}: "), remedy
    )
    return
  checked = checkpoint.has_checksums(folder)
  yield Finding(thing, WHOLE if checked else UNCHECKED)


def _shards(workdir) -> Iterator[Finding]:
  folder = workdir / "encode"
  if not (folder / latent_shards.MANIFEST).exists() and not list(
    folder.glob("*.array_record")
  ):
    return
  faults = latent_shards.lost(folder, thorough=True)
  for name, fault in faults.items():
    remedy = f"delete it, if it is there, and run {_again('encode')}: only it is made"
    yield Finding(f"encode/{name}", LOST, fault, remedy)
  if latent_shards.MANIFEST in faults:
    return
  try:
    clips = records.read_latents_manifest(str(folder / latent_shards.MANIFEST))
  except ValueError as error:
    remedy = f"delete it and run {_again('encode')}"
    yield Finding(f"encode/{latent_shards.MANIFEST}", LOST, str(error), remedy)
    return
  shards = {clip.shard for clip in clips}
  if rest := len(shards - faults.keys()):
    listed = (folder / latent_shards.NAME).exists()
    note = f"{rest} shards, {len(clips)} clips in all"
    yield Finding("encode: shards", WHOLE if listed else UNCHECKED, note)
