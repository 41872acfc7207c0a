"""The captioner's task: its losses in numpy, its mesh, its phases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from sora_jax.models.captioner import CaptionerConfig
from sora_jax.packing.caption_styles import STYLES
from sora_jax.runtime import sharding
from sora_jax.tasks import captioner

MODEL = CaptionerConfig(
  width=32,
  depth=1,
  heads=2,
  mlp_width=64,
  text_depth=1,
  caption_depth=1,
  embed_width=8,
  vocab_size=24,
  absolute_positions=2,
)

pytestmark = pytest.mark.usefixtures("fast_compile")
ROWS, SEGMENTS, P, L, S = 8, 2, 6, 8, 8
ANY, SHORT = MODEL.vocab_size, MODEL.vocab_size + 1


def numpy_caption_loss(logits_BSV, text_BS, segment_BS):
  """Mean of -log p(next), text by text, token by token."""
  losses = []
  for logits_SV, text_S, segment_S in zip(logits_BSV, text_BS, segment_BS, strict=True):
    for number in set(segment_S) - {0}:
      ids, places = text_S[segment_S == number], np.flatnonzero(segment_S == number)
      for place, following in zip(places, ids[1:], strict=False):
        p_V = np.exp(logits_SV[place] - logits_SV[place].max())
        losses.append(-np.log(p_V[following] / p_V.sum()))
  return np.mean(losses)


def numpy_contrastive_loss(clip_ME, text_ME, scale):
  """CLIP's pseudocode, figure 3 of arXiv:2103.00020."""
  logits = scale * clip_ME @ text_ME.T

  def cross_entropy(logits):
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return -np.log(np.diag(p)).mean()

  return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_caption_loss_equals_one_in_numpy(seed):
  rng = np.random.default_rng(seed)
  segment_BS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 2, 3, 3, 3, 3]])
  text_BS = rng.integers(0, 9, segment_BS.shape)
  logits_BSV = rng.normal(size=(2, 8, 9)).astype(np.float32)
  next_BS, said_BS = captioner.next_tokens(text_BS, segment_BS)
  loss, right = captioner.caption_loss(logits_BSV, next_BS, said_BS)
  expected = numpy_caption_loss(logits_BSV, text_BS, segment_BS)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert said_BS.sum() == 10 and 0 <= right <= 1
  sure = 50.0 * jax.nn.one_hot(next_BS, 9)
  loss, right = captioner.caption_loss(sure, next_BS, said_BS)
  assert loss < 1e-6 and right == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_contrastive_loss_equals_one_in_numpy(seed):
  rng = np.random.default_rng(seed)
  clip_ME, text_ME = rng.normal(size=(2, 7, 4)).astype(np.float32)
  clip_ME, text_ME = (
    x / np.linalg.norm(x, axis=1, keepdims=True) for x in (clip_ME, text_ME)
  )
  paired_M = np.array([1, 0, 1, 1, 1, 0, 1], bool)
  loss, found = captioner.contrastive_loss(clip_ME, text_ME, 3.0, paired_M)
  kept = clip_ME[paired_M], text_ME[paired_M]
  np.testing.assert_allclose(loss, numpy_contrastive_loss(*kept, 3.0), rtol=1e-5)
  best = (kept[0] @ kept[1].T).argmax(1)
  np.testing.assert_allclose(found, np.mean(best == np.arange(5)), rtol=1e-6)


def make_batch(step=0):
  rng = np.random.default_rng(1)
  text_S = np.array([SHORT, 5, 6, 1, SHORT + 1, 7, 1, 0])
  return {
    "patch_LP": rng.normal(size=(ROWS, L, P)).astype(np.float32),
    "segment_L": np.tile([1, 1, 1, 2, 2, 2, 2, 0], (ROWS, 1)),
    "position_L3": rng.uniform(0, 4, (ROWS, L, 3)).astype(np.float32),
    "text_S": np.tile(text_S, (ROWS, 1)) + np.zeros((ROWS, 1), int),
    "text_segment_S": np.tile([1, 1, 1, 1, 2, 2, 2, 0], (ROWS, 1)),
    "text_position_S": np.tile([0, 1, 2, 3, 0, 1, 2, 0], (ROWS, 1)),
    "step": np.int32(step),
  }


@functools.cache
def made(**loss):
  return captioner.make(
    MODEL, captioner.CaptionerLossConfig(**loss), P, SEGMENTS, jnp.float32
  )


@functools.cache
def params():
  return random_params(made().init, jax.random.key(0))


def loss_and_gradient(task, batch, mesh):
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  places = sharding.param_shardings(shapes, captioner.SHARDING_RULES, mesh)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params(), places)
    program = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    key = jax.random.key(7)
    return jax.device_get(program(placed, sharding.shard_batch(batch, mesh), key))


@functools.cache
def one_device():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return loss_and_gradient(made(), make_batch(), mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
  "axes", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "context": 2, "tensor": 2}]
)
def test_eight_devices_equal_one(axes):
  """The contrastive loss is over the clips of all of them."""
  (loss, metrics), gradient = loss_and_gradient(
    made(), make_batch(), sharding.make_mesh(**axes)
  )
  (expected, expected_metrics), expected_gradient = one_device()
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert metrics.keys() == expected_metrics.keys()
  for name in metrics:
    np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    gradient,
    expected_gradient,
  )


@pytest.mark.slow
def test_every_param_learns():
  _, gradient = one_device()
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    # Where keys have no bias in them, softmax does not see what all have in common.
    if "pool_key']['bias" not in jax.tree_util.keystr(path):
      assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_styles_are_said_in_the_second_phase_only():
  """Until then all captions are of any style, whatever the batch says."""
  loss = jax.jit(lambda task_loss, batch: task_loss(params(), batch, jax.random.key(0)),
                 static_argnums=0)  # fmt: skip
  task = made(styled_from=5, styled_share=1.0)
  unstyled = make_batch(step=4)
  first = unstyled["text_position_S"] == 0
  unstyled["text_S"] = np.where(
    first & (unstyled["text_segment_S"] > 0), ANY, unstyled["text_S"]
  )
  early, late = (loss(task.loss, make_batch(step))[0] for step in (4, 5))
  np.testing.assert_allclose(early, loss(task.loss, unstyled)[0], rtol=1e-6)
  np.testing.assert_allclose(
    late, jax.jit(task.evaluate)(params(), make_batch(), None)["loss"], rtol=1e-5
  )
  assert abs(early - late) > 1e-4
  assert STYLES[0] == "any"


@pytest.mark.parametrize(
  "change", [{"styled_share": 1.5}, {"contrastive_weight": -1.0}, {"styled_from": -1}]
)
def test_losses_that_cannot_be(change):
  with pytest.raises(ValueError, match=next(iter(change))):
    captioner.CaptionerLossConfig(**change)
