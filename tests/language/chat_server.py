"""A server with OpenAI's chat API on this machine, which misbehaves as it is told."""

import contextlib
import hashlib
import http.server
import json
import threading
import time


def good(text: str, **message) -> dict:
  """The body of an answer."""
  return {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
      {
        "index": 0,
        "finish_reason": message.pop("finish", "stop"),
        "message": {"role": "assistant", "content": text, **message},
      }
    ],
    "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
  }


def question_digest(body: dict) -> str:
  """Short name of a question by what it says."""
  text = json.dumps(body["messages"], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


class Server:
  """What happened, and what is to happen.

  Attributes:
    url: of the API.
    plan: number of a request, from 0 -> what to do instead of answering well: a status,
      (status, headers), "hang", "drop", raw bytes of a body, or a dict.
    bodies: of the questions in order. answered: digests of those with a good answer.
    keys: that came with them. paths: that were asked for.
    say: question -> text of a good answer.
  """

  def __init__(self, url):
    self.url, self.plan, self.bodies = url, {}, []
    self.answered, self.keys, self.paths = [], set(), []
    self.say = lambda body: f"caption {question_digest(body)}"
    self.lock = threading.Lock()

  def what_now(self, handler):
    size = int(handler.headers["Content-Length"])
    body = json.loads(handler.rfile.read(size))
    with self.lock:
      number = len(self.bodies)
      self.bodies.append(body)
      self.paths.append(handler.path)
      self.keys.add(handler.headers["Authorization"])
      plan = self.plan(number) if callable(self.plan) else self.plan.get(number)
      if plan is None:
        self.answered.append(question_digest(body))
    return good(self.say(body)) if plan is None else plan


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_POST(self):
    plan = self.server.state.what_now(self)
    headers = {}
    if isinstance(plan, tuple):
      plan, headers = plan
    if plan == "hang":
      time.sleep(0.5)
      plan = "drop"
    if plan == "drop":
      self.close_connection = True
      self.connection.close()
      return
    status, body = 200, plan
    if isinstance(plan, int):
      key = self.headers["Authorization"]  # servers do repeat it
      status, body = plan, {"error": {"message": f"no, {key}"}}
      if plan == 402:
        status, body = 429, {"error": {"message": "?", "code": "insufficient_quota"}}
    if not isinstance(body, bytes):
      body = json.dumps(body).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(body)


class _Threads(http.server.ThreadingHTTPServer):
  daemon_threads = True

  def handle_error(self, *_):  # a client that has gone away
    pass


@contextlib.contextmanager
def running():
  """A server in a thread: yields its `Server`."""
  with _Threads(("127.0.0.1", 0), _Handler) as server:
    server.state = Server(f"http://127.0.0.1:{server.server_port}/v1")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.state
    server.shutdown()
