"""The packed row: shapes from names, and one writer for training and sampling."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from sora_jax.packing import packed_row
from sora_jax.packing.packed_row import PackedRow, RowSize, RowWriter, Segment
from sora_jax.packing.planner import Budget

BUDGET = Budget(tokens=9, text_tokens=6, segments=4)


def segment(tokens, texts, given=(), text_L=0, clip=-1, seed=0):
  rng = np.random.default_rng(seed)
  return Segment(
    rng.standard_normal((tokens, 2)).astype(np.float32),
    rng.standard_normal((tokens, 3)).astype(np.float32),
    np.isin(np.arange(tokens), given),
    texts,
    text_L,
    clip,
  )


def ids(*values):
  return np.array(values, np.int32)


@pytest.mark.parametrize("rows", [(), (3,)])
def test_an_empty_row_has_the_shapes_that_names_say(rows):
  row = packed_row.empty(PackedRow, RowSize(BUDGET, 2), *rows)
  L, S, N = dataclasses.astuple(BUDGET)
  assert {name: (x.shape, str(x.dtype)) for name, x in row.items()} == {
    "patch_LP": ((*rows, L, 2), "float32"),
    "segment_L": ((*rows, L), "int32"),
    "position_L3": ((*rows, L, 3), "float32"),
    "group_L": ((*rows, L), "int32"),
    "text_S": ((*rows, S), "int32"),
    "text_segment_S": ((*rows, S), "int32"),
    "text_position_S": ((*rows, S), "int32"),
    "clip_N": ((*rows, N), "int32"),
  }
  assert np.all(row.pop("clip_N") == -1)
  assert not any(value.any() for value in row.values())


def test_rows_of_features_have_no_ids():
  row = packed_row.empty(PackedRow, RowSize(BUDGET, 2, text_width=5))
  assert "text_S" not in row and "text_position_S" not in row
  assert row["text_SE"].shape == (BUDGET.text_tokens, 5)
  assert row["text_SE"].dtype == ml_dtypes.bfloat16


def test_segments_follow_each_other():
  row = packed_row.empty(PackedRow, RowSize(BUDGET, 2))
  writer = RowWriter(row)
  first = segment(4, [ids(7, 8)], given=[0, 3], clip=11)
  second = segment(3, [ids(9)], clip=12, seed=1)
  assert writer.add(first) == (slice(0, 4), range(0, 1))
  assert writer.add(second) == (slice(4, 7), range(1, 2))
  assert row["segment_L"].tolist() == [1] * 4 + [2] * 3 + [0, 0]
  assert row["group_L"].tolist() == [1, 0, 0, 1, 2, 2, 2, 0, 0]
  assert row["clip_N"].tolist() == [11, 12, -1, -1]
  assert row["text_S"].tolist() == [7, 8, 9, 0, 0, 0]
  assert row["text_segment_S"].tolist() == [1, 1, 2, 0, 0, 0]
  assert row["text_position_S"].tolist() == [0, 1, 0, 0, 0, 0]
  for name in ("patch_LP", "position_L3"):
    np.testing.assert_array_equal(row[name][:4], getattr(first, name))
    np.testing.assert_array_equal(row[name][4:7], getattr(second, name))
    assert not row[name][7:].any()


def test_a_segment_with_several_texts_takes_as_many_slots():
  row = packed_row.empty(PackedRow, RowSize(BUDGET, 2))
  writer = RowWriter(row)
  writer.add(segment(2, [ids(1)]))
  place = writer.add(
    segment(4, [ids(2), ids(3, 4)], given=[0], text_L=np.array([0, 0, 1, 1]))
  )
  writer.add(segment(1, [ids(5)]))
  assert place.slots == range(1, 3)
  assert row["segment_L"].tolist() == [1, 1, 2, 2, 2, 2, 3, 0, 0]
  # Groups go by slot, clips by segment.
  assert row["group_L"].tolist() == [0, 0, 3, 2, 4, 4, 6, 0, 0]
  assert row["text_segment_S"].tolist() == [1, 2, 3, 3, 4, 0]


@pytest.mark.parametrize(
  "added",
  [segment(10, [ids(1)]), segment(1, [ids(*range(7))]), segment(1, [ids(1)] * 5)],
)
def test_nothing_is_cut_to_fit(added):
  row = packed_row.empty(PackedRow, RowSize(BUDGET, 2))
  with pytest.raises(AssertionError):
    RowWriter(row).add(added)


def test_rows_of_a_batch_are_written_in_place():
  batch = packed_row.empty(PackedRow, RowSize(BUDGET, 2), 2)
  RowWriter(packed_row.row_of(batch, 1)).add(segment(3, [ids(4)], clip=5))
  assert batch["segment_L"].tolist() == [[0] * 9, [1] * 3 + [0] * 6]
  assert batch["clip_N"].tolist() == [[-1] * 4, [5, -1, -1, -1]]


def test_what_fits_a_budget():
  assert BUDGET.fits((5, 3, 2), (4, 3, 2))
  for over in ((5, 1, 1), (1, 4, 1), (1, 1, 3)):
    assert not BUDGET.fits((5, 3, 2), over)
