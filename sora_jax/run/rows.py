"""What the packed rows of a recipe are made of: their options, texts and tokenizer."""

import pathlib
from collections.abc import Sequence

from sora_jax.data import records, tokenizer
from sora_jax.data.caption_texts import CaptionFeatures, CaptionIds, CaptionTexts
from sora_jax.data.packed_dataset import PackedOptions
from sora_jax.run import recipe as recipes
from sora_jax.run.build import budget


def packed_options(stage: recipes.DiTStage) -> PackedOptions:
  """How clips become the rows that the DiT is trained on."""
  return PackedOptions(
    budget(stage),
    stage.model.patch_size,
    stage.reference_fps,
    caption_dropout=stage.caption_dropout,
    given_prob=stage.given_prob,
    extra_prob=stage.extra_prob,
  )


def caption_texts(
  recipe: recipes.Recipe, workdir: pathlib.Path, vocabulary: pathlib.Path
) -> CaptionTexts:
  """Captions as the rows hold them.

  vocabulary: the tokenizer of the small text encoder; a frozen one has its own.
  """
  stage, text = recipe.dit, recipe.text
  if not text.folder:
    return CaptionIds(tokenizer.Tokenizer(str(vocabulary)), stage.max_text_tokens)
  empty_text = records.read_empty_text(str(workdir / "encode" / records.EMPTY_TEXT))
  return CaptionFeatures(empty_text, text.max_tokens, text.pad_to)


def train_tokenizer(
  stage: recipes.DiTStage,
  latents: Sequence[records.LatentClip],
  path: pathlib.Path,
) -> None:
  """Trains the small text encoder's tokenizer, if none that fits is there yet."""
  vocab_size = stage.text.vocab_size
  if path.exists() and tokenizer.Tokenizer(str(path)).vocab_size <= vocab_size:
    return
  captions = [c for clip in latents if clip.split == "train" for c in clip.captions]
  tokenizer.train(captions, str(path), vocab_size)
