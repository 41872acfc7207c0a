"""Styles of captions: a token for each takes the first place of a captioner's text."""

from collections.abc import Sequence

# Their ids follow those of the tokenizer. "any" says nothing of the style.
STYLES = ("any", "short", "descriptive")


def styles_of(captions: Sequence[str]) -> list[str]:
  """The style of each of a clip's captions.

  Of several, the shortest is short and the longest descriptive. What lies between, one
  that stands alone, and ones of equal length, are of any style: what is short depends
  on what there is to say.
  """
  lengths = [len(caption) for caption in captions]
  least, most = min(lengths, default=0), max(lengths, default=0)
  styles = {least: "short", most: "descriptive"} if least < most else {}
  return [styles.get(length, "any") for length in lengths]
