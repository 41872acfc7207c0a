"""What a sentencepiece model says of itself: its pieces and how it cleans a text.

Read from the bytes of its protocol buffer: the class in the sentencepiece package needs
the very release of protobuf that it was generated with.
"""

import pathlib
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER = 1, 2, 3, 4


class Piece(NamedTuple):
  """A piece; kind: NORMAL, ..."""

  text: str
  score: float
  kind: int


class Model(NamedTuple):
  """A model; kind: UNIGRAM, BPE, or another number. charsmap: of the normalizer."""

  pieces: list[Piece]
  kind: int
  byte_fallback: bool
  unk_id: int
  eos_id: int
  charsmap: bytes
  add_dummy_prefix: bool
  remove_extra_whitespaces: bool


def read(path) -> Model:
  """Reads a model. ValueError for a file that is none."""
  try:
    fields = list(_fields(pathlib.Path(path).read_bytes()))
    pieces = [_piece(dict(_fields(value))) for number, value in fields if number == 1]
    trainer, normalizer = (
      dict(_fields(next((value for n, value in fields if n == number), b"")))
      for number in (2, 3)
    )
    if not pieces or not trainer or not normalizer:
      raise ValueError("it has no pieces, or not all that it needs; is it truncated?")
    return Model(
      pieces,
      kind=trainer.get(3, UNIGRAM),
      byte_fallback=bool(trainer.get(35, 0)),
      unk_id=trainer.get(40, 0),
      eos_id=trainer.get(42, 2),
      charsmap=normalizer.get(2, b""),
      add_dummy_prefix=bool(normalizer.get(3, 1)),
      remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )
  except (ValueError, TypeError, KeyError, IndexError, struct.error) as error:
    raise ValueError(f"{path}: not a sentencepiece model ({error})") from error


def _piece(fields) -> Piece:
  (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
  return Piece(fields[1].decode(), score, fields.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
  """Numbers and values of a message's fields, in their order."""
  place = 0

  def varint():
    nonlocal place
    value, shift = 0, 0
    while True:
      byte = data[place]
      value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
      if byte < 128:
        return value

  while place < len(data):
    tag = varint()
    number, wire = tag >> 3, tag & 7
    if wire == 0:
      yield number, varint()
      continue
    if wire not in (1, 2, 5):
      raise ValueError(f"a field of type {wire}")
    size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
    if place + size > len(data):
      raise ValueError("truncated")
    yield number, data[place : place + size]
    place += size
