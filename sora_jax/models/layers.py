"""Layers shared by the networks: norms, rotary positions, timestep embedding, MLP."""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from sora_jax.models import lora, partition, rounded_matmul


class RMSNorm(nn.Module):
  """Root-mean-square norm over the last axis with a learned scale, in float32.

  rope_half_split: that of the `Dense` layer whose output is normalised, so that the
    scale meets the channels in the order that they have there.
  """

  epsilon: float = 1e-6
  rope_half_split: int = 0

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    scale = in_halves(scale, self.rope_half_split)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
    return (y * scale).astype(x.dtype)


def dot_general(lhs, rhs, dimension_numbers, precision=None, shared=None, **kwargs):
  """Computes `lax.dot_general` for dense layers: rows [..., D] by a kernel [D, F].

  On CPU the rows are flattened: there XLA's gradients of a matmul over [B, L, D]
  transpose and copy; over [B * L, D] they are twice as fast. Elsewhere merging B and L
  would merge two sharded axes.

  Args:
    shared: dim of the kernel that lies over partition.PARAMS. Then its gradient, of
      rows [B, L, D] that lie as tokens do, is scattered as it is summed.
  """
  ((lhs_contract, rhs_contract), (lhs_batch, _)) = dimension_numbers
  dense = tuple(lhs_contract) == (lhs.ndim - 1,) and tuple(rhs_contract) == (0,)
  if shared is not None and _scatters(lhs.shape, rhs.shape[shared]):
    assert dense and not lhs_batch, dimension_numbers
    return _scattered_dot(lhs, rhs, shared)
  if partition.platform() != "cpu" or lhs_batch or not dense:
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, **kwargs)
  rows = lhs.reshape(-1, lhs.shape[-1])
  out = _rows_by_kernel(rows, rhs, precision, **kwargs)
  return out.reshape(*lhs.shape[:-1], *rhs.shape[1:])


def _rows_by_kernel(rows, kernel, precision=None, **kwargs):
  """Multiplies rows [R, D] by a kernel [D, ...] on CPU, of rounded inputs if wanted."""
  if rounded_matmul.is_wanted() and kernel.ndim == 2 and rows.dtype == jnp.float32:
    return rounded_matmul.matmul(rows, kernel)
  contracted = (((1,), (0,)), ((), ()))
  return jax.lax.dot_general(rows, kernel, contracted, precision, **kwargs)


def _scatters(shape, size: int) -> bool:
  """Returns whether the mesh shares kernels of that size, and divides such tokens."""
  mesh = partition.mesh()
  if mesh is None:
    return False
  param_shards, batch_shards = (
    math.prod(mesh.shape[axis] for axis in axes)
    for axes in (partition.PARAMS, partition.ROWS)
  )
  divides = not (
    size % param_shards or shape[0] % batch_shards or shape[1] % mesh.shape["context"]
  )
  return param_shards > 1 and divides


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scattered_dot(x_BLD, kernel_DF, shared: int) -> Array:
  # Each chip has a gradient of the whole kernel, from its own tokens. Left alone, XLA
  # sums them all on every chip, which then keeps one part: twice the traffic.
  return x_BLD @ kernel_DF


def _scattered_dot_fwd(x_BLD, kernel_DF, shared):
  return x_BLD @ kernel_DF, (x_BLD, kernel_DF)


def _scattered_dot_bwd(shared, kept, dout_BLF):
  x_BLD, kernel_DF = kept

  def local(x_BLD, dout_BLF):
    gradient_DF = jnp.einsum("bld,blf->df", x_BLD, dout_BLF)
    # Axis by axis: a scatter over a whole slice becomes a sum on TPU.
    for axis in partition.PARAMS:
      gradient_DF = jax.lax.psum_scatter(
        gradient_DF, axis, scatter_dimension=shared, tiled=True
      )
    return jax.lax.psum(gradient_DF, "data")

  tokens = PartitionSpec(partition.ROWS, "context")
  gradient_DF = jax.shard_map(
    local,
    in_specs=(tokens, tokens),
    out_specs=PartitionSpec(*[None] * shared, partition.PARAMS),
    axis_names={*partition.ROWS, "context"},
    check_vma=False,
  )(x_BLD, dout_BLF)
  return jnp.einsum("blf,df->bld", dout_BLF, kernel_DF), gradient_DF


_scattered_dot.defvjp(_scattered_dot_fwd, _scattered_dot_bwd)


class Dense(nn.Module):
  """A dense layer; adds x A B where its params hold adapters, see `lora.attach`.

  Attributes:
    features, use_bias, dtype, kernel_init: as of `nn.Dense`.
    shared: see `dot_general`.
    rope_half_split: channels of a head, in whose output the even channels come first,
      as `apply_rope` wants them, while the params keep the published order; 0 = all
      keep it.
  """

  features: int
  use_bias: bool = True
  dtype: jnp.dtype | None = None
  kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
  shared: int | None = None
  rope_half_split: int = 0

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    dtype = self.dtype or jnp.result_type(x, kernel)
    x = x.astype(dtype)

    def product(x, kernel, **kwargs):
      contracted = (((x.ndim - 1,), (0,)), ((), ()))
      return dot_general(x, kernel.astype(dtype), contracted, **kwargs)

    y = product(x, in_halves(kernel, self.rope_half_split), shared=self.shared)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
      y += in_halves(bias, self.rope_half_split).astype(dtype)
    if self.has_variable("params", lora.A):
      a: Array = self.get_variable("params", lora.A)
      b: Array = self.get_variable("params", lora.B)
      y += product(product(x, a), in_halves(b, self.rope_half_split))
    return y


def in_halves(x: Array, channels: int) -> Array:
  """Returns the last axis with the even channels of each head before the odd ones."""
  if not channels:
    return x
  pairs = x.reshape(*x.shape[:-1], -1, channels // 2, 2)
  return pairs.swapaxes(-1, -2).reshape(x.shape)


def conv_general_dilated(
  lhs, rhs, window_strides, padding, dimension_numbers, **kwargs
):
  """Computes `lax.conv_general_dilated` for `nn.Conv`; on CPU by a matmul if small.

  XLA's convolutions there, their gradients above all, are up to twice slower than a
  matmul over the shifted copies of the input (channels last).
  """
  kernel = rhs.shape[:-2]
  small = math.prod(kernel) <= 9
  dense = kwargs.get("feature_group_count", 1) == 1 and not isinstance(padding, str)
  dilated = any(
    d != 1 for name in ("lhs_dilation", "rhs_dilation") for d in kwargs.get(name) or ()
  )
  if partition.platform() != "cpu" or not small or not dense or dilated:
    return jax.lax.conv_general_dilated(
      lhs,
      rhs,
      window_strides,
      padding,
      dimension_numbers=dimension_numbers,
      **kwargs,
    )
  padded = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
  strides = window_strides
  sizes = [
    (n - k) // stride + 1
    for n, k, stride in zip(padded.shape[1:-1], kernel, strides, strict=True)
  ]
  # One shifted copy of the input for each cell of the kernel, side by side in channels.
  taps = [
    padded[
      (
        slice(None),
        *(
          slice(o, o + (n - 1) * stride + 1, stride)
          for o, n, stride in zip(offset, sizes, strides, strict=True)
        ),
      )
    ]
    for offset in np.ndindex(*kernel)
  ]
  rows = jnp.concatenate(taps, axis=-1).reshape(-1, math.prod(rhs.shape[:-1]))
  kernel_DF = rhs.reshape(-1, rhs.shape[-1])
  out = _rows_by_kernel(rows, kernel_DF)
  return out.reshape(lhs.shape[0], *sizes, rhs.shape[-1])


def layer_norm(x: Array, epsilon: float = 1e-6) -> Array:
  """Layer norm without learned parameters, in float32 (adaLN brings its own)."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
  return y.astype(x.dtype)


def timestep_embedding(t: Array, features: int, max_period: float = 1e4) -> Array:
  """Sinusoidal features [..., features] of a noise level t in [0, 1].

  t is scaled by 1000, the range that DiT (arXiv:2212.09748) and Wan embed.
  """
  half = features // 2
  frequency = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
  angle = 1000.0 * t.astype(jnp.float32)[..., None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def position_features(position_BLX: Array, frequencies: int) -> Array:
  """Sines and cosines of positions along X axes: [B, L, X * 2 * frequencies].

  Wavelengths go from 4 to 256 positions, evenly in their logarithm.
  """
  wavelength_F = jnp.geomspace(4.0, 256.0, frequencies, dtype=jnp.float32)
  angle_BLXF = 2 * jnp.pi * position_BLX.astype(jnp.float32)[..., None] / wavelength_F
  features = jnp.concatenate([jnp.sin(angle_BLXF), jnp.cos(angle_BLXF)], axis=-1)
  return features.reshape(*position_BLX.shape[:-1], -1)


def rope_angles(
  position_BLX: Array, dims: Sequence[int], theta: float = 1e4
) -> tuple[Array, Array]:
  """Cosine and sine tables [B, L, K/2] of a rotary embedding over several axes.

  Args:
    position_BLX: float positions along X axes (t, h, w for video).
    dims: channels of the head given to each axis, even, summing to K.
    theta: longest wavelength over 2 pi, as in RoFormer (arXiv:2104.09864).
  """
  angles = []
  for axis, dim in enumerate(dims):
    frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angles.append(position_BLX[..., axis, None].astype(jnp.float32) * frequency)
  angle_BLK = jnp.concatenate(angles, axis=-1)
  return jnp.cos(angle_BLK), jnp.sin(angle_BLK)


def apply_rope(x_BLNK: Array, cos_BLK: Array, sin_BLK: Array) -> Array:
  """Rotates pairs of channels by the angles: the first half's with the second half's.

  Published models rotate neighbours; theirs come here `in_halves`, since accelerators
  read every second channel slowly. Attention does not see the order of channels.
  """
  x_BLN2K = x_BLNK.astype(jnp.float32).reshape(*x_BLNK.shape[:-1], 2, -1)
  cos, sin = cos_BLK[:, :, None], sin_BLK[:, :, None]
  if partition.platform() == "cpu":
    even, odd = x_BLN2K[..., 0, :], x_BLN2K[..., 1, :]
    parts = even * cos - odd * sin, even * sin + odd * cos
    return jnp.concatenate(parts, axis=-1).astype(x_BLNK.dtype)
  # Joining halves is a pass of its own on TPU, swapping them is not.
  signed = jnp.stack([-sin, sin], axis=-2)
  out = x_BLN2K * cos[..., None, :] + x_BLN2K[..., ::-1, :] * signed
  return out.reshape(x_BLNK.shape).astype(x_BLNK.dtype)


def video_rope_dims(head_dim: int) -> tuple[int, int, int]:
  """Channels of a head for (t, h, w): Wan's split, time gets what is left over."""
  third = 2 * (head_dim // 6)
  return head_dim - 2 * third, third, third
