"""Lines of text files that people wrote, with whatever editor: captions, prompts."""

import codecs
import pathlib
import re
import unicodedata

# Larger files are no captions, and must not fill the memory of a data worker.
MOST_BYTES = 1 << 20
# What `str.splitlines` takes for ends of lines although editors show it inside of one:
# vertical tab, form feed, the separators of ASCII, next line, and those of Unicode.
_INSIDE = re.compile("[\v\f\x1c-\x1e\x85\u2028\u2029]+")
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_lines(path, what: str = "captions") -> list[str]:
  """Reads the lines of a text file that are not blank, stripped.

  Read are UTF-8, with or without a byte order mark, and UTF-16 with one. No other
  encoding is guessed, since a wrong guess is text that looks right to a program.

  Args:
    path: of the file.
    what: the lines are, for messages.

  Raises:
    ValueError: for another encoding, control characters, or a file that is too large
      or cannot be read; it names the file.
  """
  path = pathlib.Path(path)
  try:
    size = path.stat().st_size
    if size > MOST_BYTES:
      raise ValueError(f"{path}: {size} bytes, {what} are at most {MOST_BYTES}")
    content = path.read_bytes()
  except OSError as e:
    raise ValueError(f"{path}: cannot be read ({e.strerror})") from e
  text = decode(content, path, what)
  lines = [clean(line) for line in re.split("\r\n|\r|\n", text)]
  for number, line in enumerate(lines, 1):
    if fault := control_character(line):
      raise ValueError(f"{path}:{number}: {what} with a {fault}")
  return [line for line in lines if line]


def decode(content: bytes, path, what: str = "captions") -> str:
  """Text of the bytes of a file. ValueError, naming the file, for other encodings."""
  encoding = "utf-16" if content.startswith(UTF16) else "utf-8-sig"
  try:
    return content.decode(encoding)
  except UnicodeDecodeError as e:
    raise ValueError(
      f"{path}: {what} must be UTF-8, or UTF-16 with a byte order mark ({e.reason} "
      f"at byte {e.start})"
    ) from e


def clean(text: str) -> str:
  """One line of text, stripped, without separators that only some programs see."""
  return _INSIDE.sub(" ", text).strip().strip("\ufeff").strip()


def control_character(text: str) -> str | None:
  """Says which control character is in a text; None if there is none, but for tabs."""
  for character in text:
    if unicodedata.category(character) in ("Cc", "Cs") and character != "\t":
      return f"control character U+{ord(character):04X}"
  return None
