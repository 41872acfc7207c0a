"""The page: one HTML file that needs no other file and no network."""

import html
from collections.abc import Iterable, Sequence

from sora_jax.data.intake.find import shown
from sora_jax.runtime import files

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 24px auto; max-width: 1240px;
  padding: 0 16px; color: #222; background: #fff; }
h2 { border-bottom: 1px solid #ccc; margin-top: 40px; }
table { border-collapse: collapse; }
td, th { padding: 3px 12px 3px 0; text-align: left; vertical-align: top; }
tr + tr td { border-top: 1px solid #eee; }
figure { display: inline-block; margin: 6px 12px 10px 0; vertical-align: top; }
figcaption, .note { color: #555; font-size: 13px; max-width: 720px;
  overflow-wrap: anywhere; }
img { max-width: 100%; image-rendering: pixelated; }
td { overflow-wrap: anywhere; }
"""


def text(value: object, most: int = 300) -> str:
  """Anything as text of the page: captions and names may hold whatever they like."""
  plain = shown(str(value))
  return html.escape(plain if len(plain) <= most else plain[: most - 1] + "\u2026")


def note(value: object) -> str:
  """A paragraph, such as one that says what is not there yet."""
  return f'<p class="note">{text(value, 2000)}</p>'


def figure(image: str, *lines: object) -> str:
  """An <img>, or what else is shown, with lines of text below."""
  caption = "<br>".join(map(text, lines))
  return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
  """A table of texts."""
  lines = ["".join(f"<th>{text(cell)}</th>" for cell in head)] if head else []
  lines += ["".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows]
  return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def section(title: str, *parts: str) -> str:
  """A part of the page; `parts` are HTML."""
  return f"<h2>{text(title)}</h2>\n" + "\n".join(parts)


def write(path, title: str, sections: Iterable[str]) -> None:
  """Writes the page, which appears when it is whole."""
  body = "\n".join(sections)
  files.write_text(
    path,
    f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n"
    f"<body><h1>{text(title)}</h1>\n{body}\n</body></html>\n",
  )
