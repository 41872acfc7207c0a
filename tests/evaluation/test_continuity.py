"""What goes on from what was given: drawn clips cut at a seam, and wrong ones."""

import functools

import numpy as np
import pytest
from scipy import ndimage

from sora_jax.data import shapes
from sora_jax.evaluation import continuity

SEAM = 17


@functools.cache
def clips(count=16, **wanted):
  """(truth, video) of held-out clips of 33 frames in which nothing is hidden."""
  found = []
  for index in range(2000):
    truth = shapes.describe("heldout", index, 4)["truth"]
    motions = {item["motion"] for item in truth["objects"]}
    right = truth["frames"] == 33 and not truth["occluder"]
    if right and motions <= set(wanted.get("motions", motions)):
      found.append((truth, shapes.draw(truth)))
    if len(found) == count:
      return found
  raise AssertionError(f"{len(found)} clips with {wanted}")


# Name -> what is given of a clip, what is new, and on which side that is.
CUTS = {
  "after": (slice(0, SEAM), slice(SEAM, None), 1),
  "before": (slice(SEAM, None), slice(0, SEAM), -1),
  "first image": (slice(0, 1), slice(1, SEAM), 1),
  "last image": (slice(SEAM, SEAM + 1), slice(0, SEAM), -1),
  "infill, from its start": (slice(0, 5), slice(5, 9), 1),
  "infill, from its end": (slice(9, SEAM), slice(5, 9), -1),
  "in between": (slice(0, SEAM, 2), slice(1, SEAM, 2), 0),
}


def judge(truth, video_THWC, cut="after", change=lambda x: x):
  given, new, side = CUTS[cut]
  motions = continuity.motions_of(truth)
  return continuity.judge(video_THWC[given], change(video_THWC[new]), side, motions)


def blurred(video_THWC):
  rng = np.random.default_rng(0)
  smooth = ndimage.gaussian_filter(video_THWC.astype(np.float32), (0, 1, 1, 0))
  noisy = smooth + rng.normal(0, 6, smooth.shape)
  return noisy.clip(0, 255).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda x: x, blurred], ids=["drawn", "blurred"])
@pytest.mark.parametrize("cut", CUTS)
def test_real_clips_go_on(cut, change):
  names = {"identity", "moves_on"} | ({"joined"} if CUTS[cut][2] else set())
  for truth, video_THWC in clips():
    right = judge(truth, video_THWC, cut, change)
    assert right == dict.fromkeys(names, True), continuity.motions_of(truth)


def test_motion_need_not_be_judged():
  (_, video_THWC) = clips()[0]
  right = continuity.judge(video_THWC[:SEAM], video_THWC[SEAM:])
  assert right == {"identity": True, "joined": True}


def drawn_anew(truth, **change):
  """The clip with objects that are different."""
  items = [{**item, **change} for item in truth["objects"]]
  return shapes.draw({**truth, "objects": items})


@pytest.mark.slow
def test_another_colour_or_shape_is_another_object():
  changed = 0
  for truth, video_THWC in clips():
    if truth["count"] > 1:
      continue
    (item,) = truth["objects"]
    for change in ({"color": "magenta"}, {"shape": "star"}):
      other_THWC = drawn_anew(truth, **change)
      right = continuity.judge(video_THWC[:SEAM], other_THWC[SEAM:])
      same = change.items() <= item.items()
      assert right["identity"] == same and right["joined"]
      changed += not same
  assert changed > 12


MOVES = ("left", "right", "up", "down")


@pytest.mark.parametrize("motions", [MOVES, ("grow", "shrink"), ("turn",)])
@pytest.mark.parametrize("cut", ["after", "before", "infill, from its start"])
def test_reversed_motion_does_not_move_on(cut, motions):
  for truth, video_THWC in clips(4, motions=motions):
    right = judge(truth, video_THWC, cut, lambda x: x[::-1])
    assert right["identity"] and not right["moves_on"]


@pytest.mark.parametrize("motions", [MOVES, ("grow", "shrink"), ("turn",), ("bounce",)])
@pytest.mark.parametrize("cut", ["after", "first image"])
def test_what_stops_does_not_move_on(cut, motions):
  for truth, video_THWC in clips(4, motions=motions):
    right = judge(truth, video_THWC, cut, lambda x: np.repeat(x[:1], len(x), axis=0))
    assert right["identity"] and right["joined"] and not right["moves_on"]


def test_what_stands_still_must_not_begin_to_move():
  (truth, _) = clips(1, motions=MOVES)[0]
  video_THWC = shapes.draw(truth)
  still_THWC = np.repeat(video_THWC[SEAM - 1 : SEAM], SEAM, axis=0)
  motions = dict.fromkeys(continuity.motions_of(truth), "still")
  assert continuity.judge(still_THWC, still_THWC, 1, motions)["moves_on"]
  assert not continuity.judge(still_THWC, video_THWC[SEAM:], 1, motions)["moves_on"]


def test_a_jump_at_the_seam_is_not_joined():
  for truth, video_THWC in clips(4, motions=("grow", "shrink", "turn", "still")):
    there = np.abs(video_THWC[SEAM].astype(int) - video_THWC[SEAM, 0, 0]).max(-1) > 60
    columns = np.flatnonzero(there.any(axis=0))
    room = video_THWC.shape[2] - columns[-1] - 1
    # To the side with more room, by what is far for something that stays in its place.
    step = 8 if room >= columns[0] else -8
    if max(room, columns[0]) < 10:
      continue
    right = judge(truth, video_THWC, change=lambda x, s=step: np.roll(x, s, axis=2))
    assert right["identity"] and not right["joined"] and not right["moves_on"]


def test_nothing_is_not_the_object():
  for cut, (_, _, side) in CUTS.items():
    truth, video_THWC = clips()[0]
    right = judge(truth, video_THWC, cut, lambda x: np.full_like(x, 80))
    assert not any(right.values()) and ("joined" in right) == bool(side)
  # Nor is there anything to keep if nothing was given.
  grey_THWC = np.full((SEAM, 64, 64, 3), 80, np.uint8)
  assert not continuity.judge(grey_THWC, grey_THWC)["identity"]


def test_something_may_be_gone_at_a_seam_for_a_latent_frame():
  truth, video_THWC = clips(1, motions=("turn", "still", "grow", "shrink"))[0]

  def gone(frames, x):
    return np.concatenate([np.full_like(x[:frames], 80), x[frames:]])

  assert judge(truth, video_THWC, change=functools.partial(gone, 3))["joined"]
  assert not judge(truth, video_THWC, change=functools.partial(gone, 5))["joined"]
