"""Matmuls of rounded inputs: float64 products of the rounded values are the judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models import layers, rounded_matmul


def _rounded(x):
  return np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)


@pytest.mark.parametrize("native", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [64, 63])
def test_values_and_gradients(rows, native):
  rng = np.random.default_rng(0)
  x_RD, kernel_DF, dout_RF = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in ((rows, 48), (48, 24), (rows, 24))
  )
  with rounded_matmul.native(native):
    out_RF, pull = jax.vjp(rounded_matmul.matmul, x_RD, kernel_DF)
    dx_RD, dkernel_DF = pull(jnp.asarray(dout_RF))
  x, kernel, dout = map(_rounded, (x_RD, kernel_DF, dout_RF))
  for got, want in (
    (out_RF, x @ kernel),
    (dx_RD, dout @ kernel.T),
    (dkernel_DF, x.T @ dout),
  ):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_layers_round_only_where_it_is_asked_for():
  layer = layers.Dense(8)
  x_BLD = jax.random.normal(jax.random.key(0), (2, 16, 32))
  params = layer.init(jax.random.key(1), x_BLD)
  kernel = params["params"]["kernel"]
  exact = np.asarray(layer.apply(params, x_BLD))
  np.testing.assert_allclose(exact, np.asarray(x_BLD, np.float64) @ kernel, atol=1e-5)
  with jax.default_matmul_precision(rounded_matmul.PRECISION):
    rounded = np.asarray(layer.apply(params, x_BLD))
  want = _rounded(x_BLD) @ _rounded(kernel)
  np.testing.assert_allclose(rounded, want, atol=1e-5)
  assert np.abs(rounded - exact).max() > 1e-4
