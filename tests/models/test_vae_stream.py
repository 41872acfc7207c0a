"""Streaming equals the whole pass; tiles and meshes change (nearly) nothing."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from markers import slow_but
from random_params import random_params

from sora_jax.encoders import tiling
from sora_jax.encoders.autoencoder import Autoencoder, NonFiniteError, in_chunks
from sora_jax.models.vae import PRESETS, VAE, VAEConfig
from sora_jax.models.vae_stream import decode_chunk, encode_chunk
from sora_jax.runtime import checkpoint, sharding

CONFIGS = {
  "wan2.1": dataclasses.replace(
    PRESETS["wan2.1"], width=4, blocks=1, latent_channels=3
  ),
  "wan2.2": dataclasses.replace(
    PRESETS["wan2.2"], width=4, decoder_width=6, blocks=1, latent_channels=3
  ),
  # The quickstart's, and one more where only pixels and kernels reach back.
  "fold": VAEConfig(
    width=8,
    width_multipliers=(1,),
    downsample=(),
    blocks=1,
    latent_channels=3,
    patch_size=(4, 8, 8),
    kernel=(1, 3, 3),
    end_kernel=(1, 1, 1),
    bottleneck=4,
    middle=False,
    head_width=8,
  ),
  "mixed": VAEConfig(
    width=4,
    width_multipliers=(1, 2),
    downsample=("t",),
    blocks=1,
    latent_channels=3,
    patch_size=(2, 2, 2),
    kernel=(4, 1, 1),
    middle=False,
  ),
}
CONFIGS["blend"] = dataclasses.replace(CONFIGS["fold"], kernel=(2, 3, 3), blend=True)
CONFIGS["frame_head"] = dataclasses.replace(
  CONFIGS["fold"], kernel=(2, 3, 3), head_width=8, frame_head=True, overlap=2
)
# All kinds of layers in one stage, quick to compile.
SMALL = VAEConfig(
  width=4,
  width_multipliers=(1, 1),
  downsample=("st",),
  blocks=1,
  latent_channels=3,
  patch_size=(2, 2, 2),
  decoder_width=6,
  stage_shortcut=True,
)
FRAMES, LATENTS = 17, 5
# Latents of each chunk.
CHUNKINGS = [(1, 1, 1, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 1, 1), (1, 2, 2)]


def params_of(config):
  video = np.zeros((1, 1, config.space_factor, config.space_factor, 3), np.float32)
  return random_params(VAE(config).init, jax.random.key(0), video)["params"]


class Case:
  """A small model, a clip and latents, what the whole passes give, and jitted steps."""

  def __init__(self, name):
    config = CONFIGS[name]
    vae, params = VAE(config), params_of(config)
    rng = np.random.default_rng(1)
    size = (config.space_factor, 2 * config.space_factor)
    self.video = rng.uniform(-1, 1, (1, FRAMES, *size, 3)).astype(np.float32)
    shape = (1, LATENTS, 1, 2, config.latent_channels)
    self.latent = rng.standard_normal(shape).astype(np.float32)
    whole = jax.jit(
      lambda p, x, z: (
        vae.apply(p, x, method=VAE.encode),
        vae.apply(p, z, method=VAE.decode),
      )
    )
    self.whole = whole({"params": params}, self.video, self.latent)
    self.steps = [
      functools.partial(jax.jit(functools.partial(step, vae)), params)
      for step in (encode_chunk, decode_chunk)
    ]

  def stream(self, part, x, lengths):
    """Outputs of chunks of the lengths, side by side, and the last cache."""
    cache, outs, start = None, [], 0
    for n in lengths:
      out, cache = self.steps[part](x[:, start : start + n], cache)
      outs.append(out)
      start += n
    assert start == x.shape[1]
    joined = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *outs)
    return joined, cache


@pytest.fixture(scope="module", params=slow_but(CONFIGS, quick=("fold", "small")))
def case(request):
  return Case(request.param)


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_every_chunking_equals_the_whole(case):
  for chunks in CHUNKINGS:
    frames = [4 * chunks[0] - 3, *(4 * n for n in chunks[1:])]
    (mean, logvar), _ = case.stream(0, case.video, frames)
    close(mean, case.whole[0][0])
    close(logvar, case.whole[0][1])
    close(case.stream(1, case.latent, chunks)[0], case.whole[1])


def test_few_compilations_and_a_plain_cache_of_one_size(case):
  """Also after a first chunk of one frame, where nothing is halved or doubled yet."""
  for part, x, first, steady in ((0, case.video, 1, 4), (1, case.latent, 1, 1)):
    _, one = case.stream(part, x[:, :first], [first])
    _, two = case.stream(part, x[:, : first + steady], [first, steady])
    _, many = case.stream(part, x, [first] + [steady] * (LATENTS - 1))
    types = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (one, two, many))
    assert types[0] == types[1] == types[2]
    assert all(type(leaf).__name__ == "ArrayImpl" for leaf in jax.tree.leaves(many))
    assert isinstance(many, dict)


def test_chunks_off_the_grid():
  config = CONFIGS["mixed"]
  vae, params = VAE(config), params_of(config)
  video = np.zeros((1, 6, 2, 2, 3), np.float32)
  with pytest.raises(ValueError, match="6 frames of 2x2 is off"):
    encode_chunk(vae, params, video)
  with pytest.raises(ValueError, match="chunk of 6 frames: after the first, .* of 4"):
    encode_chunk(vae, params, video, {})


# --- the autoencoder: streams, tiles, meshes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Model folders by config name."""
  parent = tmp_path_factory.mktemp("vae")
  for name, config in {"small": SMALL, "fold": CONFIGS["fold"]}.items():
    meta = {
      "model": dataclasses.asdict(config),
      "latent_mean": [0.1, 0.2, -0.3],
      "latent_std": [1.5, 0.5, 1.0],
    }
    checkpoint.save_model(parent / name, params_of(config), meta)
  return parent


def load(path, **axes):
  """The autoencoder, on one device without axes of a mesh."""
  devices = jax.devices() if axes else jax.devices()[:1]
  mesh = sharding.make_mesh(**axes, devices=devices)
  return Autoencoder(path, mesh)


def uint8_video(*shape):
  rng = np.random.default_rng(2)
  return rng.integers(0, 256, (*shape, 3), np.uint8)


def same_pixels(a, b):
  """Equal but for the rounding of a value between two."""
  difference = np.abs(a.astype(int) - b.astype(int))
  assert a.shape == b.shape and difference.max() <= 1 and difference.mean() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "fold"])
def test_autoencoder_streams(folder, name):
  autoencoder = load(folder / name)
  factor = autoencoder.config.space_factor
  video = uint8_video(1, 25, factor, 2 * factor)
  latent = autoencoder.encode(video)
  chunks = list(in_chunks(video, 8))
  assert [chunk.shape[1] for chunk in chunks] == [9, 8, 8]
  streamed = np.concatenate(list(autoencoder.encode_stream(chunks)), axis=1)
  close(streamed, latent)
  # First, steady and a remainder: three programs, and the whole passes'.
  assert [z.shape[1] for z in in_chunks(latent, 2)] == [3, 2, 2]
  decoded = list(autoencoder.decode_stream(in_chunks(latent, 2)))
  assert [frames.shape[1] for frames in decoded] == [9, 8, 8]
  same_pixels(np.concatenate(decoded, axis=1), autoencoder.decode(latent))
  for step in (autoencoder._encode, autoencoder._decode):
    assert step._cache_size() == 3


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_not_black(folder, value):
  autoencoder = load(folder / "fold")
  latent = np.array(autoencoder.encode(uint8_video(1, 9, 64, 88)))
  latent[0, 1, 2, 3] = value
  with pytest.raises(NonFiniteError, match="decoded pixels that are NaN or infinite"):
    autoencoder.decode(latent)
  first, second = autoencoder.decode_stream([latent[:, :1], latent[:, 1:]])
  assert np.asarray(first).shape == first.shape == (1, 1, 64, 88, 3)
  with pytest.raises(NonFiniteError):
    np.asarray(second)


@pytest.mark.slow
def test_tiles_without_attention_equal_the_whole_away_from_seams(folder):
  """A convolution's reach is 1 latent here, so a tile is exact but at its edges."""
  autoencoder = load(folder / "fold")
  video = uint8_video(1, 9, 64, 88)
  latent = autoencoder.encode(video)
  tiled = [
    np.concatenate(
      list(autoencoder.encode_stream(in_chunks(video, 4), tile=tile)), axis=1
    )
    for tile in (40, 96)
  ]
  # Tiles as large as the frame are the frame.
  close(tiled[1], latent)
  assert tiled[0].shape == latent.shape
  plan = tiling.plan((8, 11), 5)
  assert plan.rows == (0, 3) and plan.columns == (0, 3, 6)
  exact = np.ones((8, 11), bool)
  # Rows and columns within 1 of the edge of a tile that the frame's edge is not.
  exact[3:5] = False
  exact[:, 3:5] = exact[:, 6:8] = False
  close(tiled[0][:, :, exact], latent[:, :, exact])
  assert not np.allclose(tiled[0], latent, atol=1e-3)

  frames = autoencoder.decode(latent)
  decoded = np.concatenate(
    list(autoencoder.decode_stream(in_chunks(latent, 1), tile=40)), axis=1
  )
  exact = exact.repeat(8, axis=0).repeat(8, axis=1)
  same_pixels(decoded[:, :, exact], frames[:, :, exact])


def test_wrong_tiles(folder):
  autoencoder = load(folder / "fold")
  video = uint8_video(1, 1, 16, 16)
  with pytest.raises(ValueError, match="tile of 12 pixels is not a multiple of 8"):
    next(autoencoder.encode_stream([video], tile=12))
  with pytest.raises(ValueError, match="tile has 1 latent pixels"):
    next(autoencoder.encode_stream([video], tile=8))
  with pytest.raises(ValueError, match="1 frames of 16x12 is off"):
    next(autoencoder.encode_stream([video[:, :, :12]]))


@pytest.mark.parametrize("grid, tile", [((9, 23), 6), ((5, 5), 5), ((7, 8), 2)])
def test_blending_keeps_what_tiles_agree_on(grid, tile):
  plan = tiling.plan(grid, tile)
  x = np.random.default_rng(0).random((2, 3, 2 * grid[0], 2 * grid[1], 1))
  parts = plan.cut(x, 2)
  assert len(parts) == len(plan)
  assert {part.shape[2:4] for part in parts} == {tuple(2 * n for n in plan.size)}
  for starts, n in zip((plan.rows, plan.columns), plan.size, strict=True):
    # Neighbours share at least a quarter.
    steps = np.diff(starts)
    assert all(0 < step <= n - max(1, n // 4) for step in steps)
  np.testing.assert_allclose(plan.blend(parts, 2), x, atol=1e-6)
  pixels = (255 * x).astype(np.uint8)
  np.testing.assert_array_equal(plan.blend(plan.cut(pixels, 2), 2), pixels)


def test_blending_ramps_between_tiles():
  plan = tiling.plan((1, 6), 4)
  assert plan.columns == (0, 2)
  tiles = [np.full((1, 1, 1, 4, 1), value, np.float32) for value in (0.0, 1.0)]
  np.testing.assert_allclose(
    plan.blend(tiles)[0, 0, 0, :, 0], [0, 0, 0.25, 0.75, 1, 1], atol=1e-6
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, axes, rows, height",
  [
    ("small", {"fsdp": 1, "context": 8}, 1, 8),
    # 5 latents of height on 4 devices.
    ("small", {"data": 2, "fsdp": 1, "context": 4}, 4, 5),
    ("fold", {"fsdp": 2, "context": 2, "tensor": 2}, 2, 3),
  ],
)
def test_eight_devices_equal_one(folder, name, axes, rows, height):
  """The batch over data and fsdp, one clip's height over context."""
  one = load(folder / name)
  many = load(folder / name, **axes)
  factor = one.config.space_factor
  video = uint8_video(rows, 9, height * factor, factor)
  latent = one.encode(video)
  close(np.concatenate(list(many.encode_stream(in_chunks(video, 4))), 1), latent)
  decoded = np.concatenate(list(many.decode_stream(in_chunks(latent, 1))), 1)
  same_pixels(decoded, one.decode(latent))
  _, cache = many._apply(many._encode, video[:, :5], keep=True)
  for leaf in jax.tree.leaves(cache):
    B, _, H, *_ = leaf.sharding.shard_shape(leaf.shape)
    assert B == rows // many.batch_size(1)
    ways = many.mesh.shape["context"]
    assert H == (leaf.shape[2] // ways if leaf.shape[2] % ways == 0 else leaf.shape[2])
