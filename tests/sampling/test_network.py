"""Each function around the network alone: loops, reuse, guidance, blends, and more."""

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import noise_process
from sora_jax.diffusion.solvers import Options
from sora_jax.models.dit import Context
from sora_jax.packing.packed_row import RowSize
from sora_jax.packing.planner import Budget
from sora_jax.sampling import network, sample_batch

L, P, SLOTS = 8, 2, 3
SIZE = RowSize(Budget(L, 4, SLOTS), P)


# Levels that the DiT is told: of the slots in up to 8 calls.
TIME_BNR = np.full((1, SLOTS, 8), 0.5, np.float32)


def batch(**changes):
  """A clip of 4 tokens with a given one and two texts, one of 3, and padding."""
  made = sample_batch.empty_batch(1, SIZE)
  made.packed["segment_L"][0] = [1, 1, 1, 1, 2, 2, 2, 0]
  made.packed["group_L"][0] = [1, 0, 0, 2, 4, 4, 4, 0]
  made.packed["patch_LP"][0] = np.arange(L * P).reshape(L, P)
  for name, value in changes.items():
    made.sampling[name][0] = value
  return made


def call(of, level=0.5, index=0, memory=None, x=1.0):
  x_BLP = jnp.full((1, L, P), x)
  level_BN = jnp.broadcast_to(jnp.asarray(level, jnp.float32), (1, SLOTS))
  out_BLP, memory = of(x_BLP, level_BN, index, memory)
  return np.asarray(out_BLP), memory


def says(value):
  """A network with one answer, which counts its calls in its memory."""

  def answer(x_BLP, level_BN, index, memory):
    out_BLP = jnp.broadcast_to(jnp.asarray(value, jnp.float32), x_BLP.shape)
    return out_BLP, None if memory is None else memory + 1

  return answer


def test_numbers_of_slots_and_means_of_clips_by_token():
  packed = batch().packed
  of_slots = network.per_token(packed, jnp.array([[1.0, 2.0, 3.0]]))
  assert of_slots[0, :, 0].tolist() == [1, 1, 1, 2, 3, 3, 3, 0]
  x_BL = jnp.array([[9.0, 1.0, 2.0, 6.0, 1.0, 2.0, 6.0, 5.0]])
  # Given tokens and padding do not count; a clip of two texts is one clip.
  means = network.clip_mean(packed, x_BL, SLOTS)
  assert means[0].tolist() == [3, 3, 3, 3, 3, 3, 3, 0]


@pytest.mark.parametrize(
  "index, times", [(0, [0, 2, 4]), (1, [2, 4, 0]), (5, [4, 0, 2])]
)
def test_positions_of_a_loop_turn_by_a_frame_with_each_call(index, times):
  made = batch(turn_step_L=[0, 0, 0, 0, 2, 2, 2, 0])
  made.packed["position_L3"][0] = np.arange(3 * L).reshape(L, 3)
  made.sampling["turn_L2"][0, 4:7] = [[0, 3], [1, 3], [2, 3]]
  rows = network.Rows.of_batch(
    made.packed, made.sampling, np.zeros((1, 4, 1)), TIME_BNR
  )
  before = made.packed["position_L3"]
  after = np.asarray(network.turned(before, rows, index))
  assert after[0, 4:7, 0].tolist() == times
  np.testing.assert_array_equal(after[0, 4:7, 1:], before[0, 4:7, 1:])
  np.testing.assert_array_equal(after[0, :4], before[0, :4])


def test_rows_follow_each_other_with_their_own_texts():
  made = batch()
  made.negative["text_segment_S"][0] = [3, 3, 0, 0]
  features = [np.full((1, 4, 1), value) for value in (1.0, 2.0)]
  packed = [made.packed, {**made.packed, **made.negative}]
  own, negative = (
    network.Rows.of_batch(*pair, TIME_BNR) for pair in zip(
      packed, [made.sampling] * 2, features, strict=True
    )
  )  # fmt: skip
  both = own.followed_by(negative)
  assert both.context.text_segment_BS.tolist() == [[0] * 4, [3, 3, 0, 0]]
  assert both.context.text_BSE[:, 0, 0].tolist() == [1, 2]
  assert both.given_level_BN.shape == (2, SLOTS)
  assert isinstance(both.context, Context) and both.context.text_states is None


def test_reuse_has_its_limit_but_for_the_last_call():
  class Memory(tuple):
    def _replace(self, limit):
      return float(limit)

  def limit_of(x_BLP, level_BN, index, memory):
    return x_BLP, memory

  reusing = network.reuses(limit_of, 0.25, calls=3)
  limits = [call(reusing, index=i, memory=Memory())[1] for i in range(3)]
  assert limits == [0.25, 0.25, 0.0]


def both_sides(x_BLP, level_BN, index, memory):
  """Rows with their texts say 3, those without 1."""
  half = len(x_BLP) // 2
  value_B = jnp.repeat(jnp.array([3.0, 1.0]), half)
  return jnp.broadcast_to(value_B[:, None, None], x_BLP.shape), memory


def test_guidance_has_a_scale_for_each_slot_inside_its_interval():
  packed, scale_BN = batch().packed, jnp.array([[2.0, 5.0, 1.0]])
  options = Options(guidance_interval=(0.2, 0.6))
  guided = network.guides(both_sides, packed, scale_BN, options)
  out, _ = call(guided, level=[0.5, 0.2, 0.6])
  # 1 + scale * (3 - 1); padding has a scale of 0.
  assert out[0, :, 0].tolist() == [5, 5, 5, 11, 3, 3, 3, 1]
  out, _ = call(guided, level=[0.5, 0.7, 0.1])
  assert out[0, :, 0].tolist() == [5, 5, 5, 3, 3, 3, 3, 1]


def test_guidance_is_asked_for_only_where_a_slot_is_inside():
  options = Options(guidance_interval=(0.2, 0.6))
  either = network.guides_inside(says(1.0), says(2.0), options)
  assert call(either, level=[0.9, 0.2, 0.9])[0].max() == 1.0
  assert call(either, level=[0.9, 0.1, 0.7])[0].min() == 2.0
  guided = says(1.0)
  assert network.guides_inside(guided, says(2.0), Options()) is guided


@pytest.mark.parametrize("method, still", [("euler", 2), ("heun", 4)])
def test_the_first_steps_rest(method, still):
  """Heun's steps have two calls each."""
  resting = network.rests_at_first(says(1.0), Options(method=method, zero_steps=2))
  found = [call(resting, index=i)[0].max() for i in range(5)]
  assert found == [0.0] * still + [1.0] * (5 - still)


def test_data_by_the_level_of_each_slot():
  data = network.predicts_data(says(0.5), batch().packed, "flow", "velocity")
  out, memory = call(data, level=[0.2, 0.4, 0.8], memory=3, x=2.0)
  assert memory == 4
  for slot, tokens in ((0.2, [0, 1, 2]), (0.4, [3]), (0.8, [4, 5, 6])):
    expected = noise_process.to_x0(0.5, 2.0, slot)
    np.testing.assert_allclose(out[0, tokens], expected, rtol=1e-6)


def test_twins_share_what_is_predicted_of_them():
  twin = [0, 4, 5, 3, 1, 2, 6, 7]
  weight = [0, 0.25, 1, 0, 0.75, 0, 0, 0]
  made = batch(twin_L=twin, twin_weight_L=weight)
  value = np.arange(L, dtype=np.float32)[:, None]
  out, _ = call(network.blends(says(value), made.sampling))
  assert out[0, :, 0].tolist() == [0, 1.75, 5, 3, 1.75, 5, 6, 7]


def test_tokens_follow_what_is_known_above_their_level():
  made = batch(follow_L=[0.4, 0.6, np.inf, 0.1, 0.0, 0.5, np.inf, 0.0])
  follow_BL = made.sampling["follow_L"]
  data = network.follows_known(says(-1.0), made.packed, follow_BL)
  out, _ = call(data, level=[0.5, 0.1, 0.5])
  known = made.packed["patch_LP"]
  follows = np.array([1, 0, 0, 0, 1, 0, 0, 0], bool)
  np.testing.assert_array_equal(out[0, follows], known[0, follows])
  assert np.all(out[0, ~follows] == -1.0)


def test_frames_of_a_loop_keep_their_absolute_positions(monkeypatch):
  """Attention sees them turned; what tells a frame from the others stays with it."""
  seen = {}

  def predict(model, params, x_BLP, t_BG, context, dtype, memory):
    seen["context"] = context
    return x_BLP

  monkeypatch.setattr(network.dit_task, "predict", predict)
  made = batch(turn_step_L=[0, 0, 0, 0, 2, 2, 2, 0])
  made.sampling["turn_L2"][0, 4:7] = [[0, 3], [1, 3], [2, 3]]
  made.packed["position_L3"][0, 4:7, 0] = [0, 2, 4]
  rows = network.Rows.of_batch(
    made.packed, made.sampling, jnp.zeros((1, 4, 2)), TIME_BNR
  )
  call(network.dit_network(None, None, rows, jnp.float32), index=1)
  context = seen["context"]
  assert context.position_BL3[0, 4:7, 0].tolist() == [2, 4, 0]
  assert context.absolute_BL3[0, 4:7, 0].tolist() == [0, 2, 4]
