"""Where the texts of packed rows come from: captions as ids, or features in records.

Both kinds say what `PackedDataset` asks: `lengths` of all captions, for its plans, and
`text`, one caption as a row holds it. Caption -1 of a clip is the empty text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from absl import logging

from sora_jax.data.records import EmptyText, LatentClip
from sora_jax.data.tokenizer import Tokenizer
from sora_jax.packing.caption_styles import STYLES, styles_of

_ASKED = 10_000  # captions that tell how many are cut


class CaptionTexts(Protocol):
  """Texts of clips."""

  @property
  def max_tokens(self) -> int:
    """Longest text of one clip, its end included."""

  @property
  def width(self) -> int | None:
    """Numbers of each text token's features; None: texts are ids."""

  @property
  def fingerprint(self) -> Sequence:
    """What tells rows with these texts apart from others."""

  def lengths(self, clips: Sequence[LatentClip]) -> np.ndarray:
    """Text tokens of all captions, clip by clip, and last of the empty text.

    ValueError for a clip without what is needed; names it.
    """

  def text(self, clip: LatentClip, record: dict, caption: int) -> np.ndarray:
    """Ids [S] or features [S, E] of a clip's caption.

    Args:
      clip: its row of the manifest.
      record: what `LatentReader` read of it.
      caption: index, -1 for the empty text.
    """


@dataclasses.dataclass(frozen=True)
class CaptionIds:
  """Captions as ids, cut to max_tokens, for the encoder trained with the DiT."""

  tokenizer: Tokenizer
  max_tokens: int
  width = None
  fingerprint = ()

  def lengths(self, clips: Sequence[LatentClip]) -> np.ndarray:
    """Encodes all captions once."""
    captions = [caption for clip in clips for caption in clip.captions]
    return np.array(self.tokenizer.lengths([*captions, ""], self.max_tokens), np.int64)

  def text(self, clip: LatentClip, record: dict, caption: int) -> np.ndarray:
    """Ids, with the end of text."""
    text = clip.captions[caption] if caption >= 0 else ""
    return np.array(self.tokenizer.encode(text, self.max_tokens), np.int32)


def warn_of_cut(
  texts: "CaptionIds | StyledCaptionIds", clips: Sequence[LatentClip], key: str
) -> None:
  """Logs how many captions have more than texts.max_tokens, `key` of a config."""
  captions = [caption for clip in clips for caption in clip.captions][:_ASKED]
  lengths = np.array(texts.tokenizer.lengths(captions, 2**30), np.int64)
  lengths += isinstance(texts, StyledCaptionIds)  # the token of the style
  if cut := np.count_nonzero(lengths > texts.max_tokens):
    logging.warning(
      "%d of %d captions have more than the %d tokens of %s, and their ends are not "
      "read; the longest has %d",
      cut, len(captions), texts.max_tokens, key, lengths.max(),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StyledCaptionIds:
  """Captions as ids behind the token of their style, for the captioner.

  Attributes:
    tokenizer: of the captions.
    max_tokens: longest text, its style and its end included.
    first_style: id of the first of STYLES.
  """

  tokenizer: Tokenizer
  max_tokens: int
  first_style: int
  width = None

  @property
  def fingerprint(self) -> list:
    """Where the styles' ids begin."""
    return [["styles", self.first_style]]

  def lengths(self, clips: Sequence[LatentClip]) -> np.ndarray:
    """Encodes all captions once."""
    captions = [caption for clip in clips for caption in clip.captions]
    lengths = self.tokenizer.lengths([*captions, ""], self.max_tokens - 1)
    return 1 + np.array(lengths, np.int64)

  def text(self, clip: LatentClip, record: dict, caption: int) -> np.ndarray:
    """Ids: the style, the text, its end."""
    text, style = "", "any"
    if caption >= 0:
      text, style = clip.captions[caption], styles_of(clip.captions)[caption]
    return self.encode(text, style)

  def encode(self, text: str, style: str = "any") -> np.ndarray:
    """Ids of a text in a style, at most max_tokens: int32 [S]."""
    ids = self.tokenizer.encode(text, self.max_tokens - 1)
    return np.array([self.first_style + STYLES.index(style), *ids], np.int32)


@dataclasses.dataclass(frozen=True)
class CaptionFeatures:
  """Features that a frozen encoder has written into the records.

  Attributes:
    empty: the features that take the place of no caption.
    max_tokens: longest text that the encoder was given.
    pad_to: zero features that are attended fill up each caption to that many.
  """

  empty: EmptyText
  max_tokens: int
  pad_to: int = 0

  @property
  def width(self) -> int:
    """Numbers of each text token's features."""
    return self.empty.features_SE.shape[1]

  @property
  def fingerprint(self) -> list:
    """The encoder that made the features, and their padding."""
    return [[self.empty.encoder, self.pad_to]]

  def lengths(self, clips: Sequence[LatentClip]) -> np.ndarray:
    """Takes the lengths from the manifest."""
    for clip in clips:
      if len(clip.text_lengths) != len(clip.captions):
        raise ValueError(
          f"{clip.id}: features of {len(clip.text_lengths)} of {len(clip.captions)} "
          "captions; encode it again with config.text"
        )
    lengths = [length for clip in clips for length in clip.text_lengths]
    return np.maximum([*lengths, len(self.empty.features_SE)], self.pad_to)

  def text(self, clip: LatentClip, record: dict, caption: int) -> np.ndarray:
    """Features, padded."""
    empty_SE = self.empty.features_SE
    return pad_features(record["texts"][caption] if caption >= 0 else empty_SE,
                        self.pad_to)  # fmt: skip


def pad_features(features_SE: np.ndarray, pad_to: int) -> np.ndarray:
  """Features with zero ones behind them, so that there are at least `pad_to`."""
  return np.pad(features_SE, ((0, max(0, pad_to - len(features_SE))), (0, 0)))
