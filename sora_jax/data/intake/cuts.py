"""Finds the cuts of a video, by PySceneDetect, one frame after the other.

Content and adaptive detectors see hard cuts. A slow dissolve is none to them.
"""

import collections

import numpy as np
from scenedetect import AdaptiveDetector, FrameTimecode
from scenedetect.stats_manager import StatsManager

from sora_jax.data.intake.filters import LEAST_RATIO

# What is kept as a candidate, so that a threshold above it can be chosen later.
_LEAST_CONTENT = 8.0
_WINDOW = 2


class CutFinder:
  """Takes all frames of a video in turn and keeps the candidates for cuts.

  Attributes:
    cuts: [time of the first frame after it, ratio, content]: how often the change of
      that frame is that of its neighbours, at most 255, and how large it is, as a mean
      of 0 to 255.
  """

  def __init__(self):
    self.cuts: list[list[float]] = []
    self._recent = _Recent()
    self._detector = _Detector(
      adaptive_threshold=LEAST_RATIO,
      min_scene_len=0,
      window_width=_WINDOW,
      min_content_val=_LEAST_CONTENT,
    )
    self._detector.stats_manager = self._recent
    self._times: collections.deque[float] = collections.deque(maxlen=2 * _WINDOW + 1)
    self._number = 0
    self._last: np.ndarray | None = None

  def add(self, time: float, frame_HWC: np.ndarray) -> None:
    """Takes the next frame, uint8 BGR, at its time in seconds."""
    if self._last is None:
      # A frame is compared with two on each side, so the first one is repeated, and the
      # last in `finish`: there are cuts beside them, too.
      for _ in range(_WINDOW):
        self._process(time, frame_HWC)
    self._process(time, frame_HWC)
    self._last = frame_HWC

  def finish(self) -> list[list[float]]:
    """Returns `cuts` after the last frame."""
    if self._last is not None:
      for _ in range(_WINDOW):
        self._process(self._times[-1], self._last)
    return self.cuts

  def _process(self, time, frame_HWC):
    self._times.append(time)
    code = FrameTimecode(self._number, fps=25.0)  # it only counts
    self._number += 1
    for found in self._detector.process_frame(code, frame_HWC):
      content = self._recent.content[found.frame_num]
      ratio = self._recent.ratios[found.frame_num]
      back = self._number - 1 - found.frame_num
      self.cuts.append(
        [round(self._times[-1 - back], 4), round(ratio, 2), round(content, 1)]
      )


class _Detector(AdaptiveDetector):
  """The detector without edges: it weighs them with 0 and takes a third of its time."""

  def _detect_edges(self, lum):
    return None


class _Recent(StatsManager):
  """Keeps the figures of the last few frames only: videos may have any length."""

  def __init__(self):
    super().__init__()
    self.content: dict[int, float] = {}
    self.ratios: dict[int, float] = {}

  def set_metrics(self, timecode, metric_kv_dict):
    number = int(getattr(timecode, "frame_num", timecode))
    for name, value in metric_kv_dict.items():
      if name == "content_val":
        self.content[number] = float(value)
      elif name.startswith("adaptive_ratio"):
        self.ratios[number] = float(value)
    for kept in (self.content, self.ratios):
      kept.pop(number - 4 * _WINDOW, None)
