"""Questions to an endpoint with OpenAI's chat API: limits, retries, and what it costs.

Any server that speaks the API will do: OpenAI's, vLLM, llama.cpp. Threads may share a
`Chat`: when the server says "slow down" (429), all of them wait, not only the one that
heard it.
"""

import dataclasses
import logging as python_logging
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
_CONNECTING = 10.0  # seconds, in which who is there takes a call
# Characters of a key that is a secret. Servers that want none get "none" or "x", which
# are words that a caption may have.
_SECRET = 12
# What the client logs: a line for each request, with all of its address.
_CLIENT_LOGS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Where to ask, and how patiently.

  Attributes:
    url: of the API, as https://api.openai.com/v1; what it has behind a "?" goes with
      every question. model: its name there.
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
    try:
      host, _ = self._parts.hostname, self._parts.port
    except ValueError as error:
      raise ValueError(f"endpoint {self.url!r}: {error}") from error
    if not host:
      raise ValueError(f"endpoint {self.url!r} names no host")
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
    parts = self._parts
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"

  @property
  def base(self) -> str:
    """The address without what is behind a "?"."""
    return self._parts._replace(query="", fragment="").geturl()

  @property
  def query(self) -> dict[str, str]:
    """What is behind the "?"."""
    return dict(urllib.parse.parse_qsl(self._parts.query))

  @property
  def _parts(self) -> urllib.parse.SplitResult:
    return urllib.parse.urlsplit(self.url)


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
      base_url=endpoint.base,
      default_query=endpoint.query,
      api_key=self._key,
      timeout=openai.Timeout(
        endpoint.timeout, connect=min(_CONNECTING, endpoint.timeout)
      ),
      max_retries=0,
    )
    for name in _CLIENT_LOGS:
      python_logging.getLogger(name).setLevel(python_logging.WARNING)
    self._lock = threading.Lock()
    self._next = 0.0  # time of the next turn
    self._held = 0.0  # time before which nobody asks, whatever turn it has
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
            self._held = max(self._held, self._clock.now() + pause)
            self._next = max(self._next, self._held)
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
    except api.APITimeoutError as error:
      if not self._reached and type(error.__cause__).__name__ == "ConnectTimeout":
        raise ValueError(
          f"endpoint {end.shown}: no connection (it does not take the call)"
        ) from None
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
        content = self._without_key(content)
      refusal = getattr(message, "refusal", None) or ""
      tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
      return Reply(content, self._safe(refusal), str(choice.finish_reason), tokens)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
      raise _TryLater(f"an answer without a message ({self._safe(error)})") from None

  def _wait_for_turn(self) -> None:
    """Sleeps until the rate allows one more question, and no 429 holds all."""
    rate = self.endpoint.requests_per_minute
    while True:
      with self._lock:
        turn = max(self._clock.now(), self._next)
        if rate:
          self._next = turn + 60.0 / rate
      while (left := turn - self._clock.now()) > 0:
        self._clock.sleep(left)
      if turn >= self._held:  # which may have changed meanwhile: then another turn
        return

  def _pause(self, attempt, after) -> float:
    """Seconds until the next attempt: what the server asks for, or twice as long."""
    if after is not None:
      return min(after, _LONGEST_PAUSE)
    pause = min(self.endpoint.backoff * 2**attempt, _LONGEST_PAUSE)
    return pause * random.uniform(0.75, 1.0)  # so that threads do not come back as one

  def _safe(self, text) -> str:
    """One line of a message from outside, without the key."""
    line = self._without_key(" ".join(str(text).split()))
    return line.encode(errors="replace").decode()[:200]

  def _without_key(self, text: str) -> str:
    return text.replace(self._key, "***") if len(self._key) >= _SECRET else text


class _TryLater(Exception):
  """A failure that may pass."""

  def __init__(self, reason: str, after: float | None = None, all_wait: bool = False):
    super().__init__(reason)
    self.reason, self.after, self.all_wait = reason, after, all_wait


def _hung_up(error: Exception) -> bool:
  """Whether a server took a call and ended it; named as httpx, whatever its package."""
  return type(error.__cause__).__name__ in ("RemoteProtocolError", "ReadError")


def _count(usage, name: str) -> int:
  """Tokens by what a server says of them, which may be nothing."""
  count = getattr(usage, name, 0)
  return int(count) if isinstance(count, (int, float)) else 0


def _seconds(header: str) -> float | None:
  """Seconds of a Retry-After header; None if it has none, or a date."""
  try:
    return max(0.0, float(header))
  except ValueError:
    return None
