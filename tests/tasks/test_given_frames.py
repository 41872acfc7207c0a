"""Training of models that read given frames, and of one of two experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sora_jax import train_dit
from sora_jax.data.packed_dataset import PackedOptions, segment_of
from sora_jax.data.records import LatentClip, LatentReader, write_shard
from sora_jax.models.dit import DiTConfig
from sora_jax.models.meta import DiTMeta, FrozenText
from sora_jax.packing import conditions, packed_row
from sora_jax.packing.planner import Budget
from sora_jax.run import recipe
from sora_jax.tasks import dit as dit_task
from sora_jax.training import loop

MODEL = DiTConfig(
  channels=4,
  width=24,
  depth=1,
  heads=2,
  mlp_width=32,
  text_width=8,
  frequency_width=8,
  condition_channels=8,
  image_width=6,
  image_tokens=3,
)
OPTIONS = PackedOptions(
  Budget(32, 8, 2), (1, 2, 2), 16.0, 0.0, 0.0, 0.0,
  condition_width=MODEL.condition_width, image=(3, 6),
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("fast_compile")


def record(name, seed):
  rng = np.random.default_rng(seed)
  latent_THWC = rng.standard_normal((2, 4, 4, 4), np.float32)
  beside_THWC = rng.standard_normal((2, 4, 4, 4), np.float32)
  return {
    "id": name,
    "latent_THWC": latent_THWC,
    "extras_NHWC": np.zeros((0, 4, 4, 4), np.float32),
    "extras": (),
    "fps": 16.0,
    "captions": ("x",),
    "texts": [rng.standard_normal((3, 8), np.float32)],
    "split": "train",
    "frames": 5,
    "height": 32,
    "width": 32,
    "condition_THWC": conditions.channels(beside_THWC, [0]),
    "image_JV": rng.standard_normal((3, 6), np.float32),
  }


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
  """A row of two clips, from records that were written and read."""
  folder = tmp_path_factory.mktemp("encode")
  records = [record("a", 0), record("b", 1)]
  clips = write_shard(str(folder / "latents-0.array_record"), records)
  reader = LatentReader(str(folder))
  size = packed_row.RowSize(
    OPTIONS.budget, 16, 8, condition_width=MODEL.condition_width, image=(3, 6)
  )
  row = packed_row.empty(packed_row.PackedRow, size)
  writer, rng = packed_row.RowWriter(row), np.random.default_rng(0)
  for clip in clips:
    read = reader.read(clip)
    writer.add(segment_of(rng, clip, read, 0, read["texts"][0], OPTIONS))
  return {k: jnp.asarray(v)[None] for k, v in row.items()} | {"step": jnp.array(0)}


def test_channels_of_a_mask():
  # As WanImageToVideoPipeline.prepare_latents lays out a first and a last frame.
  made = conditions.channels(np.zeros((3, 1, 1, 2)), [0, 8])[:, 0, 0]
  np.testing.assert_array_equal(
    made, [[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
  )


@pytest.mark.slow
def test_each_clip_sees_its_own_condition_and_image(batch):
  """The loss of a clip changes with what is beside it, and not with another's."""
  task = dit_task.make(MODEL, None, dit_task.DiTLossConfig(), 2)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes
  )

  @jax.jit
  def errors(batch):
    t_BN = jnp.full((1, 2), 0.5)
    objective = task.loss.__self__
    return objective._errors(params, batch, jax.random.key(1), t_BN)[0][0]

  plain_L = np.asarray(errors(batch))
  first_L = np.asarray(batch["segment_L"][0] == 1)
  # Token 2 and slot 0 are the first clip's.
  for name, place in (("condition_LQ", (0, 2)), ("image_NJV", (0, 0))):
    other = rng.standard_normal(batch[name].shape[len(place) :], np.float32)
    changed = {**batch, name: batch[name].at[place].set(other)}
    moved_L = np.abs(np.asarray(errors(changed)) - plain_L)
    assert (moved_L[first_L] > 0).all(), name
    np.testing.assert_array_equal(moved_L[~first_L], 0)


def test_records_without_a_condition_are_named():
  made = record("a", 0)
  clip = LatentClip("a", "s", 0, (2, 4, 4), 16.0, ("x",), "train", (), 5, 32, 32)
  del made["condition_THWC"]
  rng = np.random.default_rng(0)
  with pytest.raises(ValueError, match="a has no condition_THWC.*delete the folder"):
    segment_of(rng, clip, made, 0, made["texts"][0], OPTIONS)


def test_levels_of_an_expert(batch):
  seen = []
  config = dit_task.DiTLossConfig(levels=(0.875, 1.0))
  objective = dit_task.make(MODEL, None, config, 2).loss.__self__
  for t_BN in (jnp.zeros((1, 2)), jnp.ones((1, 2))):
    seen.append(float(objective._squeezed(t_BN)[0, 0]))
  assert seen == [0.875, 1.0]
  with pytest.raises(ValueError, match="levels .* are not two rising"):
    dataclasses.replace(config, levels=(0.5, 0.5))


class Stop(Exception):
  """Training would begin."""


@pytest.mark.parametrize(
  "changes, reason",
  [
    ({"model": MODEL}, "it needs given images"),
    ({"boundary": 0.875}, "it is one of two experts, and the other is needed"),
    ({}, ""),
  ],
)
def test_samples_while_training_are_of_models_that_texts_suffice_for(
  monkeypatch, tmp_path, caplog, changes, reason
):
  text_alone = dataclasses.replace(
    MODEL, condition_channels=0, image_width=0, image_tokens=0
  )
  meta = DiTMeta(
    text_alone, FrozenText("x", 512), 512, 128, 1024, 2, 16.0, True, "vae-0"
  )
  meta = dataclasses.replace(meta, **changes)
  ready, made = loop.Setup(None, (), None), []
  for name, value in (("setup", ready), ("_meta", meta), ("_Preview", None)):
    monkeypatch.setattr(
      train_dit, name, lambda *_, name=name, value=value: made.append(name) or value
    )
  monkeypatch.setattr(train_dit.latent_shards, "check", lambda _: None)
  monkeypatch.setattr(train_dit.checkpoint, "check_model", lambda _: None)

  def train(ready, *_):
    assert (ready.on_eval is None) == bool(reason)
    raise Stop

  monkeypatch.setattr(train_dit.loop, "train", train)
  with caplog.at_level("INFO"), pytest.raises(Stop):
    train_dit.run(recipe.read(tiny.get_config()), tmp_path)
  assert ("_Preview" in made) == (not reason)
  assert f"no samples while it trains: {reason}" in caplog.text or not reason
