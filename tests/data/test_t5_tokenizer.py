"""T5's tokenizers: ids are those of transformers (golden/make_tokenizers.py)."""

import json
import pathlib
import pickle

import pytest
from golden import make_losses

from sora_jax.data import tokenizer
from sora_jax.data.t5_tokenizer import T5Tokenizer, find

FOLDER = pathlib.Path(make_losses.__file__).with_name("tokenizers")
GOLDEN = json.loads((FOLDER / "ids.json").read_text())
FILES = {
  "t5/tokenizer.json": "t5",
  "umt5/tokenizer.json": "umt5",
  "spiece.model": "umt5",
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("i", range(len(GOLDEN["texts"])))
def test_ids(file, i):
  words = T5Tokenizer(str(FOLDER / file))
  ids = GOLDEN["ids"][FILES[file]][i]
  assert words.encode(GOLDEN["texts"][i], 1000) == [*ids, 1]
  assert words.encode(GOLDEN["texts"][i], 3) == [*ids[:2], 1]


def test_the_texts_tell_mistakes():
  """Bytes, special tokens and pieces are all there."""
  byte, without = ({i for ids in GOLDEN["ids"][k] for i in ids} for k in ("umt5", "t5"))
  assert {0, 1, 2} <= without and {0, 1} <= byte
  emoji = next(i for i, text in enumerate(GOLDEN["texts"]) if "🎉" in text)
  assert 2 in GOLDEN["ids"]["t5"][emoji] and 2 not in GOLDEN["ids"]["umt5"][emoji]


@pytest.mark.parametrize("file", FILES)
def test_to_json_and_back(tmp_path, file):
  words = pickle.loads(pickle.dumps(T5Tokenizer(str(FOLDER / file))))
  (tmp_path / "tokenizer.json").write_text(words.to_json())
  again = T5Tokenizer(find(tmp_path))
  assert again.vocab_size == words.vocab_size
  for text in GOLDEN["texts"]:
    assert again.encode(text, 1000) == words.encode(text, 1000)


def test_byte_pairs_of_sentencepiece(tmp_path):
  """As sentencepiece itself has them, for texts without special tokens.

  Nor with its mark of a space, which at the end of a text it drops, as transformers
  does not.
  """
  path = str(tmp_path / "spiece.model")
  texts = [text for text in GOLDEN["texts"] if not set("<\u2581\u0301") & set(text)]
  tokenizer.train(texts[:8], path, 400)
  theirs, ours = tokenizer.Tokenizer(path), T5Tokenizer(path)
  assert ours.vocab_size == theirs.vocab_size
  for text in (" ".join(text.split()) for text in texts):
    assert ours.encode(text, 1000) == theirs.encode(text, 1000), text


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer"),
    ("spiece.model", b"text", "spiece.model: not a sentencepiece model"),
    ("spiece.model", b"", "it has no pieces, "),
    ("spiece.model", (FOLDER / "spiece.model").read_bytes()[:999], "truncated"),
  ],
)
def test_bad_files(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    T5Tokenizer(find(tmp_path)).encode("a", 9)


def test_a_tokenizer_of_something_else(tmp_path):
  whole = json.loads((FOLDER / "t5" / "tokenizer.json").read_text())
  del whole["post_processor"]
  whole["added_tokens"] = []
  whole["model"]["vocab"][1][0] = "<end>"
  (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
  with pytest.raises(ValueError, match="tokenizer.json: it has no </s>"):
    T5Tokenizer(find(tmp_path)).encode("a", 9)
