"""Stage "dit": trains the DiT on packed latents and writes workdir/dit/model.

python -m sora_jax.train_dit --config=configs/quickstart.py
"""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
from absl import logging

from sora_jax.data import pipeline, records, tokenizer
from sora_jax.encoders import autoencoder
from sora_jax.encoders.text_encoder import FrozenTextEncoder
from sora_jax.models import attention, dit
from sora_jax.models.meta import DiTMeta, FrozenText, Noise, VAEMeta
from sora_jax.run import cli, init_from
from sora_jax.run import recipe as recipes
from sora_jax.run.build import budget, make_task
from sora_jax.runtime import checkpoint, sharding
from sora_jax.sampling import requests
from sora_jax.sampling.pipeline import Sampler
from sora_jax.training import loop


def setup(recipe: recipes.Recipe, workdir, mesh) -> loop.Setup:
  """Task, data and cost of the stage; trains the tokenizer if it is not there yet.

  Loads what config.dit.init_from says that training begins with.
  """
  workdir, stage = pathlib.Path(workdir), recipe.dit
  folder = workdir / "dit"
  task, rules, initial = init_from.begin(recipe, *make_task(recipe), workdir, mesh)
  latents = records.read_latents_manifest(str(workdir / "encode" / "latents.jsonl"))
  frozen = bool(recipe.text.folder)
  if frozen:
    empty_text = records.read_empty_text(workdir / "encode" / records.EMPTY_TEXT)
    texts = {
      "tokenizer": None,
      "empty_text": empty_text,
      "pad_text_to": recipe.text.pad_to,
      "max_text_tokens": recipe.text.max_tokens,
    }
  else:
    texts = {
      "tokenizer": _tokenizer(stage, latents, folder / "tokenizer.model"),
      "max_text_tokens": stage.max_text_tokens,
    }
  host, hosts = sharding.host_shard(mesh)
  shard = {"process_index": host, "process_count": hosts}

  def dataset(seed, **kwargs):
    return pipeline.PackedDataset(
      latents,
      str(workdir / "encode"),
      budget=budget(stage),
      patch_size=stage.model.patch_size,
      seed=seed,
      reference_fps=stage.reference_fps,
      given_prob=stage.given_prob,
      extra_prob=stage.extra_prob,
      bad_clips_folder=str(folder),
      **texts,
      **kwargs,
    )

  training = dataset(recipe.seed, caption_dropout=stage.caption_dropout)
  return loop.Setup(
    task=task,
    rules=rules,
    initial=initial,
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


def _tokenizer(stage, latents, path):
  """That of the small text encoder; trained if it is not there yet."""
  vocab_size = stage.text.vocab_size
  fits = path.exists() and tokenizer.Tokenizer(str(path)).vocab_size <= vocab_size
  if not fits and jax.process_index() == 0:
    captions = [c for clip in latents if clip.split == "train" for c in clip.captions]
    tokenizer.train(captions, str(path), vocab_size)
  sharding.sync("tokenizer")
  return tokenizer.Tokenizer(str(path))


def _meta(recipe, workdir, captioned) -> DiTMeta:
  """What the model's folder says of it; captioned: whether the clips are."""
  stage, text = recipe.dit, recipe.text
  if stage.init_from and not captioned:
    # A model that knows captions still does after clips without.
    base = pathlib.Path(stage.init_from) / "dit" / "model"
    captioned = DiTMeta.from_json(checkpoint.load_meta(base), base).conditional
  encoder = stage.text
  if text.folder:
    empty_text = records.read_empty_text(workdir / "encode" / records.EMPTY_TEXT)
    encoder = FrozenText(empty_text.encoder, text.pad_to, text.folder)
  vae = workdir / "vae" / "model"
  return DiTMeta(
    model=stage.model,
    text=encoder,
    max_text_tokens=text.max_tokens if text.folder else stage.max_text_tokens,
    tokens=stage.tokens,
    text_tokens=stage.text_tokens,
    segments=stage.segments,
    reference_fps=stage.reference_fps,
    conditional=captioned,
    vae=VAEMeta.from_json(checkpoint.load_meta(vae), vae).id,
    steps=stage.train.steps,
    noise=Noise(stage.loss.process, stage.loss.target),
    init_from=stage.init_from,
  )


def run(recipe: recipes.Recipe, workdir) -> None:
  """Trains to the end, then saves the EMA params, the tokenizer and what made them.

  Adapters are saved both merged into their base and, as adapter.safetensors, alone.
  """
  workdir, stage = pathlib.Path(workdir), recipe.dit
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
  made = setup(recipe, workdir, mesh)
  with jax.set_mesh(mesh):
    width = stage.model.width // stage.model.heads
    logging.info("dit: attention: %s %s", *attention.form(width, recipe.dtype))
  folder = workdir / "dit"
  vocabulary = folder / "tokenizer.model"
  meta = _meta(recipe, workdir, made.captioned)
  preview = _Preview(recipe, workdir, meta, vocabulary, mesh)
  state = loop.train(
    made.task,
    stage.train,
    made.data,
    workdir=workdir,
    name="dit",
    seed=recipe.seed,
    mesh=mesh,
    rules=made.rules,
    eval_batches=lambda: made.eval_batches,
    on_eval=lambda step, ema, writer: preview(
      step, init_from.whole(made.task, recipe, ema), writer
    ),
    initial=made.initial,
    describe=lambda indices: [made.names[i] for i in indices],
    flops_per_step=made.flops_per_step,
    profile=recipe.profile,
    tokens_per_step=stage.rows * stage.tokens,
  )
  made.data.close()
  params = state.ema
  if stage.lora.rank:
    params = init_from.finish(recipe, params, folder, make_task(recipe)[1], mesh)
  checkpoint.save_model(folder / "model", params, meta.to_json())
  if jax.process_index() == 0 and not recipe.text.folder:
    shutil.copyfile(vocabulary, folder / "model" / "tokenizer.model")
  pipeline.report_bad_clips(folder, len(made.names))
  logging.info("the DiT is in %s", folder / "model")


class _Preview:
  """Samples the first prompts of config.sample and shows them in TensorBoard."""

  def __init__(self, recipe, workdir, meta, vocabulary, mesh, count=4):
    self._config, self._sampler = recipe.sample, None
    self._requests = requests.requests_of(recipe, workdir)[:count]
    encode_text = None
    if recipe.text.folder:
      # Encodes its texts now and lets the encoder go: training needs the memory.
      texts = {t for r in self._requests for t in (r.prompt, r.negative_prompt, "")}
      texts = sorted(texts)
      encoder = FrozenTextEncoder(
        recipe.text.folder, mesh, recipe.dtype, meta.frozen_text.features
      )
      features = encoder.encode(texts, recipe.text.max_tokens)
      known = dict(zip(texts, features, strict=True))

      def encode_text(texts, max_tokens):
        return [known[text] for text in texts]

    self._make = lambda params: Sampler(
      params,
      meta,
      autoencoder.Autoencoder(workdir / "vae" / "model", mesh, recipe.dtype),
      vocabulary,
      recipe.dtype,
      encode_text,
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
  # A frozen base has no gradients of its own, only those of what goes through it.
  passes = 2.0 if stage.lora.rank else 3.0
  for i in range(rows):
    row = dataset[i]
    clips = np.bincount(row["segment_L"], minlength=stage.segments + 1)[1:]
    texts = np.bincount(row["text_segment_S"], minlength=stage.segments + 1)[1:]
    pairs = np.sum(clips * (clips + texts))
    flops += passes * dit.num_flops(stage.model, clips.sum(), texts.sum(), pairs)
  return flops / rows


if __name__ == "__main__":
  cli.command("dit")
