"""The client of endpoints against a server that fails in every way."""

import contextlib
import logging
import socket

import pytest
from absl import logging as absl_logging
from language.chat_server import good
from language.conftest import SECRET

from sora_jax.language import chat

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.slow
def test_an_answer(server, talk):
  reply = talk(temperature=0.5, max_tokens=7).ask(HELLO)
  assert reply.content.startswith("caption ") and reply.finish == "stop"
  assert reply.tokens == (100, 10) and reply.refusal == ""
  (body,) = server.bodies
  assert body["model"] == "m" and body["messages"] == HELLO
  assert body["temperature"] == 0.5 and body["max_completion_tokens"] == 7
  assert server.keys == {f"Bearer {SECRET}"}
  talk(temperature=-1).ask(HELLO)
  assert "temperature" not in server.bodies[1]


@pytest.mark.parametrize(
  "failure",
  [429, 500, 503, 408, "drop", b"{ not json", b"", {"choices": []}, {"x": 1}, b"[1]"],
  ids=str,
)
def test_what_may_pass_is_asked_again(server, talk, fake_time, failure):
  server.plan = {1: failure, 2: failure}
  talk_now = talk()
  assert talk_now.ask(HELLO).content and talk_now.ask(HELLO).content
  assert len(server.bodies) == 4
  first, second = [pause for pause in fake_time.slept if pause][:2]
  assert 0.75 <= first <= 1 and 1.5 <= second <= 2


def test_a_server_that_hangs_up_at_first_is_asked_again(server, talk):
  server.plan = {0: "drop"}
  assert talk().ask(HELLO).content
  assert len(server.bodies) == 2


def test_a_time_out_is_asked_again(server, talk):
  server.plan = {0: "hang"}
  assert talk(timeout=0.2).ask(HELLO).content
  assert len(server.bodies) == 2


def test_retry_after_holds_for_all(server, talk, fake_time):
  server.plan = {0: (429, {"Retry-After": "17"}), 2: (429, {"Retry-After": "9999"})}
  talk_now = talk()
  talk_now.ask(HELLO)
  assert fake_time.time == 17
  talk_now.ask(HELLO)
  assert fake_time.time == 17 + 60  # a server that says never is asked in a minute
  # Another thread would have waited, too: the turn is one for all.
  talk_now._next = fake_time.time + 5
  talk_now.ask(HELLO)
  assert fake_time.time == 17 + 60 + 5


def test_a_429_holds_those_who_have_a_turn_already(talk, fake_time):
  talk_now = talk(requests_per_minute=60)
  talk_now._next = 1.0  # the turn that is taken

  def sleep(seconds):
    fake_time.sleep(seconds)
    talk_now._held = 5.0  # another thread hears "slow down" meanwhile

  talk_now._clock = chat.Clock(fake_time.now, sleep)
  talk_now.ask(HELLO)
  assert fake_time.time >= 5


def test_requests_per_minute(talk, fake_time):
  talk_now = talk(requests_per_minute=30)
  for _ in range(4):
    talk_now.ask(HELLO)
  assert fake_time.time == pytest.approx(6)


def test_it_gives_up(server, talk):
  server.plan = lambda number: 500
  with pytest.raises(chat.GaveUp, match="status 500, 3 times"):
    talk(retries=2).ask(HELLO)
  assert len(server.bodies) == 3


def test_a_question_that_is_rejected_is_not_asked_again(server, talk):
  server.plan = {0: 400}
  with pytest.raises(chat.GaveUp, match=r"status 400: .*\*\*\*"):
    talk().ask(HELLO)
  assert len(server.bodies) == 1


@pytest.mark.parametrize(
  "status, words",
  [(401, "the key in OPENAI_API_KEY"), (403, "the key"), (404, "for model 'm'"),
   (402, "quota of the key is used up")],
)  # fmt: skip
def test_what_cannot_work_ends_it(server, talk, status, words):
  server.plan = {0: status}
  with pytest.raises(ValueError, match=words):
    talk().ask(HELLO)
  assert len(server.bodies) == 1


def test_an_endpoint_that_is_not_there(monkeypatch, fake_time):
  monkeypatch.setenv(chat.KEY, SECRET)
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
  talk = chat.Chat(chat.Endpoint(url, "m"), fake_time.clock)
  with pytest.raises(ValueError, match=f"endpoint {url}: no connection .*refused"):
    talk.ask(HELLO)


def test_bad_endpoints(monkeypatch):
  with pytest.raises(ValueError, match="'localhost:1' does not begin with http"):
    chat.Endpoint("localhost:1", "m")
  with pytest.raises(ValueError, match="name of the model is missing"):
    chat.Endpoint("http://x", "")
  with pytest.raises(ValueError, match="timeout 0 must be positive"):
    chat.Endpoint("http://x", "m", timeout=0)
  monkeypatch.delenv(chat.KEY, raising=False)
  with pytest.raises(ValueError, match="no OPENAI_API_KEY; for a server that wants no"):
    chat.Chat(chat.Endpoint("http://x", "m"))


@pytest.mark.parametrize("url", ["http://h:abc/v1", "http:///v1", "http://[::1/v1"])
def test_addresses_that_are_none(url):
  with pytest.raises(ValueError, match="^endpoint 'http://"):
    chat.Endpoint(url, "m")


def test_an_endpoint_that_does_not_take_the_call(monkeypatch, fake_time):
  monkeypatch.setenv(chat.KEY, SECRET)
  with socket.socket() as s, contextlib.ExitStack() as callers:
    s.bind(("127.0.0.1", 0))
    s.listen(0)
    for _ in range(4):  # so many that nobody else is let in
      caller = callers.enter_context(socket.socket())
      caller.setblocking(False)
      caller.connect_ex(s.getsockname())
    url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
    talk = chat.Chat(chat.Endpoint(url, "m", timeout=0.3), fake_time.clock)
    with pytest.raises(ValueError, match=f"{url}: no connection .*not take the call"):
      talk.ask(HELLO)


def test_secrets_of_an_address_are_not_shown(server, caplog, monkeypatch):
  endpoint = chat.Endpoint("https://me:pass@h:8/v1?key=1", "m")
  assert endpoint.shown == "https://h:8/v1"
  caplog.set_level(logging.INFO)
  address = server.url.replace("//", "//me:pass@") + "?key=s3cret"
  assert chat.Chat(chat.Endpoint(address, "m")).ask(HELLO).content
  assert server.paths == ["/v1/chat/completions?key=s3cret"]
  assert "s3cret" not in caplog.text and "pass" not in caplog.text


@pytest.mark.parametrize("key", ["x", "none"])
def test_a_key_that_is_a_word_is_none_of_a_caption(server, monkeypatch, key):
  monkeypatch.setenv(chat.KEY, key)
  server.plan = {0: good("a fox, none of it")}
  reply = chat.Chat(chat.Endpoint(server.url, "m")).ask(HELLO)
  assert reply.content == "a fox, none of it"


@pytest.mark.parametrize(
  "usage", [None, {}, {"total_tokens": 9}, {"prompt_tokens": "?"}]
)
def test_an_answer_counts_whatever_is_said_of_tokens(server, talk, usage):
  server.plan = {0: {**good("a dog"), "usage": usage}}
  reply = talk().ask(HELLO)
  assert reply.content == "a dog" and reply.tokens == (0, 0)


def test_the_key_is_nowhere(server, talk, caplog, monkeypatch):
  def log(level, text, _, *args):  # whatever was logged before
    chat.logging.log(level, text, *args)

  monkeypatch.setattr(chat.logging, "log_first_n", log)
  absl_logging.set_verbosity(absl_logging.DEBUG)
  caplog.set_level(logging.DEBUG)
  server.plan = {
    0: 500, 1: 429, 2: b"{", 3: good(f"I know {SECRET}", refusal=f"no {SECRET}"),
    4: 400, 5: 401,
  }  # fmt: skip
  said = [str(talk().ask(HELLO))]
  for error in (chat.GaveUp, ValueError):
    with pytest.raises(error) as caught:
      talk().ask(HELLO)
    said.append(repr(caught.value))
  absl_logging.set_verbosity(absl_logging.INFO)
  assert caplog.text and SECRET not in caplog.text
  assert SECRET not in "".join(said) and "***" in said[0]
