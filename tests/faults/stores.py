"""Faults of where a run is kept: full, read-only, slow, gone; and of clips in it.

Folders of their own are mounted for some, which only root may do on Linux: others are
told that those rows were left out.
"""

import contextlib
import pathlib
import shutil
import subprocess
import sys

import msgpack
import numpy as np
import tiny
from array_record.python import array_record_module
from faults.catalogue import fault
from faults.runs import ALL, Followed, Outcome

from sora_jax.data import records

_ROOM = 400 * 1024  # bytes: for a log, and for half of a checkpoint
_SLOW = pathlib.Path(__file__).with_name("slow_store.c")


@contextlib.contextmanager
def mounted(folder: pathlib.Path):
  """A small file system of its own in memory; yields None where none can be made."""
  folder.mkdir(exist_ok=True)
  made = not subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True
  ).returncode
  try:
    yield folder if made else None
  finally:
    if made:
      subprocess.run(["umount", "-l", folder], check=True)


def _remount(folder, options):
  subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def _left_out(what):
  sys.stderr.write(f"{what}: left out, as nothing can be mounted here\n")


@fault
def disk_full(runs, tries):
  """A save finds no room: training goes on; it ends after so many, in one line."""
  del tries
  for again in (True, False):
    with mounted(runs.folder / "small") as folder:
      if folder is None:
        _left_out("disk full")
        return
      work = folder / "run"
      shutil.copytree(runs.cut, work)
      reached = max(row["step"] for row in tiny.rows(work / "dit/metrics.jsonl"))
      _remount(folder, f"size={shutil.disk_usage(folder).used + _ROOM}")
      followed = Followed(runs.start(work))
      said = followed.wait("the save at step")
      if again:
        _remount(folder, "size=64m")
      code, log = followed.end()
      outcome = runs.outcome(work, code, runs.keep(log), reached)
      outcome.said = said
      yield ("disk full for a save" if again else "disk full"), outcome
      if not again:
        _remount(folder, "size=64m")
        yield "disk full, room, typed again", runs.go_on(work)


@fault
def read_only(runs, tries):
  """The folder of a run cannot be written."""
  del tries
  with mounted(runs.folder / "small") as folder:
    if folder is None:
      _left_out("read-only")
      return
    shutil.copytree(runs.cut, folder / "run")
    _remount(folder, "ro")
    yield "read-only workdir", runs.go_on(folder / "run")


@fault
def slow_store(runs, tries):
  """Files take 0.3 s to open for writing, to reach the disk and to be renamed."""
  del tries
  shared = runs.folder / "slow_store.so"
  compiled = subprocess.run(
    ["cc", "-shared", "-fPIC", "-O1", "-o", shared, _SLOW, "-ldl"], capture_output=True
  )
  if compiled.returncode:
    sys.stderr.write("slow store: left out, as there is no C compiler\n")
    return
  work = runs.copy(runs.cut)
  extra = {"LD_PRELOAD": str(shared), "SLOW_STORE": str(work / "dit" / "checkpoints")}
  yield "slow store", runs.go_on(work, extra=extra)


@fault
def media_gone(runs, tries):
  """The media are gone before, and while, the VAE trains: no model is to be saved."""
  del tries
  for running in (False, True):
    work = runs.copy(runs.whole)
    for stage in ("vae", "encode", "dit"):
      shutil.rmtree(work / stage)
    media, away = work / "data" / "shapes", work / "away"
    flags = ("--config.vae.train.steps=2000", "--config.vae.train.eval_every=0")
    if not running:
      media.rename(away)
    followed = Followed(runs.start(work, ALL, flags))
    if running:
      followed.wait("step 2/2000")
      media.rename(away)
    code, log = followed.end()
    runs.keep(log)
    made = (work / "vae" / "model").exists()
    refused = code == 1 and "Traceback" not in log
    name = f"all media gone {'while' if running else 'before'} the VAE trains"
    yield name, Outcome(made, refused, equal=not made, note=f"code {code}")


@fault
def infinite_latent(runs, tries):
  """The latent of one clip is infinite: its updates are left out, and it is named."""
  del tries
  work = runs.without_dit()
  clip = next(
    clip
    for clip in records.read_latents_manifest(str(work / "encode" / "latents.jsonl"))
    if clip.split == "train"
  )
  path = work / "encode" / clip.shard
  make_infinite(path, clip.index)
  leave = f"--config.data.leave_out=('{clip.id}',)"
  for name, flags in (("an infinite latent", ()), ("..., left out", (leave,))):
    code, log = Followed(runs.start(work, flags=flags)).end()
    outcome = runs.outcome(work, code, runs.keep(log))
    # With a clip less the params are others.
    outcome.equal, outcome.said = None, bool(flags) or repr(clip.id) in log
    outcome.note = f"{log.count('is left out')} updates left out"
    yield name, outcome


def make_infinite(path, index) -> None:
  """Rewrites a shard of latents, that of one record being infinite."""
  reader = array_record_module.ArrayRecordReader(str(path))
  packed = reader.read_all()
  reader.close()
  record = msgpack.unpackb(packed[index])
  size = len(record["latent"]["data"]) // 2
  record["latent"]["data"] = np.full(size, np.inf, np.float16).tobytes()
  packed[index] = msgpack.packb(record)
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
  for item in packed:
    writer.write(item)
  writer.close()
