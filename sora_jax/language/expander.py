"""An expander that a run has trained: short texts to long ones, without an endpoint."""

import functools
import pathlib
import zlib
from collections.abc import Sequence

import jax
import numpy as np

from sora_jax.data.tokenizer import EOS, Tokenizer
from sora_jax.language.pairs import as_given
from sora_jax.models import expander
from sora_jax.models.meta import ExpanderMeta
from sora_jax.runtime import checkpoint

NETWORK = ExpanderMeta.network
TOKENIZER = "tokenizer.model"


class TrainedExpander:
  """Greedy, or by nucleus sampling.

  Attributes:
    by: name of the weights, for the record.
    top_p: of the nucleus; 0 takes the likeliest words.
  """

  def __init__(self, folder, top_p: float = 0.0):
    """Loads folder/expander/model.

    Args:
      folder: of a run.
      top_p: see above, from 0 to 1.

    Raises:
      ValueError: if there is no complete expander, or top_p is out of range.
    """
    if not 0 <= top_p <= 1:
      raise ValueError(f"top_p {top_p:g} is not from 0 to 1")
    model = pathlib.Path(folder) / NETWORK / "model"
    meta = ExpanderMeta.from_json(checkpoint.load_meta(model), model)
    self._tokenizer = Tokenizer(str(model / TOKENIZER), meta.vocabulary)
    if self._tokenizer.vocab_size > meta.model.vocab_size:
      raise ValueError(
        f"{model / TOKENIZER} has {self._tokenizer.vocab_size} pieces, but the "
        f"expander {meta.model.vocab_size}"
      )
    self._params, _ = checkpoint.load_model(model)
    self._tokens, self.by, self.top_p = meta.max_tokens, meta.id, top_p
    pieces = self._tokenizer.vocab_size
    self._generate = jax.jit(
      functools.partial(expander.generate, meta.model, pieces=pieces)
    )

  @staticmethod
  def is_in(folder) -> bool:
    """Whether a run's folder has an expander."""
    return (pathlib.Path(folder) / NETWORK / "model" / "model.json").exists()

  def expand(self, texts: Sequence[str], seed: int = 0) -> list[str]:
    """A long text for each, which depends on that text and the seed alone.

    Raises:
      ValueError: for a text of more than half of the tokens that a pair has.
    """
    if not texts:
      return []
    most = self._tokens // 2
    given = [self._tokenizer.encode(as_given(text), 1 << 20) for text in texts]
    for text, ids in zip(texts, given, strict=True):
      if len(ids) > most:
        raise ValueError(
          f"prompt {text[:40]!r} has {len(ids)} tokens, but the expander takes {most}"
        )
    rows = 1 << (len(texts) - 1).bit_length()  # few programs
    ids_BS, given_B = np.zeros((rows, self._tokens), np.int32), np.ones(rows, np.int32)
    for row, ids in enumerate(given):
      ids_BS[row, : len(ids)], given_B[row] = ids, len(ids)
    words = [zlib.crc32(as_given(text).encode()) for text in texts]
    words += [0] * (rows - len(texts))
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.key(seed), np.array(words, np.uint32)
    )
    made_BS = np.asarray(
      self._generate(self._params, ids_BS, given_B, keys_B, self.top_p)
    )
    return [
      self._of(text, made_BS[row, len(given[row]) :]) for row, text in enumerate(texts)
    ]

  def _of(self, text, ids) -> str:
    """The long text of what was written. ValueError if it has no end."""
    if EOS not in ids:
      raise ValueError(f"prompt {text[:40]!r}: its expansion came to no end")
    return self._tokenizer.decode(list(ids))
