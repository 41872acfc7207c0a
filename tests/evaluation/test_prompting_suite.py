"""The measures of the suite of prompting."""

import numpy as np

from sora_jax.evaluation import prompting_suite


def test_seam_ratio():
  frames = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones(
    (1, 4, 4, 3), np.uint8
  )
  assert prompting_suite.seam_ratio(frames, 3) == 1.0
  assert prompting_suite.seam_ratio(frames, 0) == 7.0
  frames[5:] += 4
  assert prompting_suite.seam_ratio(frames, 5) == 5.0
  assert prompting_suite.seam_ratio(frames, 4, [5]) == 0.2
  assert prompting_suite.alike(17, 5) == [1, 9, 13]
  assert prompting_suite.alike(16, 0, (8,)) == [4, 12]


def test_histogram_distance():
  black, white = np.zeros((2, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
  assert prompting_suite.histogram_distance(black, black) == 0.0
  assert prompting_suite.histogram_distance(black, white) == 1.0
