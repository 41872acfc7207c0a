"""What the packed rows of a recipe are made of: their options, texts and tokenizer."""

import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sora_jax.data import mixture, records, tokenizer
from sora_jax.data.caption_texts import CaptionFeatures, CaptionIds, CaptionTexts
from sora_jax.data.packed_dataset import Choice, PackedDataset, PackedOptions
from sora_jax.data.schedule import Scheduled
from sora_jax.models.meta import VAEMeta
from sora_jax.run import build
from sora_jax.run import recipe as recipes
from sora_jax.run.build import budget
from sora_jax.runtime import checkpoint


def packed_options(stage: recipes.DiTStage) -> PackedOptions:
  """How clips become the rows that the DiT is trained on."""
  return PackedOptions(
    budget(stage),
    stage.model.patch_size,
    stage.reference_fps,
    caption_dropout=stage.caption_dropout,
    given_prob=stage.given_prob,
    extra_prob=stage.extra_prob,
    synthetic_captions=stage.synthetic_captions,
    condition_width=stage.model.condition_width,
    image=build.image_size(stage.model),
  )


def training_rows(
  make: Callable[..., PackedDataset], options: PackedOptions, recipe: recipes.Recipe
) -> PackedDataset | Scheduled:
  """The rows that the DiT is trained on: of one budget, or of several by their steps.

  make: gives the `PackedDataset` of options, a seed and a choice of clips.
  """
  stage, parts = recipe.dit, []
  shares = mixture.shares(recipe.data.mixture)
  for number, _ in enumerate(stage.schedule or (0,)):
    parts.append(
      make(
        options,
        recipe.seed,
        Choice(
          size=number if stage.schedule else -1,
          leave_out=recipe.data.leave_out,
          shares=shares,
          image_share=stage.image_share[number] if stage.image_share else None,
        ),
      )
    )
  if len(parts) == 1:
    return parts[0]
  return Scheduled(parts, [step * stage.rows for step in stage.schedule])


def vae_id(workdir: pathlib.Path) -> str:
  """Fingerprint of the arrays of a run's VAE; "" if it has none."""
  folder = workdir / "vae" / "model"
  if not folder.exists():
    return ""
  return VAEMeta.from_json(checkpoint.load_meta(folder), folder).id


def latent_reader(workdir: pathlib.Path) -> records.LatentReader:
  """Reads the latents of a run, which must be of its VAE; for one data set."""
  return records.LatentReader(str(workdir / "encode"), vae_id(workdir))


def last_part(dataset: PackedDataset | Scheduled) -> PackedDataset:
  """The rows that training ends with, of the largest clips as a rule."""
  return dataset.last() if isinstance(dataset, Scheduled) else dataset


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
  vocab_size: int, latents: Sequence[records.LatentClip], path: pathlib.Path
) -> None:
  """Trains a tokenizer of the training captions, if none that fits is there yet."""
  if path.exists() and tokenizer.Tokenizer(str(path)).vocab_size <= vocab_size:
    return
  # Once each, however many budgets they are encoded at.
  once = [clip for clip in latents if clip.split == "train" and not clip.budget]
  captions = [caption for clip in once for caption in clip.captions]
  tokenizer.train(captions, str(path), vocab_size)


def segment_counts(
  dataset: PackedDataset, segments: int, most: int = 64
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(tokens of each clip, tokens of each text) of the first rows: int [segments]."""
  for i in range(min(most, dataset.elements_per_epoch())):
    row = dataset[i]
    clips, texts = (
      np.bincount(row[name], minlength=segments + 1)[1:]
      for name in ("segment_L", "text_segment_S")
    )
    yield clips, texts
