"""The tokenizer of T5 and UMT5 as published: its tokenizer.json, or its spiece.model.

Ids are those of transformers: special tokens in a text, as "</s>", are themselves, and
what has no piece is spelled in bytes if the vocabulary has them.
"""

import os

import tokenizers

from sora_jax.data import sentencepiece_file

NAMES = ("tokenizer.json", "spiece.model")
END = "</s>"


class T5Tokenizer:
  """Text to ids. Loads the file on first use, so it can be pickled to workers."""

  def __init__(self, path: str):
    """path: a file of NAMES. ValueError if it is not there."""
    self._path = os.fspath(path)
    self._loaded: tokenizers.Tokenizer | None = None
    if not os.path.exists(self._path):
      raise ValueError(f"{self._path}: no such tokenizer")

  def encode(self, text: str, max_tokens: int) -> list[int]:
    """Ids of `text`, at most `max_tokens`, always ending in that of the end."""
    model = self._model()
    ids = model.encode(text, add_special_tokens=False).ids
    end = model.token_to_id(END)
    assert end is not None  # see _model
    return [*ids[: max_tokens - 1], end]

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    return max(self._model().get_vocab().values()) + 1

  def to_json(self) -> str:
    """Content of a tokenizer.json, which transformers reads, too."""
    return self._model().to_str()

  def _model(self) -> tokenizers.Tokenizer:
    if self._loaded is None:
      try:
        if self._path.endswith(".model"):
          made = of_sentencepiece(self._path)
        else:
          made = tokenizers.Tokenizer.from_file(self._path)
      except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{self._path}: not a tokenizer ({error})") from error
      if made.token_to_id(END) is None:
        raise ValueError(f"{self._path}: it has no {END}, as T5's")
      made.no_truncation()
      made.no_padding()
      self._loaded = made
    return self._loaded

  def __getstate__(self):
    return {"_path": self._path, "_loaded": None}


def find(folder) -> str:
  """The tokenizer's file in a folder: a tokenizer.json, if it has one, is read."""
  paths = [os.path.join(folder, name) for name in NAMES]
  return next((path for path in paths if os.path.isfile(path)), paths[-1])


def of_sentencepiece(path: str) -> tokenizers.Tokenizer:
  """The same tokenizer as a spiece.model's, with its byte fallback."""
  model = sentencepiece_file.read(path)
  made = tokenizers.Tokenizer(_vocabulary(model))
  made.normalizer = _normalizer(model)
  if model.add_dummy_prefix:
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
      replacement="▁", prepend_scheme="always", split=False
    )
  made.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace("▁", " "),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(content=" ", left=1),
    ]
  )
  kinds = (sentencepiece_file.CONTROL, sentencepiece_file.UNKNOWN)
  special = [piece.text for piece in model.pieces if piece.kind in kinds]
  own = [p.text for p in model.pieces if p.kind == sentencepiece_file.USER]
  made.add_special_tokens(
    [tokenizers.AddedToken(piece, normalized=False) for piece in special]
  )
  made.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in own])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"$A {END}", special_tokens=[(END, model.eos_id)]
  )
  return made


def _vocabulary(model):
  """Pieces with their scores, or for byte pairs with the order of their merges."""
  pieces = model.pieces
  if model.kind == sentencepiece_file.UNIGRAM:
    scores = [(piece.text, piece.score) for piece in pieces]
    return tokenizers.models.Unigram(
      scores, unk_id=model.unk_id, byte_fallback=model.byte_fallback
    )
  if model.kind != sentencepiece_file.BPE:
    raise ValueError(f"its pieces are of kind {model.kind}, not unigram or BPE")
  normal = {
    p.text: (-p.score, i)
    for i, p in enumerate(pieces)
    if p.kind == sentencepiece_file.NORMAL
  }
  merges = sorted(
    (rank, text[:cut], text[cut:])
    for text, rank in normal.items()
    for cut in range(1, len(text))
    if text[:cut] in normal and text[cut:] in normal
  )
  return tokenizers.models.BPE(
    vocab={piece.text: i for i, piece in enumerate(pieces)},
    merges=[(left, right) for _, left, right in merges],
    unk_token=pieces[model.unk_id].text,
    fuse_unk=True,
    byte_fallback=model.byte_fallback,
  )


def _normalizer(model):
  """Characters, white space and the mark of spaces, as sentencepiece has them."""
  steps, regex, library = [], tokenizers.Regex, tokenizers.normalizers
  if model.charsmap:
    steps.append(library.Precompiled(model.charsmap))
  if model.remove_extra_whitespaces:
    steps.append(library.Replace(regex(r"\A +| +\z"), ""))
    steps.append(library.Replace(regex(" {2,}"), " "))
  steps.append(library.Replace(" ", "▁"))
  # A mark that is in a text is not that of its start.
  steps.append(library.Replace(regex(r"\A▁"), "▁▁"))
  return library.Sequence(steps)
