"""The packed row: one layout and one writer for training and sampling; pure numpy.

A row holds clips one after the other, its *segments*, and padding behind them. Their
texts lie in a row of their own, likewise one after the other. Each text has a *slot*,
which is two noise groups: tokens of slot n that are noisy are in group 2n, those that
are given in group 2n + 1, and both see the text. A clip has one slot, so that slot n
belongs to segment n + 1; while sampling, a clip whose text changes with time has more.

Rows are dicts of arrays, because Grain stacks and jit takes those; the types below say
what is in them. A field's name ends in its shape: L tokens, S text tokens, N segments
or slots, P numbers of a patch, E features of a text token, Q numbers of a patch of the
condition, J tokens of a clip's images with V features. In a batch every array has a
leading axis of rows, under the same name.
"""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, TypedDict, TypeVar, cast

import ml_dtypes
import numpy as np

from sora_jax.packing.planner import Budget


class Field(NamedTuple):
  """How an array of a row begins: its dtype, and the value of padding."""

  dtype: Any
  padding: float = 0


# Arrays are numpy's on the host, and JAX's under jit.
Float32 = Annotated[Any, Field(np.float32)]
Int32 = Annotated[Any, Field(np.int32)]


class PackedText(TypedDict, total=False):
  """The texts of a row: ids with their positions, or a frozen encoder's features."""

  # Slot of each text token plus 1; 0 is padding.
  text_segment_S: Int32
  # Ids for the encoder that is trained with the DiT, and the index of each in its text.
  text_S: Int32
  text_position_S: Int32
  # Or the features themselves, of the dtype that `RowSize` says.
  text_SE: Annotated[Any, Field(ml_dtypes.bfloat16)]


class PackedRow(PackedText, total=False):
  """Clips and texts of a row; see the top of this file."""

  # Clean patches, (latent - mean) / std; while sampling, where they are known.
  patch_LP: Float32
  # Segment of each token, 1, 2, ... in the order of the row; 0 is padding.
  segment_L: Int32
  # (t, h, w): t in latent frames at the reference rate, so real time; h, w in patches.
  # Extra images are at their own, fractional t.
  position_L3: Float32
  # 2 * slot + given; 0 for padding.
  group_L: Int32
  # Of models that read given frames beside the noise: patches of the condition.
  condition_LQ: Float32
  # Of models that read whole images: features of each slot's.
  image_NJV: Float32
  # Index of each segment's clip in its list, -1 for none. It stays on the host.
  clip_N: Annotated[Any, Field(np.int32, -1)]


# The same with a leading axis of rows.
PackedBatch = PackedRow

Row = TypeVar("Row")  # a type of the fields of a row, such as PackedRow

_IDS, _FEATURES = ("text_S", "text_position_S"), ("text_SE",)


class RowSize(NamedTuple):
  """The sizes that give a row its shapes.

  Attributes:
    budget: tokens, text tokens and segments.
    patch_width: P, numbers of one token.
    text_width: E of a frozen encoder's features; None: the texts are ids.
    text_dtype: of those features; records hold bfloat16.
    condition_width: Q of the condition's patches; 0: there are none.
    image: (J, V) of a clip's images, their tokens and features; None: there are none.
  """

  budget: Budget
  patch_width: int
  text_width: int | None = None
  text_dtype: Any = ml_dtypes.bfloat16
  condition_width: int = 0
  image: tuple[int, int] | None = None


def empty(kind: type[Row], size: RowSize, *rows: int) -> Row:
  """A row of padding, or a batch of that many rows, of a type with `Field`s.

  Shapes are what the names of the fields say. Ids or features are left out, whichever
  the texts are not.
  """
  L, S, N = dataclasses.astuple(size.budget)
  lengths = {"L": L, "S": S, "N": N, "P": size.patch_width, "E": size.text_width}
  lengths |= {"Q": size.condition_width}
  lengths |= dict(zip("JV", size.image or (0, 0), strict=True))
  left_out = [*(_FEATURES if size.text_width is None else _IDS)]
  left_out += [] if size.condition_width else ["condition_LQ"]
  left_out += [] if size.image else ["image_NJV"]
  arrays: dict[str, np.ndarray] = {}
  for name, hint in typing.get_type_hints(kind, include_extras=True).items():
    if name not in left_out:
      (field,), dims = hint.__metadata__, name.rpartition("_")[2]
      shape = (lengths[d] if d in lengths else int(d) for d in dims)
      dtype = size.text_dtype if name in _FEATURES else field.dtype
      arrays[name] = np.full((*rows, *shape), field.padding, dtype)
  return cast(Row, arrays)


def row_of(batch: Row, index: int) -> Row:
  """Views of one row of a batch, to write into."""
  arrays = cast(dict[str, np.ndarray], batch)
  return cast(Row, {name: value[index] for name, value in arrays.items()})


class Segment(NamedTuple):
  """A clip with its extra images, as it goes into a row.

  Attributes:
    patch_LP, position_L3: of its tokens, as in `PackedRow`.
    given_L: bool, tokens that are given instead of noisy.
    texts: ids [S] or features [S, E] of each of its texts.
    text_L: index of the text that each token sees.
    clip: what `clip_N` says of it.
    condition_LQ, image_JV: of models that read such, as in `PackedRow`; all of the
      clip's texts are of the same images.
  """

  patch_LP: np.ndarray
  position_L3: np.ndarray
  given_L: np.ndarray
  texts: Sequence[np.ndarray]
  text_L: np.ndarray | int = 0
  clip: int = -1
  condition_LQ: np.ndarray | None = None
  image_JV: np.ndarray | None = None


class Place(NamedTuple):
  """Where a segment is in its row: its tokens, and the slots of its texts."""

  tokens: slice
  slots: range


class TextWriter:
  """Writes texts into a row, one after the other."""

  def __init__(self, row: PackedText):
    self._row, self._used = row, 0

  def add(self, text: np.ndarray, slot: int) -> None:
    """Appends ids [S] or features [S, E], which the tokens of that slot see."""
    row, here = self._row, slice(self._used, self._used + len(text))
    assert here.stop <= len(row["text_segment_S"]), (here, row["text_segment_S"].shape)
    if text.ndim == 1:
      row["text_S"][here] = text
      row["text_position_S"][here] = np.arange(len(text))
    else:
      row["text_SE"][here] = text
    row["text_segment_S"][here] = slot + 1
    self._used = here.stop


class RowWriter:
  """Writes segments into an empty row, one after the other."""

  def __init__(self, row: PackedRow):
    self._row, self._texts = row, TextWriter(row)
    self._segments = self._tokens = self._slots = 0

  def add(self, segment: Segment) -> Place:
    """Appends a segment and its texts."""
    row, n = self._row, self._segments
    here = slice(self._tokens, self._tokens + len(segment.patch_LP))
    slots = range(self._slots, self._slots + len(segment.texts))
    assert here.stop <= len(row["segment_L"]), (here, row["segment_L"].shape)
    assert slots.stop <= len(row["clip_N"]), (slots, row["clip_N"].shape)
    row["patch_LP"][here] = segment.patch_LP
    row["position_L3"][here] = segment.position_L3
    row["segment_L"][here] = n + 1
    row["group_L"][here] = 2 * (slots.start + segment.text_L) + segment.given_L
    row["clip_N"][n] = segment.clip
    if segment.condition_LQ is not None:
      row["condition_LQ"][here] = segment.condition_LQ
    if segment.image_JV is not None:
      row["image_NJV"][slots.start : slots.stop] = segment.image_JV
    for slot, text in zip(slots, segment.texts, strict=True):
      self._texts.add(text, slot)
    self._segments, self._tokens, self._slots = n + 1, here.stop, slots.stop
    return Place(here, slots)
