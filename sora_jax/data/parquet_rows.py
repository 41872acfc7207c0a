"""Rows of a manifest that is a Parquet table: `pip install 'sora_jax[parquet]'`."""

import os
from collections.abc import Iterator
from typing import Any

_BATCH = 1 << 14  # rows that are in memory as Python objects


def read_rows(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (row number from 1, row) of a table; a row has no null values.

  Raises:
    ValueError: no such table, or pyarrow is not installed; names the file.
  """
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as e:
    raise ValueError(
      f"{path}: Parquet needs pyarrow: pip install 'sora_jax[parquet]'"
    ) from e
  number = 0
  try:
    with parquet.ParquetFile(path) as table:
      for batch in table.iter_batches(_BATCH):
        for row in batch.to_pylist():
          number += 1
          yield number, {key: value for key, value in row.items() if value is not None}
  except (OSError, pyarrow.ArrowException) as e:
    raise ValueError(f"{path}: not a Parquet table, or damaged ({e})") from e
