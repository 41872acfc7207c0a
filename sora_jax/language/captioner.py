"""What is wanted of a captioner, as `encoders.captioner.Captioner` has it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class ClipPixels(NamedTuple):
  """A clip as a captioner sees it: frames uint8 [T, H, W, 3], and their rate."""

  frames: np.ndarray
  fps: float


class Captioner(Protocol):
  """A model that writes captions of clips, and says how well they fit."""

  def caption(
    self,
    clips: Sequence[ClipPixels],
    style: str = "descriptive",
    method: str = "greedy",
    seed: int = 0,
  ) -> list[str]:
    """A caption of each clip; style is one that it has learnt."""

  def similarity(
    self, clips: Sequence[ClipPixels], captions: Sequence[str]
  ) -> np.ndarray:
    """How well each clip and its caption fit: float32 [N], cosines."""
