"""The VAE chunk by chunk: equal to the whole pass, in the memory of one chunk.

The cache between two chunks is a plain tree: of each causal convolution its last frames
of input. Chunks of one size compile once, besides the first one, which holds the first
frame, and a shorter one at the end.
"""

from jax import Array

from sora_jax.models.vae import VAE


def encode_chunk(vae: VAE, params, video_BTHWC: Array, cache=None):
  """((mean, log-variance), cache) of the next frames of a video; see `VAE.encode`.

  Args:
    video_BTHWC: the first chunk has 1 + 4k frames, later ones 4k (4: time factor).
    cache: what the chunk before gave; None begins a video.

  Raises:
    ValueError: if the chunk's size is off the grid.
  """
  factor, frames = vae.config.time_factor, video_BTHWC.shape[1]
  if cache is not None and (frames % factor or not frames):
    raise ValueError(
      f"a chunk of {frames} frames: after the first, chunks have a multiple of {factor}"
    )
  return _apply(vae, params, VAE.encode, video_BTHWC, cache)


def decode_chunk(vae: VAE, params, latent_BTHWC: Array, cache=None):
  """(video, cache) of the next latents, any number of them; see `VAE.decode`.

  t latents give 1 + 4 (t - 1) frames in the first chunk, 4t in later ones.
  """
  return _apply(vae, params, VAE.decode, latent_BTHWC, cache)


def _apply(vae, params, method, x, cache):
  first = cache is None
  variables = {"params": params} if first else {"params": params, "cache": cache}
  out, kept = vae.apply(variables, x, first, method=method, mutable=["cache"])
  return out, kept.get("cache", {})
