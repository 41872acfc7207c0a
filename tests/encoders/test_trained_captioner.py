"""The captioner as others use it: a stage that trains it, captions, similarities."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_captioner
from random_params import random_params

from sora_jax import evaluate
from sora_jax.data import tokenizer
from sora_jax.data.clips import Clip
from sora_jax.data.intake import score
from sora_jax.data.video import writer
from sora_jax.encoders.captioner import Captioner, VideoClip
from sora_jax.evaluation import captioning
from sora_jax.models import captioner as networks
from sora_jax.models.captioner import CaptionerConfig
from sora_jax.models.meta import CaptionerMeta
from sora_jax.packing.caption_styles import STYLES
from sora_jax.run import recipe as recipes
from sora_jax.run import stages
from sora_jax.runtime import checkpoint
from sora_jax.tasks import captioner as captioner_task

MODEL = CaptionerConfig(**tiny_captioner.SIZES)

pytestmark = pytest.mark.usefixtures("fast_compile")
META = CaptionerMeta(
  model=MODEL,
  input="pixels",
  patch_size=(1, 16, 16),
  styles=STYLES,
  max_text_tokens=12,
  tokens=48,
  segments=4,
  reference_fps=16.0,
  max_frames=17,
  max_pixels=48 * 48,
  size_multiple=16,
)
CAPTIONS = ["a red circle moves", "A small blue star stands still.", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A captioner of random weights, in the folder of a run."""
  run = tmp_path_factory.mktemp("run")
  task = captioner_task.make(
    MODEL,
    captioner_task.CaptionerLossConfig(),
    16 * 16 * 12,
    META.segments,
    patch_side=16,
  )
  params = random_params(task.init, jax.random.key(0))
  place = run / "captioner" / "model"
  checkpoint.save_model(place, params, META.to_json())
  tokenizer.train(CAPTIONS, str(place / "tokenizer.model"), MODEL.vocab_size)
  return run


@pytest.fixture(scope="module")
def model(folder):
  return Captioner.from_checkpoint(folder)


def video(frames=5, height=32, width=48, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 255, (frames, height, width, 3)).astype(np.uint8)


# All sizes and lengths that there are, and more.
CLIPS = [
  VideoClip(video(5), 8.0),
  (video(1, 16, 16, 1), 1.0),
  VideoClip(video(40, 90, 130, 2), 24.0),
  VideoClip(video(7, 17, 300, 3), 29.97),
  VideoClip(video(5, 32, 48, 4), 8.0),
]


@pytest.mark.slow
def test_clips_in_any_company_have_the_same_captions(model):
  # Five clips are three rows; together with others they are in other places.
  for method in ("greedy", "beam", "nucleus"):
    seeds = [7, 8, 9, 10, 11]
    all_of_them = model.caption(CLIPS, method=method, seed=seeds, rows=2)
    assert len(all_of_them) == len(CLIPS)
    for i in (0, 2):
      (alone,) = model.caption(CLIPS[i : i + 1], method=method, seed=seeds[i : i + 1])
      assert alone == all_of_them[i]


@pytest.mark.slow
def test_a_seed_and_a_style_change_captions(model):
  draws = {
    tuple(model.caption(CLIPS[:2], method="nucleus", seed=s, top_p=1.0))
    for s in (0, 0, 1, 2)
  }
  assert len(draws) == 3
  said = {tuple(model.caption(CLIPS, style=style)) for style in STYLES}
  assert len(said) > 1


@pytest.mark.slow
def test_embeddings_do_not_depend_on_the_batch(model):
  whole_NE = model.embed_clips(CLIPS)
  alone_NE = np.concatenate([model.embed_clips([clip], rows=1) for clip in CLIPS])
  np.testing.assert_allclose(whole_NE, alone_NE, atol=1e-5)
  text_NE = model.embed_captions(CAPTIONS, rows=2)
  np.testing.assert_allclose(
    text_NE[1:2], model.embed_captions(CAPTIONS[1:2]), atol=1e-5
  )
  np.testing.assert_allclose((text_NE**2).sum(-1), 1, atol=1e-5)
  similarity = model.similarity(CLIPS[:3], CAPTIONS)
  np.testing.assert_allclose(similarity, (whole_NE[:3] * text_NE).sum(-1), atol=1e-5)
  assert model.similarity([], []).shape == (0,) and model.caption([]) == []


def test_captions_of_any_length_and_script_have_an_embedding(model):
  texts = ["", "x" * 10000, "красный круг", "赤い円が動く", "🔴" * 300, "\x00\n"]
  assert np.isfinite(model.embed_captions(texts)).all()


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda m: m.caption(CLIPS, style="long"), "style 'long' is none of"),
    (lambda m: m.caption(CLIPS, method="best"), "method 'best' is none of"),
    (lambda m: m.caption(CLIPS, top_p=0.0), "top_p 0.0 in"),
    (lambda m: m.caption(CLIPS, seed=[1]), "1 seeds for 5 clips"),
    (lambda m: m.caption([(video()[..., :1], 8.0)]), r"\(5, 32, 48, 1\)"),
    (lambda m: m.caption([(video()[:0], 8.0)]), r"\(0, 32, 48, 3\)"),
    (lambda m: m.caption([(video().astype(float), 8.0)]), "float64"),
    (lambda m: m.caption([(video(), 0.0)]), "at 0.0 frames a second"),
    (lambda m: m.similarity(CLIPS, ["a"]), "5 clips and 1 captions"),
    (lambda m: m.embed_captions([None]), "a text, not None"),
  ],
)
def test_bad_input_is_said(model, call, message):
  with pytest.raises(ValueError, match=message):
    call(model)


def test_other_folders_and_vocabularies_are_refused(folder, tmp_path):
  with pytest.raises(ValueError, match=str(tmp_path)):
    Captioner.from_checkpoint(tmp_path)
  place = folder / "captioner" / "model"
  path = tmp_path / "tokenizer.model"
  words = [f"w{i}o{i * 7}rd{i * 13}" for i in range(200)]
  tokenizer.train(words, str(path), 400)
  params, _ = checkpoint.load_model(place)
  with pytest.raises(ValueError, match="it is of another vocabulary"):
    Captioner(params, META, tokenizer.Tokenizer(str(path)))
  # A smaller one is seen by its hash, and what it has not is never said.
  tokenizer.train(CAPTIONS[:1], str(path), MODEL.vocab_size - 8)
  words = tokenizer.Tokenizer(str(path))
  assert words.vocab_size < MODEL.vocab_size
  model = Captioner(params, META, words)
  for seed in range(3):
    model.caption(CLIPS[:2], method="nucleus", seed=seed, top_p=1.0)
  whole = tokenizer.Tokenizer(str(place / "tokenizer.model")).digest
  with pytest.raises(ValueError, match=f"{words.digest}, not the tokenizer {whole}"):
    tokenizer.Tokenizer(str(path), whole)


@pytest.mark.slow
def test_a_score_for_the_filter_of_clips(folder, model, tmp_path):
  name = f"sora_jax.encoders.captioner:similarity_scorer:{folder}"
  scorer = score.load(name)
  expected = np.mean(model.similarity(CLIPS[:1] * 2, CAPTIONS[:2]))
  found = scorer(*CLIPS[0][:1], tuple(CAPTIONS[:2]), CLIPS[0].fps)
  np.testing.assert_allclose(found["similarity"], expected, atol=1e-5)
  assert scorer(video(), (), 8.0) == {"similarity": 0.0}
  with pytest.raises(ValueError, match="module:maker:argument"):
    score.load("nothing")


def test_retrieval_counts_equal_captions_as_right():
  clip_NE = np.eye(4)[[0, 1, 2, 3]]
  text_NE = np.eye(4)[[0, 2, 1, 3]]
  found = captioning.retrieval(clip_NE, text_NE, ["a", "b", "c", "d"])
  assert found["clip_to_caption"].value == found["caption_to_clip"].value == 0.5
  assert captioning.retrieval(clip_NE, text_NE, ["a", "b", "b", "d"])[
    "clip_to_caption"
  ].value == 1.0  # fmt: skip


def test_similarity_of_samples_stands_beside_that_of_clips(model, tmp_path):
  paths = [tmp_path / f"{i}.png" for i in range(4)]
  for i, path in enumerate(paths):
    writer.write(path, video(1, 32, 32, i), 8.0)

  def clip(path):
    return Clip(str(path), str(path), 0.0, 1, 8.0, 32, 32, CAPTIONS[:1])

  # Two prompts, one of them without a file, sampled twice each.
  prompts = [clip(paths[0]), clip("")]
  found = captioning.similarity_of_samples(model, paths, prompts, 2)
  clips = [VideoClip(video(1, 32, 32, i), 8.0) for i in range(4)]
  expected = model.similarity(clips, CAPTIONS[:1] * 4)
  np.testing.assert_allclose(found["samples"], expected.mean(), atol=1e-5)
  np.testing.assert_allclose(found["real"], expected[0], atol=1e-5)
  assert (found["n"], found["real_n"]) == (4, 1)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"input": "sound"}, "config.captioner.input 'sound'"),
    ({"train": {"steps": 0}}, "config.captioner.train.steps must be at least 1"),
    ({"tokens": 10}, "config.captioner.tokens 10: a clip"),
    ({"patch_size": (1, 24, 24)}, "must be a multiple of 24"),
    ({"model": {"stem_pieces": 3}}, "stem_pieces 3 must divide"),
    ({"patch_size": (2, 8, 8)}, r"must be \(1, n, n\)"),
    ({"max_text_tokens": 200}, "fit into a row"),
    ({"rows": 0}, "rows, segments and eval_batches"),
  ],
)
def test_configs_that_cannot_be(change, message):
  with pytest.raises(ValueError, match=message):
    recipes.read(tiny_captioner.get_config(**change))


def test_flops_are_counted():
  assert networks.num_flops(MODEL, 48, 1, 10, 5, 100) > 0


def test_a_captioner_of_latents_judges_samples(tiny_run, tmp_path):
  """It reads a run's latents, sees videos through its VAE, and `evaluate` asks it."""
  for stage in ("data", "vae", "encode", "dit"):
    shutil.copytree(tiny_run.workdir / stage, tmp_path / stage)
  config = tiny_captioner.get_config(input="latents", patch_size=(1, 2, 2))
  config.captioner.train.steps = 1
  recipe = recipes.read(config)
  stages.run(("captioner",), recipe, tmp_path)
  model = Captioner.from_checkpoint(tmp_path)
  assert model.meta.input == "latents" and model.meta.steps == 1
  alone_NE = np.concatenate([model.embed_clips([clip], rows=1) for clip in CLIPS[:3]])
  np.testing.assert_allclose(model.embed_clips(CLIPS[:3]), alone_NE, atol=1e-5)
  assert len(model.caption(CLIPS[:2])) == 2

  config.evaluate.captioner = str(tmp_path)
  evaluate.run(recipes.read(config), tmp_path)
  found = json.loads((tmp_path / "evaluate" / "results.json").read_text())["similarity"]
  assert found["n"] == found["real_n"] == 2
  assert max(abs(found["samples"]), abs(found["real"])) <= 1 + 1e-5
  other, meta = checkpoint.load_model(tmp_path / "vae" / "model")
  checkpoint.save_model(tmp_path / "vae" / "model", other, {**meta, "id": "another"})
  with pytest.raises(ValueError, match="reads latents of the VAE .*, not of 'another'"):
    Captioner.from_checkpoint(tmp_path)
