"""A sentencepiece tokenizer trained on the data set's own captions.

Ids are T5's: 0 pads, 1 ends a text, 2 is unknown (never used: what has no piece is
spelled in bytes, so every script works, also ones no training caption had).
"""

import collections
import hashlib
import io
import os
import pathlib
import unicodedata
from collections.abc import Iterable

import sentencepiece

from sora_jax.runtime import files

PAD, EOS, UNK = 0, 1, 2

# Texts whose ids are in memory at once when only their lengths are wanted.
_LENGTHS_CHUNK = 1 << 16

# Without captions there is nothing to learn pieces from; sentencepiece wants one
# sentence nevertheless. The vocabulary is then the bytes and little else.
_PLACEHOLDER = "a"


# Bytes, special pieces and a few characters.
SMALLEST = 256 + 3 + 2


def check_size(vocab_size: int, key: str) -> None:
  """Raises ValueError, naming the key, for a vocabulary that cannot be trained."""
  if vocab_size < SMALLEST:
    raise ValueError(
      f"{key} {vocab_size} is less than {SMALLEST}: 256 bytes, 3 special pieces and a "
      "few characters"
    )


def train(captions: Iterable[str], path: str, vocab_size: int = 8192) -> None:
  """Trains a byte pair model and writes it to `path`, atomically.

  Deterministic: the same captions in the same order give the same bytes.

  Args:
    captions: texts; may be few or none.
    path: of the model file; its folder is created.
    vocab_size: upper limit, specials and 256 bytes included. Small corpora give less.

  Raises:
    ValueError: if the vocabulary is too small to hold the specials and the bytes.
  """
  if vocab_size < SMALLEST:
    raise ValueError(f"vocab_size is {vocab_size}, the smallest one is {SMALLEST}")
  texts = [text for text in map(_normalise, captions) if text] or [_PLACEHOLDER]
  texts = _drop_rare_characters(texts, (vocab_size - SMALLEST) // 2)
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
    model_writer=model,
    model_type="bpe",
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    byte_fallback=True,
    character_coverage=1.0,
    # NFC is applied here; the default rule (NFKC) would rewrite some scripts.
    normalization_rule_name="identity",
    pad_id=PAD,
    eos_id=EOS,
    unk_id=UNK,
    bos_id=-1,
    max_sentence_length=1 << 20,
    num_threads=1,
    minloglevel=2,
  )
  files.write_bytes(path, model.getvalue())


class Tokenizer:
  """Text to ids. Loads the model on first use, so it can be pickled to workers."""

  def __init__(self, path: str, digest: str = ""):
    """Args: digest is that of the file that is wanted; "" takes any.

    Raises:
      ValueError: if there is none, or it is another one.
    """
    self._path = os.fspath(path)
    self._processor = None
    if not os.path.exists(self._path):
      raise ValueError(f"{self._path}: no such tokenizer model")
    if digest and self.digest != digest:
      raise ValueError(
        f"{self._path} is {self.digest}, not the tokenizer {digest} that the model "
        "beside it was trained with"
      )

  @property
  def digest(self) -> str:
    """Hash of the file: a model is of no use with another one."""
    data = pathlib.Path(self._path).read_bytes()
    return f"vocabulary-{hashlib.sha256(data).hexdigest()[:12]}"

  def encode(self, text: str, max_tokens: int) -> list[int]:
    """Ids of `text`, at most `max_tokens`, always ending in EOS."""
    return self._model().encode(_normalise(text))[: max_tokens - 1] + [EOS]

  def lengths(self, texts: list[str], max_tokens: int) -> list[int]:
    """`len(encode(text, max_tokens))` of many texts, on all cores."""
    lengths = []
    for start in range(0, len(texts), _LENGTHS_CHUNK):
      chunk = [_normalise(text) for text in texts[start : start + _LENGTHS_CHUNK]]
      for ids in self._model().encode(chunk, num_threads=-1):
        lengths.append(min(len(ids) + 1, max_tokens))
    return lengths

  def decode(self, ids: list[int]) -> str:
    """Text of ids up to the first EOS."""
    ids = [int(i) for i in ids]
    if EOS in ids:
      ids = ids[: ids.index(EOS)]
    return self._model().decode([i for i in ids if i != PAD])

  @property
  def vocab_size(self) -> int:
    return self._model().vocab_size()

  def _model(self):
    if self._processor is None:
      processor = sentencepiece.SentencePieceProcessor()
      try:
        processor.LoadFromFile(self._path)
      except (RuntimeError, OSError) as e:
        raise ValueError(f"{self._path}: not a sentencepiece model: {e}") from e
      self._processor = processor
    return self._processor

  def __getstate__(self):
    return {"_path": self._path, "_processor": None}


def _drop_rare_characters(texts, limit):
  """Keeps the `limit` most frequent characters: each one costs a piece.

  A large script does not fit into a small vocabulary; sentencepiece itself fails
  there (it drops at most 2 % of the text). Dropped characters are spelled in bytes.
  """
  counts = collections.Counter()
  for text in texts:
    counts.update(text)
  counts.pop(" ", None)
  if len(counts) <= limit:
    return texts
  # Ties are broken by the character, not by the order of the corpus.
  ranked = sorted(counts, key=lambda character: (-counts[character], character))
  blank = dict.fromkeys(map(ord, ranked[limit:]), " ")
  texts = [" ".join(text.translate(blank).split()) for text in texts]
  return [text for text in texts if text] or [_PLACEHOLDER]


def _normalise(text):
  """Canonical Unicode, and single spaces for white space of any kind."""
  return " ".join(unicodedata.normalize("NFC", text).split())
