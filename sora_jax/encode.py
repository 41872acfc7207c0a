"""Stage "encode": VAE over the manifest -> latent shards and a manifest of latents.

  python -m sora_jax.encode --config=configs/quickstart.py

Clips are grouped by frame size, and each group by length, so that the number of
compiled shapes is bounded. Padding in time is exact: the VAE is causal, so the latents
of a clip do not depend on frames behind its end.
"""

import contextlib
import functools
import pathlib

import jax
import numpy as np
from absl import logging

from sora_jax.data import records
from sora_jax.data.bad_clips import BadClips, report_bad_clips
from sora_jax.data.buckets import frame_bucket, limit_sizes, plan_shards
from sora_jax.data.clip_reader import read_clip
from sora_jax.data.clips import read_manifest
from sora_jax.data.records import EMPTY_TEXT
from sora_jax.encoders.autoencoder import Autoencoder
from sora_jax.encoders.text_encoder import FrozenTextEncoder
from sora_jax.packing import time_grid
from sora_jax.run import build, cli
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding
from sora_jax.runtime.prefetch import ahead
from sora_jax.runtime.progress import Progress


def run(recipe: recipes.Recipe, workdir) -> None:
  """Writes workdir/encode/{latents-*.array_record, latents.jsonl}; resumes by shard.

  With config.text.folder, records hold the features of captions as well, and those of
  the empty one are in workdir/encode/empty_text.msgpack.

  Raises:
    ValueError: if no clip of a split could be read, or another text encoder made the
      features that are there.
  """
  workdir = pathlib.Path(workdir)
  folder = workdir / "encode"
  clips = read_manifest(workdir / "data" / "manifest.jsonl")
  # Encoding is local to a process: each encodes its own shards on its own devices.
  mesh = build.clip_mesh(recipe.encode)
  autoencoder = Autoencoder(workdir / "vae" / "model", mesh, recipe.dtype)
  encode_text = _text_encoder(recipe, folder, mesh)
  sized = limit_sizes(clips, recipe.encode.max_sizes)
  shards = plan_shards(sized, recipe.encode.clips_per_shard)
  bad_clips = BadClips(folder)
  mine = list(enumerate(shards))[jax.process_index() :: jax.process_count()]
  total = sum(len(shard) for _, shard in mine)
  with Progress("encoded", total, "clips", jax.process_index()) as progress:
    for number, shard in mine:
      path = folder / f"latents-{number:05d}-of-{len(shards):05d}.array_record"
      if path.exists():
        progress.skip(len(shard))
        continue
      encoded = encode_clips(
        shard, autoencoder, recipe.encode, recipe.seed, bad_clips, encode_text
      )
      records.write_shard(str(path), encoded)
      progress.advance(len(shard), f"shard {number + 1} of {len(shards)}")
  sharding.sync("encode")
  if jax.process_index() == 0:
    _write_manifest(folder, len(shards))
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


def _write_manifest(folder, count):
  latents = []
  for number in range(count):
    name = f"latents-{number:05d}-of-{count:05d}.array_record"
    latents += records.read_shard_clips(str(folder / name))
  for split in ("train", "heldout"):
    if not any(clip.split == split for clip in latents):
      raise ValueError(
        f"{folder}: no clip of split {split!r} could be encoded; see bad_clips.jsonl"
      )
  latents.sort(key=lambda clip: clip.id)
  records.write_latents_manifest(str(folder / "latents.jsonl"), latents)
  logging.info("%s: %d clips", folder / "latents.jsonl", len(latents))


def encode_clips(
  clips, autoencoder, config: recipes.Encode, seed, bad_clips, encode_text=None
):
  """Yields a record (see `records.write_shard`) of each clip that can be read.

  encode_text: captions -> features; without it, records have none.
  """
  texts = {}
  if encode_text:
    captions = sorted({caption for clip in clips for caption in clip.captions})
    texts = dict(zip(captions, encode_text(captions), strict=True))
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
      if not read:
        continue
      for record in _encode_batch(read, frames, batch_size, autoencoder, config, seed):
        if encode_text:
          record["texts"] = [texts[caption] for caption in record["captions"]]
        yield record


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
  return read


def _encode_batch(read, frames, batch_size, autoencoder, config, seed):
  videos = np.stack([_pad_time(v, frames) for _, v in read])
  latents = autoencoder.encode(_pad_rows(videos, batch_size))
  extras = [_extra_frames(clip, config.extras, seed) for clip, _ in read]
  images = [v[f : f + 1] for (_, v), fs in zip(read, extras, strict=True) for f in fs]
  image_latents = []
  for i in range(0, len(images), batch_size):
    part = _pad_rows(np.stack(images[i : i + batch_size]), batch_size)
    image_latents += list(autoencoder.encode(part)[: len(images) - i, 0])
  image_latents = iter(image_latents)
  for (clip, video_THWC), latent, chosen in zip(read, latents, extras, strict=False):
    t, h, w = autoencoder.config.latent_shape(*video_THWC.shape[:3])
    kept = [next(image_latents) for _ in chosen]
    yield {
      "id": clip.id,
      "latent_THWC": latent[:t],
      "extras_NHWC": np.stack(kept) if kept else np.zeros((0, *latent.shape[1:])),
      "extras": tuple(time_grid.time_of(frame) for frame in chosen),
      "fps": clip.fps,
      "captions": clip.captions,
      "split": clip.split,
      "frames": clip.frames,
      "height": clip.height,
      "width": clip.width,
      "truth": clip.truth,
    }


def _extra_frames(clip, count, seed):
  """Frames of a video kept as images; the first one is a latent of its own anyway."""
  if clip.frames == 1:
    return []
  rng = np.random.default_rng([seed, *clip.id.encode()])
  chosen = rng.permutation(np.arange(1, clip.frames))[:count]
  return sorted(int(frame) for frame in chosen)


def _pad_time(video_THWC, frames):
  missing = frames - len(video_THWC)
  return np.pad(video_THWC, ((0, missing), (0, 0), (0, 0), (0, 0)), mode="edge")


def _pad_rows(x, rows):
  return np.concatenate([x, np.repeat(x[:1], rows - len(x), axis=0)])


if __name__ == "__main__":
  cli.command("encode")
