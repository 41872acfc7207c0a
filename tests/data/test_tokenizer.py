"""Tokenizer: ids, byte fallback, determinism, tiny and huge corpora, silence."""

import pickle
import random
import subprocess
import sys

import pytest

from sora_jax.data import tokenizer

CAPTIONS = [
  f"a {color} {shape} moves {way}"
  for color in ("red", "blue", "green")
  for shape in ("circle", "square", "star")
  for way in ("left", "right")
]

TEXTS = (
  "",
  "a red circle moves left",
  "日本語のテキスト",
  "Привет, мир",
  "العربية ﷽",
  "नमस्ते दुनिया",
  "🎉 emoji 👩‍👩‍👧",
  "</s> <pad> <unk> <0x41>",
  "\x00\x07 odd",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("tokenizer") / "a.model")
  tokenizer.train(CAPTIONS, path, vocab_size=400)
  return tokenizer.Tokenizer(path)


@pytest.mark.parametrize("text", TEXTS)
def test_any_script_round_trips_without_unknowns(trained, text):
  ids = trained.encode(text, 1000)
  assert ids[-1] == tokenizer.EOS
  assert not {tokenizer.PAD, tokenizer.EOS, tokenizer.UNK} & set(ids[:-1])
  assert max(ids) < trained.vocab_size
  assert trained.decode(ids) == text


def test_white_space_and_unicode_forms_are_one(trained):
  assert trained.encode(" a \n red\tcircle ", 99) == trained.encode("a red circle", 99)
  assert trained.encode("cafe\u0301", 99) == trained.encode("caf\u00e9", 99)


def test_truncation_keeps_the_end(trained):
  full = trained.encode(CAPTIONS[0], 100)
  assert trained.encode(CAPTIONS[0], 4) == full[:3] + [tokenizer.EOS]
  assert trained.encode(CAPTIONS[0], 1) == [tokenizer.EOS]
  assert trained.encode(CAPTIONS[0], len(full)) == full


def test_words_of_the_corpus_are_single_tokens(trained):
  assert len(trained.encode("a red circle moves left", 100)) == 6


def test_lengths_are_those_of_encode(trained):
  texts = [*CAPTIONS, *TEXTS]
  for limit in (3, 100):
    want = [len(trained.encode(text, limit)) for text in texts]
    assert trained.lengths(texts, limit) == want


@pytest.mark.parametrize("captions", [[], ["", "  \n"], ["x"], CAPTIONS[:1]])
@pytest.mark.parametrize("vocab_size", [261, 8192])
def test_few_or_no_captions(tmp_path, captions, vocab_size):
  path = str(tmp_path / "few.model")
  tokenizer.train(captions, path, vocab_size)
  few = tokenizer.Tokenizer(path)
  assert few.encode("", 9) == [tokenizer.EOS]
  assert few.vocab_size <= vocab_size
  for text in TEXTS:
    assert few.decode(few.encode(text, 1000)) == text


def test_more_characters_than_the_vocabulary_holds(tmp_path):
  pick = random.Random(0)
  script = [chr(0x4E00 + i) for i in range(2000)]
  captions = ["".join(pick.choices(script, k=20)) for _ in range(500)]
  path = str(tmp_path / "script.model")
  tokenizer.train(captions, path, vocab_size=500)
  large = tokenizer.Tokenizer(path)
  assert large.vocab_size <= 500
  for text in captions[:5]:
    assert large.decode(large.encode(text, 1000)) == text


def test_training_again_gives_the_same_bytes(tmp_path):
  for name in "ab":
    tokenizer.train(CAPTIONS, tmp_path / name, 400)
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_pickles_after_use(trained):
  copy = pickle.loads(pickle.dumps(trained))
  assert copy.encode("a red circle", 99) == trained.encode("a red circle", 99)


def test_is_silent(tmp_path):
  code = (
    "from sora_jax.data import tokenizer\n"
    f"tokenizer.train(['a b'], {str(tmp_path / 'a')!r})\n"
    f"tokenizer.Tokenizer({str(tmp_path / 'a')!r}).encode('x', 9)\n"
  )
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_errors_name_the_file_and_the_limit(tmp_path):
  with pytest.raises(ValueError, match="vocab_size is 100, the smallest one is 261"):
    tokenizer.train(CAPTIONS, tmp_path / "a", vocab_size=100)
  with pytest.raises(ValueError, match="none.model: no such tokenizer"):
    tokenizer.Tokenizer(tmp_path / "none.model")
  (tmp_path / "bad.model").write_bytes(b"text")
  with pytest.raises(ValueError, match="bad.model: not a sentencepiece model"):
    tokenizer.Tokenizer(tmp_path / "bad.model").encode("a", 9)
