"""Classifier-free guidance of a prediction by the one without the caption; pure."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from sora_jax.diffusion.solvers import Options


def _row_mean(x_BL):
  return jnp.broadcast_to(jnp.mean(x_BL, axis=1, keepdims=True), x_BL.shape)


def guide(
  conditional: Array,
  unconditional: Array,
  scale,
  options: Options | None = None,
  clip_mean: Callable[[Array], Array] = _row_mean,
) -> Array:
  """Classifier-free guidance of predictions of a target [B, L, P].

  Args:
    conditional, unconditional: predictions with and without the caption.
    scale: strength, broadcasts against them; 1 = none.
    options: for guidance_rescale and cfg_zero; None: neither.
    clip_mean: [B, L] -> mean over the clip of each token, [B, L]; clips in one row do
      not change each other. By default a row is one clip.
  """
  options = options or Options()
  if options.cfg_zero:
    product = clip_mean(jnp.mean(conditional * unconditional, axis=-1))
    square = clip_mean(jnp.mean(jnp.square(unconditional), axis=-1))
    unconditional = (product / jnp.maximum(square, 1e-12))[..., None] * unconditional
  guided = unconditional + scale * (conditional - unconditional)
  if options.guidance_rescale:

    def deviation(x_BLP):
      mean_BL = clip_mean(jnp.mean(x_BLP, axis=-1))
      square_BL = jnp.mean(jnp.square(x_BLP - mean_BL[..., None]), axis=-1)
      return jnp.sqrt(clip_mean(square_BL))[..., None]

    rescaled = guided * deviation(conditional) / jnp.maximum(deviation(guided), 1e-12)
    guided += options.guidance_rescale * (rescaled - guided)
  return guided
