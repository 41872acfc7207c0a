"""The task of the VAE: L1 and KL, and by config squared error, LPIPS and a critic.

Clips of a batch are padded to one size, so that every term is a mean over the pixels
(or latents, or cells of the critic) that belong to a clip.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from sora_jax.models.lpips import LPIPS
from sora_jax.models.partition import PARAMS
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.tasks import Task, vae_gan
from sora_jax.tasks.clip_pixels import (
  Clips,
  choose_frames,
  latent_mask,
  masked_mean,
  to_float,
  valid_mask,
)

# A channel that varies less is taken to say nothing.
_LEAST_VARIANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class VAELossConfig:
  """Weights of the terms; L1 has weight 1.

  Attributes:
    mse_weight: of the mean squared error. It looks at the few pixels that are far off,
      such as edges that move, which L1 weighs like the many that are nearly right.
    latent_noise: most noise on the latents that the decoder learns from, relative to
      their standard deviation; each clip gets a random share. So it learns to draw a
      steady video of latents that are not quite right, as generated ones are.
    kl_weight: of the posterior's divergence from the standard normal.
    decorrelation_weight: of the squared correlations between channels of the latents
      over a batch. Noise on latents that is relative to each channel rewards saying
      few things in many channels; this makes each say something of its own.
    lpips_weight: of the perceptual distance of frames (models/lpips.py); it needs
      lpips_file, a .safetensors file with the names of weights/lpips.py.
    lpips_frames: random frames of each clip that it looks at; 0 = all.
    gan_weight: 0 trains without a discriminator (and without its params).
    gan_adaptive: gan_weight is relative to the gradient of the reconstruction's terms,
      as in VQGAN (arXiv:2012.09841, equation 7).
    gan_start: step at which the generator begins to feel the discriminator, which
      itself learns from the first step on.
    discriminator_width, discriminator_depth: see models/discriminator.py.
  """

  mse_weight: float = 0.0
  latent_noise: float = 0.0
  kl_weight: float = 1e-5
  decorrelation_weight: float = 0.0
  lpips_weight: float = 0.0
  lpips_file: str = ""
  lpips_frames: int = 4
  gan_weight: float = 0.0
  gan_adaptive: bool = False
  gan_start: int = 0
  discriminator_width: int = 64
  discriminator_depth: int = 3

  def __post_init__(self):
    if self.lpips_weight > 0 and not self.lpips_file:
      raise ValueError(
        f"vae lpips_weight {self.lpips_weight} needs lpips_file, a .safetensors file "
        "of VGG16 with the heads of LPIPS"
      )
    if self.latent_noise < 0:
      raise ValueError(f"vae latent_noise {self.latent_noise} is negative")
    if self.decorrelation_weight < 0:
      raise ValueError(
        f"vae decorrelation_weight {self.decorrelation_weight} is negative"
      )
    if self.lpips_frames < 0:
      raise ValueError(f"vae lpips_frames {self.lpips_frames} is less than 0, for all")


def make(
  model: VAEConfig,
  loss_config: VAELossConfig,
  dtype: jnp.dtype = jnp.float32,
  lpips_params=None,
) -> Task:
  """Returns the task over batches of `data.clip_dataset.ClipDataset`.

  Args:
    model: sizes of the VAE.
    loss_config: the terms of the loss and their weights.
    dtype: of the computation; params and losses are float32.
    lpips_params: what `weights.lpips.load` returns, where the loss has LPIPS. They are
      the task's frozen params and are not trained.
  """
  networks = _Networks(model, loss_config, dtype)
  return Task(
    init=networks.init,
    loss=functools.partial(_loss, networks),
    evaluate=functools.partial(_evaluate, networks),
    frozen={"lpips": lpips_params} if loss_config.lpips_weight > 0 else None,
  )


@dataclasses.dataclass(frozen=True)
class _Networks:
  """The VAE and the networks that judge what it decodes, as functions of params."""

  model: VAEConfig
  loss_config: VAELossConfig
  dtype: jnp.dtype

  @property
  def critic(self) -> vae_gan.Critic | None:
    """The discriminator, if there is one."""
    config = self.loss_config
    if config.gan_weight <= 0:
      return None
    return vae_gan.Critic(
      config.discriminator_width, config.discriminator_depth, self.dtype
    )

  def init(self, key: Array) -> dict:
    """Initialises the params of all networks that are trained, on the least clips."""
    vae_key, discriminator_key = jax.random.split(key)
    frames, size = 1 + self.model.time_factor, self.model.space_factor
    video_BTHWC = jnp.zeros((1, frames, size, size, 3))
    params = {"vae": VAE(self.model).init(vae_key, video_BTHWC)["params"]}
    if self.critic:
      params["discriminator"] = self.critic.init(discriminator_key)
    return params

  def encode(self, params, video_BTHWC: Array) -> tuple[Array, Array]:
    """Returns the mean and the log-variance of the posterior."""
    return self._apply_vae(params, VAE.encode, video_BTHWC)

  def decode(self, params, latent_BTHWC: Array) -> Array:
    """Returns the video of a latent."""
    return self._apply_vae(params, VAE.decode, latent_BTHWC)

  def lpips(self, frozen, clips, key: Array) -> Array:
    """Returns the mean LPIPS of random frames of two clips.

    clips: two videos and their mask, as for `choose_frames`.
    """
    network = LPIPS(dtype=self.dtype)
    clips = choose_frames(clips, key, self.loss_config.lpips_frames)
    x_BHWC, y_BHWC, mask_BHWC = (clip.reshape(-1, *clip.shape[2:]) for clip in clips)
    variables = {"params": frozen["lpips"]}
    distance_B = network.apply(variables, x_BHWC, y_BHWC, mask_BHWC[..., 0])
    # Frames of the padding have no pixel at all, not even the first.
    real_B = mask_BHWC[:, 0, 0, 0]
    return jnp.sum(distance_B * real_B) / jnp.maximum(jnp.sum(real_B), 1.0)

  def _apply_vae(self, params, method, x_BTHWC):
    vae = VAE(self.model, self.dtype)
    return vae.apply({"params": params["vae"]}, x_BTHWC, method=method)


def _loss(networks: _Networks, params, batch, key: Array, frozen=None):
  """Returns the total of all terms, the critic's own included, and the metrics."""
  config = networks.loss_config
  clips = Clips(to_float(batch["video_THWC"]), valid_mask(batch))
  moments = networks.encode(params, clips.video_BTHWC)
  latent_BTHWC = _draw_latent(*moments, config.latent_noise, key)
  latent = _latent_loss(networks, moments, latent_mask(networks.model, batch))
  reconstruction = functools.partial(
    _reconstruction_loss, networks, clips, latent, frozen, key
  )
  critic = networks.critic
  if critic is None:
    return reconstruction(networks.decode(params, latent_BTHWC))

  generator = functools.partial(vae_gan.generator_loss, critic, params, clips)
  if config.gan_adaptive:
    decoded_BTHWC, (total, metrics), generator_loss, scale = vae_gan.balanced(
      lambda last: networks.decode(
        vae_gan.with_last_kernel(params, last), latent_BTHWC
      ),
      vae_gan.last_kernel(params),
      reconstruction,
      generator,
    )
    metrics = {**metrics, "gan_scale": scale}
  else:
    decoded_BTHWC = networks.decode(params, latent_BTHWC)
    total, metrics = reconstruction(decoded_BTHWC)
    generator_loss, scale = generator(decoded_BTHWC), 1.0
  critic_loss = vae_gan.critic_loss(critic, params, clips, decoded_BTHWC)
  on = (batch["step"] >= config.gan_start).astype(jnp.float32)
  total += config.gan_weight * on * scale * generator_loss + 0.5 * critic_loss
  return total, {**metrics, "gan_generator": generator_loss, "gan_critic": critic_loss}


def _draw_latent(mean_BTHWC, logvar_BTHWC, latent_noise: float, key: Array) -> Array:
  """Draws from the posterior, and adds the noise that the decoder is to be used to."""
  eps_BTHWC = jax.random.normal(key, mean_BTHWC.shape)
  latent_BTHWC = mean_BTHWC + jnp.exp(0.5 * logvar_BTHWC) * eps_BTHWC
  if latent_noise > 0:
    latent_BTHWC += latent_noise * noise_like(latent_BTHWC, key)
  return latent_BTHWC


def _latent_loss(networks: _Networks, moments, mask_BTHWC) -> tuple[Array, dict]:
  """Returns (KL + decorrelation by their weights, each of them)."""
  config = networks.loss_config
  kl = masked_mean(_kl_divergence(*moments), mask_BTHWC)
  total, metrics = config.kl_weight * kl, {"kl": kl}
  if config.decorrelation_weight > 0:
    correlation_CC = correlation(moments[0], mask_BTHWC)
    # How far each channel is said by the others, the mean over the channels.
    repeated = jnp.sum(correlation_CC**2) - jnp.sum(jnp.diag(correlation_CC) ** 2)
    metrics["decorrelation"] = repeated / networks.model.latent_channels
    total += config.decorrelation_weight * metrics["decorrelation"]
  return total, metrics


def correlation(latent_BTHWC, mask_BTHWC) -> Array:
  """Returns the correlation [C, C] of channels over the latents whose mask is 1.

  Channels that do not vary have none, not even with themselves.
  """
  count = jnp.maximum(jnp.sum(mask_BTHWC), 1.0)
  axes = tuple(range(4))
  mean_C = jnp.sum(latent_BTHWC * mask_BTHWC, axes) / count
  centered_BTHWC = (latent_BTHWC - mean_C) * mask_BTHWC
  covariance_CC = jnp.einsum("bthwc,bthwd->cd", centered_BTHWC, centered_BTHWC) / count
  scale_C = jax.lax.rsqrt(jnp.diag(covariance_CC) + _LEAST_VARIANCE)
  return covariance_CC * scale_C[:, None] * scale_C


def _kl_divergence(mean_BTHWC, logvar_BTHWC) -> Array:
  """Returns the divergence of each number's posterior from the standard normal."""
  return 0.5 * (mean_BTHWC**2 + jnp.exp(logvar_BTHWC) - 1.0 - logvar_BTHWC)


def _reconstruction_loss(
  networks: _Networks, clips: Clips, latent, frozen, key: Array, decoded_BTHWC
):
  """Returns (L1 + squared error + LPIPS + the terms of the latent, each of them).

  All but L1 are weighted in the sum. latent: what `_latent_loss` returns.
  """
  config = networks.loss_config
  video_BTHWC, mask_BTHWC = clips
  l1 = masked_mean(jnp.abs(decoded_BTHWC - video_BTHWC), mask_BTHWC)
  total, metrics = l1 + latent[0], {"l1": l1, **latent[1]}
  if config.mse_weight > 0:
    metrics["mse"] = masked_mean((decoded_BTHWC - video_BTHWC) ** 2, mask_BTHWC)
    total += config.mse_weight * metrics["mse"]
  if config.lpips_weight > 0:
    compared = clips.on_black(decoded_BTHWC), clips.on_black(video_BTHWC), mask_BTHWC
    metrics["lpips"] = networks.lpips(frozen, compared, jax.random.fold_in(key, 1))
    total += config.lpips_weight * metrics["lpips"]
  return total, metrics


def _evaluate(networks: _Networks, params, batch, key: Array, frozen=None) -> dict:
  """Returns the PSNR, and with frozen params the LPIPS, of decoded clips.

  Also the effective rank of the latents: of how many channels they would have as much
  to say if none repeated another, see evaluation/vae_health.py. The posterior's mean is
  decoded, so that no noise is in the figures; key only chooses the frames of LPIPS.
  """
  clips = Clips(to_float(batch["video_THWC"]), valid_mask(batch))
  mean_BTHWC, _ = networks.encode(params, clips.video_BTHWC)
  decoded_BTHWC = networks.decode(params, mean_BTHWC)
  metrics = {
    "psnr": _mean_psnr(jnp.clip(decoded_BTHWC, -1.0, 1.0), clips),
    "effective_rank": _effective_rank(mean_BTHWC, latent_mask(networks.model, batch)),
  }
  if frozen is not None:
    shown = (
      clips.on_black(jnp.clip(video_BTHWC, -1.0, 1.0))
      for video_BTHWC in (decoded_BTHWC, clips.video_BTHWC)
    )
    metrics["lpips"] = networks.lpips(frozen, (*shown, clips.mask_BTHWC), key)
  return metrics


def _effective_rank(latent_BTHWC, mask_BTHWC) -> Array:
  """Returns exp of the entropy of the eigenvalues of the channels' correlation."""
  eigenvalues = jnp.linalg.eigvalsh(correlation(latent_BTHWC, mask_BTHWC))
  shares = jnp.maximum(eigenvalues, 1e-12) / jnp.maximum(jnp.sum(eigenvalues), 1e-6)
  return jnp.exp(-jnp.sum(shares * jnp.log(shares)))


def _mean_psnr(video_BTHWC, clips: Clips) -> Array:
  """Returns the mean PSNR in dB over the clips that have pixels, of these alone."""
  axes = tuple(range(1, 5))
  squared_BTHWC = (video_BTHWC - clips.video_BTHWC) ** 2
  pixels_B = jnp.maximum(jnp.sum(clips.mask_BTHWC, axes) * 3, 1.0)
  mse_B = jnp.sum(squared_BTHWC * clips.mask_BTHWC, axes) / pixels_B
  # The range of values is 2, and an exact copy counts as 100 dB and not as infinite.
  psnr_B = 10.0 * jnp.log10(4.0 / jnp.maximum(mse_B, 1e-10))
  real_B = jnp.sum(clips.mask_BTHWC, axes) > 0
  return jnp.sum(psnr_B * real_B) / jnp.maximum(jnp.sum(real_B), 1)


def noise_like(latent_BTHWC, key: Array):
  """Returns noise with the deviation that each channel has in the batch.

  Each clip gets a random share of it between 0 and 1.
  """
  share_key, noise_key = jax.random.split(jax.random.fold_in(key, 2))
  share_B = jax.random.uniform(share_key, latent_BTHWC.shape[:1])
  deviation_C = jnp.std(jax.lax.stop_gradient(latent_BTHWC), axis=(0, 1, 2, 3))
  noise_BTHWC = deviation_C * jax.random.normal(noise_key, latent_BTHWC.shape)
  return share_B[:, None, None, None, None] * noise_BTHWC


# Sharding of the task's frozen params.
LPIPS_RULES = (
  (r"lpips/vgg/.*/kernel", P(None, None, None, PARAMS)),
  (r"lpips/(vgg/.*/bias|head_\d)", P()),
)


def sharding_rules(model: VAEConfig, loss_config: VAELossConfig):
  """Returns the rules that shard the output channels of every kernel over fsdp."""
  rules = [
    (r"vae/.*/(conv|space|time)/kernel", P(None, None, None, None, PARAMS)),
    (r"vae/.*/(bias|scale)", P()),
  ]
  if model.middle:
    rules.append((r"vae/.*/attention/(qkv|out)/kernel", P(None, PARAMS)))
  if loss_config.gan_weight > 0:
    rules += vae_gan.RULES
  return rules
