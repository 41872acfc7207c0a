"""Patches: order, inverse, positions, and sizes that do not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.packing import patches

SIZES = [((3, 4, 6), (1, 2, 2)), ((4, 2, 3), (2, 1, 3)), ((1, 1, 1), (1, 1, 1))]


def draw(*shape):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape, patch_size", SIZES)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_roundtrip(lead, shape, patch_size):
  latent = draw(*lead, *shape, 5)
  patch = patches.patchify(latent, patch_size)
  grid = patches.grid_shape(shape, patch_size)
  length = patches.num_tokens(shape, patch_size)
  assert patch.shape == (*lead, length, 5 * np.prod(patch_size))
  np.testing.assert_array_equal(patches.unpatchify(patch, grid, patch_size), latent)


def test_unpatchify_ignores_padding_behind_the_grid():
  latent = draw(2, 4, 4, 3)
  patch = patches.patchify(latent, (1, 2, 2))
  row = np.concatenate([patch, np.full((5, patch.shape[1]), np.nan)])
  np.testing.assert_array_equal(patches.unpatchify(row, (2, 2, 2), (1, 2, 2)), latent)


@pytest.mark.parametrize("shape, patch_size", SIZES[:2])
def test_order_is_that_of_a_strided_convolution(shape, patch_size):
  """Patch vectors times the kernel read as a matrix = the convolution."""
  latent, kernel = draw(1, *shape, 5), draw(*patch_size, 5, 7)
  convolved = jax.lax.conv_general_dilated(
    latent,
    kernel,
    window_strides=patch_size,
    padding="VALID",
    dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
  )
  product = patches.patchify(latent, patch_size) @ kernel.reshape(-1, 7)
  np.testing.assert_allclose(product, convolved.reshape(1, -1, 7), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape, patch_size", SIZES)
def test_numpy_and_jax_agree(shape, patch_size):
  latent = draw(2, *shape, 3)
  patch = patches.patchify(latent, patch_size)
  assert isinstance(patch, np.ndarray)
  on_device = jax.jit(patches.patchify, static_argnums=1)(latent, patch_size)
  assert isinstance(on_device, jax.Array)
  np.testing.assert_array_equal(patch, on_device)
  grid = patches.grid_shape(shape, patch_size)
  back = patches.unpatchify(jnp.asarray(patch), grid, patch_size)
  assert isinstance(back, jax.Array)
  np.testing.assert_array_equal(back, latent)


def test_positions_follow_the_tokens():
  """A latent that holds its own coordinates has them in the order of positions."""
  grid = (3, 2, 4)
  coordinates = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1)
  position = patches.grid_positions(grid)
  assert position.dtype == np.float32
  np.testing.assert_array_equal(position, patches.patchify(coordinates, (1, 1, 1)))


def test_sizes_that_do_not_divide():
  message = r"latent of \(T, H, W\) = \(3, 5, 4\) .* patches of \(1, 2, 2\)"
  with pytest.raises(ValueError, match=message):
    patches.grid_shape((3, 5, 4), (1, 2, 2))
  with pytest.raises(ValueError, match=message):
    patches.patchify(draw(3, 5, 4, 2), (1, 2, 2))
  with pytest.raises(ValueError):
    patches.num_tokens((3, 4), (1, 2, 2))


def test_positions_of_a_clip_and_its_extra_images():
  position_L3 = patches.clip_positions((2, 1, 2), 1.5, [0.25, 2.75])
  assert position_L3.dtype == np.float32
  assert position_L3.tolist() == [
    *([0, 0, 0], [0, 0, 1], [1.5, 0, 0], [1.5, 0, 1]),
    *([0.25, 0, 0], [0.25, 0, 1], [2.75, 0, 0], [2.75, 0, 1]),
  ]
  whole = patches.clip_positions((3, 2, 2), 1.0)
  np.testing.assert_array_equal(whole, patches.grid_positions((3, 2, 2)))
