"""A trained VAE as other stages use it: pixels to normalised latents and back."""

import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.encoders import tiling
from sora_jax.models.meta import VAEMeta
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.models.vae_stream import decode_chunk, encode_chunk
from sora_jax.packing import time_grid
from sora_jax.runtime import checkpoint, sharding, shipped
from sora_jax.runtime.residency import Residency
from sora_jax.tasks import clip_pixels

# Frames that the encoder is given at once: one size, for few compilations.
_CHUNK = 32


class NonFiniteError(ValueError):
  """Decoded pixels are NaN or infinite, which as uint8 would be black."""


class Frames:
  """Decoded uint8 video [B, T, H, W, 3], which may still be under way.

  np.asarray waits for it, and raises NonFiniteError for pixels that are no numbers.
  """

  def __init__(self, video_BTHWC: Array, finite: Array):
    self._video_BTHWC, self._finite = video_BTHWC, finite
    self.shape, self.dtype = video_BTHWC.shape, video_BTHWC.dtype

  def __len__(self):
    return self.shape[0]

  def __array__(self, dtype=None, copy=None):
    if not self._finite:
      raise NonFiniteError(
        "the VAE has decoded pixels that are NaN or infinite: its model is damaged, or "
        "the latents are far from any that it was trained on"
      )
    return np.asarray(self._video_BTHWC, dtype)


class Autoencoder:
  """Jitted encode and decode of a model folder, sharded over the mesh.

  The batch goes over `data` and `fsdp`, the height of frames over `context`, so that
  several devices can share one large clip.

  Latents leave and enter normalised: (posterior mean - latent mean) / latent std per
  channel, with the statistics that are stored with the model.
  """

  def __init__(
    self,
    folder,
    mesh: jax.sharding.Mesh | None = None,
    dtype=jnp.float32,
    residency: Residency | None = None,
  ):
    """Loads a VAE.

    Args:
      folder: of the model, or of a run with vae/model in it; or the name of a
        checkpoint that comes with the package.
      mesh: that clips lie on; all local devices share a clip if None.
      dtype: of the computation.
      residency: that says when the params are on the devices; always without it.

    Raises:
      ValueError: if the folder holds no complete VAE.
    """
    folder = shipped.find(folder)
    inside = folder / "vae" / "model"
    folder = inside if inside.is_dir() else folder
    mesh = mesh or sharding.sampling_mesh(1)
    meta = VAEMeta.from_json(checkpoint.load_meta(folder), folder)
    self.config, self.mesh, self.meta = meta.model, mesh, meta
    self.residency = residency or Residency()

    def load():
      params, _ = checkpoint.load_model(folder)
      return jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    self.residency.put("vae", load)
    mean = np.asarray(meta.latent_mean, np.float32)
    std = np.asarray(meta.latent_std, np.float32)
    self._encode, self._decode = programs(self.config, mean, std, mesh, dtype)

  def encode(self, video_BTHWC: np.ndarray) -> np.ndarray:
    """uint8 [B, T, H, W, 3] -> normalised latents, float32 [B, t, h, w, C].

    B must divide by the mesh. Compiles once for each shape.
    """
    return np.asarray(self._apply(self._encode, video_BTHWC)[0])

  def decode(self, latent_BTHWC: np.ndarray) -> np.ndarray:
    """Normalised latents -> uint8 video; B must divide by the mesh.

    Raises:
      NonFiniteError: for pixels that are NaN or infinite.
    """
    return np.asarray(Frames(*self._apply(self._decode, latent_BTHWC)[0]))

  def encode_video(self, video_THWC: np.ndarray) -> np.ndarray:
    """One video of 1 + 4k frames -> latents [t, h, w, C], chunk by chunk."""
    frames = len(video_THWC)
    if frames > 1:
      # Padding is exact, as the encoder is causal, and saves compilations.
      over = -(frames - 1) % _CHUNK
      video_THWC = np.pad(video_THWC, ((0, over), (0, 0), (0, 0), (0, 0)), mode="edge")
    copies_BTHWC = np.repeat(video_THWC[None], self.batch_size(1), axis=0)
    chunks = self.encode_stream(in_chunks(copies_BTHWC, _CHUNK))
    latent_THWC = np.concatenate([np.asarray(chunk)[0] for chunk in chunks])
    return latent_THWC[: time_grid.latent_frames(frames)]

  def encode_stream(
    self, chunks: Iterable[np.ndarray], tile: int | None = None
  ) -> Iterator[Array]:
    """Latents of a video that comes in chunks, as `encode` of the whole would give.

    Whole frames are still being computed when they are handed out: np.asarray waits.

    Args:
      chunks: uint8 [B, T, H, W, 3], the first of 1 + 4k frames, later ones of 4k; see
        `in_chunks`. Memory does not grow with their number.
      tile: pixels a side of the tiles that frames are cut into, where they are larger.
        Neighbours overlap by a quarter at least and are blended, so that the latents
        are nearly those of the whole frame.

    Raises:
      ValueError: for a chunk off the grid, and a tile that is no multiple of the space
        factor, or of one latent only.
    """
    return map(self._by_parts(self._encode, tile, self.config.space_factor, 1), chunks)

  def decode_stream(
    self, chunks: Iterable[np.ndarray], tile: int | None = None
  ) -> Iterator[Frames | np.ndarray]:
    """uint8 video of latents that come in chunks of any sizes; see `encode_stream`."""
    return map(self.decoder(tile), chunks)

  def decoder(
    self, tile: int | None = None
  ) -> Callable[[np.ndarray], Frames | np.ndarray]:
    """A function of the latents of one video, part by part -> uint8 video of each.

    It keeps what the causal decoder needs of the parts before; `tile` as in
    `encode_stream`. Its result may still be under way: np.asarray waits, see `Frames`.
    """
    return self._by_parts(self._decode, tile, 1, self.config.space_factor)

  def batch_size(self, wanted: int) -> int:
    """Smallest multiple of the mesh's batch shards that is at least `wanted`."""
    return sharding.whole_batch(wanted, self.mesh)

  def _by_parts(self, step, tile, scale_in, scale_out):
    tiles, caches = None, []

    def apply(part):
      nonlocal tiles, caches
      # A copy: it may be read after its result was handed out.
      part = np.array(part)
      if tiles is None:
        tiles = self._tiles(part.shape, tile, scale_in)
        caches = [None] * len(tiles)
      outs = []
      for i, cut in enumerate(tiles.cut(part, scale_in)):
        out, caches[i] = self._apply(step, cut, caches[i], keep=True)
        outs.append(Frames(*out) if isinstance(out, tuple) else out)
      if len(outs) == 1:
        return outs[0]
      return tiles.blend([np.asarray(out) for out in outs], scale_out)

    return apply

  def _tiles(self, shape, tile, scale):
    factor = self.config.space_factor
    if tile is not None and tile % factor:
      raise ValueError(f"a tile of {tile} pixels is not a multiple of {factor}")
    if shape[2] % scale or shape[3] % scale:
      self.config.latent_shape(1, *shape[2:4])
    grid = (shape[2] // scale, shape[3] // scale)
    return tiling.plan(grid, max(2, *grid) if tile is None else tile // factor)

  def _apply(self, step, x, cache=None, keep=False):
    with jax.set_mesh(self.mesh):
      x = sharding.shard_alike({"x": x}, self.mesh)["x"]
      return step(self.residency.get("vae"), x, cache, keep)


def programs(config: VAEConfig, mean, std, mesh, dtype=jnp.float32):
  """Jitted (encode, decode), each (params, x, cache=None, keep=False) -> (y, cache).

  y: latents; of decode a uint8 video, and whether all its pixels were finite before.
  mean, std: of the latents, by channel. keep: return what the next chunk needs.
  """
  vae = VAE(config, dtype)

  def shard(x_BTHWC):
    rows = "context" if x_BTHWC.shape[2] >= mesh.shape["context"] else None
    spec = PartitionSpec(sharding.BATCH_AXES, None, rows)
    return jax.lax.with_sharding_constraint(x_BTHWC, NamedSharding(mesh, spec))

  def shard_evenly(x_BTHWC):
    # Inside a program a height may be shared unevenly, but not between two of them.
    divides = x_BTHWC.shape[2] % mesh.shape["context"] == 0
    spec = PartitionSpec(sharding.BATCH_AXES, None, "context" if divides else None)
    return jax.lax.with_sharding_constraint(x_BTHWC, NamedSharding(mesh, spec))

  # A donated cache is overwritten by the next one.
  jit = functools.partial(
    jax.jit,
    out_shardings=(NamedSharding(mesh, PartitionSpec()), None),
    static_argnames="keep",
    donate_argnames="cache",
  )

  @jit
  def encode(params, video_BTHWC, cache=None, keep=False):
    video_BTHWC = clip_pixels.to_float(shard(video_BTHWC))
    if keep:
      (latent, _), cache = encode_chunk(vae, params, video_BTHWC, cache)
    else:
      latent, _ = vae.apply({"params": params}, video_BTHWC, method=VAE.encode)
    return (latent - mean) / std, jax.tree.map(shard_evenly, cache)

  @jit
  def decode(params, latent_BTHWC, cache=None, keep=False):
    latent_BTHWC = shard(latent_BTHWC) * std + mean
    if keep:
      video, cache = decode_chunk(vae, params, latent_BTHWC, cache)
    else:
      video = vae.apply({"params": params}, latent_BTHWC, method=VAE.decode)
    shown = clip_pixels.to_uint8(video), jnp.isfinite(video).all()
    return shown, jax.tree.map(shard_evenly, cache)

  return encode, decode


def in_chunks(x_BTHWC: np.ndarray, size: int) -> Iterator[np.ndarray]:
  """Cuts a video or latent for streaming: 1 + size frames, size, ..., the remainder."""
  yield x_BTHWC[:, : 1 + size]
  for start in range(1 + size, x_BTHWC.shape[1], size):
    yield x_BTHWC[:, start : start + size]
