"""The CPU forms of dense layers and convolutions equal XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models import layers

DIMENSIONS = ("NDHWC", "DHWIO", "NDHWC")


def normal(*shape):
  rng = np.random.default_rng(list(shape))
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def assert_same_with_gradients(one, other, *args):
  np.testing.assert_allclose(one(*args), other(*args), rtol=1e-5, atol=1e-5)
  arguments = tuple(range(len(args)))

  def gradients(f):
    return jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), arguments)(*args)

  for a, b in zip(gradients(one), gradients(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def conv(function, strides, padding):
  def apply(x, w):
    numbers = jax.lax.conv_dimension_numbers(x.shape, w.shape, DIMENSIONS)
    return function(
      x,
      w,
      strides,
      padding,
      dimension_numbers=numbers,
      lhs_dilation=(1, 1, 1),
      rhs_dilation=(1, 1, 1),
      feature_group_count=1,
      precision=None,
    )

  return apply


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kernel", "strides", "padding"),
  [
    ((1, 1, 1), (1, 1, 1), ((0, 0), (0, 0), (0, 0))),
    ((1, 3, 3), (1, 1, 1), ((0, 0), (1, 1), (1, 1))),
    ((3, 1, 1), (1, 1, 1), ((2, 0), (0, 0), (0, 0))),
    ((2, 2, 2), (1, 1, 1), ((1, 0), (0, 0), (1, 1))),
    ((3, 3, 3), (1, 1, 1), ((2, 0), (1, 1), (1, 1))),
    ((1, 3, 3), (1, 2, 2), ((0, 0), (0, 1), (0, 1))),
  ],
)
def test_convolution(kernel, strides, padding):
  x, w = normal(2, 3, 4, 6, 5), normal(*kernel, 5, 7)
  assert_same_with_gradients(
    conv(layers.conv_general_dilated, strides, padding),
    conv(jax.lax.conv_general_dilated, strides, padding),
    x,
    w,
  )


def test_dense():
  x, w = normal(2, 3, 4), normal(4, 5)
  numbers = (((2,), (0,)), ((), ()))
  assert_same_with_gradients(
    lambda x, w: layers.dot_general(x, w, numbers),
    lambda x, w: jax.lax.dot_general(x, w, numbers),
    x,
    w,
  )


def test_other_contractions_are_left_to_xla():
  x, y = normal(2, 3, 4), normal(2, 4, 5)
  numbers = (((2,), (1,)), ((0,), (0,)))
  np.testing.assert_array_equal(
    layers.dot_general(x, y, numbers), jax.lax.dot_general(x, y, numbers)
  )
