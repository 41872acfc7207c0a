"""What the VAE learns: L1, KL, and by config squared error, LPIPS and a critic."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from sora_jax.models.discriminator import Discriminator
from sora_jax.models.lpips import LPIPS
from sora_jax.models.partition import PARAMS
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.tasks import Task

# Of the adaptive weight, as VQGAN's authors have them.
_DELTA, _MOST = 1e-4, 1e4
# A clip's padding, as the data pipeline fills it.
_BLACK = -1.0


@dataclasses.dataclass(frozen=True)
class VAELossConfig:
  """Weights of the terms; L1 has weight 1.

  Attributes:
    mse_weight: of the mean squared error. It looks at the few pixels that are far off,
      such as edges that move, which L1 weighs like the many that are nearly right.
    latent_noise: most noise on the latents that the decoder learns from, relative to
      their standard deviation; each clip gets a random share. So it learns to draw a
      steady video of latents that are not quite right, as generated ones are.
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
    if self.lpips_frames < 0:
      raise ValueError(f"vae lpips_frames {self.lpips_frames} is less than 0, for all")


def make(
  model: VAEConfig,
  loss_config: VAELossConfig,
  dtype: jnp.dtype = jnp.float32,
  lpips_params=None,
) -> Task:
  """The task over batches of `data.clip_dataset.ClipDataset`.

  lpips_params: as of `weights.lpips.load`, where the loss has LPIPS; they stay frozen.
  """
  vae = VAE(model, dtype)
  critic_sizes = loss_config.discriminator_width, loss_config.discriminator_depth
  discriminator = Discriminator(*critic_sizes, dtype=dtype)
  adversarial = loss_config.gan_weight > 0

  def init(key: Array):
    vae_key, discriminator_key = jax.random.split(key)
    frames = 1 + model.time_factor
    video = jnp.zeros((1, frames, model.space_factor, model.space_factor, 3))
    params = {"vae": VAE(model).init(vae_key, video)["params"]}
    if adversarial:
      video = jnp.zeros((1, 5, 32, 32, 3))
      params["discriminator"] = Discriminator(*critic_sizes).init(
        discriminator_key, video
      )["params"]
    return params

  def apply(params, method, x):
    return vae.apply({"params": params["vae"]}, x, method=method)

  def critic(params, video_BTHWC):
    logit_BTHW = discriminator.apply({"params": params["discriminator"]}, video_BTHWC)
    return logit_BTHW[..., None]

  def lpips(frozen, clips, key):
    network = LPIPS(dtype=dtype)
    clips = choose_frames(clips, key, loss_config.lpips_frames)
    x, y, mask = (clip.reshape(-1, *clip.shape[2:]) for clip in clips)
    distance = network.apply({"params": frozen["lpips"]}, x, y, mask[..., 0])
    real = mask[:, 0, 0, 0]
    return jnp.sum(distance * real) / jnp.maximum(jnp.sum(real), 1.0)

  def loss(params, batch, key: Array, frozen=None):
    video_BTHWC = to_float(batch["video_THWC"])
    mask_BTHWC = valid_mask(batch)
    mean_BTHWC, logvar_BTHWC = apply(params, VAE.encode, video_BTHWC)
    eps_BTHWC = jax.random.normal(key, mean_BTHWC.shape)
    latent_BTHWC = mean_BTHWC + jnp.exp(0.5 * logvar_BTHWC) * eps_BTHWC
    if loss_config.latent_noise > 0:
      latent_BTHWC += loss_config.latent_noise * noise_like(latent_BTHWC, key)
    kl_BTHWC = 0.5 * (mean_BTHWC**2 + jnp.exp(logvar_BTHWC) - 1.0 - logvar_BTHWC)
    kl = _masked_mean(kl_BTHWC, latent_mask(model, batch))

    def on_black(video_BTHWC):
      # Networks that judge see the same where there is no clip, whatever is there.
      return jnp.where(mask_BTHWC > 0, video_BTHWC, _BLACK)

    def reconstruction(decoded_BTHWC):
      l1 = _masked_mean(jnp.abs(decoded_BTHWC - video_BTHWC), mask_BTHWC)
      total, metrics = l1 + loss_config.kl_weight * kl, {"l1": l1, "kl": kl}
      if loss_config.mse_weight > 0:
        metrics["mse"] = _masked_mean((decoded_BTHWC - video_BTHWC) ** 2, mask_BTHWC)
        total += loss_config.mse_weight * metrics["mse"]
      if loss_config.lpips_weight > 0:
        clips = on_black(decoded_BTHWC), on_black(video_BTHWC), mask_BTHWC
        metrics["lpips"] = lpips(frozen, clips, jax.random.fold_in(key, 1))
        total += loss_config.lpips_weight * metrics["lpips"]
      return total, metrics

    if not adversarial:
      return reconstruction(apply(params, VAE.decode, latent_BTHWC))

    cells = slice(None, None, 2**loss_config.discriminator_depth)
    mask_cells = mask_BTHWC[:, cells, cells, cells]

    def generator(decoded_BTHWC):
      logit = critic(jax.lax.stop_gradient(params), on_black(decoded_BTHWC))
      return -_masked_mean(logit, mask_cells)

    if loss_config.gan_adaptive:
      decoded_BTHWC, (total, metrics), feeling, scale = _balanced(
        lambda last: apply(_with_last(params, last), VAE.decode, latent_BTHWC),
        _last(params),
        reconstruction,
        generator,
      )
      metrics = {**metrics, "gan_scale": scale}
    else:
      decoded_BTHWC = apply(params, VAE.decode, latent_BTHWC)
      total, metrics = reconstruction(decoded_BTHWC)
      feeling, scale = generator(decoded_BTHWC), 1.0

    def hinge(sign, video_BTHWC):
      logit = critic(params, on_black(jax.lax.stop_gradient(video_BTHWC)))
      return _masked_mean(jax.nn.relu(1.0 - sign * logit), mask_cells)

    judging = hinge(1.0, video_BTHWC) + hinge(-1.0, decoded_BTHWC)
    on = (batch["step"] >= loss_config.gan_start).astype(jnp.float32)
    total += loss_config.gan_weight * on * scale * feeling + 0.5 * judging
    return total, {**metrics, "gan_generator": feeling, "gan_critic": judging}

  def evaluate(params, batch, key: Array, frozen=None):
    # The posterior's mean is decoded: no noise.
    video_BTHWC = to_float(batch["video_THWC"])
    decoded_BTHWC = apply(params, VAE.decode, apply(params, VAE.encode, video_BTHWC)[0])
    mask_BTHWC = valid_mask(batch)
    squared = (jnp.clip(decoded_BTHWC, -1.0, 1.0) - video_BTHWC) ** 2
    axes = tuple(range(1, 5))
    pixels_B = jnp.maximum(jnp.sum(mask_BTHWC, axes) * 3, 1.0)
    mse_B = jnp.sum(squared * mask_BTHWC, axes) / pixels_B
    psnr_B = 10.0 * jnp.log10(4.0 / jnp.maximum(mse_B, 1e-10))
    real_B = jnp.sum(mask_BTHWC, axes) > 0
    metrics = {"psnr": jnp.sum(psnr_B * real_B) / jnp.maximum(jnp.sum(real_B), 1)}
    if frozen is not None:
      clips = (
        jnp.where(mask_BTHWC > 0, jnp.clip(clip, -1.0, 1.0), _BLACK)
        for clip in (decoded_BTHWC, video_BTHWC)
      )
      metrics["lpips"] = lpips(frozen, (*clips, mask_BTHWC), key)
    return metrics

  frozen = None
  if loss_config.lpips_weight > 0:
    frozen = {"lpips": lpips_params}
  return Task(init, loss, evaluate, frozen)


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


def noise_like(latent_BTHWC, key: Array):
  """Noise with the deviation of each channel in the batch; each clip has a share."""
  share_key, noise_key = jax.random.split(jax.random.fold_in(key, 2))
  share_B = jax.random.uniform(share_key, latent_BTHWC.shape[:1])
  deviation_C = jnp.std(jax.lax.stop_gradient(latent_BTHWC), axis=(0, 1, 2, 3))
  noise_BTHWC = deviation_C * jax.random.normal(noise_key, latent_BTHWC.shape)
  return share_B[:, None, None, None, None] * noise_BTHWC


def choose_frames(clips, key: Array, count: int):
  """The same `count` different random frames of each of the clips; 0 = all frames.

  clips: arrays [B, T, H, W, ...], the last of them their mask. Where a clip is padded
  in time, its own frames come first: a shorter one gives all it has.
  """
  if not 0 < count < clips[-1].shape[1]:
    return clips
  padding_BT = 1.0 - clips[-1][:, :, 0, 0, 0]
  order_BT = jax.random.uniform(key, padding_BT.shape) + padding_BT
  index_BT = jnp.argsort(order_BT, axis=1)[:, :count]
  index = index_BT[:, :, None, None, None]
  return [jnp.take_along_axis(clip, index, axis=1) for clip in clips]


def _balanced(decode, last, reconstruction, generator):
  """Decodes, and weighs the generator's term against the reconstruction's.

  The weight is the ratio of the norms of their gradients at the decoder's last kernel.
  Both go back to the decoded clip once; from there one step gives those at the kernel,
  and they are handed on to the params, so that nothing is differentiated twice.

  Args:
    decode: last kernel -> clip. last: that kernel.
    reconstruction: clip -> (loss, metrics). generator: clip -> loss.

  Returns:
    The clip, what reconstruction and generator give, and the weight.
  """
  decoded, to_last = jax.vjp(decode, last)
  still = jax.lax.stop_gradient(decoded)
  (total, metrics), ours = jax.value_and_grad(reconstruction, has_aux=True)(still)
  feeling, theirs = jax.value_and_grad(generator)(still)

  def norm(gradient):
    return jnp.linalg.norm(jax.lax.stop_gradient(to_last(gradient)[0]))

  scale = jnp.clip(norm(ours) / (norm(theirs) + _DELTA), 0.0, _MOST)
  # 0, and the gradient that is known already.
  total += jnp.vdot(ours, decoded - still)
  feeling += jnp.vdot(theirs, decoded - still)
  return decoded, (total, metrics), feeling, scale


def _last(params):
  return params["vae"]["decoder"]["conv_out"]["conv"]["kernel"]


def _with_last(params, kernel):
  """Params with another kernel in the decoder's last layer."""
  decoder = params["vae"]["decoder"]
  conv = {**decoder["conv_out"]["conv"], "kernel": kernel}
  decoder = {**decoder, "conv_out": {"conv": conv}}
  return {"vae": {**params["vae"], "decoder": decoder}}


# Of the params that `make` gets for LPIPS, below "lpips".
LPIPS_RULES = (
  (r"lpips/vgg/.*/kernel", P(None, None, None, PARAMS)),
  (r"lpips/(vgg/.*/bias|head_\d)", P()),
)


def sharding_rules(model: VAEConfig, loss_config: VAELossConfig):
  """Sharding of the params: the output channels of every kernel over fsdp."""
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
