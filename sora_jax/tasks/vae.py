"""The task of the VAE: L1 and KL, and by config squared error, LPIPS and a critic.

Clips of a batch are padded to one size, so that every term is a mean over the pixels
(or latents, or cells of the critic) that belong to a clip.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from sora_jax.models.discriminator import Discriminator
from sora_jax.models.lpips import LPIPS
from sora_jax.models.partition import PARAMS
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.tasks import Task

# The adaptive weight is |g1| / (|g2| + _DELTA), at most _MOST: VQGAN's own figures.
_DELTA, _MOST = 1e-4, 1e4
# The data pipeline fills a clip's padding with black.
_BLACK = -1.0
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
  def adversarial(self) -> bool:
    """Whether there is a discriminator."""
    return self.loss_config.gan_weight > 0

  def init(self, key: Array) -> dict:
    """Initialises the params of all networks that are trained, on the least clips."""
    vae_key, discriminator_key = jax.random.split(key)
    frames, size = 1 + self.model.time_factor, self.model.space_factor
    video_BTHWC = jnp.zeros((1, frames, size, size, 3))
    params = {"vae": VAE(self.model).init(vae_key, video_BTHWC)["params"]}
    if self.adversarial:
      video_BTHWC = jnp.zeros((1, 5, 32, 32, 3))
      discriminator = self._discriminator(jnp.float32)
      variables = discriminator.init(discriminator_key, video_BTHWC)
      params["discriminator"] = variables["params"]
    return params

  def encode(self, params, video_BTHWC: Array) -> tuple[Array, Array]:
    """Returns the mean and the log-variance of the posterior."""
    return self._apply_vae(params, VAE.encode, video_BTHWC)

  def decode(self, params, latent_BTHWC: Array) -> Array:
    """Returns the video of a latent."""
    return self._apply_vae(params, VAE.decode, latent_BTHWC)

  def criticize(self, params, video_BTHWC: Array) -> Array:
    """Returns the discriminator's logits, one channel of the cells of a video."""
    discriminator = self._discriminator(self.dtype)
    variables = {"params": params["discriminator"]}
    return discriminator.apply(variables, video_BTHWC)[..., None]

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

  def _discriminator(self, dtype):
    config = self.loss_config
    sizes = config.discriminator_width, config.discriminator_depth
    return Discriminator(*sizes, dtype=dtype)


class _Clips(NamedTuple):
  """Real clips [B, T, H, W, 3] in [-1, 1], and 1 where they have pixels [.., 1]."""

  video_BTHWC: Array
  mask_BTHWC: Array

  def on_black(self, video_BTHWC: Array) -> Array:
    """Returns a video that is black where the clips are padded.

    Networks that judge thus see the same there, whatever was decoded.
    """
    return jnp.where(self.mask_BTHWC > 0, video_BTHWC, _BLACK)


def _loss(networks: _Networks, params, batch, key: Array, frozen=None):
  """Returns the total of all terms, the critic's own included, and the metrics.

  Stop-gradients keep the terms apart: the generator's does not reach the params of the
  discriminator, and the critic's does not reach those of the VAE.
  """
  config = networks.loss_config
  clips = _Clips(to_float(batch["video_THWC"]), valid_mask(batch))
  moments = networks.encode(params, clips.video_BTHWC)
  latent_BTHWC = _draw_latent(*moments, config.latent_noise, key)
  latent = _latent_loss(networks, moments, latent_mask(networks.model, batch))
  reconstruction = functools.partial(
    _reconstruction_loss, networks, clips, latent, frozen, key
  )
  if not networks.adversarial:
    return reconstruction(networks.decode(params, latent_BTHWC))

  generator = functools.partial(_generator_loss, networks, params, clips)
  if config.gan_adaptive:
    decoded_BTHWC, (total, metrics), generator_loss, scale = _balanced(
      lambda last: networks.decode(_with_last(params, last), latent_BTHWC),
      _last(params),
      reconstruction,
      generator,
    )
    metrics = {**metrics, "gan_scale": scale}
  else:
    decoded_BTHWC = networks.decode(params, latent_BTHWC)
    total, metrics = reconstruction(decoded_BTHWC)
    generator_loss, scale = generator(decoded_BTHWC), 1.0
  critic_loss = _critic_loss(networks, params, clips, decoded_BTHWC)
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
  kl = _masked_mean(_kl_divergence(*moments), mask_BTHWC)
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
  networks: _Networks, clips: _Clips, latent, frozen, key: Array, decoded_BTHWC
):
  """Returns (L1 + squared error + LPIPS + the terms of the latent, each of them).

  All but L1 are weighted in the sum. latent: what `_latent_loss` returns.
  """
  config = networks.loss_config
  video_BTHWC, mask_BTHWC = clips
  l1 = _masked_mean(jnp.abs(decoded_BTHWC - video_BTHWC), mask_BTHWC)
  total, metrics = l1 + latent[0], {"l1": l1, **latent[1]}
  if config.mse_weight > 0:
    metrics["mse"] = _masked_mean((decoded_BTHWC - video_BTHWC) ** 2, mask_BTHWC)
    total += config.mse_weight * metrics["mse"]
  if config.lpips_weight > 0:
    compared = clips.on_black(decoded_BTHWC), clips.on_black(video_BTHWC), mask_BTHWC
    metrics["lpips"] = networks.lpips(frozen, compared, jax.random.fold_in(key, 1))
    total += config.lpips_weight * metrics["lpips"]
  return total, metrics


def _generator_loss(networks: _Networks, params, clips: _Clips, decoded_BTHWC):
  """Returns the hinge loss of the VAE: how little the critic takes its clips for real.

  The gradient goes through the critic, but not to its params.
  """
  critic_params = jax.lax.stop_gradient(params)
  logit_BTHWC = networks.criticize(critic_params, clips.on_black(decoded_BTHWC))
  return -_masked_mean(logit_BTHWC, _cell_mask(networks, clips))


def _critic_loss(networks: _Networks, params, clips: _Clips, decoded_BTHWC):
  """Returns the hinge loss of the discriminator over real and decoded clips."""
  mask_cells = _cell_mask(networks, clips)

  def hinge(sign, video_BTHWC):
    shown_BTHWC = clips.on_black(jax.lax.stop_gradient(video_BTHWC))
    logit_BTHWC = networks.criticize(params, shown_BTHWC)
    return _masked_mean(jax.nn.relu(1.0 - sign * logit_BTHWC), mask_cells)

  return hinge(1.0, clips.video_BTHWC) + hinge(-1.0, decoded_BTHWC)


def _cell_mask(networks: _Networks, clips: _Clips) -> Array:
  """Returns 1 where the first pixel of a cell of the discriminator is the clip's."""
  cells = slice(None, None, 2**networks.loss_config.discriminator_depth)
  return clips.mask_BTHWC[:, cells, cells, cells]


def _evaluate(networks: _Networks, params, batch, key: Array, frozen=None) -> dict:
  """Returns the PSNR, and with frozen params the LPIPS, of decoded clips.

  Also the effective rank of the latents: of how many channels they would have as much
  to say if none repeated another, see evaluation/vae_health.py. The posterior's mean is
  decoded, so that no noise is in the figures; key only chooses the frames of LPIPS.
  """
  clips = _Clips(to_float(batch["video_THWC"]), valid_mask(batch))
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


def _mean_psnr(video_BTHWC, clips: _Clips) -> Array:
  """Returns the mean PSNR in dB over the clips that have pixels, of these alone."""
  axes = tuple(range(1, 5))
  squared_BTHWC = (video_BTHWC - clips.video_BTHWC) ** 2
  pixels_B = jnp.maximum(jnp.sum(clips.mask_BTHWC, axes) * 3, 1.0)
  mse_B = jnp.sum(squared_BTHWC * clips.mask_BTHWC, axes) / pixels_B
  # The range of values is 2, and an exact copy counts as 100 dB and not as infinite.
  psnr_B = 10.0 * jnp.log10(4.0 / jnp.maximum(mse_B, 1e-10))
  real_B = jnp.sum(clips.mask_BTHWC, axes) > 0
  return jnp.sum(psnr_B * real_B) / jnp.maximum(jnp.sum(real_B), 1)


def to_float(video_u8: Array) -> Array:
  """Returns uint8 pixels as float32 in [-1, 1]."""
  return video_u8.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: Array) -> Array:
  """Returns pixels in [-1, 1] as uint8, clipped and rounded; it inverts `to_float`."""
  return jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def valid_mask(batch) -> Array:
  """Returns 1 where a padded clip has pixels: float32 [B, T, H, W, 1].

  batch: with `video_THWC` [B, T, H, W, 3] and `valid_3`, the (T, H, W) that each clip
    fills from its first corner on.
  """
  T, H, W = batch["video_THWC"].shape[1:4]
  valid_B3 = batch["valid_3"]
  t = jnp.arange(T)[None, :] < valid_B3[:, :1]
  h = jnp.arange(H)[None, :] < valid_B3[:, 1:2]
  w = jnp.arange(W)[None, :] < valid_B3[:, 2:]
  mask = t[:, :, None, None] & h[:, None, :, None] & w[:, None, None, :]
  return mask[..., None].astype(jnp.float32)


def _masked_mean(value_BTHWC, mask_BTHWC):
  """Returns the mean of the values whose mask, of one channel, is 1; 0 without any."""
  weight = jnp.sum(mask_BTHWC) * value_BTHWC.shape[-1]
  return jnp.sum(value_BTHWC * mask_BTHWC) / jnp.maximum(weight, 1.0)


def noise_like(latent_BTHWC, key: Array):
  """Returns noise with the deviation that each channel has in the batch.

  Each clip gets a random share of it between 0 and 1.
  """
  share_key, noise_key = jax.random.split(jax.random.fold_in(key, 2))
  share_B = jax.random.uniform(share_key, latent_BTHWC.shape[:1])
  deviation_C = jnp.std(jax.lax.stop_gradient(latent_BTHWC), axis=(0, 1, 2, 3))
  noise_BTHWC = deviation_C * jax.random.normal(noise_key, latent_BTHWC.shape)
  return share_B[:, None, None, None, None] * noise_BTHWC


def choose_frames(clips, key: Array, count: int):
  """Takes `count` random frames of each clip, alike from all arrays; 0 takes all.

  clips: arrays [B, T, H, W, ...], the last of them their mask. Where a clip is padded
  in time, its own frames come first: a shorter one gives all it has.
  """
  if not 0 < count < clips[-1].shape[1]:
    return clips
  padding_BT = 1.0 - clips[-1][:, :, 0, 0, 0]
  # A random order in which frames of the padding, at 1 and more, come last.
  order_BT = jax.random.uniform(key, padding_BT.shape) + padding_BT
  index_BT = jnp.argsort(order_BT, axis=1)[:, :count]
  index = index_BT[:, :, None, None, None]
  return [jnp.take_along_axis(clip, index, axis=1) for clip in clips]


def _balanced(decode, last, reconstruction, generator):
  """Decodes, and weighs the generator's term against the reconstruction's.

  The weight is the ratio of the norms of their gradients at the decoder's last kernel
  (VQGAN, arXiv:2012.09841, equation 7). Both go back to the decoded clip once; from
  there one step gives those at the kernel, and they are handed on to the params, so
  that nothing is differentiated twice.

  Args:
    decode: last kernel -> clip.
    last: the decoder's last kernel.
    reconstruction: clip -> (loss, metrics).
    generator: clip -> loss.

  Returns:
    The clip, what reconstruction and generator return, and the weight.
  """
  decoded, to_last = jax.vjp(decode, last)
  still = jax.lax.stop_gradient(decoded)
  (total, metrics), ours = jax.value_and_grad(reconstruction, has_aux=True)(still)
  generator_loss, theirs = jax.value_and_grad(generator)(still)

  def norm(gradient):
    return jnp.linalg.norm(jax.lax.stop_gradient(to_last(gradient)[0]))

  scale = jnp.clip(norm(ours) / (norm(theirs) + _DELTA), 0.0, _MOST)
  # The terms below are 0, but their gradient is the one that is known already.
  total += jnp.vdot(ours, decoded - still)
  generator_loss += jnp.vdot(theirs, decoded - still)
  return decoded, (total, metrics), generator_loss, scale


def _last(params):
  """Returns the kernel of the decoder's last layer."""
  return params["vae"]["decoder"]["conv_out"]["conv"]["kernel"]


def _with_last(params, kernel):
  """Returns the params with another kernel in the decoder's last layer."""
  decoder = params["vae"]["decoder"]
  conv = {**decoder["conv_out"]["conv"], "kernel": kernel}
  decoder = {**decoder, "conv_out": {"conv": conv}}
  return {"vae": {**params["vae"], "decoder": decoder}}


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
    rules += [
      (r"discriminator/conv_\d+/kernel", P(None, None, None, None, PARAMS)),
      (r"discriminator/head/kernel", P(None, None, None, PARAMS)),
      (r"discriminator/.*/(bias|scale)", P()),
    ]
  return rules


def latent_mask(model: VAEConfig, batch) -> Array:
  """Returns 1 where a latent's pixels are all valid: float32 [B, t, h, w, 1]."""
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
