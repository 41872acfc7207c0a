"""The tour: scenes become frames, frames a GIF that is not too large."""

import sys

import numpy as np
import PIL.Image
import pytest
import tiny

sys.path.insert(0, str(tiny.ROOT / "launch"))
import tour  # noqa: E402


def results():
  grey_THWC = np.full((3, 16, 16, 3), 90, np.uint8)
  return [
    tour.Result(grey_THWC, "a short one", frozenset({0})),
    tour.Result(np.repeat(grey_THWC, 2, axis=0), "a long one"),
  ]


def test_what_was_given_has_a_frame_and_what_has_ended_stays():
  frames = [np.asarray(frame) for frame in tour.scene_frames("A mode", results())]
  assert len(frames) == 6
  corner = (tour._TITLE, tour._GAP)  # of the first video
  assert tuple(frames[0][corner]) == tour._MARK
  assert tuple(frames[1][corner]) == tuple(frames[5][corner]) == (90, 90, 90)


def test_the_tour_loops_and_has_a_limit(tmp_path, monkeypatch):
  path = tmp_path / "tour.gif"
  scenes = {"A mode": results(), "Another": results()}
  assert 0 < tour.write(path, scenes, 8.0) < tour.LIMIT_MB
  with PIL.Image.open(path) as image:
    assert image.info["loop"] == 0
    total = sum(image.seek(i) or image.info["duration"] for i in range(image.n_frames))
  # Five frames of an eighth of a second (in hundredths) and one of a second, twice.
  assert total == pytest.approx(2 * (5 * 125 + 1000), abs=60)
  monkeypatch.setattr(tour, "LIMIT_MB", 1e-6)
  with pytest.raises(ValueError, match="more than 1e-06"):
    tour.write(tmp_path / "other.gif", scenes, 8.0)
  assert not list(tmp_path.glob("*other*"))
