"""Flags of `sample` made from the fields of a dataclass: its types, defaults and helps.

A field's metadata holds `help`; `form`, how a value that is not a plain one is written
(WIDTHxHEIGHT, FROM,TO, SECONDS:TEXT); `choices` and `least` of a value; and `flag`, the
name where it is not the field's: one that may be given several times.
"""

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags

# The flags belong to the command that calls, so that its --help shows them.
flags.disclaim_key_flags()


def define(config: type, without: Iterable[str] = ()) -> None:
  """Defines a flag for each field of a dataclass but those of `without`."""
  for field, kind in _fields(config, without):
    name, help, more = _name(field), field.metadata["help"], field.metadata
    if "flag" in more:
      flags.DEFINE_multi_string(name, [], help)
    elif "choices" in more:
      flags.DEFINE_enum(name, field.default, more["choices"], help)
    elif kind is bool:
      flags.DEFINE_bool(name, field.default, help)
    elif kind is int:
      flags.DEFINE_integer(name, field.default, help, more.get("least"))
    elif kind is float:
      flags.DEFINE_float(name, field.default, help, more.get("least"))
    elif typing.get_origin(kind) is tuple and "x" not in more["form"]:
      default = None if field.default is None else [f"{x:g}" for x in field.default]
      flags.DEFINE_list(name, default, help)
    else:
      flags.DEFINE_string(name, field.default, help)


def values(
  config: type,
  args: flags.FlagValues,
  kept: Mapping[str, Any],
  without: Iterable[str] = (),
) -> dict[str, Any]:
  """The fields' values, as the flags say.

  kept: values in place of those of flags that were not given.

  Raises:
    ValueError: for a flag whose value is not written as it should be; names it.
  """
  found = {}
  for field, kind in _fields(config, without):
    name = _name(field)
    if field.name in kept and not args[name].present:
      found[field.name] = kept[field.name]
    else:
      form = field.metadata.get("form", "")
      found[field.name] = _parsed(name, args[name].value, kind, form)
  return found


def _fields(config, without):
  """Each field with its type; X of `X | None`."""
  hints = typing.get_type_hints(config)
  for field in dataclasses.fields(config):
    if field.name not in without:
      kinds = [k for k in typing.get_args(hints[field.name]) if k is not type(None)]
      optional = type(None) in typing.get_args(hints[field.name])
      yield field, kinds[0] if optional else hints[field.name]


def _name(field):
  return field.metadata.get("flag", field.name)


def _parsed(name, value, kind, form):
  if value is None or typing.get_origin(kind) is not tuple:
    return value
  if isinstance(value, str):
    size = re.fullmatch(r"(\d+)x(\d+)", value)
    if not size or not int(size[1]) or not int(size[2]):
      raise ValueError(f"--{name}={value} is not {form}, such as 64x64")
    return int(size[1]), int(size[2])
  if ":" in form:
    return tuple(_timed(name, text, form) for text in value)
  numbers = _numbers(name, ",".join(value), form, value)
  if len(numbers) != 2:
    raise ValueError(f"--{name}={','.join(value)} is not {form}")
  return numbers


def _timed(name, text, form):
  seconds, _, rest = text.partition(":")
  if not rest:
    raise ValueError(f"--{name}={text} is not {form}")
  return *_numbers(name, seconds, form, [seconds]), rest


def _numbers(name, shown, form, texts):
  try:
    return tuple(map(float, texts))
  except ValueError:
    raise ValueError(f"--{name}={shown} is not {form}") from None
