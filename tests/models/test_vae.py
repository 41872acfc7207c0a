"""VAE: nothing looks ahead, prefixes equal the whole, an image is a first frame."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markers import slow_but

from sora_jax.models.vae import VAE, Blend, VAEConfig, _add_overlap, _unfold

CONFIGS = {
  "wan": VAEConfig(
    width=4,
    width_multipliers=(1, 1, 2, 2),
    downsample=("s", "st", "st"),
    blocks=1,
    latent_channels=3,
  ),
  "fold": VAEConfig(
    width=8,
    width_multipliers=(1,),
    downsample=(),
    blocks=1,
    latent_channels=3,
    patch_size=(4, 4, 4),
    end_kernel=(1, 1, 1),
    middle=False,
  ),
  "mixed": VAEConfig(
    width=4,
    width_multipliers=(1, 2),
    downsample=("t",),
    blocks=1,
    latent_channels=3,
    patch_size=(2, 2, 2),
    kernel=(2, 1, 1),
    bottleneck=3,
    middle=False,
  ),
}
CONFIGS["blend"] = dataclasses.replace(CONFIGS["fold"], head_width=8, blend=True)
CONFIGS["frame_head"] = dataclasses.replace(
  CONFIGS["fold"], head_width=8, frame_head=True, overlap=2
)
CONFIGS["overlap"] = dataclasses.replace(CONFIGS["blend"], overlap=1)
FRAMES, LATENTS = 9, 3


@functools.cache
def behaviour(name):
  """All that the tests look at, from one compilation a config."""
  config = CONFIGS[name]
  vae = VAE(config)
  # Height and width of one and of two latent pixels.
  size = (config.space_factor, 2 * config.space_factor)
  rng = np.random.default_rng(0)
  video = rng.uniform(-1, 1, (1, FRAMES, *size, 3)).astype(np.float32)
  latent = rng.standard_normal((1, LATENTS, 1, 2, config.latent_channels))
  latent = latent.astype(np.float32)
  shapes = jax.eval_shape(vae.init, jax.random.key(0), video)["params"]
  # All params random: zero biases would hide what padding does.
  params = jax.tree.map(
    lambda leaf: (
      rng.standard_normal(leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
    ).astype(np.float32),
    shapes,
  )

  @jax.jit
  def run(params, video, latent):
    def encode(video):
      return jnp.concatenate(
        vae.apply({"params": params}, video, method=VAE.encode), axis=-1
      )

    def decode(latent):
      return vae.apply({"params": params}, latent, method=VAE.decode)

    def reach(function, x):
      """[frames out, frames in]: largest gradient of each output frame."""
      out, vjp = jax.vjp(function, x)
      weight = jax.random.normal(jax.random.key(1), out.shape)
      one_hot = jnp.eye(out.shape[1])[:, None, :, None, None, None]
      gradients = jax.vmap(lambda mask: vjp(weight * mask)[0])(one_hot)
      return jnp.abs(gradients).max((1, 3, 4, 5))

    return {
      "encoded": encode(video),
      "encoded_prefix": encode(video[:, :5]),
      "encoded_image": encode(video[:, :1]),
      "decoded": decode(latent),
      "decoded_prefix": decode(latent[:, :2]),
      "decoded_image": decode(latent[:, :1]),
      "encoder_reach": reach(encode, video),
      "decoder_reach": reach(decode, latent),
    }

  values = jax.tree.map(np.asarray, run(params, video, latent))
  assert all(np.isfinite(value).all() for value in values.values())
  return values


@pytest.fixture(params=slow_but(CONFIGS, quick=("fold",)))
def name(request):
  return request.param


@pytest.mark.slow
def test_no_gradient_from_the_future_to_a_latent(name):
  reach = behaviour(name)["encoder_reach"]
  latent, frame = np.indices(reach.shape)
  assert reach.shape == (LATENTS, FRAMES)
  future = frame > 4 * latent
  assert np.all(reach[future] == 0.0)
  # Its own frames do reach a latent.
  own = (frame <= 4 * latent) & (frame > 4 * (latent - 1))
  assert np.all(reach[own] > 1e-4)


def test_no_gradient_from_a_later_latent_to_a_frame(name):
  reach = behaviour(name)["decoder_reach"]
  frame, latent = np.indices(reach.shape)
  assert reach.shape == (FRAMES, LATENTS)
  assert np.all(reach[4 * (latent - 1) >= frame] == 0.0)
  own = (4 * (latent - 1) < frame) & (frame <= 4 * latent)
  assert np.all(reach[own] > 1e-4)


def test_image_is_the_first_frame_of_a_video(name):
  values = behaviour(name)
  for part in ("encoded", "decoded"):
    assert values[f"{part}_image"].shape[1] == 1
    np.testing.assert_allclose(
      values[f"{part}_image"], values[part][:, :1], rtol=1e-5, atol=1e-5
    )


def test_prefix_equals_the_whole(name):
  values = behaviour(name)
  for part, frames in (("encoded", 2), ("decoded", 5)):
    assert values[f"{part}_prefix"].shape[1] == frames
    np.testing.assert_allclose(
      values[f"{part}_prefix"], values[part][:, :frames], rtol=1e-5, atol=1e-5
    )


def test_golden_outputs(name):
  """Mean sizes of latents and frames, made by this code: change them knowingly."""
  expected = {
    "wan": (1.77177, 0.91573),
    "fold": (1.9625, 0.93444),
    "mixed": (0.62483, 0.77212),
    "blend": (1.09209, 0.81779),
    "frame_head": (0.74966, 0.82012),
    "overlap": (1.58388, 0.90964),
  }[name]
  values = behaviour(name)
  sizes = [np.abs(values[part]).mean() for part in ("encoded", "decoded")]
  np.testing.assert_allclose(sizes, expected, rtol=1e-4)


@pytest.mark.slow
def test_shapes(name):
  """1 + 4k frames give 1 + k latents and the same number of frames again."""
  config = CONFIGS[name]
  vae = VAE(config, jnp.bfloat16)
  factor = config.space_factor
  assert config.time_factor == 4
  video = jax.ShapeDtypeStruct((2, 5, factor, factor, 3), jnp.float32)
  variables = jax.eval_shape(vae.init, jax.random.key(0), video)
  encode = functools.partial(vae.apply, method=VAE.encode)
  decode = functools.partial(vae.apply, method=VAE.decode)
  for k in (0, 1, 2, 5):
    shape = (1 + 4 * k, 3 * factor, 2 * factor)
    assert config.latent_shape(*shape) == (1 + k, 3, 2)
    video = jax.ShapeDtypeStruct((2, *shape, 3), jnp.float32)
    mean, logvar = jax.eval_shape(encode, variables, video)
    assert mean.shape == logvar.shape == (2, 1 + k, 3, 2, config.latent_channels)
    decoded = jax.eval_shape(decode, variables, mean)
    assert decoded.shape == video.shape
    assert mean.dtype == decoded.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_params_do_not_depend_on_the_length(name):
  vae, factor = VAE(CONFIGS[name]), CONFIGS[name].space_factor

  def params(frames):
    video = jnp.zeros((1, frames, factor, factor, 3))
    return jax.eval_shape(vae.init, jax.random.key(0), video)

  assert params(1) == params(5)


@pytest.mark.parametrize(
  "frames, height, width, message",
  [
    (8, 16, 16, "8 frames of 16x16 is off .* multiple of 4"),
    (9, 12, 16, "9 frames of 16x12 .* multiples of 8"),
    (9, 16, 20, "9 frames of 20x16"),
  ],
)
def test_sizes_off_the_grid(frames, height, width, message):
  config = CONFIGS["wan"]
  with pytest.raises(ValueError, match=message):
    config.latent_shape(frames, height, width)
  video = jnp.zeros((1, frames, height, width, 3))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(VAE(config).init, jax.random.key(0), video)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"downsample": ("s", "st")}, "needs one entry fewer"),
    ({"downsample": ("s", "ts", "st")}, r"\['ts'\] are not s, t or st"),
    ({"patch_size": (1, 2, 4)}, "must be square"),
  ],
)
def test_wrong_configs(options, message):
  with pytest.raises(ValueError, match=message):
    VAEConfig(**options)


def test_blended_frames_are_evenly_between_latents():
  latent_BTHWC = jnp.array([8.0, 0.0, 4.0]).reshape(1, 3, 1, 1, 1)
  whole = Blend(4).apply({}, latent_BTHWC)
  np.testing.assert_array_equal(whole.ravel(), [8, 6, 4, 2, 0, 1, 2, 3, 4])


@pytest.mark.slow
@pytest.mark.parametrize(("patch", "overlap"), [(4, 1), (4, 4), (8, 3)])
def test_overlapping_patches_are_a_transposed_convolution(patch, overlap):
  """Windows at a stride of a patch, added up where they meet, as JAX does it."""
  window = patch + 2 * overlap
  key_x, key_kernel = jax.random.split(jax.random.key(0))
  x_HWC = jax.random.normal(key_x, (3, 2, 5))
  kernel_HWIO = jax.random.normal(key_kernel, (window, window, 5, 3))
  whole_HWC = jax.lax.conv_transpose(
    x_HWC[None], kernel_HWIO[::-1, ::-1], (patch, patch), "VALID"
  )[0]
  want_HWC = whole_HWC[overlap:-overlap, overlap:-overlap]
  windows_HWP = jnp.einsum("hwc,yxco->hwyxo", x_HWC, kernel_HWIO).reshape(3, 2, -1)
  size = (1, patch, patch)
  patches_BTHWP = _add_overlap(windows_HWP[None, None], size, overlap)
  got_HWC = _unfold(patches_BTHWP, size, first=True)[0, 0]
  np.testing.assert_allclose(got_HWC, want_HWC, atol=1e-5)


def test_an_overlap_larger_than_the_patch_is_refused():
  with pytest.raises(ValueError, match="overlap 5 is not between 0 and the patch's 4"):
    dataclasses.replace(CONFIGS["fold"], overlap=5)
