"""Makes tokenizers/: tokenizers of T5 and UMT5, and transformers' ids of texts.

  python tests/golden/make_tokenizers.py

A tiny unigram sentencepiece model with byte fallback, as UMT5's, and what
transformers makes of it: tokenizer.json of T5Tokenizer (with its 100 extra ids and no
bytes) and of the general TokenizersBackend, each saved by transformers, and the ids
that these two give texts. Made with transformers 5.24.0, sentencepiece 0.2.3 and
protobuf 7.36, without which transformers reads no spiece.model.
"""

import json
import pathlib
import shutil
import tempfile

import sentencepiece
from transformers import PreTrainedTokenizerFast, T5Tokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

FOLDER = pathlib.Path(__file__).with_name("tokenizers")
CORPUS = """a red circle moves right & a blue square, slowly, moves left; it's 3.5 times
as large. the camera pans over a city at night, neon lights & rain, 4k, highly detailed
一个红色的圆圈向右移动 красный круг движется вправо la caméra bouge à gauche
""".split("\n")
TEXTS = [
  "", " ", "a red circle moves right", "red & blue, left; right", "R&D &amp; x, y,z ,",
  "a\u00a0b\tc\nd   e  ", "  leading and trailing  ", "emoji 🎉 and 👩‍👩‍👧",
  "the end</s>and more </s> text", "<pad> <unk> <extra_id_3>", "一个红色的圆",
  "красный круг",
  "नमस्ते العربية 日本語", "caf\u00e9 cafe\u0301 ﬁ Å ½ ①", "▁under▁ ▁",
  "\u200b\u3000x\r\n",
  "UPPER lower 12345 !?", "…“quotes” — dash",
]  # fmt: skip


def main():
  shutil.rmtree(FOLDER, ignore_errors=True)
  FOLDER.mkdir()
  # A few of NFKC's rules: all of them are a quarter of a megabyte.
  rules = {"\ufb01": "fi", "\u00a0": " ", "\u3000": " ", "\t": " ", "\u2460": "1"}
  rules |= {"e\u0301": "\u00e9", "\r": "", "\u200b": ""}
  table = FOLDER / "rules.tsv"
  table.write_text(
    "".join(
      " ".join(f"{ord(c):X}" for c in a)
      + "\t"
      + " ".join(f"{ord(c):X}" for c in b)
      + "\n"
      for a, b in rules.items()
    )
  )
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS * 20), model_prefix=str(FOLDER / "spiece"),
    model_type="unigram", vocab_size=380, hard_vocab_limit=False, byte_fallback=True,
    character_coverage=1.0, normalization_rule_tsv=str(table), pad_id=0, eos_id=1,
    unk_id=2, bos_id=-1, minloglevel=2,
  )  # fmt: skip
  (FOLDER / "spiece.vocab").unlink()
  table.unlink()
  made = {"texts": TEXTS, "ids": {}}
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    shutil.copy(FOLDER / "spiece.model", folder / "spiece.model")
    config = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    t5 = T5Tokenizer.from_pretrained(folder)
    general = TokenizersBackend.from_pretrained(
      folder, vocab_file=str(folder / "spiece.model"), eos_token="</s>",
      unk_token="<unk>", pad_token="<pad>",
    )  # fmt: skip
  for name, tokenizer in (("t5", t5), ("umt5", general)):
    tokenizer.save_pretrained(FOLDER / name)
    print(name, sorted(path.name for path in (FOLDER / name).iterdir()))
    kind = T5Tokenizer if name == "t5" else PreTrainedTokenizerFast
    again = kind.from_pretrained(FOLDER / name)
    ids = [again(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert ids == [
      tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS
    ]
    made["ids"][name] = ids
    for path in (FOLDER / name).iterdir():
      if path.name != "tokenizer.json":
        path.unlink()
  (FOLDER / "ids.json").write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
  main()
