"""Sections of a config: nested dicts with names and types checked, as dataclasses."""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict


def fill_in(
  cls: type,
  config: ConfigDict,
  where: str,
  without: Mapping[str, Any],
  default: Any = None,
) -> None:
  """Adds to a section every key that it leaves out and that has a default.

  Args:
    cls: the section's dataclass. where: its key, such as config.dit.
    without: key of a section -> its names that follow from others and are no keys.
    default: of the whole section, where there is one.
  """
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    kind, value = hints[field.name], _default(field, default)
    if field.name in without.get(where, ()):
      continue
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
      if field.name not in config:
        config[field.name] = ConfigDict()
      inner = value if dataclasses.is_dataclass(value) else None
      fill_in(kind, config[field.name], f"{where}.{field.name}", without, inner)
    elif field.name not in config and value is not dataclasses.MISSING:
      config[field.name] = value


def _default(field: dataclasses.Field, section: Any) -> Any:
  """The field's value in the section's default, else its own; or MISSING."""
  return field.default if section is None else getattr(section, field.name)


def to_dataclass(cls: type, values: Any, where: str, default: Any = None) -> Any:
  """An object of a dataclass from nested dicts.

  Args:
    cls: the dataclass.
    values: some or all of its fields.
    where: its key, such as config.dit.
    default: of the whole section, where there is one.

  Raises:
    ValueError: naming the key, for an unknown or missing one, or a wrong type.
  """
  if not isinstance(values, dict):
    raise ValueError(f"{where} must be a ConfigDict, not {values!r}")
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=1)
      hint = f"; did you mean {where}.{near[0]}?" if near else ""
      raise ValueError(f"{where}.{key} is not a key that anything reads{hint}")
  hints = typing.get_type_hints(cls)
  read = {}
  for name, field in fields.items():
    value = _default(field, default)
    inner = value if dataclasses.is_dataclass(value) else None
    if name in values:
      read[name] = _convert(hints[name], values[name], f"{where}.{name}", inner)
    elif default is not None:
      read[name] = value
    elif (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    ):
      raise ValueError(f"{where}.{name} is missing")
  with naming(where):
    return cls(**read)


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
  """Puts the key in front of the message of a ValueError."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def _convert(kind, value, where, default=None):
  if dataclasses.is_dataclass(kind):
    return to_dataclass(kind, value, where, default)
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    return value
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise ValueError(f"{where} must be a tuple, not {value!r}")
    if len(args) == 2 and args[1] is ...:
      args = (args[0],) * len(value)
    if len(args) != len(value):
      raise ValueError(f"{where} must have {len(args)} entries, not {value!r}")
    return tuple(
      _convert(arg, item, f"{where}[{i}]")
      for i, (arg, item) in enumerate(zip(args, value, strict=True))
    )
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    raise ValueError(f"{where} must be of type {kind.__name__}, not {value!r}")
  return value
