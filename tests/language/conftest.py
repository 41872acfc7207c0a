"""An endpoint, its key, and time that passes without waiting."""

import threading

import pytest
from language import chat_server

from sora_jax.language import chat

SECRET = "sk-very-secret-key"


class FakeTime:
  """Sleeping moves the clock on, and is remembered."""

  def __init__(self):
    self.time, self.slept, self._lock = 0.0, [], threading.Lock()

  def now(self):
    return self.time

  def sleep(self, seconds):
    with self._lock:
      self.time += seconds
      self.slept.append(seconds)

  @property
  def clock(self):
    return chat.Clock(self.now, self.sleep)


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv(chat.KEY, SECRET)
  with chat_server.running() as state:
    yield state


@pytest.fixture
def fake_time():
  return FakeTime()


@pytest.fixture
def talk(server, fake_time):
  """(**fields of Endpoint) -> Chat with the server."""

  def make(**fields):
    endpoint = chat.Endpoint(server.url, "m", **{"timeout": 5.0, **fields})
    return chat.Chat(endpoint, fake_time.clock)

  return make
