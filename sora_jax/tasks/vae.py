"""What the VAE learns: L1, squared error, KL, and an adversarial loss by config."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from sora_jax.models.discriminator import Discriminator
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class VAELossConfig:
  """Weights of the terms; L1 has weight 1.

  mse_weight: of the mean squared error. It looks at the few pixels that are far off,
  such as edges that move, which L1 weighs like the many that are nearly right.
  gan_weight 0 trains without a discriminator (and without its params). gan_start is
  the step at which the generator begins to feel the discriminator, which itself
  learns from the first step on.
  """

  mse_weight: float = 0.0
  kl_weight: float = 1e-5
  gan_weight: float = 0.0
  gan_start: int = 0
  discriminator_width: int = 32


def make(
  model: VAEConfig, loss_config: VAELossConfig, dtype: jnp.dtype = jnp.float32
) -> Task:
  """The task over batches of `data.pipeline.ClipDataset`."""
  vae = VAE(model, dtype)
  discriminator = Discriminator(loss_config.discriminator_width, dtype=dtype)
  adversarial = loss_config.gan_weight > 0

  def init(key: Array):
    vae_key, discriminator_key = jax.random.split(key)
    frames = 1 + model.time_factor
    video = jnp.zeros((1, frames, model.space_factor, model.space_factor, 3))
    params = {"vae": VAE(model).init(vae_key, video)["params"]}
    if adversarial:
      video = jnp.zeros((1, 5, 32, 32, 3))
      params["discriminator"] = Discriminator(loss_config.discriminator_width).init(
        discriminator_key, video
      )["params"]
    return params

  def apply(params, method, x):
    return vae.apply({"params": params["vae"]}, x, method=method)

  def critic(params, video_BTHWC):
    return discriminator.apply({"params": params["discriminator"]}, video_BTHWC)

  def loss(params, batch, key: Array):
    video_BTHWC = to_float(batch["video_THWC"])
    mask_BTHWC = valid_mask(batch)
    mean_BTHWC, logvar_BTHWC = apply(params, VAE.encode, video_BTHWC)
    eps_BTHWC = jax.random.normal(key, mean_BTHWC.shape)
    latent_BTHWC = mean_BTHWC + jnp.exp(0.5 * logvar_BTHWC) * eps_BTHWC
    decoded_BTHWC = apply(params, VAE.decode, latent_BTHWC)

    l1 = _masked_mean(jnp.abs(decoded_BTHWC - video_BTHWC), mask_BTHWC)
    kl_BTHWC = 0.5 * (mean_BTHWC**2 + jnp.exp(logvar_BTHWC) - 1.0 - logvar_BTHWC)
    kl = _masked_mean(kl_BTHWC, latent_mask(model, batch))
    total = l1 + loss_config.kl_weight * kl
    metrics = {"l1": l1, "kl": kl}
    if loss_config.mse_weight > 0:
      metrics["mse"] = _masked_mean((decoded_BTHWC - video_BTHWC) ** 2, mask_BTHWC)
      total += loss_config.mse_weight * metrics["mse"]
    if not adversarial:
      return total, metrics

    # Where there is no clip, both see the same, so the critic learns nothing there.
    fake_BTHWC = jnp.where(mask_BTHWC > 0, decoded_BTHWC, video_BTHWC)
    frozen = jax.lax.stop_gradient(params)
    generator = -jnp.mean(critic(frozen, fake_BTHWC))
    real = jnp.mean(jax.nn.relu(1.0 - critic(params, video_BTHWC)))
    fake = jnp.mean(
      jax.nn.relu(1.0 + critic(params, jax.lax.stop_gradient(fake_BTHWC)))
    )
    on = (batch["step"] >= loss_config.gan_start).astype(jnp.float32)
    total += loss_config.gan_weight * on * generator + 0.5 * (real + fake)
    return total, {**metrics, "gan_generator": generator, "gan_critic": real + fake}

  def evaluate(params, batch, key: Array):
    del key  # the posterior's mean is decoded
    video_BTHWC = to_float(batch["video_THWC"])
    decoded_BTHWC = apply(params, VAE.decode, apply(params, VAE.encode, video_BTHWC)[0])
    mask_BTHWC = valid_mask(batch)
    squared = (jnp.clip(decoded_BTHWC, -1.0, 1.0) - video_BTHWC) ** 2
    axes = tuple(range(1, 5))
    pixels_B = jnp.maximum(jnp.sum(mask_BTHWC, axes) * 3, 1.0)
    mse_B = jnp.sum(squared * mask_BTHWC, axes) / pixels_B
    psnr_B = 10.0 * jnp.log10(4.0 / jnp.maximum(mse_B, 1e-10))
    real_B = jnp.sum(mask_BTHWC, axes) > 0
    return {"psnr": jnp.sum(psnr_B * real_B) / jnp.maximum(jnp.sum(real_B), 1)}

  return Task(init, loss, evaluate)


def to_float(video_u8: Array) -> Array:
  """uint8 pixels -> float32 in [-1, 1]."""
  return video_u8.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: Array) -> Array:
  """Inverse of `to_float`, clipped and rounded."""
  return jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def valid_mask(batch) -> Array:
  """1 where a padded clip has pixels: float32 [B, T, H, W, 1]."""
  T, H, W = batch["video_THWC"].shape[1:4]
  valid_B3 = batch["valid_3"]
  t = jnp.arange(T)[None, :] < valid_B3[:, :1]
  h = jnp.arange(H)[None, :] < valid_B3[:, 1:2]
  w = jnp.arange(W)[None, :] < valid_B3[:, 2:]
  mask = t[:, :, None, None] & h[:, None, :, None] & w[:, None, None, :]
  return mask[..., None].astype(jnp.float32)


def _masked_mean(value_BTHWC, mask_BTHWC):
  weight = jnp.sum(mask_BTHWC) * value_BTHWC.shape[-1]
  return jnp.sum(value_BTHWC * mask_BTHWC) / jnp.maximum(weight, 1.0)


def sharding_rules(model: VAEConfig, loss_config: VAELossConfig):
  """Sharding of the params: the output channels of every kernel over fsdp."""
  rules = [
    (r"vae/.*/(conv|space|time)/kernel", P(None, None, None, None, "fsdp")),
    (r"vae/.*/(bias|scale)", P()),
  ]
  if model.middle:
    rules.append((r"vae/.*/attention/(qkv|out)/kernel", P(None, "fsdp")))
  if loss_config.gan_weight > 0:
    rules += [
      (r"discriminator/.*/kernel", P(None, None, None, None, "fsdp")),
      (r"discriminator/.*/(bias|scale)", P()),
    ]
  return rules


def latent_mask(model: VAEConfig, batch) -> Array:
  """1 where a latent's pixels are all valid: float32 [B, t, h, w, 1]."""
  shape = model.latent_shape(*batch["video_THWC"].shape[1:4])
  valid_B3 = batch["valid_3"]
  # A clip without frames has no latent either.
  frames = jnp.where(
    valid_B3[:, 0] > 0, 1 + (valid_B3[:, 0] - 1) // model.time_factor, 0
  )
  counts = (
    frames,
    valid_B3[:, 1] // model.space_factor,
    valid_B3[:, 2] // model.space_factor,
  )
  t, h, w = (jnp.arange(n) < c[:, None] for n, c in zip(shape, counts, strict=True))
  mask = t[:, :, None, None] & h[:, None, :, None] & w[:, None, None, :]
  return mask[..., None].astype(jnp.float32)
