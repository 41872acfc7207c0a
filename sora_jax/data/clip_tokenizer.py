"""CLIP's tokenizer: byte pairs of lower case, between the marks of start and end."""

import json
import os
import pathlib

import tokenizers

from sora_jax.runtime import files

START, END = "<|startoftext|>", "<|endoftext|>"
# Contractions, words, single digits, and runs of anything else.
_WORDS = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|"
  r"[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
  """Text to ids, by a tokenizer.json of the `tokenizers` library."""

  def __init__(self, path: str):
    """Reads the file. ValueError if it is none."""
    self._path = os.fspath(path)
    if not os.path.exists(self._path):
      raise ValueError(f"{self._path}: no such tokenizer")
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(self._path)
    except Exception as error:  # noqa: BLE001 (the library raises nothing narrower)
      raise ValueError(f"{self._path}: not a tokenizer ({error})") from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    start, end = (self._tokenizer.token_to_id(mark) for mark in (START, END))
    if start is None or end is None:
      raise ValueError(f"{self._path}: it has no {START} and {END}")
    self._start, self._end = start, end

  def encode(self, text: str, max_tokens: int) -> list[int]:
    """Ids of `text`, at most `max_tokens`, from the start's to the end's."""
    ids = self._tokenizer.encode(text, add_special_tokens=False).ids
    return [self._start, *ids[: max_tokens - 2], self._end]

  @property
  def vocab_size(self) -> int:
    return self._tokenizer.get_vocab_size()


def write(folder, path) -> None:
  """Writes the tokenizer of a published folder to `path`, a tokenizer.json.

  Args:
    folder: with tokenizer.json, or vocab.json and merges.txt.
    path: of the file to write.

  Raises:
    ValueError: it has neither, or they are damaged; names the file.
  """
  folder = pathlib.Path(folder)
  whole, vocab, merges = (
    folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
  )
  if whole.is_file():
    files.write_bytes(path, whole.read_bytes())
  else:
    files.write_text(path, _built(vocab, merges).to_str())
  ClipTokenizer(str(path))


def _built(vocab, merges):
  """The tokenizer of the two files that CLIP was published with."""
  try:
    words = json.loads(vocab.read_text(encoding="utf-8"))
    lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split()) for line in lines if line and line[0] != "#"]
    model = tokenizers.models.BPE(
      vocab=words, merges=pairs, unk_token=END, end_of_word_suffix="</w>"
    )
  except Exception as error:  # noqa: BLE001 (the library raises nothing narrower)
    raise ValueError(f"{vocab}, {merges}: no byte pairs ({error})") from error
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = tokenizers.normalizers.Sequence(
    [
      tokenizers.normalizers.NFC(),
      tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
      tokenizers.normalizers.Lowercase(),
    ]
  )
  split = tokenizers.pre_tokenizers.Split(
    tokenizers.Regex(_WORDS), "removed", invert=True
  )
  in_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, in_bytes])
  return tokenizer
