"""Odd values of a config's keys: a recipe, or a ValueError that names the key."""

import copy
import dataclasses
import re

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from sora_jax.run import recipe

pytestmark = pytest.mark.fuzz

CONFIG = tiny.get_config().to_dict()


def keys_of(section, where=()):
  for key, value in section.items():
    yield (*where, key)
    if isinstance(value, dict):
      yield from keys_of(value, (*where, key))


SCALARS = (
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
  | st.sampled_from([0, 1, -1, 1e-9, "", "bfloat16", "adamw", "raw"])
)  # fmt: skip
VALUES = st.recursive(
  SCALARS,
  lambda inner: (
    st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.sampled_from(["steps", "x"]), inner, max_size=2)
  ),
  max_leaves=4,
)


@pytest.mark.slow
@given(
  st.lists(st.tuples(st.sampled_from(list(keys_of(CONFIG))), VALUES), max_size=3),
  st.lists(st.text("abc_", min_size=1, max_size=6), max_size=1),
)
def test_overrides(overrides, unknown):
  config = copy.deepcopy(CONFIG)
  for key, value in [*overrides, *((("data", name), 1) for name in unknown)]:
    section = config
    for part in key[:-1]:
      if not isinstance(section.get(part), dict):
        break
      section = section[part]
    else:
      section[key[-1]] = value
  try:
    made = recipe.read(config)
  except ValueError as error:
    assert re.match(r"config\b|.*config\.", str(error)), error
  else:
    assert dataclasses.is_dataclass(made) and not unknown
