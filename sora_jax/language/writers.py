"""Those who write captions: a captioner of ours, or a vision model at an endpoint."""

import base64
import io
import re
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from sora_jax.data import text_file
from sora_jax.data.clip_reader import read_clip
from sora_jax.data.clips import Clip
from sora_jax.language import chat
from sora_jax.language.captioner import Captioner, ClipPixels
from sora_jax.language.styles import Style

# As models begin that do not do what they are asked to. Captions may quote "Sorry".
_REFUSAL = re.compile(
  r"(i['’]?m sorry\b|i am sorry\b|(sorry, )?(but )?i( can ?not| can['’]t| am unable to"
  r"|['’]m unable to) (assist|help|comply|describe|see|view|watch|provide|identify"
  r"|answer|analy[sz]e|process|access|create|write|do|fulfil|determine|discuss)\b"
  r"|as an ai\b|unable to (assist|help|comply)\b)",
  re.IGNORECASE,
)
# What models think before they answer, where a server does not take that away.
_THOUGHTS = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


class Question(NamedTuple):
  """A caption that is wanted."""

  clip: Clip
  style: Style


class Answer(NamedTuple):
  """What came of a question.

  Attributes:
    text: the caption; "" if there is none.
    reason: why there is none.
    tokens: (of the question, of the answer) that are paid for.
    final: whether asking again would bring the same, so that it is kept.
    asked: whether anybody was asked.
  """

  text: str = ""
  reason: str = ""
  tokens: tuple[int, int] = (0, 0)
  final: bool = True
  asked: bool = True


class Writer(Protocol):
  """Whoever writes captions.

  Attributes:
    by: the model's name, for the manifest.
    settings: what else decides what is written (JSON-able).
    size: questions that are answered together.
    threads: that may call `answer` at once.
  """

  by: str
  settings: dict[str, Any]
  size: int
  threads: int

  def answer(self, questions: Sequence[Question]) -> list[Answer]:
    """Answers questions of one style. ValueError if no question can be answered."""


class Trained:
  """A captioner of ours, in batches. Two threads: one reads while the other computes.

  What it writes may depend on a batch in its last bits; so `recaption` makes batches
  of the same clips each time, whatever is known of them already.
  """

  threads = 2

  def __init__(
    self,
    captioner: Captioner,
    identity: str,
    method: str = "greedy",
    seed: int = 0,
    size: int = 8,
  ):
    """Args: identity is that of the weights; the others are as `Captioner` has them."""
    self._captioner, self._method, self._seed = captioner, method, seed
    self._lock = threading.Lock()
    self.by, self.size = identity, size
    self.settings = {"method": method, "size": size}
    if method == "nucleus":
      self.settings["seed"] = seed

  def answer(self, questions: Sequence[Question]) -> list[Answer]:
    """Captions of the clips that can be read."""
    read, answers = [], {}
    for i, question in enumerate(questions):
      video_THWC, reason = _frames(question.clip)
      if video_THWC is None:
        answers[i] = Answer(reason=reason, final=False, asked=False)
      else:
        read.append((i, ClipPixels(video_THWC, question.clip.fps)))
    if read:
      style = questions[0].style.name
      with self._lock:
        texts = self._captioner.caption(
          [pixels for _, pixels in read], style, self._method, self._seed
        )
      for (i, _), text in zip(read, texts, strict=True):
        caption = " ".join(text.split())
        answers[i] = Answer(caption, "" if caption else "the caption is empty")
    return [answers[i] for i in range(len(questions))]


class Vision:
  """A vision model at an endpoint, which sees some frames of a clip as JPEG images."""

  size = 1

  def __init__(
    self,
    talk: chat.Chat,
    frames: int = 8,
    max_side: int = 512,
    max_characters: int = 2000,
    threads: int = 8,
  ):
    """Args:
    talk: to the endpoint.
    frames: that are sent of a clip, evenly spaced, its first and last among them.
    max_side: of an image in pixels; larger ones are made smaller.
    max_characters: of a caption; longer ones are none.
    threads: questions that are open at once.
    """
    self._talk, self._frames, self._side = talk, frames, max_side
    self._most, self.threads = max_characters, threads
    end = talk.endpoint
    self.by = end.model
    self.settings = {
      "frames": frames,
      "max_side": max_side,
      "max_characters": max_characters,
      "temperature": end.temperature,
      "max_tokens": end.max_tokens,
    }

  def answer(self, questions: Sequence[Question]) -> list[Answer]:
    """A caption of one clip."""
    ((clip, style),) = questions
    video_THWC, reason = _frames(clip)
    if video_THWC is None:
      return [Answer(reason=reason, final=False, asked=False)]
    chosen = spread(len(video_THWC), self._frames)
    images = [jpeg(video_THWC[i], self._side) for i in chosen]
    try:
      reply = self._talk.ask(question_of(style.prompt, images))
    except chat.GaveUp as error:
      return [Answer(reason=str(error), final=False)]
    text, reason = checked(reply, self._most)
    return [Answer(text, reason, reply.tokens)]


def question_of(prompt: str, images: Sequence[bytes]) -> list[dict[str, Any]]:
  """Messages of the chat API: a prompt, and JPEG images."""
  parts: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
  for image in images:
    url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    parts.append({"type": "image_url", "image_url": {"url": url}})
  return [{"role": "user", "content": parts}]


def checked(reply: chat.Reply, max_characters: int) -> tuple[str, str]:
  """(the text of a reply, "") or ("", what is wrong with it)."""
  if reply.refusal:
    return "", f"the model refuses: {reply.refusal}"
  if reply.finish == "content_filter":
    return "", "the answer was filtered"
  if not isinstance(reply.content, str):
    kind = type(reply.content).__name__
    return "", f"the answer is no text but {kind}"
  text = _THOUGHTS.sub("", text_file.clean(reply.content), count=1)
  text = " ".join(text.split())
  if len(text) > 1 and text.count('"') == 2 and text[0] == text[-1] == '"':
    text = text[1:-1].strip()
  if not text:
    return "", "the answer is empty"
  if fault := text_file.control_character(text):
    return "", f"the answer has a {fault}"
  if _REFUSAL.match(text):
    return "", f"the model refuses: {text[:80]}"
  if reply.finish == "length":
    return "", "the answer is cut off: it has more than max_tokens tokens"
  if len(text) > max_characters:
    return "", f"the answer has {len(text)} characters, more than {max_characters}"
  return text, ""


def spread(length: int, count: int) -> list[int]:
  """Up to `count` different indices below `length`, evenly spaced, with both ends."""
  places = np.linspace(0, length - 1, min(count, length))
  return [int(round(place)) for place in places]


def jpeg(image_HWC: np.ndarray, max_side: int) -> bytes:
  """A JPEG file of uint8 [H, W, 3], made smaller if a side is above `max_side`."""
  image = Image.fromarray(image_HWC)
  image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
  file = io.BytesIO()
  image.save(file, "JPEG", quality=90)
  return file.getvalue()


def _frames(clip: Clip) -> tuple[np.ndarray | None, str]:
  """(uint8 [T, H, W, 3], "") of a clip, or (None, why it cannot be read)."""
  try:
    return read_clip(clip), ""
  # A file can break in more ways than the decoder names; none of them ends a run.
  except (ValueError, RuntimeError, OSError) as error:
    return None, f"cannot be read: {getattr(error, 'reason', error)}"
