"""DiT and text encoder: a packed row equals each clip alone, with remat too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markers import slow_but
from random_params import random_like

from sora_jax.models import dit_cache
from sora_jax.models.caption_encoder import TextEncoder, TextEncoderConfig
from sora_jax.models.dit import REMAT_POLICIES, DiT, DiTConfig, num_flops
from sora_jax.models.dit_cache import Reuse
from sora_jax.packing import patches

CONFIG = DiTConfig(
  patch_size=(1, 2, 2),
  channels=2,
  width=24,
  depth=2,
  heads=2,
  mlp_width=32,
  text_width=8,
  frequency_width=16,
)
TEXT = TextEncoderConfig(vocab_size=11, width=8, depth=2, heads=2)
TOKENS, TEXT_TOKENS, SEGMENTS = 32, 16, 4


def make_clip(rng, grid, text_tokens, t, given=(), extras=()):
  """One clip of a row: given latent frames, and extra image tokens at their times."""
  position = [patches.grid_positions(grid) * [0.75, 1, 1]]
  is_given = [np.repeat(np.isin(np.arange(grid[0]), given), grid[1] * grid[2])]
  for time in extras:
    position.append(patches.grid_positions((1, *grid[1:])) + [time, 0, 0])
    is_given.append(np.ones(grid[1] * grid[2], bool))
  position = np.concatenate(position)
  return {
    "x": rng.standard_normal((len(position), CONFIG.patch_width)),
    "position": position,
    "given": np.concatenate(is_given),
    "t": t,
    "text": rng.standard_normal((text_tokens, CONFIG.text_width)),
    "ids": rng.integers(1, TEXT.vocab_size, text_tokens),
    "weight": rng.standard_normal((len(position), CONFIG.patch_width)),
    "text_weight": rng.standard_normal((text_tokens, TEXT.width)),
  }


@functools.cache
def clips():
  rng = np.random.default_rng(1)
  return [
    make_clip(rng, (3, 2, 2), 5, 0.8, given=[0, 2], extras=[1.37]),
    make_clip(rng, (1, 2, 3), 1, 0.1),  # an image whose caption was dropped
    make_clip(rng, (2, 1, 2), 7, 0.45),
  ]


def pack(order, offset=0):
  """A row with these clips after `offset` tokens of padding, and where they are."""
  row = {
    "x": np.full((TOKENS, CONFIG.patch_width), 7.0),
    "t": np.zeros(2 * SEGMENTS),
    "group": np.zeros(TOKENS, np.int32),
    "segment": np.zeros(TOKENS, np.int32),
    "position": np.zeros((TOKENS, 3)),
    "text": np.full((TEXT_TOKENS, CONFIG.text_width), 7.0),
    "text_segment": np.zeros(TEXT_TOKENS, np.int32),
    "ids": np.zeros(TEXT_TOKENS, np.int32),
    "text_position": np.zeros(TEXT_TOKENS, np.int32),
    "weight": np.zeros((TOKENS, CONFIG.patch_width)),
    "text_weight": np.zeros((TEXT_TOKENS, TEXT.width)),
  }
  places, text_start = {}, 0
  for segment, index in enumerate(order):
    clip = clips()[index]
    here = slice(offset, offset + len(clip["x"]))
    there = slice(text_start, text_start + len(clip["text"]))
    row["group"][here] = 2 * segment + clip["given"]
    row["segment"][here] = row["text_segment"][there] = segment + 1
    row["t"][2 * segment] = clip["t"]
    row["text_position"][there] = np.arange(len(clip["text"]))
    for name in ("x", "position", "weight"):
      row[name][here] = clip[name]
    for name in ("text", "ids", "text_weight"):
      row[name][there] = clip[name]
    places[index] = here, there
    offset, text_start = here.stop, there.stop
  return row, places


# Packed; packed in another order; each alone, once behind padding.
ORDERS = [(0, 1, 2), (2, 0, 1), (0,), (1,), (2,)]
OFFSETS = [0, 3, 0, 0, 5]
PACKED, PERMUTED, ALONE = [0], [1], [2, 3, 4]


@functools.cache
def rows():
  made = [pack(*pair) for pair in zip(ORDERS, OFFSETS, strict=True)]
  batch = {
    name: np.stack([row[name] for row, _ in made]).astype(
      np.float32 if made[0][0][name].dtype == np.float64 else np.int32
    )
    for name in made[0][0]
  }
  return batch, [places for _, places in made]


def apply(config, params, batch, dtype=jnp.float32, **kwargs):
  names = ("x", "t", "group", "segment", "position", "text", "text_segment")
  inputs = (batch[name] for name in names)
  return DiT(config, dtype).apply({"params": params}, *inputs, **kwargs)


@functools.cache
def params():
  return random_like(
    jax.eval_shape(
      lambda key, batch: DiT(CONFIG).init(
        key,
        *(batch[n] for n in ("x", "t", "group", "segment", "position", "text")),
        batch["text_segment"],
      ),
      jax.random.key(0),
      rows()[0],
    )["params"],
    scale=0.3,
  )


@functools.cache
def results(remat):
  """Outputs, and gradients by params and inputs of each set of rows."""
  config = dataclasses.replace(CONFIG, remat=remat)
  batch, _ = rows()

  def total(params, inputs, row_weight):
    out = apply(config, params, {**batch, **inputs})
    return jnp.einsum("blp,blp,b", out, batch["weight"], row_weight), out

  run = jax.jit(jax.grad(total, (0, 1), has_aux=True))
  inputs = {name: batch[name] for name in ("x", "t", "text")}
  values = {}
  for name, chosen in {
    "packed": PACKED, "permuted": PERMUTED, "alone": ALONE
  }.items():  # fmt: skip
    row_weight = np.isin(np.arange(len(ORDERS)), chosen).astype(np.float32)
    gradients, out = run(params(), inputs, row_weight)
    values[name] = jax.tree.map(np.asarray, gradients)
  return np.asarray(out), values


@pytest.fixture(params=slow_but(REMAT_POLICIES, ("none",)))
def remat(request):
  return request.param


def test_packed_row_equals_each_clip_alone(remat):
  out, _ = results(remat)
  _, places = rows()
  assert np.isfinite(out).all()
  for index, row in enumerate(ALONE):
    alone = out[row, places[row][index][0]]
    assert alone.std() > 0.1
    for packed in (*PACKED, *PERMUTED):
      here = places[packed][index][0]
      np.testing.assert_allclose(out[packed, here], alone, atol=1e-5)


def test_gradients_of_a_packed_row_are_those_of_its_clips(remat):
  _, gradients = results(remat)
  by_params = {name: value[0] for name, value in gradients.items()}
  # The time projection sums over all tokens: relative to the largest entry of each.
  for alone, *packed in zip(
    *(jax.tree.leaves(by_params[name]) for name in ("alone", "packed", "permuted")),
    strict=True,
  ):
    scale = np.abs(alone).max()
    assert scale > 1e-3
    for value in packed:
      np.testing.assert_allclose(value / scale, alone / scale, atol=1e-5)
  _, places = rows()
  for index, row in enumerate(ALONE):
    for part, name in ((0, "x"), (1, "text")):
      alone = gradients["alone"][1][name][row, places[row][index][part]]
      packed = gradients["packed"][1][name][0, places[0][index][part]]
      np.testing.assert_allclose(packed, alone, atol=1e-5 * np.abs(alone).max())
      assert np.any(alone)


def test_padding_gets_no_gradient(remat):
  batch, _ = rows()
  by_input = results(remat)[1]["packed"][1]
  assert not np.any(by_input["x"][0][batch["segment"][0] == 0])
  assert not np.any(by_input["text"][0][batch["text_segment"][0] == 0])


def test_remat_changes_nothing(remat):
  out, gradients = results(remat)
  reference, expected = results("none")
  np.testing.assert_allclose(out, reference, atol=1e-5)
  for a, b in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * (1 + np.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_text_states_made_once_are_those_of_every_block(remat):
  """And their layers are then not asked: without their params nothing changes."""
  config, batch = dataclasses.replace(CONFIG, remat=remat), rows()[0]

  @jax.jit
  def run(params, text):
    states = dit_cache.text_states(config.width, params, text)
    blind = jax.tree_util.tree_map_with_path(
      lambda path, x: x * 0 if "cross_key" in str(path) else x, params
    )
    return states, apply(config, blind, batch, text_states=states)

  states, out = run(params(), batch["text"])
  shape = (CONFIG.depth, len(ORDERS), TEXT_TOKENS, CONFIG.width)
  assert [x.shape for x in states] == [shape, shape]
  np.testing.assert_allclose(out, results(remat)[0], atol=2e-5)


@pytest.mark.slow
def test_blocks_are_skipped_until_their_input_has_changed():
  batch, _ = rows()
  start = Reuse.start(len(ORDERS), TOKENS, CONFIG.width, jnp.float32)

  @jax.jit
  def run(x, reuse, limit):
    reuse = reuse._replace(limit=limit)
    return apply(CONFIG, params(), {**batch, "x": x}, reuse=reuse)

  whole, kept = run(batch["x"], start, np.inf)  # the first call runs, whatever it is
  np.testing.assert_allclose(whole, results("none")[0], atol=1e-5)
  assert kept.change == 0.0
  near = batch["x"] + 0.02 * np.sign(batch["x"])
  exact, _ = run(near, start, 0.0)
  reused, first = run(near, kept, 1e9)
  assert 0.0 < first.change < 0.1
  np.testing.assert_array_equal(first.added_BLD, kept.added_BLD)
  # What enters is new, and what the blocks add is old.
  assert np.abs(reused - exact).max() > 1e-3 < np.abs(reused - whole).max()
  # Changes add up, until they reach the limit.
  _, second = run(batch["x"], first, 1e9)
  np.testing.assert_allclose(second.change, 2 * first.change, rtol=0.2)
  again, third = run(near, second, 2.5 * first.change)
  np.testing.assert_allclose(again, exact, atol=1e-4)
  assert third.change == 0.0
  # Padding has no say.
  other = np.where(batch["segment"][..., None] > 0, batch["x"], -3.0)
  assert run(other, kept, 1e9)[1].change < 1e-6


@jax.jit
def gradients_of_first_clip(t, text, x):
  batch, _ = rows()
  first = (batch["segment"] == 1)[:1, :, None]
  batch = {name: value[:1] for name, value in batch.items()}

  def total(inputs):
    return jnp.sum(jnp.where(first, apply(CONFIG, params(), {**batch, **inputs}), 0.0))

  return jax.grad(total)({"t": t, "text": text, "x": x})


@pytest.mark.slow
def test_clips_do_not_see_each_other():
  """Exactly zero gradients by the noise levels, captions and tokens of others."""
  batch, places = rows()
  inputs = {name: batch[name][:1] for name in ("t", "text", "x")}
  gradients = gradients_of_first_clip(**inputs)
  reached = {name: np.asarray(value)[0] != 0.0 for name, value in gradients.items()}
  # Both levels, of its noisy and of its given tokens.
  np.testing.assert_array_equal(reached["t"], np.arange(2 * SEGMENTS) < 2)
  here, there = places[0][0]
  for name, inside in (("x", here), ("text", there)):
    assert reached[name][inside].any(-1).all()
    reached[name][inside] = False
    assert not reached[name].any()


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_depth_is_scanned(remat):
  """One block is traced whatever the depth; its params have a leading layer axis."""

  def traced(depth):
    config = dataclasses.replace(CONFIG, depth=depth, remat=remat)
    batch, _ = rows()
    names = ("x", "t", "group", "segment", "position", "text", "text_segment")
    arguments = [batch[name] for name in names]
    shapes = jax.eval_shape(DiT(config).init, jax.random.key(0), *arguments)["params"]
    jaxpr = jax.make_jaxpr(lambda p: apply(config, p, batch))(shapes)
    # Without line breaks: where those are depends on how long the numbers are.
    return shapes, str(jaxpr).count(" = ")

  shapes, length = traced(2)
  deep, deep_length = traced(12)
  assert deep_length == length
  blocks, deep_blocks = shapes.pop("blocks"), deep.pop("blocks")
  assert shapes == deep
  for leaf, deep_leaf in zip(*map(jax.tree.leaves, (blocks, deep_blocks)), strict=True):
    assert leaf.shape == (2, *deep_leaf.shape[1:]) and deep_leaf.shape[0] == 12


def test_output_is_float32_from_bfloat16_too():
  batch, _ = rows()
  out = jax.eval_shape(lambda p: apply(CONFIG, p, batch, jnp.bfloat16), params())
  assert out.shape == batch["x"].shape and out.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(params())} == {np.dtype("float32")}


@pytest.mark.parametrize(
  "options, message",
  [
    ({"width": 25}, "dit width 25 over 2 heads"),
    ({"width": 6, "heads": 2}, "dit width 6 over 2 heads"),
    ({"remat": "some"}, "dit remat 'some' is not one of"),
  ],
)
def test_wrong_configs(options, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **options)


@pytest.mark.slow
def test_flops_are_those_of_the_compiled_matmuls():
  """Counted in the jaxpr of one clip, where attention meets all pairs."""
  L, S = 12, 5
  config = dataclasses.replace(CONFIG, depth=3)
  batch = {
    "x": jnp.zeros((1, L, config.patch_width)),
    "t": jnp.zeros((1, 2)),
    "group": jnp.zeros((1, L), jnp.int32),
    "segment": jnp.ones((1, L), jnp.int32),
    "position": jnp.zeros((1, L, 3)),
    "text": jnp.zeros((1, S, config.text_width)),
    "text_segment": jnp.ones((1, S), jnp.int32),
  }
  shapes = jax.eval_shape(DiT(config).init, jax.random.key(0), *batch.values())
  jaxpr = jax.make_jaxpr(lambda p: apply(config, p, batch))(shapes["params"])
  groups = 2 * (16 * 24 + 24 * 24 + 6 * 24 * 24) * 2  # the time embedding's, per group
  gather = 2 * 2 * L * (6 * config.depth + 2) * config.width  # modulation to tokens
  expected = num_flops(config, L, S, L * (L + S)) + groups + gather
  assert count_flops(jaxpr.jaxpr) == expected


def count_flops(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      depth = np.prod([equation.invars[0].aval.shape[i] for i in contracted])
      total += 2 * int(depth) * equation.outvars[0].aval.size
    times = equation.params.get("length", 1)
    for param in equation.params.values():
      inner = getattr(param, "jaxpr", param)  # closed or not
      if hasattr(inner, "eqns"):
        total += times * count_flops(inner)
  return total


@pytest.mark.slow
def test_packed_captions_equal_each_alone():
  batch, places = rows()
  names = ("ids", "text_segment", "text_position")
  arguments = [batch[name] for name in names]
  shapes = jax.eval_shape(TextEncoder(TEXT).init, jax.random.key(0), *arguments)
  variables = random_like(shapes, scale=0.3)

  def total(variables, row_weight):
    out = TextEncoder(TEXT).apply(variables, *arguments)
    return jnp.einsum("bse,bse,b", out, batch["text_weight"], row_weight), out

  run = jax.jit(jax.grad(total, has_aux=True))
  gradients = {}
  for chosen in (PACKED, PERMUTED, ALONE):
    row_weight = np.isin(np.arange(len(ORDERS)), chosen).astype(np.float32)
    gradients[tuple(chosen)], out = run(variables, row_weight)
  out = np.asarray(out)
  assert np.isfinite(out).all()
  for index, row in enumerate(ALONE):
    alone = out[row, places[row][index][1]]
    for packed in (*PACKED, *PERMUTED):
      there = places[packed][index][1]
      np.testing.assert_allclose(out[packed, there], alone, atol=1e-5)
  for packed, permuted, alone in zip(*map(jax.tree.leaves, gradients.values()),
                                     strict=True):  # fmt: skip
    scale = np.abs(alone).max()
    np.testing.assert_allclose(packed, alone, atol=1e-5 * scale)
    np.testing.assert_allclose(permuted, alone, atol=1e-5 * scale)
  blocks = jax.tree.leaves(shapes["params"]["blocks"])
  assert {leaf.shape[0] for leaf in blocks} == {TEXT.depth}


@pytest.mark.slow
def test_only_absolute_positions_tell_where_a_clip_is():
  """Rotary positions are relative: moved as a whole, a clip looks the same to them."""

  def predict(config, shift_3):
    dit = DiT(config)
    clip = clips()[1]
    L = len(clip["position"])
    args = (
      jnp.asarray(clip["x"])[None],
      jnp.full((1, 2), 0.5),
      jnp.zeros((1, L), jnp.int32),
      jnp.ones((1, L), jnp.int32),
      jnp.asarray(clip["position"] + np.asarray(shift_3))[None],
      jnp.asarray(clip["text"])[None],
      jnp.ones((1, len(clip["text"])), jnp.int32),
    )
    shapes = jax.eval_shape(dit.init, jax.random.key(0), *args)
    return np.asarray(jax.jit(dit.apply)(random_like(shapes, scale=0.3), *args))

  absolute = dataclasses.replace(CONFIG, absolute_positions=3)
  for config, differs in ((CONFIG, False), (absolute, True)):
    change = np.abs(predict(config, (0, 1, 0)) - predict(config, (0, 0, 0))).max()
    assert (change > 1e-2) == differs and (change < 1e-3) != differs, change
