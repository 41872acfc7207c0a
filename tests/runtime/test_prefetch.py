"""A thread makes what comes next, and no more."""

import threading

import pytest

from sora_jax.runtime import prefetch


def test_the_next_item_is_made_while_one_is_used():
  """Once the first one is in use the second begins; errors come where they belong."""
  began = [threading.Event() for _ in range(3)]

  def make():
    for i, event in enumerate(began):
      event.set()
      yield i
    raise ValueError("the end")

  items = prefetch.ahead(make(), 1)
  assert next(items) == 0 and began[1].wait(10)
  assert not began[2].is_set()
  assert [next(items), next(items)] == [1, 2]
  with pytest.raises(ValueError, match="the end"):
    next(items)


def test_what_nobody_waits_for_is_not_made():
  made, began, go = [], threading.Event(), threading.Event()

  def make():
    yield 0
    for i in range(1, 9):
      made.append(i)
      began.set()
      assert go.wait(10)
      yield i

  items = prefetch.ahead(make(), 3)
  assert next(items) == 0 and began.wait(10)
  threading.Timer(0.2, go.set).start()
  items.close()
  assert made == [1]
