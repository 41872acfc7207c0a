"""The section of a config that is about the expander of prompts."""

import dataclasses

from sora_jax.data import tokenizer
from sora_jax.models.expander import ExpanderConfig
from sora_jax.run import convert
from sora_jax.runtime.fields import free
from sora_jax.training import optim
from sora_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class ExpanderStage:
  """An expander of prompts that is trained on captions; config.stages asks for it.

  rows: pairs of captions in a batch. max_tokens: longest pair, with both ends; a prompt
  may have half of it.
  """

  train: TrainConfig = TrainConfig(
    steps=600,
    learning_rate=2e-3,
    warmup_steps=50,
    schedule="cosine",
    b2=0.98,
    ema_decay=0.98,
    save_every=300,
    eval_every=300,
  )
  model: ExpanderConfig = ExpanderConfig()
  rows: int = 32
  max_tokens: int = 128
  eval_batches: int = free(2)


def check(stage: ExpanderStage) -> None:
  """Raises ValueError, naming the key, for what does not go together."""
  if stage.max_tokens < 4 or min(stage.rows, stage.eval_batches) < 1:
    raise ValueError(
      f"config.expander.max_tokens {stage.max_tokens} must be at least 4, and rows "
      f"{stage.rows} and eval_batches {stage.eval_batches} at least 1"
    )
  tokenizer.check_size(stage.model.vocab_size, "config.expander.model.vocab_size")
  with convert.naming("config.expander.train"):
    optim.make_schedule(stage.train, 1.0)
