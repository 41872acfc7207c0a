"""What a packed row will hold: from a manifest, or from the recipe's longest clip."""

import pathlib

import numpy as np

from sora_jax.data import clips, records
from sora_jax.models.attention import splash_tpu
from sora_jax.packing import patches, planner
from sora_jax.planning import cost_model
from sora_jax.run import build
from sora_jax.run import recipe as recipes

# Rows that are looked at; they are in random order.
_ROWS = 32


def of_recipe(
  recipe: recipes.Recipe,
  workdir: str,
  manifest: str | None = None,
  clip_tokens: int = 0,
) -> cost_model.Load:
  """Returns what the recipe's rows will hold.

  Args:
    recipe: for the size of a row.
    workdir: of a run, whose manifest is taken if it has one.
    manifest: another one, of clips or of latents.
    clip_tokens: of each clip, where there is no manifest; 0 = the longest.

  Raises:
    ValueError: if a manifest cannot be read, or a clip is longer than a row.
  """
  paths = [manifest] if manifest else _manifests(workdir)
  budget = build.budget(recipe.dit)
  if paths:
    lengths = _lengths(recipe, paths[0])
    rows, fill = _packed(lengths, budget, recipe.seed)
    return of_rows(rows, fill, budget, paths[0])
  tokens = clip_tokens or recipes.longest_clip(recipe)
  text = recipes.longest_text(recipe)
  if tokens > budget.tokens:
    raise ValueError(
      f"--clip_tokens={tokens} is more than a row holds: config.dit.tokens "
      f"{budget.tokens}"
    )
  count = min(budget.tokens // tokens, budget.text_tokens // text, budget.segments)
  source = f"{count} clips of {tokens} tokens a row"
  return of_rows([[(tokens, text)] * count], count * tokens / budget.tokens, budget,
                 source)  # fmt: skip


def _manifests(workdir):
  wanted = ("encode/latents.jsonl", "data/manifest.jsonl")
  paths = [pathlib.Path(workdir) / name for name in wanted]
  return [str(path) for path in paths if path.exists()]


def _lengths(recipe, path):
  """Returns (tokens, text tokens) of each training clip; the longest text if unknown.

  Image latents that a visit may append are not counted.
  """
  text, patch_size = recipes.longest_text(recipe), recipe.dit.model.patch_size
  rows = next(clips.read_rows(path), (0, {}))[1]
  found = []
  if "shape" in rows:
    latents = records.read_latents_manifest(path)
    last = max((clip.budget for clip in latents), default=0)
    for clip in latents:
      if clip.split == "train" and clip.budget == last:
        grid = patches.grid_shape(clip.shape, patch_size)
        longest = max([recipe.text.pad_to, *clip.text_lengths])
        found.append((int(np.prod(grid)), longest if clip.text_lengths else text))
  else:
    for clip in clips.read_manifest(path):
      if clip.split == "train":
        shape = recipe.vae.model.latent_shape(clip.frames, clip.height, clip.width)
        found.append((int(np.prod(patches.grid_shape(shape, patch_size))), text))
  if not found:
    raise ValueError(f"{path} has no clip of split 'train'")
  return found


def _packed(lengths, budget, seed):
  """Packs as training does; returns rows of lengths, and how full all rows are."""
  rows = planner.plan(lengths, budget, seed, epoch=0)
  full = planner.fill(lengths, rows, budget)
  return [[lengths[i] for i in row] for row in rows[:_ROWS]], full


def of_rows(rows, fill: float, budget: planner.Budget, source: str) -> cost_model.Load:
  """Returns the mean load of rows, each a list of a clip's (tokens, text tokens)."""
  sums = np.zeros(7)
  for row in rows:
    tokens, texts = (np.array(column) for column in zip(*row, strict=True))
    visits = _visited(_ids(tokens, budget.tokens), _ids(tokens, budget.tokens))
    cross = _visited(_ids(tokens, budget.tokens), _ids(texts, budget.text_tokens))
    pairs = np.sum(tokens * (tokens + texts))
    own = np.sum(tokens.astype(float) ** 2) / budget.tokens**2
    sums += [len(row), tokens.sum(), texts.sum(), pairs, visits, cross, own]
  return cost_model.Load(source, fill, *(sums / len(rows)).tolist())


def _ids(lengths, total):
  """Returns the segment ids of a row: 1, 2, ..., then 0 for padding."""
  ids = np.zeros(total, np.int32)
  used = np.repeat(1 + np.arange(len(lengths)), lengths)
  ids[: len(used)] = used
  return ids


def _visited(ids_L, ids_S):
  """Returns the share of all blocks that the attention kernel visits."""
  blocks, padded = [], []
  for ids in (ids_L, ids_S):
    length, block = splash_tpu.whole_blocks(len(ids))
    padded.append(np.pad(ids, (0, length - len(ids))))
    blocks.append(block)
  return float(np.mean(splash_tpu.active_blocks(*padded, *blocks)))
