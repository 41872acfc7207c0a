"""Adversarial terms of the VAE's loss: a critic of clips, and what it costs whom.

Stop-gradients keep the terms apart: the generator's does not reach the params of the
critic, and the critic's does not reach those of the VAE.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from sora_jax.models.discriminator import Discriminator
from sora_jax.models.partition import PARAMS
from sora_jax.tasks.clip_pixels import Clips, masked_mean

# The adaptive weight is |g1| / (|g2| + _DELTA), at most _MOST: VQGAN's own figures.
_DELTA, _MOST = 1e-4, 1e4
# Sharding of the critic's params.
RULES = (
  (r"discriminator/conv_\d+/kernel", P(None, None, None, None, PARAMS)),
  (r"discriminator/head/kernel", P(None, None, None, PARAMS)),
  (r"discriminator/.*/(bias|scale)", P()),
)


@dataclasses.dataclass(frozen=True)
class Critic:
  """The discriminator, as functions of the task's params."""

  width: int
  depth: int
  dtype: jnp.dtype

  def init(self, key: Array) -> dict:
    """Initialises its own params, in float32."""
    video_BTHWC = jnp.zeros((1, 5, 32, 32, 3))
    return self._network(jnp.float32).init(key, video_BTHWC)["params"]

  def logits(self, params, video_BTHWC: Array) -> Array:
    """Returns its logits, one channel of the cells of a video."""
    variables = {"params": params["discriminator"]}
    return self._network(self.dtype).apply(variables, video_BTHWC)[..., None]

  def cell_mask(self, clips: Clips) -> Array:
    """Returns 1 where the first pixel of a cell is the clip's."""
    cells = slice(None, None, 2**self.depth)
    return clips.mask_BTHWC[:, cells, cells, cells]

  def _network(self, dtype):
    return Discriminator(self.width, self.depth, dtype=dtype)


def generator_loss(critic: Critic, params, clips: Clips, decoded_BTHWC):
  """Returns the hinge loss of the VAE: how little the critic takes its clips for real.

  The gradient goes through the critic, but not to its params.
  """
  critic_params = jax.lax.stop_gradient(params)
  logit_BTHWC = critic.logits(critic_params, clips.on_black(decoded_BTHWC))
  return -masked_mean(logit_BTHWC, critic.cell_mask(clips))


def critic_loss(critic: Critic, params, clips: Clips, decoded_BTHWC):
  """Returns the hinge loss of the discriminator over real and decoded clips."""
  mask_cells = critic.cell_mask(clips)

  def hinge(sign, video_BTHWC):
    shown_BTHWC = clips.on_black(jax.lax.stop_gradient(video_BTHWC))
    logit_BTHWC = critic.logits(params, shown_BTHWC)
    return masked_mean(jax.nn.relu(1.0 - sign * logit_BTHWC), mask_cells)

  return hinge(1.0, clips.video_BTHWC) + hinge(-1.0, decoded_BTHWC)


def balanced(decode, last, reconstruction, generator):
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


def last_kernel(params):
  """Returns the kernel of the decoder's last layer."""
  return params["vae"]["decoder"]["conv_out"]["conv"]["kernel"]


def with_last_kernel(params, kernel):
  """Returns the params with another kernel in the decoder's last layer."""
  decoder = params["vae"]["decoder"]
  conv = {**decoder["conv_out"]["conv"], "kernel": kernel}
  decoder = {**decoder, "conv_out": {"conv": conv}}
  return {"vae": {**params["vae"], "decoder": decoder}}
