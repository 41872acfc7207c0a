"""A thread that makes what comes next while what is at hand is used."""

import collections
from collections.abc import Generator, Iterable
from concurrent import futures


def ahead(items: Iterable, count: int = 2) -> Generator:
  """The items, the next `count` of them made by a thread while one is used.

  An error comes where its item would have. Close it, lest items are made for nobody.
  """
  items, end = iter(items), object()
  pool = futures.ThreadPoolExecutor(1)
  try:
    following = collections.deque(pool.submit(next, items, end) for _ in range(count))
    while (item := following.popleft().result()) is not end:
      following.append(pool.submit(next, items, end))
      yield item
  finally:
    pool.shutdown(cancel_futures=True)
