"""Stage "dit": trains the DiT on packed latents and writes workdir/dit/model.

python -m sora_jax.train_dit --config=configs/quickstart.py
"""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
from absl import logging

from sora_jax.data import presence, records, tokenizer
from sora_jax.data.bad_clips import report_bad_clips
from sora_jax.data.batches import Batches, first_batches
from sora_jax.data.caption_texts import CaptionIds, warn_of_cut
from sora_jax.data.clips import read_manifest
from sora_jax.data.packed_dataset import Choice, PackedDataset
from sora_jax.encoders import autoencoder, model_folders
from sora_jax.encoders.text_encoder import FrozenTextEncoder
from sora_jax.models import attention, dit
from sora_jax.models.meta import DiTMeta, FrozenText, Noise
from sora_jax.run import build, cli, init_from, latent_shards, rows
from sora_jax.run import recipe as recipes
from sora_jax.run.build import make_task
from sora_jax.runtime import checkpoint, sharding
from sora_jax.sampling import requests
from sora_jax.sampling.pipeline import NonFiniteSample, Sampler
from sora_jax.training import loop


def setup(recipe: recipes.Recipe, workdir, mesh) -> loop.Setup:
  """Task, data and cost of the stage; trains the tokenizer if it is not there yet.

  Loads what config.dit.init_from says that training begins with.
  """
  workdir, stage = pathlib.Path(workdir), recipe.dit
  folder = workdir / "dit"
  task, rules, initial = init_from.begin(recipe, *make_task(recipe), workdir, mesh)
  latents = records.read_latents_manifest(str(workdir / "encode" / "latents.jsonl"))
  _check_clips(recipe, workdir, latents)
  vocabulary = folder / "tokenizer.model"
  if not recipe.text.folder and jax.process_index() == 0:
    rows.train_tokenizer(stage.text.vocab_size, latents, vocabulary)
  sharding.sync("tokenizer")
  texts = rows.caption_texts(recipe, workdir, vocabulary)
  if isinstance(texts, CaptionIds) and jax.process_index() == 0:
    warn_of_cut(texts, latents, "config.dit.max_text_tokens")
  host, hosts = sharding.host_shard(mesh)
  shard = {"process_index": host, "process_count": hosts}
  options = rows.packed_options(stage)
  heldout = dataclasses.replace(options, caption_dropout=0.0)

  def dataset(options, seed, choice):
    reader = rows.latent_reader(workdir)
    return PackedDataset(latents, reader, texts, options, seed, choice, str(folder))

  training = rows.training_rows(dataset, options, recipe)
  return loop.Setup(
    task=task,
    rules=rules,
    initial=initial,
    data=Batches(training, stage.rows, workers=recipe.data.workers, **shard),
    eval_batches=first_batches(
      dataset(heldout, 0, Choice("heldout", leave_out=recipe.data.leave_out)),
      stage.rows,
      stage.eval_batches,
      **shard,
    ),
    names=[clip.id for clip in latents],
    max_unreadable=recipe.data.max_unreadable,
    flops_per_step=stage.rows * _flops_per_row(rows.last_part(training), stage),
    tokens_per_step=stage.rows * stage.tokens,
    units=lambda batch: int(np.count_nonzero(batch["segment_L"])),
    captioned=any(clip.captions for clip in latents if clip.split == "train"),
  )


def _check_clips(recipe, workdir, latents):
  """Raises ValueError for clips to leave out that are none of the run."""
  data = recipe.data
  known = {clip.id for clip in latents}
  manifest = workdir / "data" / "manifest.jsonl"
  if not known.issuperset(data.leave_out) and manifest.exists():
    known |= {clip.id for clip in read_manifest(manifest)}  # not encoded, maybe
  presence.check_left_out(data.leave_out, known)


def _meta(recipe, workdir, captioned) -> DiTMeta:
  """What the model's folder says of it; captioned: whether the clips are."""
  stage, text, words = recipe.dit, recipe.text, ""
  base = init_from.base_meta(recipe)
  encoder = stage.text
  if text.folder:
    empty_text = records.read_empty_text(workdir / "encode" / records.EMPTY_TEXT)
    place = model_folders.of_text(text.folder).parents[1]
    encoder = FrozenText(empty_text.encoder, text.pad_to, str(place))
  else:
    words = tokenizer.Tokenizer(str(workdir / "dit" / "tokenizer.model")).digest
  return DiTMeta(
    model=stage.model,
    text=encoder,
    max_text_tokens=text.max_tokens if text.folder else stage.max_text_tokens,
    tokens=stage.tokens,
    text_tokens=stage.text_tokens,
    segments=stage.segments,
    reference_fps=stage.reference_fps,
    # A model that knows captions still does after clips without.
    conditional=captioned or bool(base and base.conditional),
    vae=rows.vae_id(workdir),
    steps=stage.train.steps,
    noise=Noise(stage.loss.process, stage.loss.target),
    init_from=stage.init_from,
    sampling=base.sampling if base else None,
    boundary=base.boundary if base else 0.0,
    image=base.image if base else "",
    low_noise=stage.low_noise,
    vocabulary=words,
  )


def run(recipe: recipes.Recipe, workdir) -> None:
  """Trains to the end, then saves the EMA params, the tokenizer and what made them.

  Adapters are saved both merged into their base and, as adapter.safetensors, alone.
  """
  workdir, stage = pathlib.Path(workdir), recipe.dit
  folder, vocabulary = workdir / "dit", workdir / "dit" / "tokenizer.model"
  latent_shards.check(workdir / "encode")
  # Training does not need it, but whoever samples does: better known now.
  checkpoint.check_model(workdir / "vae" / "model")
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
  ready = setup(recipe, workdir, mesh)
  with jax.set_mesh(mesh):
    width = stage.model.width // stage.model.heads
    logging.info("dit: attention: %s %s", *attention.backend(width, recipe.dtype))
  meta = _meta(recipe, workdir, ready.captioned)
  if reason := _no_previews(meta):
    logging.info("dit: no samples while it trains: %s", reason)
  else:
    preview = _Preview(recipe, workdir, meta, vocabulary, mesh)

    def on_eval(step, ema, writer):
      preview(step, init_from.whole(ready.task, recipe, ema), writer)

    ready = ready._replace(on_eval=on_eval)
  state = loop.train(ready, stage.train, folder, mesh, recipe.seed, recipe.profile)
  ready.data.close()
  params = state.ema
  if stage.lora.rank:
    params = init_from.finish(recipe, params, folder, make_task(recipe)[1], mesh)
  meta = dataclasses.replace(meta, id=checkpoint.fingerprint(params))
  checkpoint.save_model(folder / "model", params, meta.to_json())
  if jax.process_index() == 0 and not recipe.text.folder:
    shutil.copyfile(vocabulary, folder / "model" / "tokenizer.model")
  report_bad_clips(folder, len(ready.names))
  logging.info("the DiT is in %s", folder / "model")


def _no_previews(meta: DiTMeta) -> str:
  """Why texts alone make no samples of a model that is in training; "" if they do."""
  if meta.boundary:
    return "it is one of two experts, and the other is needed, too"
  return "it needs given images" if meta.model.condition_channels else ""


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
    rows = self._config.rows
    try:
      videos = self._sampler.sample(self._requests, self._config, rows=rows)
    except NonFiniteSample as error:  # training decides for itself when to stop
      logging.warning("step %d: no samples: %s", step, error)
      return
    for request, video_THWC in zip(self._requests, videos, strict=True):
      if len(video_THWC) == 1:
        writer.images(step, {request.prompt: video_THWC[0]})
      else:
        writer.videos(step, {request.prompt: video_THWC}, request.fps)


def _flops_per_row(dataset, stage) -> float:
  """FLOPs of the forward and backward pass of a row, on average."""
  flops = []
  for clips, texts in rows.segment_counts(dataset, stage.segments):
    pairs = np.sum(clips * (clips + texts))
    flops.append(dit.num_flops(stage.model, clips.sum(), texts.sum(), pairs))
  return build.passes(stage) * sum(flops) / len(flops)


if __name__ == "__main__":
  cli.command("dit")
