"""The GPU's attention kernels, interpreted on CPU, equal plain attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models import attention, partition
from sora_jax.models.attention import blockwise, flash_gpu

LENGTH = 2 * flash_gpu.KEPT


def ids(lengths, total):
  """Segments 1, 2, ... of these lengths, then padding."""
  used = np.repeat(1 + np.arange(len(lengths)), lengths)
  return np.pad(used, (0, total - len(used))).astype(np.int32)


# Clips that end inside of blocks and at their ends, and a block of padding alone.
CLIPS = np.stack([ids((100, 28, 90), LENGTH), ids((60, 30), LENGTH)])
# Fewer keys, no whole block; the second clip of the first row has none at all.
CAPTIONS = np.stack([ids((40, 0, 20), 77), ids((50, 27), 77)])
# Clips in pieces: what is skipped is less, what is seen is right.
PIECES = np.stack([np.resize(np.repeat([2, 3, 1, 0], 9), 200), ids((1, 199), 200)])


kernel = functools.partial(flash_gpu.flash_attention, interpret=True)


def draw(queries, keys, width=32, dtype=jnp.float32):
  """Queries, keys, values and gradients of the output, which padding has not."""
  rng = np.random.default_rng(0)
  lengths = (queries.shape[1], keys.shape[1], keys.shape[1], queries.shape[1])
  *qkv, dout = (rng.standard_normal((2, n, 2, width), np.float32) for n in lengths)
  return [jnp.asarray(x, dtype) for x in qkv], dout * seen(queries, keys)


def seen(queries, keys):
  """Which queries have keys, as a factor of outputs."""
  rows = zip(queries, keys, strict=True)
  return (np.stack([np.isin(q, k) & (q > 0) for q, k in rows]))[..., None, None]


@functools.partial(jax.jit, static_argnums=0)
def run(backend, qkv, queries, keys, dout):
  """(output, gradients of queries, keys and values), of any dtype, as float32."""
  out, pull = jax.vjp(lambda *qkv: backend(*qkv, queries, keys), *qkv)
  results = (out, *pull(dout.astype(out.dtype)))
  assert [x.dtype for x in results] == [x.dtype for x in (out, *qkv)]
  return [x.astype(jnp.float32) for x in results]


@pytest.mark.slow
@pytest.mark.parametrize(
  "queries, keys, width, dtype, atol",
  [
    (CLIPS, CLIPS, 32, jnp.float32, 1e-5),
    (CLIPS, CAPTIONS, 72, jnp.float32, 1e-5),  # of two matrices, 64 and 8
    (PIECES, CLIPS, 24, jnp.float32, 1e-5),
    (CLIPS, CLIPS, 64, jnp.bfloat16, 0.03),
    (CLIPS, CAPTIONS, 40, jnp.bfloat16, 0.03),
  ],
  ids=["clips", "captions", "pieces", "clips_bf16", "captions_bf16"],
)
def test_kernels_equal_the_plain_form(queries, keys, width, dtype, atol):
  qkv, dout = draw(queries, keys, width, dtype)
  found = run(kernel, qkv, queries, keys, dout)
  # Plain attention of the same numbers in float32: its own rounding is no measure.
  exact = [x.astype(jnp.float32) for x in qkv]
  expected = run(attention.reference_attention, exact, queries, keys, dout)
  real = seen(queries, keys)
  for a, b, where in zip(found, expected, (real, real, 1, 1), strict=True):
    assert np.abs(b).max() > 0.5
    np.testing.assert_allclose(a, b * where, atol=atol)


@pytest.mark.slow
def test_padding_and_queries_without_keys_are_zero_and_reach_nobody():
  """Whatever their values and gradients are."""
  qkv, dout = draw(CLIPS, CAPTIONS)
  clean = run(kernel, qkv, CLIPS, CAPTIONS, dout)
  real = seen(CLIPS, CAPTIONS), *[(CAPTIONS > 0)[..., None, None]] * 2
  huge = [jnp.where(r, x, 1e4) for x, r in zip(qkv, real, strict=True)]
  dout = np.where(real[0], dout, 1e4)
  for a, b in zip(clean, run(kernel, huge, CLIPS, CAPTIONS, dout), strict=True):
    np.testing.assert_array_equal(a, b)
  for x, r in zip((clean[0], *clean[1:]), (real[0], *real), strict=True):
    assert not np.asarray(x * ~r).any() and np.asarray(x).any()


@pytest.mark.slow
def test_blocks_of_other_clips_are_never_read():
  """Masked alone, a NaN of another clip would still reach the sums: 0 * NaN."""
  block = flash_gpu.KEPT
  segments = np.tile(ids((block, block, block), 3 * block), (2, 1))
  other = (segments == 2)[..., None, None]
  qkv, dout = draw(segments, segments)
  clean = run(kernel, qkv, segments, segments, dout)
  spoilt = [jnp.where(other, jnp.nan, x) for x in (*qkv, dout)]
  spoilt = run(kernel, spoilt[:3], segments, segments, spoilt[3])
  for a, b in zip(clean, spoilt, strict=True):
    np.testing.assert_array_equal(a[:, segments[0] != 2], b[:, segments[0] != 2])
    assert np.isnan(b[:, segments[0] == 2]).all()


def test_ranges():
  """Padding visits nothing, and is not visited."""
  block = flash_gpu.KEPT
  queries = np.stack([np.repeat([1, 2, -1], block), np.repeat([1, 1, 3], block)])
  keys = np.array([[1] * 128 + [2] * 64 + [-2] * 64, [-2] * 64 + [3] * 128 + [-2] * 64])
  first, last = flash_gpu.ranges(jnp.asarray(queries), jnp.asarray(keys))
  visits = [[set(range(*x)) for x in zip(*row, strict=True)]
            for row in zip(first.tolist(), last.tolist(), strict=True)]  # fmt: skip
  assert visits == [[{0, 1}, {2}, set()], [set(), set(), {1, 2}]]


@pytest.mark.slow
def test_the_parts_of_a_ring():
  """Forward and backward pass apart; some clips have no keys on this chip."""
  qkv, dout = draw(CLIPS, CAPTIONS)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def run(backend, options):
    options = dict(options)
    inputs = (*qkv, jnp.asarray(CLIPS), jnp.asarray(CAPTIONS))
    out, lse = backend.forward(*inputs, **options)
    # Of all keys of the ring there are more than of these.
    of_all = jnp.logaddexp(lse, 3.0)
    return out, lse, backend.backward(*inputs, out, of_all, dout, **options)

  out, lse, found = run(flash_gpu, (("interpret", True),))
  other, other_lse, expected = run(blockwise, ())
  meet = seen(CLIPS, CAPTIONS)[..., 0, 0]
  np.testing.assert_allclose(out[meet], other[meet], atol=1e-5)
  np.testing.assert_allclose(lse[meet], other_lse[meet], atol=1e-5)
  # What a chip adds for clips without keys must weigh nothing.
  assert (lse[~meet] < -1e9).all() and not np.asarray(out[~meet]).any()
  for a, b in zip(found, expected, strict=True):
    assert np.abs(b).max() > 0.2
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_gpus_use_them_and_else_chunks(monkeypatch):
  monkeypatch.setattr(attention.partition, "platform", lambda: "gpu")
  monkeypatch.setattr(flash_gpu, "flash_attention", kernel)
  qkv, _ = draw(CLIPS, CAPTIONS)
  inputs = (*(x[:1] for x in qkv), CLIPS[:1], CAPTIONS[:1])

  def packed():
    # Of a new function each time: jax remembers what it has traced.
    text = str(jax.make_jaxpr(lambda *inputs: attention.attention(*inputs))(*inputs))
    assert ("scan[" in text) != ("packed_attention" in text)
    return "packed_attention" in text

  assert not packed()  # this machine has no GPU, and these are float32
  assert attention.backend(32, jnp.float32)[0] == "chunked"
  monkeypatch.setattr(flash_gpu, "unsupported_reason", lambda *_: None)
  assert packed() and attention.backend(32, jnp.float32) == ("flash", "")


@pytest.mark.parametrize(
  "kind, width, dtype, refused",
  [
    ("NVIDIA H100 80GB HBM3", 128, jnp.bfloat16, None),
    ("NVIDIA H100 80GB HBM3", 384, jnp.bfloat16, "heads of 384 channels"),
    ("NVIDIA A100-SXM4-80GB", 64, jnp.float32, "float32"),
    ("Tesla T4", 64, jnp.bfloat16, "Tesla T4 is none of A100"),
  ],
)
def test_unsupported_reasons(kind, width, dtype, refused, monkeypatch):
  monkeypatch.setattr(partition, "device_kind", lambda: kind)
  reason = flash_gpu.unsupported_reason(width, dtype)
  assert reason is None if refused is None else refused in reason


def test_they_lower_for_gpus_and_what_they_keep_is_named():
  """Whether a GPU's compiler takes them is not seen here; that Pallas does, is."""
  qkv, _ = draw(CLIPS, CAPTIONS, 72, jnp.bfloat16)

  def loss(*qkv):
    out = flash_gpu.flash_attention(*qkv, CLIPS, CAPTIONS)
    return jnp.sum(out.astype(jnp.float32) ** 2)

  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*qkv)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("xla.gpu.triton") == 3
  # Output and log-sum-exp, for the remat policy "attention_saved".
  assert str(traced.jaxpr).count("name[name=attention]") == 2
