"""Styles of captions: what a model is asked to write."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Those that are asked for if nobody names any; an endpoint takes any, with a prompt.
USUAL = ("descriptive", "short")

_PROMPTS = {
  "descriptive": (
    "These images are frames of one video, in order and evenly spaced. Write one "
    "paragraph that describes the video for someone who has to draw it: each subject "
    "with its colours, shape, size and number, how each of them moves and in which "
    "direction, what they do to each other, the background, the light, the style, and "
    "how the camera moves. Say only what is seen. Do not speak of frames, images or "
    "the video itself. Answer with the description alone."
  ),
  "short": (
    "These images are frames of one video, in order and evenly spaced. Say in one "
    "short sentence of at most fifteen words what is seen and what happens. Do not "
    "speak of frames, images or the video itself. Answer with the sentence alone."
  ),
}


class Style(NamedTuple):
  """A style, and the prompt that asks an endpoint for it."""

  name: str
  prompt: str = ""

  @property
  def digest(self) -> str:
    """Hash of the prompt; "" without one."""
    if not self.prompt:
      return ""
    return hashlib.sha256(self.prompt.encode()).hexdigest()[:12]


def trained(names: Sequence[str] | None, known: Sequence[str]) -> list[Style]:
  """Styles of a captioner of ours, which takes no prompts.

  Args:
    names: of the styles; None for the usual ones, or "any" if it has learnt no other.
    known: those that it has learnt.

  Raises:
    ValueError: for a style that it has not learnt.
  """
  if names is None:
    names = [name for name in USUAL if name in known] or ["any"]
  _check(names)
  if unknown := [name for name in names if name not in known]:
    raise ValueError(
      f"style {unknown[0]!r} is none of this captioner's: {', '.join(known)}"
    )
  return [Style(name) for name in names]


def prompted(names: Sequence[str] | None, prompts: Mapping[str, str]) -> list[Style]:
  """Styles of an endpoint.

  Args:
    names: of the styles; None for the usual ones. prompts: style -> prompt, in place of
      ours.

  Raises:
    ValueError: for a style without a prompt, and a prompt of no style.
  """
  names = USUAL if names is None else names
  _check(names)
  if unused := [name for name in prompts if name not in names]:
    raise ValueError(f"a prompt of style {unused[0]!r}, which is none of {list(names)}")
  found = []
  for name in names:
    prompt = prompts.get(name, _PROMPTS.get(name, "")).strip()
    if not prompt:
      raise ValueError(
        f"style {name!r} has no prompt; {list(_PROMPTS)} have one of ours"
      )
    found.append(Style(name, prompt))
  return found


def _check(names):
  if not names or len(set(names)) < len(names) or not all(names):
    raise ValueError(f"styles {list(names)} are none, or one of them occurs twice")
