"""Checkpoints of a training: asynchronous (Orbax), checksummed, retained by policy.

A checkpoint holds the state, and one sealed JSON object: the step, what the host knew,
and a checksum of each array as it was on the devices. So whatever is read back is what
was saved, or a `DamagedError`: never other values.
"""

import copy
import json
import math
import threading
import time

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from sora_jax.runtime import checksums, hosts, sharding
from sora_jax.runtime.background_writes import BackgroundWrites, ElsewhereError

_SEALED = {"step", "arrays", "host", "score", "checksum"}
_PARTIAL = "*.orbax-checkpoint-tmp*"
# Seconds that are waited for what a failed save still writes.
_WRITING = 60
# What says that a store or a machine fails, and nothing of what is on the disk.
_NO_DAMAGE = (
  "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED",
  "Permission denied", "Input/output error", "Stale file handle",
  "Too many open files", "out of memory",
)  # fmt: skip


class DamagedError(ValueError):
  """A checkpoint is not what was saved; its folder and the reason in one line."""

  def __init__(self, folder: epath.Path, step: int, reason: str):
    super().__init__(f"{folder}: the checkpoint is damaged ({reason})")
    self.step, self.reason = step, reason


class Checkpoints:
  """Numbered checkpoints in a folder: a sharded state and a JSON-able dict each.

  Saving is asynchronous and atomic: a run that is killed while it saves leaves the
  checkpoints before intact. All processes must call each method.
  """

  def __init__(
    self,
    folder,
    keep: int,
    always: int | None = None,
    every: int = 0,
    best: bool = False,
    failures: int = 1,
  ):
    """Opens the folder, or makes it.

    Args:
      keep: number of newest checkpoints that stay.
      always: step whose checkpoint stays as well.
      every: checkpoints of multiples of it stay as well; 0 = none.
      best: whether the one with the lowest score stays as well.
      failures: so many saves in a row may fail, the last of which is an error.
    """
    self.folder = epath.Path(folder).absolute()
    policies = [ocp.checkpoint_managers.LatestN(keep)]
    if always is not None:
      policies.append(ocp.checkpoint_managers.CustomSteps([always]))
    if every:
      policies.append(ocp.checkpoint_managers.EveryNSteps(interval_steps=every))
    self._lowest = _LowestScore()
    if best:
      policies.append(self._lowest)
    self._policy = ocp.checkpoint_managers.AnyPreservationPolicy(policies)
    self._writes = BackgroundWrites()
    self._states = self._writes.of(ocp.StandardCheckpointHandler())
    self._hosts = self._writes.of(_made_late(ocp.JsonCheckpointHandler()))
    self._limit, self._failed = failures, 0
    self._saving: int | None = None
    self._manager = self._open()
    if best:
      self._lowest.scores = self._scores()

  def _open(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(
          barrier_sync_fn=self._writes.meet,
          # A folder that cannot be made is known at once: otherwise all that is to be
          # written there would wait for it, minutes long.
          create_directories_asynchronously=False,
        ),
      ),
      item_handlers={"state": self._states, "host": self._hosts},
    )

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  # --- saving

  def save(self, step: int, state, host: dict, score: float | None = None) -> None:
    """Starts to save; returns once the state may be donated.

    A save that fails, as on a full disk, is a warning, here or when the next one is
    asked for.

    Args:
      host: JSON-able and the same in all processes.
      score: what the best one has least of.

    Raises:
      ValueError: if as many in a row failed as may.
    """
    self._settle()
    rows = checksums.start_tree(state)
    known = {"step": step, "host": copy.deepcopy(host), "score": score}

    begun = threading.Event()

    def sealed():
      begun.wait()  # what training waits for has the processors first
      return checksums.seal({**known, "arrays": rows()})

    if score is not None and math.isfinite(score):
      self._lowest.scores[step] = score
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      host=ocp.args.JsonSave(sealed),  # type: ignore[arg-type]
    )
    self._saving = step
    self._writes.begin()
    fault = self._unwritable()
    if fault is None:
      fault = _fault_of(lambda: self._manager.save(step, args=args, force=True))
      begun.set()
      fault = _of_any(fault)
    if fault:
      self._note_failure(fault)

  def save_and_wait(
    self, step: int, state, host: dict, score: float | None = None
  ) -> None:
    """Saves, trying again as often as may fail; returns once it is on the disk."""
    while step not in self.steps() or self._saving is not None:
      if step not in self.steps():
        if self._failed:
          time.sleep(2**self._failed)
        self.save(step, state, host, score)
      self._settle()

  def wait(self) -> None:
    """Waits for a save under way. ValueError if as many in a row failed as may."""
    self._settle()

  def close(self) -> None:
    """Waits for saves under way, then frees the threads."""
    if fault := _fault_of(self._manager.close):
      logging.warning("%s: a save failed (%s)", self.folder, fault)

  def _settle(self) -> None:
    """Waits for the save under way, and learns whether it failed on any process."""
    if self._saving is None:
      return

    def finish():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

    if fault := _of_any(_fault_of(finish)):
      self._note_failure(fault)
    else:
      self._saving, self._failed = None, 0

  def _note_failure(self, fault: str) -> None:
    step, self._saving = self._saving, None
    self._failed += 1
    assert step is not None
    self._lowest.scores.pop(step, None)
    # A new manager, since this one takes the step for saved. What it has written is
    # removed: on a full disk that is room for the next one.
    _fault_of(self._manager.close)
    self._writes.end(_WRITING)
    sharding.sync("failed writes ended")
    if jax.process_index() == 0:
      self._remove_partial()
    sharding.sync("failed save")
    self._manager = self._open()
    there = self.steps()
    newest = (
      f"the newest checkpoint is of step {there[-1]}" if there else "there is none"
    )
    if self._failed >= self._limit:
      raise ValueError(
        f"{self.folder}: {self._failed} saves in a row failed, the last at step {step} "
        f"({fault}); {newest}. Mend that, and the same command goes on from there"
      )
    logging.warning(
      "%s: the save at step %d failed (%s): training goes on and saves at the next "
      "turn, %d more failures in a row end it; %s",
      *(self.folder, step, fault, self._limit - self._failed, newest),
    )

  def _unwritable(self) -> str | None:
    """Why process 0 cannot make folders; all must call it.

    It makes them for all, which would wait for it without an end.
    """
    if jax.process_count() == 1:
      return None
    place = self.folder / f"probe{_PARTIAL.strip('*')}"

    def probe():
      place.mkdir(parents=True, exist_ok=True)
      (place / "file").write_text("x" * 4096)
      place.rmtree()

    return _of_any(_fault_of(probe) if jax.process_index() == 0 else None)

  def _remove_partial(self) -> None:
    """Removes what a failed save has left; a store may need more than one turn."""
    for turn in range(5):
      faults = [_fault_of(path.rmtree) for path in self.folder.glob(_PARTIAL)]
      if not any(faults):
        return
      time.sleep(0.1 * 2**turn)
    logging.warning("%s: a failed save cannot be removed (%s)", self.folder, faults[0])

  # --- restoring

  def restore(self, step: int, abstract_state) -> tuple:
    """(state, host) of a step, placed as the ShapeDtypeStructs of abstract_state say.

    Raises:
      DamagedError: if it is not what was saved.
      ValueError: naming the folder, if it holds other params than these: then also the
        first that differs, with both shapes. If it cannot be read for other reasons.
    """
    folder = self.folder / str(step)
    sealed = self._sealed(step)
    saved = sealed["arrays"]
    if saved is None:
      logging.info("%s is of a version without checksums: not checked", folder)
      found = self._attempt(step, lambda: self._shapes_on_disk(folder))
      _compare(folder, found, _shapes(abstract_state))
    else:
      shapes = {name: row[:2] for name, row in saved.items()}
      _compare(folder, shapes, checksums.described(abstract_state))
    state = self._attempt(
      step,
      lambda: self._states.restore(
        folder / "state", args=ocp.args.StandardRestore(abstract_state)
      ),
    )
    if saved is not None:
      fault = checksums.difference(saved, checksums.of_tree(state))
      if fault := _of_any(fault):
        raise DamagedError(folder, step, fault)
    return state, sealed["host"]

  def host(self, step: int) -> dict:
    """The JSON-able dict of a step. Raises as `restore`."""
    return self._sealed(step)["host"]

  def _sealed(self, step) -> dict:
    return self._attempt(step, lambda: read_sealed(self.folder / str(step), step))

  def _attempt(self, step, read):
    """Result of a function that reads; all processes raise if it fails on any."""
    value, error = None, None
    try:
      value = read()
    except Exception as caught:  # noqa: BLE001 (Orbax raises what its backends raise)
      error = caught
    said = None if error is None else [_is_damage(error), checksums.one_line(error)]
    if said := _of_any(said):
      folder = self.folder / str(step)
      if said[0]:
        raise DamagedError(folder, step, said[1]) from error
      raise ValueError(f"{folder}: cannot be read now ({said[1]})") from error
    return value

  def _shapes_on_disk(self, folder) -> dict[str, list]:
    shapes = _shapes(self._states.metadata(folder / "state"))
    if not shapes:
      raise FileNotFoundError("no metadata of the state")
    return shapes

  def _scores(self) -> dict[int, float]:
    """Scores of the checkpoints that are there and whole."""
    scores = {}
    for step in self.steps():
      try:
        score = self._sealed(step)["score"]
      except ValueError:
        continue  # whoever goes on from it will say so
      if score is not None and math.isfinite(score):
        scores[step] = score
    return scores

  # --- moving and deleting

  def set_aside(self, step: int) -> epath.Path:
    """Moves a damaged checkpoint to where `set_aside_steps` finds it; that folder."""
    place = self.folder.parent / "damaged" / str(step)
    count = 0
    while place.exists():
      count += 1
      place = place.with_name(f"{step}-{count}")
    sharding.sync("set aside")  # all have looked
    if jax.process_index() == 0:
      place.parent.mkdir(parents=True, exist_ok=True)
      (self.folder / str(step)).rename(place)
    sharding.sync("was set aside")
    self._manager.reload()
    return place

  def set_aside_in(self) -> epath.Path | None:
    """Folder of what `set_aside` has moved; None if it never has."""
    folder = self.folder.parent / "damaged"
    return folder if folder.exists() and any(folder.iterdir()) else None

  def delete_after(self, step: int) -> None:
    """Deletes the checkpoints of later steps, if there are any."""
    for later in self.steps():
      if later > step:
        self._manager.delete(later)
        self._lowest.scores.pop(later, None)


class _LowestScore(ocp.checkpoint_managers.PreservationPolicy):
  """Preserves the checkpoint with the lowest score, the newest of equal ones."""

  def __init__(self) -> None:
    self.scores: dict[int, float] = {}

  def should_preserve(self, checkpoints, *, context):
    """Which of them is the best."""
    del context
    steps = [info.step for info in checkpoints]
    scored = [step for step in steps if step in self.scores]
    best = min(scored, key=lambda step: (self.scores[step], -step), default=None)
    return [step == best for step in steps]


def steps_in(folder) -> list[int]:
  """Steps of the complete checkpoints in a folder, ascending; it need not exist.

  Unlike `Checkpoints` this changes nothing there, and one process may ask alone.
  """
  return sorted(ocp.utils.checkpoint_steps(epath.Path(folder).absolute()))


def read_sealed(folder: epath.Path, step: int) -> dict:
  """{"arrays", "host", "score"} of a checkpoint's folder; arrays are `checksums` rows.

  They are None for a checkpoint of a version without checksums.

  Raises:
    ValueError: if that is damaged, or of another step.
    OSError: if it is not there.
  """
  found = json.loads((folder / "host" / "metadata").read_text())
  if not isinstance(found, dict):
    raise ValueError(f"host/metadata is no object but {type(found).__name__}")
  if not found.keys() & _SEALED:
    return {"arrays": None, "host": found, "score": None}
  if found.keys() != _SEALED or not checksums.is_whole(found):
    raise ValueError("host/metadata is not what was saved")
  if found["step"] != step:
    raise ValueError(f"it is of step {found['step']}")
  return found


def _made_late(handler):
  """A handler of JSON that gets a function; its thread calls it for the values."""
  write = handler._save_fn

  async def save(make, directory):
    await write(make(), directory)

  handler._save_fn = save
  return handler


def _fault_of(call) -> str | None:
  """Why a call of Orbax failed, in one line; None if it did not."""
  try:
    call()
  except Exception as error:  # noqa: BLE001 (it raises whatever its backends raise)
    return checksums.one_line(error)
  return None


def _of_any(fault):
  """The fault of the first process that has one; None if none has. All must call it.

  One that a process has of its own, if there is any.
  """
  faults = [fault for fault in hosts.gather(fault) if fault is not None]
  own = [fault for fault in faults if ElsewhereError.__name__ not in str(fault)]
  return next(iter(own or faults), None)


def _is_damage(error: Exception) -> bool:
  said = str(error)
  return not (
    isinstance(error, (MemoryError, PermissionError, jax.errors.JaxRuntimeError))
    or any(word in said for word in _NO_DAMAGE)
  )


def _shapes(tree) -> dict[str, list]:
  """[shape] by path, of what may hold more than arrays."""
  leaves = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=lambda leaf: hasattr(leaf, "shape")
  )
  return {
    checksums.path_of(path): [list(leaf.shape)]
    for path, leaf in leaves
    if hasattr(leaf, "shape")
  }


def _compare(folder, saved: dict[str, list], wanted: dict[str, list]) -> None:
  """Raises ValueError for the first array that has another shape, or another dtype."""
  # Params first: a difference in the optimizer state mostly follows from theirs.
  names = sorted(saved | wanted, key=lambda name: (not name.startswith("params"), name))
  for name in names:
    ours, theirs = wanted.get(name), saved.get(name)
    if ours == theirs:
      continue
    what = ["shape", "dtype"][bool(ours and theirs and ours[0] == theirs[0])]
    shown = [_shown(row, what) for row in (theirs, ours)]
    raise ValueError(
      f"{folder}: {name} has {what} {shown[0]} in the checkpoint, {shown[1]} by the "
      "config; use the config of the checkpoint or another workdir"
    )


def _shown(row, what) -> str:
  if row is None:
    return "none (missing)"
  return str(tuple(row[0]) if what == "shape" else row[1])
