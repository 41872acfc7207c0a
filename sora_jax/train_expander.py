"""Stage "expander": a small model that makes prompts as long as the training captions.

  python -m sora_jax.train_expander --config=configs/quickstart.py

It learns from pairs of a short and a descriptive caption of the training clips, in a
few minutes on a CPU. `sample --expand` finds it in workdir/expander/model.
"""

import dataclasses
import itertools
import pathlib
import shutil

import jax
import numpy as np
from absl import logging

from sora_jax.data import tokenizer
from sora_jax.data.batches import Batches, first_batches
from sora_jax.data.clips import read_manifest
from sora_jax.language import expander
from sora_jax.language.pairs import PairDataset, as_given, pairs_of
from sora_jax.models.meta import ExpanderMeta
from sora_jax.run import build, cli
from sora_jax.run import recipe as recipes
from sora_jax.runtime import checkpoint, sharding
from sora_jax.tasks import expander as task
from sora_jax.training import loop


def run(recipe: recipes.Recipe, workdir) -> None:
  """Trains to the end, then saves the EMA params and the tokenizer.

  Raises:
    ValueError: no clip has a short caption and a longer one, or none of these fits.
  """
  workdir, stage = pathlib.Path(workdir), recipe.expander
  folder = workdir / expander.NETWORK
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
  build.check_rows("config.expander.rows", stage.rows, stage.train, mesh)
  vocabulary = folder / expander.TOKENIZER
  ready = _setup(recipe, workdir, vocabulary, mesh)
  state = loop.train(ready, stage.train, folder, mesh, recipe.seed, recipe.profile)
  ready.data.close()
  weights = checkpoint.fingerprint(state.ema)
  meta = ExpanderMeta(
    stage.model,
    stage.max_tokens,
    stage.train.steps,
    f"expander-{weights}",
    tokenizer.Tokenizer(str(vocabulary)).digest,
  )
  checkpoint.save_model(folder / "model", state.ema, meta.to_json())
  if jax.process_index() == 0:
    shutil.copyfile(vocabulary, folder / "model" / expander.TOKENIZER)
  sharding.sync("expander")
  logging.info("the expander is in %s", folder / "model")


def _setup(recipe, workdir, vocabulary, mesh) -> loop.Setup:
  """The stage's task and data; trains the tokenizer if it is not there yet."""
  stage = recipe.expander
  clips = read_manifest(workdir / "data" / "manifest.jsonl")
  pairs = pairs_of(clips)
  if jax.process_index() == 0 and not vocabulary.exists():
    both = ((as_given(short), long) for short, long in pairs)
    texts = list(dict.fromkeys(itertools.chain.from_iterable(both)))
    tokenizer.train(texts, str(vocabulary), stage.model.vocab_size)
  sharding.sync("tokenizer of the expander")
  words = tokenizer.Tokenizer(str(vocabulary))
  dataset = PairDataset(pairs, words, stage.max_tokens, recipe.seed)
  logging.info(
    "%d pairs of captions; %d are longer than %d tokens and left out",
    len(pairs) - dataset.left_out,
    dataset.left_out,
    stage.max_tokens,
  )
  host, hosts = sharding.host_shard(mesh)
  shard = {"process_index": host, "process_count": hosts}
  return loop.Setup(
    task=task.make(stage.model),
    rules=task.RULES,
    data=Batches(dataset, stage.rows, **shard),
    eval_batches=_heldout(clips, words, stage, shard),
    tokens_per_step=stage.rows * stage.max_tokens,
    units=lambda batch: int(np.count_nonzero(batch["long_S"])),
    captioned=True,
  )


def _heldout(clips, words, stage, shard) -> list[dict]:
  """Batches of held-out pairs; () where the held-out clips have none."""
  try:
    pairs = pairs_of(clips, "heldout")
    dataset = PairDataset(pairs, words, stage.max_tokens, 0)
  except ValueError as error:
    logging.info("the expander is not evaluated: %s", error)
    return []
  return first_batches(dataset, stage.rows, stage.eval_batches, **shard)


if __name__ == "__main__":
  cli.command("expander")
