"""Stage "dit": trains the DiT on packed latents and writes workdir/dit/model.

python -m sora_jax.train_dit --config=configs/quickstart.py
"""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
from absl import logging

from sora_jax import autoencoder, checkpoint, sample, sharding, stages, train
from sora_jax import recipe as recipes
from sora_jax.data import pack, pipeline, records, tokenizer
from sora_jax.models import dit
from sora_jax.tasks import dit as dit_task


def setup(recipe: recipes.Recipe, workdir, mesh) -> train.Setup:
  """Task, data and cost of the stage; trains the tokenizer if it is not there yet."""
  workdir, stage = pathlib.Path(workdir), recipe.dit
  folder = workdir / "dit"
  latents = records.read_latents_manifest(str(workdir / "encode" / "latents.jsonl"))
  vocabulary = folder / "tokenizer.model"
  vocab_size = stage.text.vocab_size
  fits = vocabulary.exists() and (
    tokenizer.Tokenizer(str(vocabulary)).vocab_size <= vocab_size
  )
  if not fits and jax.process_index() == 0:
    captions = [c for clip in latents if clip.split == "train" for c in clip.captions]
    tokenizer.train(captions, str(vocabulary), vocab_size)
  sharding.sync("tokenizer")
  host, hosts = sharding.host_shard(mesh)
  shard = {"process_index": host, "process_count": hosts}

  def dataset(seed, **kwargs):
    return pipeline.PackedDataset(
      latents,
      str(workdir / "encode"),
      tokenizer.Tokenizer(str(vocabulary)),
      pack.Budget(stage.tokens, stage.text_tokens, stage.segments),
      stage.model.patch_size,
      seed,
      max_text_tokens=stage.max_text_tokens,
      reference_fps=stage.reference_fps,
      given_prob=stage.given_prob,
      extra_prob=stage.extra_prob,
      bad_clips_folder=str(folder),
      **kwargs,
    )

  training = dataset(recipe.seed, caption_dropout=stage.caption_dropout)
  return train.Setup(
    task=dit_task.make(
      stage.model, stage.text, stage.loss, stage.segments, recipe.dtype
    ),
    rules=dit_task.SHARDING_RULES,
    data=pipeline.Batches(training, stage.rows, workers=recipe.data.workers, **shard),
    eval_batches=pipeline.first_batches(
      dataset(0, split="heldout", caption_dropout=0.0),
      stage.rows,
      stage.eval_batches,
      **shard,
    ),
    names=[clip.id for clip in latents],
    flops_per_step=stage.rows * _flops_per_row(training, stage),
    units=lambda batch: int(np.count_nonzero(batch["segment_L"])),
    captioned=any(clip.captions for clip in latents if clip.split == "train"),
  )


def run(recipe: recipes.Recipe, workdir) -> None:
  """Trains to the end, then saves the EMA params, the tokenizer and what made them."""
  workdir, stage = pathlib.Path(workdir), recipe.dit
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
  made = setup(recipe, workdir, mesh)
  folder = workdir / "dit"
  vocabulary = folder / "tokenizer.model"
  meta = {
    "model": dataclasses.asdict(stage.model),
    "text": dataclasses.asdict(stage.text),
    "tokens": stage.tokens,
    "text_tokens": stage.text_tokens,
    "segments": stage.segments,
    "max_text_tokens": stage.max_text_tokens,
    "reference_fps": stage.reference_fps,
    "conditional": made.captioned,
    "noise": {"process": stage.loss.process, "target": stage.loss.target},
    "vae": stages.fingerprint("vae", workdir),
    "steps": stage.train.steps,
  }
  state = train.train(
    made.task,
    stage.train,
    made.data,
    workdir=workdir,
    name="dit",
    seed=recipe.seed,
    mesh=mesh,
    rules=made.rules,
    eval_batches=lambda: made.eval_batches,
    on_eval=_Preview(recipe, workdir, meta, vocabulary, mesh),
    describe=lambda indices: [made.names[i] for i in indices],
    flops_per_step=made.flops_per_step,
    tokens_per_step=stage.rows * stage.tokens,
  )
  made.data.close()
  checkpoint.save_model(folder / "model", state.ema, meta)
  if jax.process_index() == 0:
    shutil.copyfile(vocabulary, folder / "model" / "tokenizer.model")
  pipeline.report_bad_clips(folder, len(made.names))
  logging.info("the DiT is in %s", folder / "model")


class _Preview:
  """Samples the first prompts of config.sample and shows them in TensorBoard."""

  def __init__(self, recipe, workdir, meta, vocabulary, mesh, count=4):
    self._config, self._sampler = recipe.sample, None
    self._requests = sample.requests_of(recipe, workdir)[:count]
    self._make = lambda params: sample.Sampler(
      params,
      meta,
      autoencoder.Autoencoder(workdir / "vae" / "model", mesh, recipe.dtype),
      vocabulary,
      recipe.dtype,
    )

  def __call__(self, step, params, writer) -> None:
    self._sampler = self._sampler or self._make(params)
    self._sampler.params = params
    videos = self._sampler.sample(self._requests, self._config, rows=self._config.rows)
    for request, video_THWC in zip(self._requests, videos, strict=True):
      if len(video_THWC) == 1:
        writer.images(step, {request.prompt: video_THWC[0]})
      else:
        writer.videos(step, {request.prompt: video_THWC}, request.fps)


def _flops_per_row(dataset, stage, rows=64) -> float:
  """FLOPs of the forward and backward pass of a row, on average."""
  rows, flops = min(rows, dataset.elements_per_epoch()), 0.0
  for i in range(rows):
    row = dataset[i]
    clips = np.bincount(row["segment_L"], minlength=stage.segments + 1)[1:]
    texts = np.bincount(row["text_segment_S"], minlength=stage.segments + 1)[1:]
    pairs = np.sum(clips * (clips + texts))
    flops += 3.0 * dit.num_flops(stage.model, clips.sum(), texts.sum(), pairs)
  return flops / rows


if __name__ == "__main__":
  stages.command("dit")
