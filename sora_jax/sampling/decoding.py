"""Videos of latents, those of a size together."""

import numpy as np

from sora_jax.data.buckets import frame_bucket
from sora_jax.encoders.autoencoder import Autoencoder, NonFiniteError
from sora_jax.sampling.conditioning import Request


class NonFiniteSample(ValueError):
  """What was sampled is NaN or infinite, which would be written as black."""


def decode(autoencoder: Autoencoder, latents, requests) -> list[np.ndarray]:
  """Videos of latents, those of a size together."""
  groups: dict[tuple, list[int]] = {}
  for i, request in enumerate(requests):
    key = (request.height, request.width, request.frames == 1)
    groups.setdefault(key, []).append(i)
  videos = {}
  for group in groups.values():
    # One length for all of a size: the decoder is causal, so padding is exact.
    frames = frame_bucket(max(requests[i].frames for i in group))
    length = autoencoder.config.latent_shape(
      frames, requests[group[0]].height, requests[group[0]].width
    )[0]
    size = autoencoder.batch_size(min(8, len(group)))
    for start in range(0, len(group), size):
      part = group[start : start + size]
      padded = [latents[i] for i in part] + [latents[part[0]]] * (size - len(part))
      batch = np.stack(
        [
          np.pad(x, ((0, length - len(x)), (0, 0), (0, 0), (0, 0)), mode="edge")
          for x in padded
        ]
      )
      try:
        decoded = autoencoder.decode(batch)
      except NonFiniteError as error:
        names = ", ".join(shown(requests[i]) for i in part)
        raise NonFiniteSample(f"{names}: {error}") from error
      for i, video_THWC in zip(part, decoded, strict=False):
        videos[i] = video_THWC[: requests[i].frames]
  return [videos[i] for i in range(len(requests))]


def shown(request: Request) -> str:
  """A request as messages name it."""
  return f"{request.prompt!r} (seed {request.seed})"
