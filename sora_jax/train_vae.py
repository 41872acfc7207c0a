"""Stage "vae": trains the VAE on pixel clips and writes workdir/vae/model.

python -m sora_jax.train_vae --config=configs/quickstart.py
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.data import mixture, presence
from sora_jax.data.bad_clips import report_bad_clips
from sora_jax.data.batches import Batches, first_batches
from sora_jax.data.clip_dataset import ClipDataset
from sora_jax.data.clips import read_manifest
from sora_jax.models.meta import VAEMeta
from sora_jax.models.vae import VAE
from sora_jax.run import cli, clip_cache, init_from
from sora_jax.run import recipe as recipes
from sora_jax.runtime import checkpoint, sharding
from sora_jax.tasks import clip_pixels
from sora_jax.tasks import vae as vae_task
from sora_jax.training import loop
from sora_jax.weights import lpips

_STATISTICS_BATCHES = 32


def setup(recipe: recipes.Recipe, workdir, mesh) -> loop.Setup:
  """Task, data and cost of the stage."""
  workdir = pathlib.Path(workdir)
  return _setup(recipe, workdir, mesh, _cache(recipe, workdir))


def _setup(recipe, workdir, mesh, cache) -> loop.Setup:
  stage, clips = recipe.vae, _clips(workdir)
  names = [clip.id for clip in clips]
  presence.check_left_out(recipe.data.leave_out, names)
  for split in ("train", "heldout"):
    presence.check_media([clip for clip in clips if clip.split == split])
  return loop.Setup(
    task=vae_task.make(
      stage.model, stage.loss, recipe.dtype, _lpips_params(stage.loss, mesh)
    ),
    rules=vae_task.sharding_rules(stage.model, stage.loss),
    data=Batches(
      _dataset(recipe, workdir, "train", cache),
      stage.batch_size,
      workers=recipe.data.workers,
      **_shard(mesh),
    ),
    eval_batches=first_batches(
      _dataset(recipe, workdir, "heldout"),
      stage.batch_size,
      stage.eval_batches,
      **_shard(mesh),
    ),
    names=names,
    max_unreadable=recipe.data.max_unreadable,
    flops_per_step=_flops(stage),
    units=lambda batch: int(batch["valid_3"][:, 0].sum()),
  )


def _lpips_params(config: vae_task.VAELossConfig, mesh):
  """Loads config.vae.loss.lpips_file onto the mesh; None, and a message, without."""
  if not config.lpips_weight:
    logging.info("vae: no perceptual loss (config.vae.loss.lpips_weight is 0)")
    return None
  params = {"lpips": lpips.load(config.lpips_file)}
  placed = sharding.param_shardings(params, vae_task.LPIPS_RULES, mesh)
  # Every host has read the whole file.
  return jax.tree.map(
    lambda value, place: jax.make_array_from_callback(
      value.shape, place, lambda index: value[index]
    ),
    params,
    placed,
  )["lpips"]


def _clips(workdir):
  return read_manifest(workdir / "data" / "manifest.jsonl")


def _cache(recipe, workdir):
  visits = recipe.vae.train.steps * recipe.vae.batch_size
  return clip_cache.training_cache(recipe, workdir, _clips(workdir), visits)


def _dataset(recipe, workdir, split, cache=None):
  return ClipDataset(
    _clips(workdir),
    recipe.vae.crop,
    recipe.seed,
    split=split,
    bad_clips_folder=workdir / "vae",
    cache=cache,
    leave_out=recipe.data.leave_out,
    shares=mixture.shares(recipe.data.mixture) if split == "train" else {},
  )


def _shard(mesh):
  host, hosts = sharding.host_shard(mesh)
  return {"process_index": host, "process_count": hosts}


def run(recipe: recipes.Recipe, workdir) -> None:
  """Trains to the end, then saves the EMA params with the latent statistics.

  With config.vae.folder, copies the model from there instead.
  """
  if recipe.vae.folder:
    return init_from.take_vae(recipe, workdir)
  workdir, stage = pathlib.Path(workdir), recipe.vae
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
  cache = _cache(recipe, workdir)
  ready = _setup(recipe, workdir, mesh, cache)
  show = functools.partial(_show, stage.model, ready.eval_batches[0], mesh)
  ready = ready._replace(on_eval=show)
  state = loop.train(
    ready, stage.train, workdir / "vae", mesh, recipe.seed, recipe.profile
  )
  params = state.ema["vae"]
  ready.data.close()
  # The first batches, whatever the iterator has done: the same after a resume.
  batches = first_batches(
    _dataset(recipe, workdir, "train", cache),
    stage.batch_size,
    _STATISTICS_BATCHES,
    **_shard(mesh),
  )
  mean, std = latent_statistics(stage.model, params, batches, mesh)
  meta = VAEMeta(
    model=stage.model,
    latent_mean=tuple(mean.tolist()),
    latent_std=tuple(std.tolist()),
    id=checkpoint.fingerprint(params),
    steps=stage.train.steps,
  )
  checkpoint.save_model(workdir / "vae" / "model", params, meta.to_json())
  report_bad_clips(workdir / "vae", len(ready.names))
  logging.info("the VAE is in %s", workdir / "vae" / "model")


def latent_statistics(model, params, batches, mesh) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation [C] of the posterior's mean over valid latents.

  Raises:
    ValueError: if no batch has a valid clip.
  """

  @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
  def moments(params, batch):
    video = clip_pixels.to_float(batch["video_THWC"])
    mean_BTHWC, _ = VAE(model).apply({"params": params}, video, method=VAE.encode)
    mask = clip_pixels.latent_mask(model, batch)
    return (
      jnp.sum(mask),
      jnp.sum(mean_BTHWC * mask, (0, 1, 2, 3)),
      jnp.sum(mean_BTHWC**2 * mask, (0, 1, 2, 3)),
    )

  C = model.latent_channels
  count, total, squares = 0.0, np.zeros(C), np.zeros(C)
  with jax.set_mesh(mesh):
    for batch in batches:
      batch = {k: v for k, v in batch.items() if not k.startswith("clip")}
      n, s, q = jax.device_get(moments(params, sharding.shard_batch(batch, mesh)))
      count, total, squares = (
        count + float(n),
        total + s.astype(np.float64),
        squares + q.astype(np.float64),
      )
  if not count:
    raise ValueError("no training clip could be read; see vae/bad_clips.jsonl")
  mean = total / count
  return mean, np.sqrt(np.maximum(squares / count - mean**2, 1e-12))


def _show(model, batch, mesh, step, params, writer) -> None:
  """Writes held-out clips over their reconstructions to TensorBoard."""

  @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
  def reconstruct(params, video_BTHWC):
    decoded = VAE(model).apply(
      {"params": params["vae"]}, clip_pixels.to_float(video_BTHWC)
    )
    return video_BTHWC, clip_pixels.to_uint8(decoded)

  video = sharding.shard_batch({"video": batch["video_THWC"]}, mesh)["video"]
  both_BTHWC = np.concatenate(jax.device_get(reconstruct(params, video)), axis=2)[:4]
  writer.videos(step, {"reconstruction": np.concatenate(both_BTHWC, axis=2)}, fps=8)


def _flops(stage) -> float:
  """Forward and backward of one step, counted from the traced forward pass."""
  vae = VAE(stage.model)
  T, H, W = stage.crop
  video = jax.ShapeDtypeStruct((stage.batch_size, T, H, W, 3), jnp.float32)
  params = jax.eval_shape(vae.init, jax.random.key(0), video)
  cost = jax.jit(vae.apply).lower(params, video).cost_analysis() or {}
  return 3.0 * cost.get("flops", 0.0)


if __name__ == "__main__":
  cli.command("vae")
