"""Stage "encode": VAE over the manifest -> latent shards and a manifest of latents.

  python -m sora_jax.encode --config=configs/quickstart.py

Clips are grouped by frame size, and each group by length, so that the number of
compiled shapes is bounded. Padding in time is exact: the VAE is causal, so the latents
of a clip do not depend on frames behind its end.
"""

import contextlib
import functools
import itertools
import pathlib
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from sora_jax.data import presence, records
from sora_jax.data.bad_clips import BadClips, report_bad_clips
from sora_jax.data.buckets import at_budget, frame_bucket, limit_sizes, plan_shards
from sora_jax.data.clip_reader import read_clip, stream_clip
from sora_jax.data.clips import read_manifest
from sora_jax.data.records import EMPTY_TEXT
from sora_jax.encoders.autoencoder import Autoencoder
from sora_jax.encoders.text_encoder import FrozenTextEncoder
from sora_jax.packing import time_grid
from sora_jax.run import build, cli, latent_shards
from sora_jax.run import recipe as recipes
from sora_jax.run.given_frames import GivenFrames
from sora_jax.runtime import hosts, limits, sharding
from sora_jax.runtime.limits import UnreadableError
from sora_jax.runtime.prefetch import ahead
from sora_jax.runtime.progress import Progress


def run(recipe: recipes.Recipe, workdir) -> None:
  """Writes workdir/encode/{latents-*.array_record, latents.jsonl, shards.json}.

  Resumes by shard: those that are there stay, unless they are not as they were written.

  With config.text.folder, records hold the features of captions as well, and those of
  the empty one are in workdir/encode/empty_text.msgpack.

  Raises:
    ValueError: if no clip of a split could be read, or another VAE or text encoder
      made what is there.
    UnreadableError: if more than config.data.max_unreadable could not be read. Shards
      that lack far more than that are removed, for the next start to make.
  """
  workdir, data = pathlib.Path(workdir), recipe.data
  folder = workdir / "encode"
  clips = read_manifest(workdir / "data" / "manifest.jsonl")
  presence.check_left_out(data.leave_out, {clip.id for clip in clips})
  presence.check_media(clips)
  # Encoding is local to a process: each encodes its own shards on its own devices.
  mesh = build.clip_mesh(recipe.encode)
  autoencoder = Autoencoder(workdir / "vae" / "model", mesh, recipe.dtype)
  encode_text = _text_encoder(recipe, folder, mesh)
  given = None
  if recipe.dit.model.condition_channels:
    given = GivenFrames(recipe, autoencoder, mesh)
  shards, vae = _plan(clips, recipe), autoencoder.meta.id
  # Before any shard is made; all processes look at the same folder.
  done = (folder / latent_shards.NAME).exists()
  lost = latent_shards.lost(folder) if done else {}
  listed = latent_shards.read(folder)
  sharding.sync("lost shards")
  mine = list(enumerate(shards))[jax.process_index() :: jax.process_count()]
  total = sum(len(shard) for _, (_, shard) in mine)
  bad_clips = BadClips(folder, total, data.max_unreadable)
  hollow: list[pathlib.Path] = []
  described = []
  with Progress("encoded", total, "clips", jax.process_index()) as progress:
    for number, (budget, shard) in mine:
      path = folder / _name(number, len(shards))
      if path.exists() and path.name not in lost:
        records.check_shard_vae(str(path), vae)
        described.append(latent_shards.described(path, listed))
        progress.skip(len(shard))
        continue
      encoded = encode_clips(
        shard, autoencoder, recipe.encode, recipe.seed, bad_clips, encode_text, given
      )
      encoded = ({**record, "budget": budget} for record in encoded)
      try:
        written = records.write_shard(str(path), encoded, vae)
      except UnreadableError:
        _remove(hollow)
        raise
      if _is_hollow(shard, len(written), data.max_unreadable):
        hollow.append(path)
      described.append(latent_shards.describe(path))
      progress.advance(len(shard), f"shard {number + 1} of {len(shards)}")
  described = sum(hosts.gather(described), [])
  if jax.process_index() == 0:
    latent_shards.write(folder, described)
    _write_manifest(folder, [shard for _, shard in shards], data.max_unreadable, vae)
  report_bad_clips(folder, len(clips))
  sharding.sync("encode manifest")


def _text_encoder(recipe, folder, mesh):
  """Captions -> features, or None."""
  config = recipe.text
  if not config.folder:
    return None
  encoder = FrozenTextEncoder(config.folder, mesh, recipe.dtype)
  path = folder / EMPTY_TEXT
  # Shards of an earlier start may be there already.
  if path.exists() and records.read_empty_text(path).encoder != encoder.id:
    raise ValueError(
      f"{folder} has features of another text encoder than the one in {config.folder} "
      f"now ({encoder.id}); delete {folder} to make them again"
    )
  sharding.sync("text encoder")
  if jax.process_index() == 0:
    (empty_SE,) = encoder.encode([""], config.max_tokens)
    records.write_empty_text(path, records.EmptyText(empty_SE, encoder.id))
  return functools.partial(encoder.encode, max_tokens=config.max_tokens)


def _plan(clips, recipe) -> list[tuple[int, list]]:
  """(index of the budget, clips) of each shard; without budgets there is one, 0."""
  config, data = recipe.encode, recipe.data
  shards = []
  for number, budget in enumerate(config.budgets or (None,)):
    sized = clips
    if budget:
      pixels, frames = budget
      sized = at_budget(clips, pixels, frames, data.size_multiple, recipe.seed)
    sized = limit_sizes(sized, config.max_sizes)
    for shard in plan_shards(sized, config.clips_per_shard):
      # What is left out keeps its place: shards of an earlier start stay right.
      kept = [clip for clip in shard if clip.id not in data.leave_out]
      shards.append((number, kept))
  return shards


def _name(number, count):
  return f"latents-{number:05d}-of-{count:05d}.array_record"


def _is_hollow(shard, found, max_unreadable) -> bool:
  """Whether a shard lacks far more of its clips than others may: the disk was gone."""
  return len(shard) - found > min(0.5, 3 * max_unreadable) * len(shard)


def _remove(hollow):
  """Removes hollow shards, so that the next start makes them."""
  for path in hollow:
    logging.warning("%s: removed, as it lacks too many of its clips", path)
    path.unlink(missing_ok=True)


def _write_manifest(folder, shards, max_unreadable, vae):
  """Writes what is in the shards; UnreadableError if that is too little, see `run`."""
  latents, hollow = [], []
  for number, shard in enumerate(shards):
    path = folder / _name(number, len(shards))
    found = records.read_shard_clips(str(path), vae)
    latents += found
    if _is_hollow(shard, len(found), max_unreadable):
      hollow.append(path)
  wanted = {clip.id for shard in shards for clip in shard}
  lost = len(wanted - {clip.id for clip in latents})
  if limits.too_many(lost, len(wanted), max_unreadable):
    _remove(hollow)
    raise UnreadableError(
      f"{folder}: {lost} of {len(wanted)} clips could not be read, more than "
      f"config.data.max_unreadable {max_unreadable:g}; bad_clips.jsonl says why"
    )
  for split in ("train", "heldout"):
    if not any(clip.split == split for clip in latents):
      raise ValueError(
        f"{folder}: no clip of split {split!r} could be encoded; see bad_clips.jsonl"
      )
  latents.sort(key=lambda clip: (clip.budget, clip.id))
  records.write_latents_manifest(str(folder / "latents.jsonl"), latents)
  logging.info("%s: %d clips", folder / "latents.jsonl", len(latents))


def encode_clips(
  clips,
  autoencoder,
  config: recipes.Encode,
  seed,
  bad_clips,
  encode_text=None,
  given: GivenFrames | None = None,
):
  """Yields a record (see `records.write_shard`) of each clip that can be read.

  encode_text: captions -> features; without it, records have none.
  given: of a model that reads given frames beside the noise.
  """
  texts, by_id = {}, {clip.id: clip for clip in clips}
  if encode_text:
    captions = sorted({text for clip in clips for text in clip.training_captions})
    texts = dict(zip(captions, encode_text(captions), strict=True))
  long = [clip for clip in clips if clip.frames > config.stream_frames + 1]
  short = [clip for clip in clips if clip.frames <= config.stream_frames + 1]
  wanted = _Wanted(config.extras, seed, given)
  for record, ends in itertools.chain(
    _encode_short(short, autoencoder, config, wanted, bad_clips),
    _encode_long(long, autoencoder, config, wanted, bad_clips),
  ):
    if encode_text:
      record["texts"] = [texts[caption] for caption in record["captions"]]
    if given:
      record |= given.encode(by_id[record["id"]], ends)
    yield record


class _Wanted:
  """Which frames of clips are needed beside their latents, for both kinds of records.

  extras: how many become images, by `seed`. given: says which are given to the model.
  """

  def __init__(self, extras: int, seed: int, given: GivenFrames | None):
    self._extras, self._seed, self._given = extras, seed, given

  def images(self, clip) -> list[int]:
    """Frames that are kept as images; a clip's first has a latent of its own anyway.

    Half of them at least are the last of their latent frames, as the first frame of a
    given end is; of an odd number, one more in half of the clips.
    """
    if clip.frames == 1:
      return []
    rng = np.random.default_rng([self._seed, *clip.id.encode()])
    frames = [int(frame) for frame in rng.permutation(np.arange(1, clip.frames))]
    half = (self._extras + int(rng.integers(2))) // 2
    ends = [frame for frame in frames if time_grid.is_last_of_latent(frame)][:half]
    others = [frame for frame in frames if frame not in ends]
    return sorted(ends + others[: self._extras - len(ends)])

  def given(self, clip) -> set[int]:
    """Frames that the model is given."""
    return self._given.frames(clip.frames) if self._given else set()


class _Frames(NamedTuple):
  """Frames of a clip by their index: those that become images, and given ones."""

  images: dict[int, np.ndarray]
  given: dict[int, np.ndarray]


def _encode_short(clips, autoencoder, config, wanted, bad_clips):
  """Records and given frames of clips that are encoded whole, padded to few lengths."""
  batch_size = autoencoder.batch_size(config.batch_size)
  groups: dict[tuple[int, int, int], list] = {}
  for clip in clips:
    frames = frame_bucket(clip.frames, config.frame_buckets)
    key = (frames, clip.height, clip.width)
    groups.setdefault(key, []).append(clip)
  batches = (
    (key[0], _read(group[i : i + batch_size], bad_clips))
    for key, group in groups.items()
    for i in range(0, len(group), batch_size)
  )
  # A thread decodes the next batch while this one is encoded.
  with contextlib.closing(ahead(batches, 1)) as decoded:
    for frames, read in decoded:
      if read:
        yield from _encode_batch(read, frames, batch_size, autoencoder, wanted)


def _read(batch, bad_clips):
  read = []
  for clip in batch:
    try:
      video_THWC = read_clip(clip)
    # A file can break in more ways than the decoder names; none of them ends a run.
    except (ValueError, RuntimeError, OSError) as error:
      bad_clips.add(clip.id, getattr(error, "reason", str(error)))
      continue
    read.append((clip, video_THWC))
  bad_clips.tried(len(batch))
  return read


def _encode_batch(read, frames, batch_size, autoencoder, wanted):
  videos = np.stack([_pad_time(v, frames) for _, v in read])
  latents = autoencoder.encode(_pad_rows(videos, batch_size))
  kept = [
    _Frames(
      {at: video_THWC[at] for at in wanted.images(clip)},
      {at: video_THWC[at] for at in wanted.given(clip)},
    )
    for clip, video_THWC in read
  ]
  clips = [clip for clip, _ in read]
  yield from _records(clips, latents, kept, autoencoder, batch_size)


def _encode_long(clips, autoencoder, config, wanted, bad_clips):
  """Records and given frames of clips that are encoded part by part, in flat memory.

  Clips of one size go side by side, those of like length together; their frames are
  never in memory at once, and two programs are compiled for a size, for all lengths.
  """
  rows = autoencoder.batch_size(config.batch_size)
  clips = sorted(clips, key=lambda c: (c.height, c.width, c.frames, c.id))
  for _, same in itertools.groupby(clips, key=lambda c: (c.height, c.width)):
    group = list(same)
    for i in range(0, len(group), rows):
      batch = group[i : i + rows]
      streams = [_ClipStream(clip, wanted, bad_clips) for clip in batch]
      chunks = _chunks(streams, config.stream_frames, rows)
      with contextlib.closing(ahead(chunks, 1)) as decoded:
        parts = [np.asarray(part) for part in autoencoder.encode_stream(decoded)]
      latents = np.concatenate(parts, axis=1)
      good = [i for i, stream in enumerate(streams) if not stream.failed]
      kept = [streams[i].kept for i in good]
      chosen = [streams[i].clip for i in good]
      yield from _records(chosen, latents[good], kept, autoencoder, rows)


class _ClipStream:
  """The frames of a clip, part by part; `kept` are those that are needed by themselves.

  failed: the clip could not be read to its end; what comes then means nothing.
  """

  def __init__(self, clip, wanted, bad_clips):
    self.clip, self.failed = clip, False
    self.kept = _Frames({}, {})
    self._wanted = (wanted.images(clip), wanted.given(clip))
    self._bad_clips, self._frames, self._at = bad_clips, stream_clip(clip), 0

  def take(self, count: int) -> np.ndarray:
    """The next frames, zeros behind the end: uint8 [count, H, W, 3]."""
    part_THWC = np.zeros((count, self.clip.height, self.clip.width, 3), np.uint8)
    try:
      for t, frame_HWC in enumerate(itertools.islice(self._frames, count)):
        part_THWC[t] = frame_HWC
        for kept, wanted in zip(self.kept, self._wanted, strict=True):
          if self._at in wanted:
            kept[self._at] = frame_HWC
        self._at += 1
    # As in `_read`.
    except (ValueError, RuntimeError, OSError) as error:
      self.failed = True
      self._bad_clips.add(self.clip.id, getattr(error, "reason", str(error)))
    return part_THWC


def _chunks(streams, size, rows):
  """Parts of 1 + size, size, size, ... frames of all clips, to the end of the longest.

  Behind the end of a clip is black, which its latents do not depend on.
  """
  longest = max(stream.clip.frames for stream in streams)
  for first in range(0, longest - 1, size):
    count = size if first else 1 + size
    parts_BTHWC = np.stack([stream.take(count) for stream in streams])
    yield _pad_rows(parts_BTHWC, rows)


def _records(clips, latents, kept, autoencoder, batch_size):
  """(record, given frames) of clips by their latents, whose ends may be padding.

  kept: `_Frames` of each clip.
  """
  images = [frame_HWC[None] for of in kept for frame_HWC in of.images.values()]
  image_latents = []
  for i in range(0, len(images), batch_size):
    part = _pad_rows(np.stack(images[i : i + batch_size]), batch_size)
    image_latents += list(autoencoder.encode(part)[: len(images) - i, 0])
  image_latents = iter(image_latents)
  for clip, latent, frames in zip(clips, latents, kept, strict=False):
    t, _, _ = autoencoder.config.latent_shape(clip.frames, clip.height, clip.width)
    extras = [next(image_latents) for _ in frames.images]
    record = {
      "id": clip.id,
      "latent_THWC": latent[:t],
      "extras_NHWC": np.stack(extras) if extras else np.zeros((0, *latent.shape[1:])),
      "extras": tuple(time_grid.time_of(frame) for frame in frames.images),
      "fps": clip.fps,
      "captions": clip.training_captions,
      "synthetic": len(clip.synthetic),
      "split": clip.split,
      "frames": clip.frames,
      "height": clip.height,
      "width": clip.width,
      "truth": clip.truth,
      "source": clip.source,
    }
    yield record, frames.given


def _pad_time(video_THWC, frames):
  missing = frames - len(video_THWC)
  return np.pad(video_THWC, ((0, missing), (0, 0), (0, 0), (0, 0)), mode="edge")


def _pad_rows(x, rows):
  return np.concatenate([x, np.repeat(x[:1], rows - len(x), axis=0)])


if __name__ == "__main__":
  cli.command("encode")
