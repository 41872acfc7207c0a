"""Which clips and captions are left out, by limits of the config."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from sora_jax.runtime.fields import extends

Range = tuple[float, float]
ANY: Range = (0.0, 1e9)
LEAST_RATIO = 1.5  # of what is kept as a candidate for a cut
MOST_BITS = 4  # see `perceptual_hash.groups`


@dataclasses.dataclass(frozen=True)
class Filter:
  """Limits (least, most) for clips; what is outside is left out, and listed with why.

  By default only what is broken is left out: damaged files, and captions that are
  longer than a page. All else is measured and kept: look at the figures in
  `data/manifest.jsonl`, under "measured", then choose. A change measures nothing again.

  motion: mean optical flow, in percent of the width for a second; near 0 where nothing
    moves but grain. Images have none and stay.
  sharpness: variance of the Laplacian of the grey picture, at most 512 pixels wide or
    high; low where it is blurred, or empty.
  brightness, contrast: mean and standard deviation of grey, 0 to 255.
  borders: share of the picture that is black bars, 0 to 1.
  cut: the strongest change inside of the clip, in means of its neighbours, that was not
    taken for a cut (config.data.cut_threshold).
  copies: bits of 64 (at most 4) up to which hashes of clips of two files make the later
    one a copy, which is left out; -1 leaves copies in. 3 finds other sizes and codecs.
  scores: (name, least) for scores of config.data.score_fn.
  caption_chars: of a caption. caption_without: regular expressions; a caption in which
    one is found is left out, ignoring case. A clip that loses all captions is, too.
  """

  motion: Range = extends(ANY)
  sharpness: Range = extends(ANY)
  brightness: Range = extends(ANY)
  contrast: Range = extends(ANY)
  borders: Range = extends(ANY)
  cut: Range = extends(ANY)
  copies: int = extends(-1)
  scores: tuple[tuple[str, float], ...] = extends(())
  caption_chars: Range = extends((0.0, 5000.0))
  caption_without: tuple[str, ...] = extends(())

  def __post_init__(self):
    for name, (least, most) in {
      **self.ranges(), "caption_chars": self.caption_chars
    }.items():  # fmt: skip
      if least > most:
        raise ValueError(f"{name} ({least:g}, {most:g}): the least is above the most")
    if not -1 <= self.copies <= MOST_BITS:
      raise ValueError(f"copies {self.copies} must be -1 to {MOST_BITS} bits of 64")
    for pattern in self.caption_without:
      try:
        re.compile(pattern)
      except re.error as e:
        raise ValueError(f"caption_without {pattern!r} is no expression: {e}") from e

  def ranges(self) -> dict[str, Range]:
    """Limits of what is measured, by the name that it has in the manifest."""
    return {
      "motion": self.motion,
      "sharpness": self.sharpness,
      "brightness": self.brightness,
      "contrast": self.contrast,
      "borders": self.borders,
      "cut": self.cut,
    }

  def measures(self) -> bool:
    """Whether any limit needs figures that only measuring gives."""
    limited = any(limits != ANY for limits in self.ranges().values())
    return limited or self.copies >= 0 or bool(self.scores)


def reason(limits: Filter, measured: Mapping[str, Any], is_image: bool) -> str | None:
  """Why a clip with these figures is left out; None if it stays."""
  for name, (least, most) in limits.ranges().items():
    value = measured.get(name, 0.0)
    if (least, most) == ANY or is_image and name in ("motion", "cut"):
      continue
    if not least <= value <= most:
      bound, limit = ("below", least) if value < least else ("above", most)
      return f"{name} {value:g} is {bound} {limit:g} (config.data.filter.{name})"
  return None


def score_reason(limits: Filter, scores: Mapping[str, float]) -> str | None:
  """Why a clip with these scores is left out; None if it stays.

  ValueError for a limit of a score that the function does not give.
  """
  for name, least in limits.scores:
    if name not in scores:
      raise ValueError(
        f"config.data.filter.scores: there is no score {name!r}, only {sorted(scores)}"
      )
    if scores[name] < least:
      return (
        f"score {name} {scores[name]:g} is below {least:g} (config.data.filter.scores)"
      )
  return None


def captions(limits: Filter, texts: list[str]) -> tuple[list[str], str | None]:
  """The captions that stay; and why none does, if there were some."""
  kept, why = [], None
  least, most = limits.caption_chars
  for text in texts:
    found = [p for p in limits.caption_without if re.search(p, text, re.IGNORECASE)]
    if found:
      why = f"its caption has {found[0]!r} in it (config.data.filter.caption_without)"
    elif not least <= len(text) <= most:
      why = (
        f"its caption has {len(text)} characters, not {least:g} to {most:g} "
        "(config.data.filter.caption_chars)"
      )
    else:
      kept.append(text)
  return kept, (None if kept else why)
