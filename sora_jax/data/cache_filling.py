"""Fills a cache of clips (`pixel_cache`) with all cores, before training begins.

Files are decoded in processes of their own, by `python -m sora_jax.data.cache_filling`:
a file that kills its decoder is left out with the reason, and the rest goes on. They
share nothing with the process that starts them, so nothing that it has imported, or
its main script, is run again.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from absl import logging

from sora_jax.data import pixel_cache
from sora_jax.data.clips import Clip, clip_of_row
from sora_jax.data.pixel_cache import PixelCache, Shard
from sora_jax.runtime import limits

_SHARDS_AT_ONCE = 4  # of a process: starting one takes half a second
_SHARE = 0.5  # of the free disk that "auto" takes at most
_ROOT = str(pathlib.Path(__file__).absolute().parents[2])


def choose(
  setting: str,
  clips: Sequence[Clip],
  indices: Sequence[int],
  folder: str | os.PathLike,
  *,
  visits: int,
  generated: bool,
) -> str | None:
  """The codec of the cache that a training is to read; None = it reads files.

  "auto" is what changes no pixel: raw frames or none. None, where clips are read once
  or hardly more often, where they were generated at training size, or where the disk
  has no room or may not be written, such as another user's; the log says so.

  Args:
    setting: "auto", "none", or a codec.
    clips, indices, folder: as of `pixel_cache.plan`.
    visits: of clips in the whole training.
    generated: whether clips were written at training size, and are quick to decode.
  """
  if setting == "none":
    return None
  if setting != "auto":
    return setting
  if generated or visits < 2 * len(indices):
    return None
  shards = pixel_cache.plan(clips, indices, folder, "raw")
  if not pixel_cache.can_be_written(shards, folder):
    logging.warning(
      "no cache of clips: %s cannot be written, so that files are decoded at each "
      "visit",
      folder,
    )
    return None
  if pixel_cache.fits(shards, folder, _SHARE):
    return "raw"
  needed = sum(pixel_cache.raw_bytes(clips[index]) for index in indices)
  logging.warning(
    "no cache of clips: raw frames take %.1f GB, more than half of the %.1f GB that "
    'are free at %s, so that files are decoded at each visit; config.data.cache "h264" '
    "takes about a tenth",
    needed / 1e9, pixel_cache.free_space(folder) / 1e9, folder,
  )  # fmt: skip
  return None


def fill(
  shards: Sequence[Shard],
  folder: str | os.PathLike,
  *,
  processes: int,
  watch: Callable = lambda items, *_: items,
) -> int:
  """Makes the shards that are missing or damaged; returns how many.

  Args:
    shards: of this host.
    folder: of the cache.
    processes: that decode; 0 = this one, which a file may then kill.
    watch: as `runtime.progress.track`.

  Raises:
    ValueError: raw frames do not fit onto the disk.
    OSError: a shard could not be written.
  """
  missing = [shard for shard in shards if not pixel_cache.is_complete(shard)]
  pixel_cache.check_space(missing, folder)
  if not missing:
    return 0
  if not processes:
    for shard in watch(missing, "cached", "shards of clips"):
      pixel_cache.write_shard(shard)
    return len(missing)
  # Small parts at first: the last one must not keep the other cores waiting.
  some = max(1, min(_SHARDS_AT_ONCE, len(missing) // (4 * processes)))
  parts = [missing[i : i + some] for i in range(0, len(missing), some)]
  with ThreadPoolExecutor(processes) as pool:
    futures = [pool.submit(_write_apart, part) for part in parts]
    try:
      for future in watch(futures, "cached", f"parts of {some} shards of clips"):
        future.result()
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  return len(missing)


def open_cache(
  shards: Sequence[Shard],
  max_unreadable: float = 1.0,
  leave_out: Collection[str] = (),
) -> PixelCache:
  """The filled cache; logs its size and what is left out of it.

  Raises:
    UnreadableError: if more than a share `max_unreadable` of its clips, without those
      of the ids `leave_out`, could not be read.
  """
  cache = PixelCache(shards)
  _check_readable(cache, shards, max_unreadable, leave_out)
  logging.info(
    "%d clips at training size in %d shards (%s, %.2f GB) of %s; %d could not be read",
    sum(len(shard.clips) for shard in shards), len(shards), cache.codec,
    sum(os.path.getsize(shard.path) for shard in shards) / 1e9,
    os.path.dirname(shards[0].path), len(cache.reasons),
  )  # fmt: skip
  return cache


def _check_readable(cache, shards, most, leave_out):
  rows = [row for s in shards for row in zip(s.indices, s.clips, strict=True)]
  wanted = {index: clip.id for index, clip in rows if clip.id not in leave_out}
  bad = [index for index in cache.reasons if index in wanted]
  if limits.too_many(len(bad), len(wanted), most):
    raise limits.UnreadableError(
      f"{len(bad)} of {len(wanted)} clips to train on could not be read, more than "
      f"config.data.max_unreadable {most:g}; the first is {wanted[bad[0]]!r}: "
      f"{cache.reasons[bad[0]]}. Is the disk with the files there? Files that are back "
      f"or have changed are read again, others after {os.path.dirname(shards[0].path)} "
      "is deleted"
    )


def _write_apart(shards):
  """Writes shards in a process; begins again without a clip that kills it."""
  left_out: dict[str, str] = {}
  todo = list(shards)
  while todo:
    code, log = _start(todo, left_out)
    if not code:
      return
    todo = [shard for shard in todo if not os.path.exists(shard.path)]
    stopped = code in (-signal.SIGTERM, -signal.SIGINT)
    if code > 0 or stopped or not todo:
      raise OSError(f"cannot write the cache of clips (exit code {code}): {log}")
    note = pixel_cache.note_path(todo[0].path)
    clip = note.read_text(encoding="utf-8") if note.exists() else ""
    if not clip or clip in left_out:
      raise OSError(f"{todo[0].path}: its process died (exit code {code}): {log}")
    left_out[clip] = f"its decoder died ({signal.Signals(-code).name})"
    logging.warning("left out clip %s of the cache: %s", clip, left_out[clip])


def _start(shards, left_out):
  """Runs a process that writes the shards: (exit code, what it said last)."""
  paths = [_ROOT, os.environ.get("PYTHONPATH", "")]
  done = subprocess.run(
    [sys.executable, "-m", "sora_jax.data.cache_filling"],
    input=_packed(shards, left_out),
    stderr=subprocess.PIPE,
    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    check=False,
  )
  return done.returncode, done.stderr.decode(errors="replace").strip()[-1000:]


def _packed(shards, left_out) -> bytes:
  return json.dumps([[dataclasses.asdict(s) for s in shards], left_out]).encode()


def _unpacked(text: bytes) -> tuple[list[Shard], dict[str, str]]:
  """What `_packed` was given; JSON has no tuples."""
  rows, left_out = json.loads(text)
  return [_shard(row) for row in rows], left_out


def _shard(row) -> Shard:
  clips = tuple(clip_of_row(clip) for clip in row["clips"])
  return Shard(row["path"], row["codec"], tuple(row["indices"]), clips)


def serve() -> None:
  """Writes the shards that standard input holds, as `_start` has written them."""
  shards, left_out = _unpacked(sys.stdin.buffer.read())
  for shard in shards:
    pixel_cache.write_shard(shard, left_out)


if __name__ == "__main__":
  serve()
