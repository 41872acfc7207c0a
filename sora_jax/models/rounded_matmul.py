"""Matmuls on CPUs of inputs rounded to bfloat16, added up and given back in float32.

That is what TPUs do of float32 matmuls by default. CPUs with instructions for it do it
two to five times as fast as one in float32; XLA chooses those only where the result is
wanted in float32, so that inputs are rounded here, and never outputs. Other CPUs
convert each number first, which is slower than float32: in `native(False)` rounded
values are multiplied in float32, with the same products.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array

# A name of `jax.default_matmul_precision`; that is what switches it on.
PRECISION = "BF16_BF16_F32"
# Rows that are transposed at once, so that they stay in the fastest cache.
_BLOCK = 16

_native = contextvars.ContextVar("native", default=True)


@contextlib.contextmanager
def native(value: bool) -> Iterator[None]:
  """A context of tracing: whether bfloat16 itself is multiplied, see above."""
  token = _native.set(value)
  try:
    yield
  finally:
    _native.reset(token)


def is_wanted() -> bool:
  """Returns whether `jax.default_matmul_precision` asks for it."""
  wanted = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
  return wanted == PRECISION


@jax.custom_vjp
def matmul(x_RD: Array, kernel_DF: Array) -> Array:
  """Multiplies float32 rows by a kernel; the gradients are made in the same way."""
  return _dot(_round(x_RD), _round(kernel_DF), 1, 0)


def _forward(x_RD, kernel_DF):
  x_RD, kernel_DF = _round(x_RD), _round(kernel_DF)
  return _dot(x_RD, kernel_DF, 1, 0), (x_RD, kernel_DF)


def _backward(kept, dout_RF):
  x_RD, kernel_DF = kept
  dout_RF = _round(dout_RF)
  return _dot(dout_RF, kernel_DF, 1, 1), _dot(_transposed(x_RD), dout_RF, 1, 0)


matmul.defvjp(_forward, _backward)


def _round(x: Array) -> Array:
  if _native.get():
    return x.astype(jnp.bfloat16)
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _dot(a, b, a_axis: int, b_axis: int) -> Array:
  contracted = (((a_axis,), (b_axis,)), ((), ()))
  return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)


def _transposed(x_RD: Array) -> Array:
  """Returns the transpose, made in two steps.

  A plain one XLA makes a part of the matmul, for which it then has no fast form.
  """
  rows, width = x_RD.shape
  if rows % _BLOCK or x_RD.dtype == jnp.float32:
    return x_RD.T
  x = x_RD.reshape(rows // _BLOCK, _BLOCK, width).swapaxes(1, 2)
  x = jax.lax.optimization_barrier(x).transpose(1, 0, 2)
  return jax.lax.optimization_barrier(x).reshape(width, rows)
