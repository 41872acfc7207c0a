"""Short prompts to long ones, as the captions that a model was trained on.

A model that has only seen descriptive captions follows descriptive prompts best
(DALL-E 3's paper, section 3.1), while people type a few words. An expander is a small
decoder that was trained on pairs of captions, `language.expander`, or a text model at
an endpoint, which is shown some of the training captions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from sora_jax.data.clips import Clip
from sora_jax.language import chat, writers

MOST_CHARACTERS = 1000  # of a text to expand; longer ones are long already
_EXAMPLES = 12

_SYSTEM = """\
You write prompts for a model that makes videos. The model was trained on captions \
like those below. Rewrite the user's prompt as one such caption: keep every subject, \
number, colour, action and other detail that the prompt names, in its words where you \
can; add what is missing for a caption of this kind; contradict nothing; be no longer \
and no more flowery than the captions are. Answer with the caption alone, in the \
language of the captions.

Captions:
{captions}"""


class Expander(Protocol):
  """Whoever makes prompts longer. `by` names it, for the record."""

  by: str

  def expand(self, texts: Sequence[str], seed: int = 0) -> list[str]:
    """A long text for each; the same ones for the same seed, as far as it can."""


class Expansion(NamedTuple):
  """What became of texts.

  Attributes:
    by: the expander. texts: long text of each short one.
  """

  by: str
  texts: dict[str, str]

  def of(self, texts: Sequence[str]) -> "Expansion":
    """Only what became one of these long texts."""
    return Expansion(self.by, {s: t for s, t in self.texts.items() if t in texts})


class AtEndpoint:
  """A text model at an endpoint."""

  def __init__(self, talk: chat.Chat, examples: Sequence[str]):
    """Args: examples are captions of the training set, see `examples_of`."""
    self._talk = talk
    shown = "\n".join(f"- {caption}" for caption in examples)
    self.system = _SYSTEM.format(captions=shown)
    digest = hashlib.sha256(self.system.encode()).hexdigest()[:12]
    self.by = f"{talk.endpoint.model}, prompt {digest}"

  def expand(self, texts: Sequence[str], seed: int = 0) -> list[str]:
    """Asks for each. ValueError, naming the text, if there is no usable answer."""
    del seed  # servers promise nothing by it; what they said is kept instead
    return [self._one(text) for text in texts]

  def _one(self, text):
    messages = [
      {"role": "system", "content": self.system},
      {"role": "user", "content": text},
    ]
    try:
      reply = self._talk.ask(messages)
    except chat.GaveUp as error:
      raise ValueError(f"{_shown(text)} cannot be expanded: {error}") from error
    found, reason = writers.checked(reply, 4 * MOST_CHARACTERS)
    if reason:
      raise ValueError(f"{_shown(text)} cannot be expanded: {reason}")
    return found


def expand(expander: Expander, texts: Sequence[str], seed: int = 0) -> Expansion:
  """Makes texts longer, each different one once; empty ones stay as they are.

  Raises:
    ValueError: for a text that is too long to be expanded, or comes back empty.
  """
  wanted = [text for text in dict.fromkeys(texts) if text.strip()]
  for text in wanted:
    if len(text) > MOST_CHARACTERS:
      raise ValueError(
        f"{_shown(text)} has {len(text)} characters: only texts of up to "
        f"{MOST_CHARACTERS} are expanded"
      )
  made = expander.expand(wanted, seed)
  for text, long in zip(wanted, made, strict=True):
    if not long.strip():
      raise ValueError(f"{_shown(text)} was expanded to nothing by {expander.by}")
  return Expansion(expander.by, dict(zip(wanted, made, strict=True)))


def replaced(fields: Any, texts: Mapping[str, str]) -> dict[str, Any]:
  """Prompt, shots and blend of a job or request with texts in place of theirs."""
  return {
    "prompt": texts.get(fields.prompt, fields.prompt),
    "shots": tuple((time, texts.get(text, text)) for time, text in fields.shots),
    "blend": texts.get(fields.blend, fields.blend),
  }


def texts_of(fields: Any) -> list[str]:
  """All texts of a job or request that say what to make."""
  return [fields.prompt, *(text for _, text in fields.shots), fields.blend]


def examples_of(clips: Sequence[Clip], count: int = _EXAMPLES) -> list[str]:
  """Descriptive captions of training clips, evenly from all over the set."""
  training = [clip for clip in clips if clip.split == "train"]
  captions = list(dict.fromkeys(filter(None, map(descriptive, training))))
  return [captions[i] for i in writers.spread(len(captions), count)] if captions else []


def descriptive(clip: Clip) -> str:
  """The caption that says most: of those asked to be descriptive, or else the longest.

  "" without any.
  """
  asked = [c.text for c in clip.synthetic if c.style == "descriptive"]
  return max(asked or clip.training_captions, key=len, default="")


def _shown(text: str) -> str:
  return f"prompt {text[:40] + ('...' if len(text) > 40 else '')!r}"
