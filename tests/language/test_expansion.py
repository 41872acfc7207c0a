"""Prompts made longer: what is asked of an endpoint, and what becomes of jobs."""

import pytest
from language.chat_server import good

from sora_jax.data.clips import Clip, SyntheticCaption
from sora_jax.language import expansion
from sora_jax.sampling.conditioning import Request
from sora_jax.sampling.job import Job


class Longer:
  """An expander that says how often it was asked."""

  by = "longer"

  def __init__(self):
    self.asked = []

  def expand(self, texts, seed=0):
    self.asked += texts
    return [f"{text}, {seed} times" for text in texts]


def make_clip(i, captions, split="train", **synthetic):
  written = tuple(SyntheticCaption(text, s, "m") for s, text in synthetic.items())
  return Clip(f"c{i}", "x", 0.0, 1, 1.0, 16, 16, captions, split, synthetic=written)


def test_each_text_is_expanded_once():
  expander = Longer()
  made = expansion.expand(expander, ["a", "", "b", "a", " "], 3)
  assert made == ("longer", {"a": "a, 3 times", "b": "b, 3 times"})
  assert expander.asked == ["a", "b"]
  assert made.of(["b, 3 times", "c"]).texts == {"b": "b, 3 times"}


@pytest.mark.parametrize(
  "fields",
  [
    Job("a", shots=((1.0, "b"),), frames=33),
    Request("a", 64, 64, 33, 12.0, shots=((1.0, "b"),)),
    Job("a", blend="b"),
  ],
)
def test_all_texts_of_a_job_or_request(fields):
  assert sorted(filter(None, expansion.texts_of(fields))) == ["a", "b"]
  new = type(fields)(
    **{**vars(fields), **expansion.replaced(fields, {"a": "A", "b": "B"})}
  )
  assert sorted(filter(None, expansion.texts_of(new))) == ["A", "B"]


def test_long_and_empty_texts():
  with pytest.raises(ValueError, match=r"'x{40}\.\.\.' has 10000 characters: only"):
    expansion.expand(Longer(), ["x" * 10_000])
  silent = Longer()
  silent.expand = lambda texts, seed: [" "] * len(texts)
  with pytest.raises(ValueError, match="'a' was expanded to nothing by longer"):
    expansion.expand(silent, ["a"])


def test_examples_are_descriptive_captions_of_training():
  clips = [
    make_clip(0, ("short", "a longer one")),
    make_clip(1, ("the longest caption of its own",), descriptive="asked", short="s"),
    make_clip(2, ()),
    make_clip(3, ("held out and long",), "heldout"),
    *(make_clip(i, (f"number {i}",)) for i in range(4, 40)),
  ]
  found = expansion.examples_of(clips, 5)
  assert found[0] == "a longer one" and found[-1] == "number 39" and len(found) == 5
  assert "asked" in expansion.examples_of(clips, 100)
  assert expansion.examples_of(clips[2:4]) == []


@pytest.mark.slow
def test_an_endpoint_sees_the_examples(server, talk):
  expander = expansion.AtEndpoint(talk(), ["a dog {runs}", "a cat"])
  server.say = lambda body: f'"long {body["messages"][1]["content"]}"\n'
  assert expander.expand(["a", "赤い円"]) == ["long a", "long 赤い円"]
  system, user = server.bodies[0]["messages"]
  assert system["role"] == "system" and user == {"role": "user", "content": "a"}
  assert system["content"].endswith("Captions:\n- a dog {runs}\n- a cat")
  other = expansion.AtEndpoint(talk(), ["a cat"])
  assert expander.by.startswith("m, prompt ") and other.by != expander.by


@pytest.mark.parametrize(
  "plan, words",
  [
    (good(""), "'a' cannot be expanded: the answer is empty"),
    (good("I'm sorry, I can't."), "cannot be expanded: the model refuses"),
    (good("x" * 5000), "has 5000 characters, more than 4000"),
    (400, "cannot be expanded: status 400"),
    (500, "cannot be expanded: status 500, 2 times"),
    (401, "the key in OPENAI_API_KEY is not accepted"),
  ],
)
def test_answers_that_are_no_prompt(server, talk, plan, words):
  server.plan = lambda number: plan
  with pytest.raises(ValueError, match=words):
    expansion.AtEndpoint(talk(retries=1), []).expand(["a"])
