"""Stage "captioner": trains a captioner on captions, writes workdir/captioner/model.

python -m sora_jax.train_captioner --config=configs/captioner.py

It reads pixels, and needs the stage "data" alone, or the latents of the stage "encode"
(config.captioner.input). No other stage waits for it, and `main` runs it where
config.stages names it.
"""

import dataclasses
import pathlib
import shutil
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from sora_jax.data import pixel_records, records, tokenizer
from sora_jax.data.bad_clips import report_bad_clips
from sora_jax.data.batches import Batches, first_batches
from sora_jax.data.caption_texts import StyledCaptionIds, warn_of_cut
from sora_jax.data.clips import Clip, read_manifest
from sora_jax.data.packed_dataset import Choice, PackedDataset, PackedOptions, Reader
from sora_jax.models import captioner
from sora_jax.models.meta import CaptionerMeta, VAEMeta
from sora_jax.packing.caption_styles import STYLES, styles_of
from sora_jax.run import build, cli, clip_cache, rows
from sora_jax.run import recipe as recipes
from sora_jax.runtime import checkpoint, sharding
from sora_jax.training import loop


class _Listed(NamedTuple):
  """Rows that have captions, and the whole manifest where pixels are read."""

  captioned: list[records.LatentClip]
  manifest: list[Clip]


def setup(recipe: recipes.Recipe, workdir, mesh, listed: _Listed) -> loop.Setup:
  """Task, data and cost of the stage; trains the tokenizer if it is not there yet."""
  workdir, stage = pathlib.Path(workdir), recipe.captioner
  folder = workdir / "captioner"
  clips, readers = listed.captioned, _readers(recipe, workdir, listed.manifest)
  vocabulary = folder / "tokenizer.model"
  if jax.process_index() == 0:
    rows.train_tokenizer(stage.model.vocab_size, clips, vocabulary)
  sharding.sync("tokenizer")
  texts = StyledCaptionIds(
    tokenizer.Tokenizer(str(vocabulary)), stage.max_text_tokens, stage.model.vocab_size
  )
  if jax.process_index() == 0:
    warn_of_cut(texts, clips, "config.captioner.max_text_tokens")
  options = PackedOptions(
    build.budget(stage),
    stage.patch_size,
    stage.reference_fps,
    caption_dropout=0.0,
    given_prob=0.0,
    extra_prob=0.0,
  )
  host, hosts = sharding.host_shard(mesh)
  shard = {"process_index": host, "process_count": hosts}

  def dataset(split, seed):
    choice = Choice(split, leave_out=recipe.data.leave_out)
    return PackedDataset(
      clips, readers[split], texts, options, seed, choice, str(folder)
    )

  training, heldout = dataset("train", recipe.seed), dataset("heldout", 0)
  task, rules = build.make_captioner(recipe)
  return loop.Setup(
    task=task,
    rules=rules,
    data=Batches(training, stage.rows, workers=recipe.data.workers, **shard),
    eval_batches=first_batches(heldout, stage.rows, stage.eval_batches, **shard),
    names=[clip.id for clip in clips],
    max_unreadable=recipe.data.max_unreadable,
    flops_per_step=stage.rows
    * _flops_per_row(training, stage, build.patch_width(recipe)),
    tokens_per_step=stage.rows * stage.tokens,
    units=lambda batch: int(np.count_nonzero(batch["segment_L"])),
    captioned=True,
  )


def _list(recipe, workdir) -> _Listed:
  """Reads the manifest of clips, or that of their latents.

  Raises:
    ValueError: if no training clip, or no held-out one, has a caption.
  """
  manifest: list[Clip] = []
  if recipe.captioner.input == "latents":
    listed = records.read_latents_manifest(str(workdir / "encode" / "latents.jsonl"))
  else:
    manifest = read_manifest(workdir / "data" / "manifest.jsonl")
    listed = pixel_records.pixel_clips(manifest)
  captioned = [row for row in listed if any(text.strip() for text in row.captions)]
  for split in ("train", "heldout"):
    if not any(row.split == split for row in captioned):
      raise ValueError(
        f"{workdir}: no clip of split {split!r} has a caption, which a captioner learns"
      )
  if left := len(listed) - len(captioned):
    logging.info("captioner: %d of %d clips have no caption", left, len(listed))
  return _Listed(captioned, manifest)


def _readers(recipe, workdir, clips) -> dict[str, Reader]:
  """Split -> what reads its records."""
  stage = recipe.captioner
  if stage.input == "latents":
    return {split: rows.latent_reader(workdir) for split in ("train", "heldout")}
  visits = stage.train.steps * stage.rows * stage.segments
  cache = clip_cache.training_cache(recipe, workdir, clips, visits)
  # The cache holds training clips only.
  return {
    "train": pixel_records.PixelReader(clips, cache),
    "heldout": pixel_records.PixelReader(clips),
  }


def _meta(recipe, workdir, captioned) -> CaptionerMeta:
  stage, data, vae = recipe.captioner, recipe.data, ""
  said = {
    style
    for clip in captioned
    if clip.split == "train"
    for style in styles_of(clip.captions)
  }
  styled = stage.loss.styled_share > 0 and stage.loss.styled_from < stage.train.steps
  if stage.input == "latents":
    folder = workdir / "vae" / "model"
    vae = VAEMeta.from_json(checkpoint.load_meta(folder), folder).id
  return CaptionerMeta(
    model=stage.model,
    input=stage.input,
    patch_size=stage.patch_size,
    styles=tuple(s for s in STYLES if s == "any" or (styled and s in said)),
    max_text_tokens=stage.max_text_tokens,
    tokens=stage.tokens,
    segments=stage.segments,
    reference_fps=stage.reference_fps,
    max_frames=data.max_frames,
    max_pixels=data.max_pixels,
    size_multiple=data.size_multiple,
    vae=vae,
    steps=stage.train.steps,
  )


def run(recipe: recipes.Recipe, workdir) -> None:
  """Trains to the end, then saves the EMA params, the tokenizer and what made them."""
  workdir, stage = pathlib.Path(workdir), recipe.captioner
  folder = workdir / "captioner"
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
  listed = _list(recipe, workdir)
  ready = setup(recipe, workdir, mesh, listed)
  state = loop.train(ready, stage.train, folder, mesh, recipe.seed, recipe.profile)
  ready.data.close()
  meta = _meta(recipe, workdir, listed.captioned)
  meta = dataclasses.replace(
    meta,
    id=checkpoint.fingerprint(state.ema),
    vocabulary=tokenizer.Tokenizer(str(folder / "tokenizer.model")).digest,
  )
  checkpoint.save_model(folder / "model", state.ema, meta.to_json())
  if jax.process_index() == 0:
    shutil.copyfile(folder / "tokenizer.model", folder / "model" / "tokenizer.model")
  sharding.sync("captioner saved")
  report_bad_clips(folder, len(ready.names))
  logging.info("the captioner is in %s", folder / "model")


def _flops_per_row(dataset, stage, patch_width: int) -> float:
  """FLOPs of the forward and backward pass of a row, on average."""
  flops = [
    3.0
    * captioner.num_flops(
      stage.model,
      patch_width,
      float(np.count_nonzero(clips)),
      clips.sum(),
      texts.sum(),
      float(np.sum(clips**2)),
    )
    for clips, texts in rows.segment_counts(dataset, stage.segments)
  ]
  return sum(flops) / len(flops)


if __name__ == "__main__":
  cli.command("captioner")
