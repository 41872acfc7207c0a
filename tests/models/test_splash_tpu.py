"""The TPU's attention kernel, interpreted on CPU, equals plain attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sora_jax.models import attention
from sora_jax.models.attention import blockwise, splash_tpu

BLOCK, LENGTH, WIDTH = 128, 384, 128


def ids(lengths, total):
  """Segments 1, 2, ... of these lengths, then padding."""
  used = np.repeat(1 + np.arange(len(lengths)), lengths)
  return np.pad(used, (0, total - len(used))).astype(np.int32)


# Clips that end inside of blocks, at their ends, and a block of padding alone.
QUERIES = np.stack([ids((140, 100, 90), LENGTH), ids((128, 60), LENGTH)])
# Captions: fewer keys, filled up to a block, and one that fills it.
CAPTIONS = np.stack([ids((40, 30, 20), 100), ids((60, 40), 100)])
# More blocks of keys than there are buffers of dq.
MANY = np.stack([ids((300, 140, 90), 640), ids((520, 120), 640)])
REAL = (QUERIES > 0)[..., None, None]
# Interpreted, memory that the kernel has not written is NaN.
INTERPRET = {"interpret": pltpu.InterpretParams()}
SCALE = WIDTH**-0.5  # of queries, which the kernel wants done


def kernel(q, *others):
  return splash_tpu.splash_attention(q * SCALE, *others, *INTERPRET.values())


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
  monkeypatch.setattr(splash_tpu, "BLOCK", BLOCK)


def draw(keys, dtype=jnp.float32):
  """Queries, keys, values and gradients of the output; padding has none."""
  rng = np.random.default_rng(0)
  lengths = (LENGTH, keys.shape[1], keys.shape[1], LENGTH)
  *qkv, dout = (rng.standard_normal((2, n, 1, WIDTH), np.float32) for n in lengths)
  return [jnp.asarray(x, dtype) for x in qkv], dout * REAL


@functools.partial(jax.jit, static_argnums=0)
def run(backend, qkv, keys, dout):
  """(output, gradients of queries, keys and values), of any dtype, as float32."""
  out, pull = jax.vjp(lambda *qkv: backend(*qkv, QUERIES, keys), *qkv)
  results = (out, *pull(dout.astype(out.dtype)))
  assert [x.dtype for x in results] == [x.dtype for x in (out, *qkv)]
  return [x.astype(jnp.float32) for x in results]


@pytest.mark.slow
@pytest.mark.parametrize(
  "keys",
  [
    pytest.param(QUERIES, id="clips"),
    pytest.param(CAPTIONS, id="captions"),
    pytest.param(MANY, id="many"),
  ],
)
@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_kernel_equals_the_plain_form(keys, dtype, atol):
  qkv, dout = draw(keys, dtype)
  found = run(kernel, qkv, keys, dout)
  # Plain attention of the same numbers in float32: its own rounding is no measure.
  expected = run(
    attention.reference_attention, [x.astype(jnp.float32) for x in qkv], keys, dout
  )
  for a, b, real in zip(found, expected, (REAL, 1, 1, 1), strict=True):
    assert np.isfinite(a).all()
    assert np.abs(b).max() > 0.5
    np.testing.assert_allclose(a * real, b * real, atol=atol)


@pytest.mark.slow
def test_blocks_of_other_clips_are_never_read():
  """Masked alone, a NaN of another clip would still reach the sums: 0 * NaN."""
  segments = ids((BLOCK, BLOCK, BLOCK), LENGTH)[None]
  (q, k, v), _ = draw(QUERIES)
  clean, spoilt = (
    kernel(q[:1], *(jnp.where(segments[..., None, None] == 2, fill, x[:1])
                    for x in (k, v)), segments, segments)
    for fill in (0.0, jnp.nan)
  )  # fmt: skip
  of_others = segments[0] != 2
  np.testing.assert_array_equal(spoilt[:, of_others], clean[:, of_others])
  assert np.isnan(spoilt[:, ~of_others]).all()


@pytest.mark.slow
@pytest.mark.parametrize("keys", [256, 128])
def test_the_parts_of_a_ring(keys):
  """Forward and backward pass apart; some clips have no keys on this chip."""
  keys = np.stack([ids((keys - 56, 56), keys), ids((0, 10, keys - 20), keys)])
  qkv, dout = draw(keys)

  @functools.partial(jax.jit, static_argnums=0)
  def run(backend):
    inputs = (*qkv, jnp.asarray(QUERIES), jnp.asarray(keys))
    out, lse = backend.forward(*inputs)
    # Of all keys of the ring there are more than of these.
    of_all = jnp.logaddexp(lse, 3.0)
    return out, lse, backend.backward(*inputs, out, of_all, dout)

  class Splash:
    def forward(q, *others):
      return splash_tpu.forward(q * SCALE, *others, **INTERPRET)

    def backward(q, *others):
      dq, *gradients = splash_tpu.backward(q * SCALE, *others, **INTERPRET)
      return dq * SCALE, *gradients

  (out, lse, found), (other, other_lse, expected) = run(Splash), run(blockwise)
  meet = np.stack([np.isin(q, k) for q, k in zip(QUERIES, keys, strict=True)])
  meet, alone = meet & (QUERIES > 0), ~meet & (QUERIES > 0)
  assert meet.any() and alone.any()
  np.testing.assert_allclose(out[meet], other[meet], atol=1e-5)
  np.testing.assert_allclose(lse[meet], other_lse[meet], atol=1e-5)
  # What a chip adds for clips without keys must weigh nothing.
  assert (lse[alone] < -1e9).all() and np.isfinite(out).all()
  for a, b in zip(found, expected, strict=True):
    assert np.abs(b).max() > 0.2
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_rows_are_filled_up_to_blocks(monkeypatch):
  monkeypatch.undo()
  for length, filled, block in (
    (100, 128, 128),
    (1000, 1024, 512),
    (4096, 4096, 512),
    (32_760, 32_768, 512),
    (184_320, 184_320, 1024),
    (102_401, 103_424, 1024),
  ):
    assert splash_tpu.whole_blocks(length) == (filled, block)
    assert splash_tpu.whole_blocks(filled) == (filled, block)
  row = jax.ShapeDtypeStruct((1, 300_000, 1, WIDTH), jnp.bfloat16)
  segments = jax.ShapeDtypeStruct((1, 300_000), jnp.int32)
  with pytest.raises(ValueError, match="300032 to 300032 tokens .*context must be"):
    jax.eval_shape(kernel, row, row, row, segments, segments)
