"""Questions to an endpoint with OpenAI's chat API: limits, retries, and what it costs.

Any server that speaks the API will do: OpenAI's, vLLM, llama.cpp. Threads may share a
`Chat`: when the server says "slow down" (429), all of them wait, not only the one that
heard it.
"""

import dataclasses
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import logging

# Where the key is; it is never a flag, which other users of a machine could read.
KEY = "OPENAI_API_KEY"
# Codes that say that this request may work later.
_LATER = (408, 409, 425, 429)
# Codes that say that no request will work: key, rights, model or address are wrong.
_NEVER = (401, 403, 404, 405)
_LONGEST_PAUSE = 60.0  # seconds; a server may ask for longer ones


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Where to ask, and how patiently.

  Attributes:
    url: of the API, as https://api.openai.com/v1. model: its name there.
    timeout: seconds to wait for an answer.
    retries: how often a question is put again after a failure that may pass.
    backoff: seconds before the first retry; doubled for each further one.
    requests_per_minute: most questions in that time; 0 = as many as there are threads.
    temperature: of the model's sampling; below 0 the model's own, since some models
      take no other. max_tokens: longest answer.
  """

  url: str
  model: str
  timeout: float = 60.0
  retries: int = 6
  backoff: float = 1.0
  requests_per_minute: float = 0.0
  temperature: float = 0.0
  max_tokens: int = 512

  def __post_init__(self):
    if not self.url.startswith(("http://", "https://")):
      raise ValueError(f"endpoint {self.url!r} does not begin with http:// or https://")
    if not self.model:
      raise ValueError(f"endpoint {self.shown}: the name of the model is missing")
    if self.timeout <= 0 or min(self.retries, self.requests_per_minute) < 0:
      raise ValueError(
        f"endpoint {self.shown}: timeout {self.timeout:g} must be positive, and "
        f"retries {self.retries} and requests_per_minute "
        f"{self.requests_per_minute:g} at least 0"
      )

  @property
  def shown(self) -> str:
    """The address for messages: without what may be a secret in it."""
    parts = urllib.parse.urlsplit(self.url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"


class Reply(NamedTuple):
  """What a model said.

  Attributes:
    content: of the message, whatever the server sent as that.
    refusal: why it does not answer, in its words; "" if it does.
    finish: why it ended, "stop" or "length" for instance.
    tokens: (of the question, of the answer) that are paid for.
  """

  content: Any
  refusal: str
  finish: str
  tokens: tuple[int, int]


class GaveUp(Exception):
  """A question without an answer for now; the argument is the reason."""


class Clock(NamedTuple):
  """Time, as tests replace it."""

  now: Callable[[], float] = time.monotonic
  sleep: Callable[[float], None] = time.sleep


class Chat:
  """Asks an endpoint; may be called by several threads at once."""

  def __init__(self, endpoint: Endpoint, clock: Clock | None = None):
    """Opens no connection yet.

    Raises:
      ValueError: the package openai is not installed, or no key is set.
    """
    self.endpoint, self._clock = endpoint, clock or Clock()
    self._key = os.environ.get(KEY, "")
    if not self._key:
      raise ValueError(
        f"endpoint {endpoint.shown}: the environment has no {KEY}; for a server that "
        f"wants none set it to any word"
      )
    try:
      import openai
    except ImportError as error:
      raise ValueError(
        "endpoints need the package openai: pip install 'sora_jax[language]'"
      ) from error
    self._api = openai
    # Retries are ours: the client's own would let every thread run into a limit alone.
    self._client = openai.OpenAI(
      base_url=endpoint.url,
      api_key=self._key,
      timeout=endpoint.timeout,
      max_retries=0,
    )
    self._lock = threading.Lock()
    self._next = 0.0  # time before which nothing is asked
    self._reached = False  # whether anything ever came back

  def ask(self, messages: Sequence[dict[str, Any]]) -> Reply:
    """Puts a question until there is an answer.

    Args:
      messages: of the chat API, {"role": ..., "content": ...} each.

    Raises:
      GaveUp: the server rejects this question, or it failed more often than
        `retries` allows.
      ValueError: no question to this endpoint can work.
    """
    for attempt in range(self.endpoint.retries + 1):
      self._wait_for_turn()
      try:
        return self._once(messages)
      except _TryLater as later:
        if attempt == self.endpoint.retries:
          raise GaveUp(f"{later.reason}, {attempt + 1} times") from None
        pause = self._pause(attempt, later.after)
        if later.all_wait:
          with self._lock:
            self._next = max(self._next, self._clock.now() + pause)
        logging.log_first_n(logging.WARNING, "%s; retrying", 5, later.reason)
        self._clock.sleep(pause)
    raise AssertionError("unreachable")

  def _once(self, messages) -> Reply:
    api, end = self._api, self.endpoint
    warm = {"temperature": end.temperature} if end.temperature >= 0 else {}
    create: Any = self._client.chat.completions.create
    try:
      answer = create(
        model=end.model,
        messages=list(messages),
        max_completion_tokens=end.max_tokens,
        **warm,
      )
    except api.APITimeoutError:
      raise _TryLater(f"no answer within {end.timeout:g} s") from None
    except api.APIStatusError as error:
      raise self._of_status(error) from None
    except (api.APIConnectionError, api.APIError) as error:
      reason = f"no connection ({self._safe(error.__cause__ or error)})"
      # Who hangs up without an answer is there; who does not take the call is not.
      if not self._reached and not _hung_up(error):
        raise ValueError(f"endpoint {self.endpoint.shown}: {reason}") from None
      raise _TryLater(reason) from None
    # What a server sends as JSON may be none; the client lets that through.
    except ValueError as error:
      raise _TryLater(f"an answer that is no JSON ({self._safe(error)})") from None
    return self._reply(answer)

  def _of_status(self, error) -> Exception:
    """The exception to raise for a status that is no success."""
    self._reached = True
    status, said = error.status_code, self._safe(error.message)
    text = f"endpoint {self.endpoint.shown} answers {status}"
    if status in (401, 403):
      # The server's own words often repeat a part of the key.
      return ValueError(f"{text}: the key in {KEY} is not accepted for this")
    if status in _NEVER:
      return ValueError(f"{text} for model {self.endpoint.model!r}: {said}")
    if status == 429 and getattr(error, "code", None) == "insufficient_quota":
      return ValueError(f"{text}: the quota of the key is used up")
    if status in _LATER or status >= 500:
      after = error.response.headers.get("retry-after", "")
      return _TryLater(f"status {status}", _seconds(after), all_wait=status == 429)
    return GaveUp(f"status {status}: {said}")

  def _reply(self, answer) -> Reply:
    self._reached = True
    try:
      choice, usage = answer.choices[0], answer.usage
      message = choice.message
      content = message.content
      if isinstance(content, str):
        content = content.replace(self._key, "***")
      refusal = getattr(message, "refusal", None) or ""
      tokens = (0, 0)
      if usage is not None:
        tokens = (int(usage.prompt_tokens), int(usage.completion_tokens))
      return Reply(content, self._safe(refusal), str(choice.finish_reason), tokens)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
      raise _TryLater(f"an answer without a message ({self._safe(error)})") from None

  def _wait_for_turn(self) -> None:
    """Sleeps until the rate allows one more question."""
    rate = self.endpoint.requests_per_minute
    with self._lock:
      turn = max(self._clock.now(), self._next)
      if rate:
        self._next = turn + 60.0 / rate
    while (left := turn - self._clock.now()) > 0:
      self._clock.sleep(left)

  def _pause(self, attempt, after) -> float:
    """Seconds until the next attempt: what the server asks for, or twice as long."""
    if after is not None:
      return min(after, _LONGEST_PAUSE)
    pause = min(self.endpoint.backoff * 2**attempt, _LONGEST_PAUSE)
    return pause * random.uniform(0.75, 1.0)  # so that threads do not come back as one

  def _safe(self, text) -> str:
    """One line of a message from outside, without the key."""
    line = " ".join(str(text).split()).replace(self._key, "***")
    return line.encode(errors="replace").decode()[:200]


class _TryLater(Exception):
  """A failure that may pass."""

  def __init__(self, reason: str, after: float | None = None, all_wait: bool = False):
    super().__init__(reason)
    self.reason, self.after, self.all_wait = reason, after, all_wait


def _hung_up(error: Exception) -> bool:
  """Whether a server took a call and ended it; named as httpx, whatever its package."""
  return type(error.__cause__).__name__ in ("RemoteProtocolError", "ReadError")


def _seconds(header: str) -> float | None:
  """Seconds of a Retry-After header; None if it has none, or a date."""
  try:
    return max(0.0, float(header))
  except ValueError:
    return None
