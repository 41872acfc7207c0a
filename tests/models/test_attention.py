"""Attention: backends agree, segments do not mix, padding is finite; and RoPE."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models import attention, layers
from sora_jax.models.attention import blockwise, per_head

SEGMENTS_Q = np.array([[1, 1, 2, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
SEGMENTS_K = np.array([[1, 2, 2, 2, 3, 3, 0], [1, 1, 1, 0, 0, 0, 0]], np.int32)


def draw(dtype=jnp.float32, heads=3, width=8):
  """Queries, keys and values for the segments above."""
  rng = np.random.default_rng(0)
  lengths = (SEGMENTS_Q.shape[1], SEGMENTS_K.shape[1], SEGMENTS_K.shape[1])
  return [
    rng.standard_normal((2, length, heads, width)).astype(dtype) for length in lengths
  ]


def naive(q, k, v, segments_q, segments_k):
  """Loops in numpy, float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for b, i, n in np.ndindex(q.shape[:3]):
    seen = segments_k[b] == segments_q[b, i]
    if seen.any():
      score = k[b, seen, n] @ q[b, i, n] / np.sqrt(q.shape[-1])
      weight = np.exp(score - score.max())
      out[b, i, n] = weight / weight.sum() @ v[b, seen, n]
  return out


def by_chunks(*inputs):
  return blockwise.chunked_attention(*inputs, 3)


BACKENDS = [attention.reference_attention, per_head.attention_by_head, by_chunks]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
  return request.param


@functools.cache
def compiled(backend):
  """Jitted: q, k, v, keys' segments, weight of each output -> out, gradients."""

  def total(q, k, v, segments_k, weight):
    out = backend(q, k, v, SEGMENTS_Q, segments_k)
    return jnp.sum(out.astype(jnp.float32) * weight), out

  @jax.jit
  def run(*arguments):
    (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*arguments)
    return jax.tree.map(lambda x: x.astype(jnp.float32), (out, gradients))

  return run


def weights():
  shape = (*SEGMENTS_Q.shape, 3, 8)
  return np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


def test_backends_equal_loops(backend):
  q, k, v = draw()
  out, _ = compiled(backend)(q, k, v, SEGMENTS_K, weights())
  expected = naive(q, k, v, SEGMENTS_Q, SEGMENTS_K)
  real = SEGMENTS_Q > 0
  np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=2e-6)


@pytest.mark.parametrize("other", BACKENDS[1:])
def test_gradients_equal_those_of_the_reference(other):
  arguments = (*draw(), SEGMENTS_K, weights())
  reference, found = (
    compiled(backend)(*arguments)[1] for backend in (BACKENDS[0], other)
  )
  for a, b in zip(reference, found, strict=True):
    assert np.abs(a).max() > 0.1
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_segments_do_not_mix(backend):
  """Gradients of one segment reach its own queries, keys and values only."""
  of_segment_2 = weights() * (SEGMENTS_Q == 2)[:, :, None, None]
  _, gradients = compiled(backend)(*draw(), SEGMENTS_K, of_segment_2)
  for gradient, segments in zip(
    gradients, (SEGMENTS_Q, SEGMENTS_K, SEGMENTS_K), strict=True
  ):
    reached = np.any(np.asarray(gradient) != 0.0, axis=(2, 3))
    np.testing.assert_array_equal(reached[0], segments[0] == 2)
    assert not reached[1].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padding_is_finite(backend, dtype):
  """Also where a query has no key at all, and where scores are huge."""
  q, k, v = draw(dtype)
  nothing = np.full_like(SEGMENTS_K, 9)
  for segments_k in (SEGMENTS_K, nothing):
    out, gradients = compiled(backend)(
      q * dtype(1e3), k * dtype(1e3), v, segments_k, weights()
    )
    for value in (out, *gradients):
      assert np.isfinite(value).all()


def test_bfloat16_is_close_to_float32(backend):
  q, k, v = draw(jnp.bfloat16)
  assert jax.eval_shape(backend, q, k, v, SEGMENTS_Q, SEGMENTS_K).dtype == jnp.bfloat16
  out, _ = compiled(backend)(q, k, v, SEGMENTS_K, weights())
  expected = naive(q, k, v, SEGMENTS_Q, SEGMENTS_K)
  real = SEGMENTS_Q > 0
  # bfloat16 has 8 bits: weights and output are each rounded once.
  np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=0.03)


@pytest.mark.slow
def test_chunks_keep_no_scores_for_the_backward_pass():
  """Not the masks of all blocks either, which depend on no param of a layer."""
  segments = np.repeat([[1, 2, 3, 0]], 128, axis=1).astype(np.int32)
  x_BLNK = np.ones((1, 512, 4, 8), np.float32)
  policy = jax.checkpoint_policies.save_only_these_names("attention")

  def loss(scale_D, segments):
    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def layer(x, scale):
      return blockwise.chunked_attention(x * scale, x, x, segments, segments, 32), None

    return jnp.sum(jax.lax.scan(layer, x_BLNK, scale_D)[0])

  compiled = jax.jit(jax.grad(loss)).lower(np.ones(3, np.float32), segments).compile()
  scores = 4 * 512 * 512 * 4  # bytes
  assert compiled.memory_analysis().temp_size_in_bytes < scores / 2


def test_packed_equals_separate():
  """Through the function that the networks call."""

  @jax.jit
  def run(q, k, v):
    packed = attention.attention(q, k, v, SEGMENTS_Q, SEGMENTS_K)
    pairs = []
    for segment in (1, 2, 3):
      at_q, at_k = SEGMENTS_Q[0] == segment, SEGMENTS_K[0] == segment
      one_q, one_k = (np.ones((1, at.sum()), np.int32) for at in (at_q, at_k))
      alone = attention.attention(q[:1, at_q], k[:1, at_k], v[:1, at_k], one_q, one_k)
      pairs.append((packed[:1, at_q], alone))
    return pairs

  for packed, alone in run(*draw()):
    np.testing.assert_allclose(packed, alone, atol=2e-6)


def rotate(x_BLNK, position_BL3, dims):
  cos, sin = layers.rope_angles(position_BL3, dims)
  return layers.apply_rope(layers.in_halves(x_BLNK, x_BLNK.shape[-1]), cos, sin)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_rope_is_a_complex_rotation(platform, monkeypatch):
  """Pair j of an axis with K channels turns by position * 10000 ** (-2 j / K)."""
  rng = np.random.default_rng(1)
  dims = layers.video_rope_dims(16)
  assert dims == (8, 4, 4) and layers.video_rope_dims(128) == (44, 42, 42)
  x = rng.standard_normal((2, 5, 3, 16)).astype(np.float32)
  position = rng.uniform(0, 30, (2, 5, 3)).astype(np.float32)
  angle = np.concatenate(
    [
      position[..., i, None] * 10000.0 ** (-2 * np.arange(dim // 2) / dim)
      for i, dim in enumerate(dims)
    ],
    axis=-1,
  )
  turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, :, None]
  expected = np.concatenate([turned.real, turned.imag], -1)
  monkeypatch.setattr(layers.partition, "platform", lambda: platform)
  turn = jax.jit(lambda position: rotate(x, position, dims))
  out = turn(position)
  np.testing.assert_allclose(out, expected, atol=2e-5)
  # Scores depend on differences of positions only.
  moved = turn(position + np.float32([3.5, 1, 2]))
  scores = [np.einsum("blnk,bsnk->bnls", y, y) for y in (out, moved)]
  np.testing.assert_allclose(*scores, atol=1e-4)


def test_timestep_embedding():
  t = np.array([[0.0, 0.25, 1.0]], np.float32)
  angle = 1000 * t[..., None] * 10000.0 ** (-np.arange(4) / 4)
  expected = np.concatenate([np.cos(angle), np.sin(angle)], -1)
  np.testing.assert_allclose(layers.timestep_embedding(t, 8), expected, atol=1e-4)


def test_norms():
  x = np.random.default_rng(2).standard_normal((3, 8)).astype(np.float32) * 5 + 1
  expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
  np.testing.assert_allclose(layers.layer_norm(x), expected, atol=1e-5)
  scale = np.arange(8, dtype=np.float32)
  out = layers.RMSNorm().apply({"params": {"scale": scale}}, x)
  expected = x / np.sqrt((x**2).mean(-1, keepdims=True)) * scale
  np.testing.assert_allclose(out, expected, rtol=1e-5)
  out = layers.RMSNorm().apply({"params": {"scale": scale}}, x.astype(jnp.bfloat16))
  assert out.dtype == jnp.bfloat16
