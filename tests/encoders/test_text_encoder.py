"""A frozen text encoder: its features, and their way from captions to samples."""

import dataclasses
import json
import pathlib
import pickle
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import sealed
import tiny

from sora_jax import sample
from sora_jax.data import records, tokenizer
from sora_jax.data.batches import Batches
from sora_jax.data.caption_texts import CaptionFeatures
from sora_jax.data.packed_dataset import PackedDataset, PackedOptions
from sora_jax.diffusion.solvers import Options
from sora_jax.encoders.text_encoder import FrozenTextEncoder, clean
from sora_jax.models.t5 import T5Config, T5Encoder
from sora_jax.packing import planner
from sora_jax.run import recipe as recipes
from sora_jax.runtime import checkpoint, sharding
from sora_jax.tasks import dit as dit_task

CONFIG = T5Config(
  vocab_size=320,
  width=24,
  depth=2,
  heads=2,
  head_dim=8,
  mlp_width=32,
  bias_per_layer=True,
)
TEXTS = ["a red circle", "", "a cyan triangle turns and moves to the right " * 3, "b"]


pytestmark = pytest.mark.usefixtures("fast_compile")


def random_params(seed=0):
  ids_BS = jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(T5Encoder(CONFIG).init, jax.random.key(0), ids_BS, ids_BS)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: rng.normal(0, s.shape[0] ** -0.5, s.shape).astype(np.float32),
    shapes["params"],
  )


def write_encoder(folder, seed=0):
  path = folder / "text" / "model"
  meta = {"model": dataclasses.asdict(CONFIG), "id": f"text-{seed}"}
  checkpoint.save_model(path, random_params(seed), meta)
  tokenizer.train(TEXTS, str(path / "spiece.model"), 300)
  return folder


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def features(folder):
  return FrozenTextEncoder(folder, one_device()).encode(TEXTS)


# --- the encoder


@pytest.mark.slow
def test_features_are_those_of_each_text_alone(folder, features):
  words = tokenizer.Tokenizer(str(folder / "text" / "model" / "spiece.model"))
  assert len(features[1]) == 1  # the end of a text is all that the empty one has
  apply = jax.jit(T5Encoder(CONFIG).apply)
  for text, made_SE in zip(TEXTS, features, strict=True):
    ids = jnp.array([words.encode(clean(text), 512)])
    alone = apply({"params": random_params()}, ids, ids >= 0)[0]
    assert made_SE.dtype == np.float32 and made_SE.shape == alone.shape
    np.testing.assert_allclose(made_SE, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sharded_over_a_mesh(folder, features):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  for a, b in zip(FrozenTextEncoder(folder, mesh).encode(TEXTS), features, strict=True):
    np.testing.assert_allclose(
      a.astype(np.float32), b.astype(np.float32), rtol=2**-6, atol=1e-4
    )


@pytest.mark.slow
def test_bfloat16_params(folder, features):
  encoder = FrozenTextEncoder(folder, one_device(), jnp.bfloat16)
  assert {p.dtype for p in jax.tree.leaves(encoder._residency.get("text"))} == {
    jnp.dtype("bfloat16")
  }
  for a, b in zip(encoder.encode(TEXTS), features, strict=True):
    a, b = a.astype(np.float32), b.astype(np.float32)
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


@pytest.mark.slow
def test_long_texts_are_cut_and_keep_their_end(folder):
  encoder = FrozenTextEncoder(folder, one_device())
  long = " ".join(["moves"] * 900)
  assert [len(f) for f in encoder.encode([long, long[:90]], 12)] == [12, 12]
  assert len(encoder.encode([long])[0]) == 512
  assert encoder.encode([]) == []


def test_captions_are_cleaned():
  assert clean("  a &amp;amp; b\n\tc&nbsp;d ") == "a & b c d"


def test_errors(folder, tmp_path):
  mesh = one_device()
  with pytest.raises(ValueError, match="no complete model"):
    FrozenTextEncoder(tmp_path, mesh)
  with pytest.raises(ValueError, match=r"another text encoder \(text-0\) .*\(text-9\)"):
    FrozenTextEncoder(folder, mesh, expected="text-9")
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  path = tmp_path / "text" / "model"
  model = json.loads((path / "model.json").read_text())
  few = {**model["meta"], "model": {**model["meta"]["model"], "vocab_size": 270}}
  sealed.rewrite(path / "model.json", meta=few)
  with pytest.raises(ValueError, match=r"spiece\.model has 300 pieces, but .* 270"):
    FrozenTextEncoder(tmp_path, mesh)
  (path / "spiece.model").unlink()
  with pytest.raises(ValueError, match=r"spiece\.model: no such tokenizer"):
    FrozenTextEncoder(tmp_path, mesh)
  (path / "model.json").write_text('{"params": "params-0", "meta": {"model": {}}}')
  with pytest.raises(ValueError, match="not a text encoder"):
    FrozenTextEncoder(tmp_path, mesh)


# --- records and rows


LENGTHS = {"clip0": (3, 5), "clip1": (), "clip2": (1,), "clip3": (4,)}


def write_records(folder, **changes):
  rng = np.random.default_rng(0)
  made = [
    {
      "id": name,
      "latent_THWC": rng.standard_normal((2, 4, 4, 3)),
      "extras_NHWC": np.zeros((0, 4, 4, 3)),
      "extras": (),
      "fps": 8.0,
      "captions": [f"caption {n}" for n in lengths],
      "texts": [rng.standard_normal((n, 6)) for n in lengths],
      "split": "train",
      "frames": 5,
      "height": 32,
      "width": 32,
      **changes,
    }
    for name, lengths in LENGTHS.items()
  ]
  return made, records.write_shard(f"{folder}/0.array_record", made)


EMPTY = records.EmptyText(np.full((2, 6), 7, ml_dtypes.bfloat16), "text-0")


def rows_of(folder, clips, pad_text_to=0, dropout=0.0):
  options = PackedOptions(
    planner.Budget(24, 20, 3), (1, 2, 2), reference_fps=8.0, caption_dropout=dropout
  )
  texts = CaptionFeatures(EMPTY, max_tokens=8, pad_to=pad_text_to)
  reader = records.LatentReader(str(folder))
  return PackedDataset(clips, reader, texts, options, seed=1)


def test_records_hold_features(tmp_path):
  made, clips = write_records(tmp_path)
  assert {clip.id: clip.text_lengths for clip in clips} == LENGTHS
  assert records.read_shard_clips(f"{tmp_path}/0.array_record") == clips
  records.write_latents_manifest(f"{tmp_path}/latents.jsonl", clips)
  assert records.read_latents_manifest(f"{tmp_path}/latents.jsonl") == clips
  reader = records.LatentReader(tmp_path)
  for record, clip in zip(made, clips, strict=True):
    texts = reader.read(clip)["texts"]
    assert [text.dtype for text in texts] == [ml_dtypes.bfloat16] * len(clip.captions)
    for text, expected in zip(texts, record["texts"], strict=True):
      np.testing.assert_array_equal(text, expected.astype(ml_dtypes.bfloat16))
  with pytest.raises(ValueError, match="clip0: the features of a caption are not fini"):
    write_records(tmp_path, captions=["a"], texts=[np.full((2, 6), np.nan)])


def test_empty_text_file(tmp_path):
  path = tmp_path / "empty_text.msgpack"
  with pytest.raises(ValueError, match="no features of the empty caption"):
    records.read_empty_text(path)
  records.write_empty_text(path, EMPTY)
  read = records.read_empty_text(path)
  assert read.encoder == "text-0"
  np.testing.assert_array_equal(read.features_SE, EMPTY.features_SE)
  path.write_bytes(path.read_bytes()[:20])
  with pytest.raises(ValueError, match="no features of the empty caption"):
    records.read_empty_text(path)


@pytest.mark.parametrize("pad_to", [0, 6])
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_rows_hold_features(tmp_path, pad_to, dropout):
  made, clips = write_records(tmp_path)
  dataset = pickle.loads(pickle.dumps(rows_of(tmp_path, clips, pad_to, dropout)))
  seen = []
  for i in range(dataset.elements_per_epoch()):
    row = dataset[i]
    assert "text_S" not in row and "text_position_S" not in row
    assert row["text_SE"].shape == (20, 6)
    assert row["text_SE"].dtype == ml_dtypes.bfloat16
    assert not row["text_SE"][row["text_segment_S"] == 0].any()
    for k, index in enumerate(row["clip_N"][row["clip_N"] >= 0]):
      here = row["text_SE"][row["text_segment_S"] == k + 1]
      texts = [] if dropout else made[index]["texts"]
      known = [text.astype(ml_dtypes.bfloat16) for text in texts] or [EMPTY.features_SE]
      assert any(
        len(here) == max(len(text), pad_to)
        and np.array_equal(here[: len(text)], text)
        and not here[len(text) :].any()
        for text in known
      )
      seen.append(index)
  assert sorted(seen) == [0, 1, 2, 3]


def test_rows_tell_which_features_they_hold(tmp_path):
  _, clips = write_records(tmp_path)
  prints = {rows_of(tmp_path, clips, pad_to).fingerprint for pad_to in (0, 6)}
  assert len(prints) == 2
  without = [dataclasses.replace(clip, text_lengths=()) for clip in clips]
  with pytest.raises(ValueError, match="clip0: features of 0 of 2 captions; encode it"):
    rows_of(tmp_path, without)
  with pytest.raises(ValueError, match="30 text tokens, but a row holds 20"):
    rows_of(tmp_path, clips, 30)[0]


@pytest.mark.slow
def test_batches_with_workers_hold_features(tmp_path):
  _, clips = write_records(tmp_path)
  made = []
  for workers in (0, 1):
    batches = Batches(rows_of(tmp_path, clips), 2, workers=workers)
    made.append(next(batches))
    batches.close()
  for name, value in made[0].items():
    np.testing.assert_array_equal(np.asarray(made[1][name]), value)
  assert made[1]["text_SE"].dtype == ml_dtypes.bfloat16


# --- recipes


def config_of(folder, **text):
  config = tiny.get_config()
  config.text = {
    "folder": str(folder),
    "width": CONFIG.width,
    "max_tokens": 24,
    "pad_to": 24,
    **text,
  }
  return config


def test_recipe_takes_the_width_of_the_encoder():
  assert recipes.read(config_of("x")).dit.model.text_width == CONFIG.width
  assert recipes.read(config_of("")).dit.model.text_width == 16


@pytest.mark.parametrize(
  "text, message",
  [
    ({"pad_to": 8}, r"config\.text\.pad_to 8 must be 0, or at least .* 24"),
    ({"pad_to": 97}, r"config\.text\.pad_to 97 is more than .* 96"),
    ({"max_tokens": 97, "pad_to": 0}, r"config\.text\.max_tokens 97 is more than"),
    ({"max_tokens": 0}, r"config\.text\.max_tokens and width must be at least 1"),
  ],
)
def test_recipe_errors(text, message):
  with pytest.raises(ValueError, match=message):
    recipes.read(config_of("x", **text))
  recipes.read(config_of("", **text))


# --- the whole way


@pytest.fixture(scope="module")
def run(tiny_run, commands, folder, tmp_path_factory):
  """The tiny run's clips and VAE, with features from there on."""
  workdir = tmp_path_factory.mktemp("run")
  for name in ("data", "vae"):
    shutil.copytree(tiny_run.workdir / name, workdir / name)
  path = workdir / "config.py"
  path.write_text(
    f"import sys\nsys.path.insert(0, {str(pathlib.Path(__file__).parents[1])!r})\n"
    "from encoders import test_text_encoder\n"
    f"def get_config():\n  return test_text_encoder.config_of({str(folder)!r})\n"
  )
  flags = [f"--config={path}", f"--workdir={workdir}"]
  commands.run("main", *flags, "--config.stages=('encode','dit','sample')")
  return workdir


def test_encode_keeps_features(run, folder):
  clips = records.read_latents_manifest(run / "encode" / "latents.jsonl")
  empty = records.read_empty_text(run / "encode" / records.EMPTY_TEXT)
  encoder = FrozenTextEncoder(folder, one_device())
  assert empty.encoder == encoder.id
  reader = records.LatentReader(run / "encode")
  stored, texts = [empty.features_SE], [""]
  for clip in clips[:3]:
    stored += reader.read(clip)["texts"]
    texts += clip.captions
  for a, b in zip(stored, encoder.encode(texts, 24), strict=True):
    np.testing.assert_allclose(
      a.astype(np.float32), b.astype(np.float32), rtol=2**-6, atol=1e-4
    )


def test_the_model_says_which_features_it_takes(run, folder, tmp_path):
  params, meta = checkpoint.load_model(run / "dit" / "model")
  assert params.keys() == {"dit"}
  assert meta["text"] == {"features": "text-0", "pad_to": 24, "folder": str(folder)}
  assert meta["max_text_tokens"] == 24
  assert (run / "sample" / "contact_sheet.png").exists()
  # The folder's own comes before the one of training; it must be the same one.
  for name in ("vae", "dit"):
    (tmp_path / name).mkdir()
    shutil.copytree(run / name / "model", tmp_path / name / "model")
  write_encoder(tmp_path, seed=1)
  with pytest.raises(ValueError, match="another text encoder"):
    sample.Sampler.from_checkpoint(tmp_path, one_device())


def test_sampling_with_features(run):
  """Every text has a say, and the company in a row has none."""
  sampler = sample.Sampler.from_checkpoint(run, one_device())
  rng = np.random.default_rng(0)
  sampler.params = jax.tree.map(
    lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), sampler.params
  )
  film = sample.Request(TEXTS[0], 64, 64, 9, 12.0, seed=4)
  other = dataclasses.replace(film, prompt=TEXTS[2])
  image = sample.Request("white noise", 32, 32, 1, 8.0, seed=6)
  negative = dataclasses.replace(film, negative_prompt="a star")

  def make(*requests):
    return sampler.sample(requests, Options(steps=2, guidance_scale=3.0), rows=1)

  together = make(film, image)
  ((alone,), (changed,), (led,)) = (
    make(request) for request in (film, other, negative)
  )
  assert np.abs(together[0].astype(int) - alone).max() <= 1
  for video in (changed, led):
    assert np.abs(video.astype(int) - alone).max() > 1


@pytest.mark.slow
def test_zero_features_are_attended():
  """As Wan does: a caption's places up to pad_to are part of its text."""
  model = recipes.read(config_of("x")).dit.model
  task = dit_task.make(model, None, dit_task.DiTLossConfig(), 1)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: 0.3 * rng.standard_normal(s.shape, np.float32),
    jax.eval_shape(task.init, jax.random.key(0)),
  )
  L, S = 4, 6
  batch = {
    "patch_LP": rng.standard_normal((1, L, model.patch_width), np.float32),
    "segment_L": np.ones((1, L), np.int32),
    "group_L": np.zeros((1, L), np.int32),
    "position_L3": np.zeros((1, L, 3), np.float32),
    "text_SE": np.zeros((1, S, model.text_width), ml_dtypes.bfloat16),
    "text_segment_S": np.array([[1, 1, 0, 0, 0, 0]], np.int32),
  }
  batch["text_SE"][:, :2] = rng.standard_normal((2, model.text_width))
  key, loss = jax.random.key(1), jax.jit(task.loss)
  short, _ = loss(params, batch, key)
  # Not in place: the first call may still read its batch.
  whole = {**batch, "text_segment_S": np.ones((1, S), np.int32)}
  padded, _ = loss(params, whole, key)
  assert abs(short - padded) > 1e-4
