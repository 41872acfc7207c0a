"""What tests of data sets share: elements compared, batches put together."""

import numpy as np


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert a[name].dtype == b[name].dtype


def take(batches, count):
  try:
    return [next(batches) for _ in range(count)]
  finally:
    batches.close()


def rows_of(host_batches):
  """Global batches from the hosts': row r is row r // hosts of host r % hosts."""
  return [
    {
      k: np.stack([b[k] for b in each], 1).reshape(-1, *each[0][k].shape[1:])
      for k in each[0]
    }
    for each in zip(*host_batches, strict=True)
  ]
