"""A trained VAE as other stages use it: pixels to normalised latents and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax import checkpoint, sharding
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.tasks import vae as vae_task


class Autoencoder:
  """Jitted encode and decode of a model folder, sharded over the batch.

  Latents leave and enter normalised: (posterior mean - latent mean) / latent std per
  channel, with the statistics that are stored with the model.
  """

  def __init__(self, folder, mesh, dtype=jnp.float32):
    """Raises ValueError if the folder holds no complete VAE."""
    params, meta = checkpoint.load_model(folder)
    if "latent_mean" not in meta:
      raise ValueError(f"{folder}: not a VAE (no latent statistics in model.json)")
    self.config = VAEConfig(**from_json(meta["model"]))
    self.mesh, self.meta = mesh, meta
    replicated = NamedSharding(mesh, PartitionSpec())
    self._params = jax.device_put(params, replicated)
    mean = np.asarray(meta["latent_mean"], np.float32)
    std = np.asarray(meta["latent_std"], np.float32)
    vae = VAE(self.config, dtype)

    @functools.partial(jax.jit, out_shardings=replicated)
    def encode(params, video_BTHWC):
      video_BTHWC = vae_task.to_float(video_BTHWC)
      latent, _ = vae.apply({"params": params}, video_BTHWC, method=VAE.encode)
      return (latent - mean) / std

    @functools.partial(jax.jit, out_shardings=replicated)
    def decode(params, latent_BTHWC):
      latent_BTHWC = latent_BTHWC * std + mean
      video = vae.apply({"params": params}, latent_BTHWC, method=VAE.decode)
      return vae_task.to_uint8(video)

    self._encode, self._decode = encode, decode

  def encode(self, video_BTHWC: np.ndarray) -> np.ndarray:
    """uint8 [B, T, H, W, 3] -> normalised latents, float32 [B, t, h, w, C].

    B must divide by the mesh. Compiles once for each shape.
    """
    return self._apply(self._encode, video_BTHWC)

  def decode(self, latent_BTHWC: np.ndarray) -> np.ndarray:
    """Normalised latents -> uint8 video; B must divide by the mesh."""
    return self._apply(self._decode, latent_BTHWC)

  def batch_size(self, wanted: int) -> int:
    """Smallest multiple of the mesh's batch shards that is at least `wanted`."""
    ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    return -(-wanted // ways) * ways

  def _apply(self, function, x):
    with jax.set_mesh(self.mesh):
      x = sharding.shard_batch({"x": x}, self.mesh)["x"]
      return np.asarray(jax.device_get(function(self._params, x)))


def from_json(config: dict) -> dict:
  """JSON's lists back to tuples."""
  return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
