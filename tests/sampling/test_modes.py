"""Each mode as a timeline, and jobs that cannot be."""

import numpy as np
import pytest
from sampling.toy_media import OPTIONS, C, clip, latents, request

from sora_jax.data.video import resizing
from sora_jax.sampling import modes, windows
from sora_jax.sampling.conditioning import Prompt
from sora_jax.sampling.job import Job
from sora_jax.sampling.windows import State, Windows


def test_images_after_the_first_guide():
  """In the window that makes their frames: a latent is given only with all of its."""
  job = Job(
    key_frames=((0.5, clip(1)), (4 / 12, clip(1))), last_image=clip(1), fps=12.0
  )
  encoded = []

  def encode(videos):
    encoded.extend(map(len, videos))
    return [np.full((1, 4, 4, C), i, np.float32) for i, video_THWC in enumerate(videos)]

  timeline = modes.plan(job, encode, 16)
  assert encoded == [1, 1, 1]
  assert sorted(time for time, _ in timeline.extras) == [1.0, 1.5, 4.0]
  state = State(2, latents(1))
  prompt, _, new = windows.next_window(timeline, Windows(3, 1), state)
  assert new == 2 and prompt.given_THW[:, 0, 0].tolist() == [1, 0, 0]
  assert [time for time, _ in prompt.extras] == [0.5]
  state = State(4, latents(1))
  prompt, _, new = windows.next_window(timeline, Windows(3, 1), state)
  assert new == 1 and prompt.given_THW[:, 0, 0].tolist() == [1, 0]
  ((time, image_HWC),) = prompt.extras
  assert time == 1.0
  np.testing.assert_array_equal(image_HWC, dict(timeline.extras)[4.0])


def test_a_given_end_begins_with_the_image_of_its_first_frame():
  """What is made ends with that frame: its latent is made, later ones are given.

  Of an image alone, and of a video of one frame, nothing else is given.
  """
  own, other = clip(9), clip(9, 1)
  cases = {
    "infill": ({"video": own, "infill": (0.1, 0.3)}, 1, [1, 0, 1], 9),
    "connect": ({"video": own, "connect": other, "gap": 7 / 12}, 4, [1] * 3 + [0] * 2
                + [1] * 2, 25),
    "loop": ({"video": own, "loop": True, "gap": 7 / 12}, 4, [1] * 3 + [0] * 2
             + [1] * 2, 16),
    "image": ({"last_image": other[:1], "frames": 9}, 2, None, 9),
    "one frame": ({"video": own, "connect": other[:1], "gap": 7 / 12}, 4, [1] * 3
                  + [0] * 2, 17),
  }  # fmt: skip
  for name, (kwargs, at, given, frames) in cases.items():
    timeline = make_job({"fps": 12.0, "gap_strength": 1.0, **kwargs})
    assert timeline.frames == frames, name
    state = windows.begin(timeline)
    if len(timeline.before_THWC):
      state = windows.see(timeline, Windows(), state, timeline.before_THWC)
    prompt = windows.next_window(timeline, Windows(), state).prompt
    assert [time for time, _ in prompt.extras] == [at], name
    if given is None:
      assert prompt.given_THW is None
    else:
      assert prompt.given_THW[:, 0, 0].tolist() == given, name


def test_a_connection_turns_from_one_video_into_the_other():
  """In pixels, where either goes on the way it came; here one is 10, the other 50."""
  a, b = (np.full((9, 32, 32, 3), value, np.uint8) for value in (10, 50))
  seen = []

  def encode(videos):
    seen.extend(video_THWC[:, 0, 0, 0].astype(int) for video_THWC in videos)
    return [latents(1 + len(video_THWC) // 4) for video_THWC in videos]

  made = modes.plan(Job(video=a, connect=b, gap=7 / 12), encode, 16)
  assert made.frames == 9 + 7 + 9
  (between,) = (x for x in seen if len(set(x)) > 1)
  np.testing.assert_array_equal(between, [10, 12, 16, 22, 30, 38, 44, 48, 50])
  level_T = made.strength_THW[:, 0, 0]
  np.testing.assert_allclose(level_T, [0, 0, 0, 0.4, 0.4, 0, 0])
  alone = Job(video=a, connect=b, gap=7 / 12, gap_strength=1.0)
  assert modes.plan(alone, encode, 16).start_THWC is None


def make_job(kwargs):
  def encode(videos):
    return [latents(1 + (len(video_THWC) - 1) // 4) for video_THWC in videos]

  return modes.plan(Job(**kwargs), encode, 16)


@pytest.mark.parametrize("mode", modes.MODES)
def test_a_mode_encodes_once(mode):
  """Everything that is known is one call of the encoder; a text has nothing."""
  own, other = clip(9), clip(9, 1)
  kwargs = {
    "text": {},
    "image": {"image": own[:1], "last_image": other[:1]},
    "extend": {"video": own, "extend_before": 1.0, "extend_after": 1.0},
    "connect": {"video": own, "connect": other},
    "loop": {"video": own, "loop": True},
    "edit": {"video": own, "strength": 0.5, "image": other[:1]},
    "infill": {"video": own, "infill": (0.3, 0.4)},
    "interpolate": {"video": own, "interpolate": 2},
  }[mode]
  calls = []

  def encode(videos):
    calls.append(len(videos))
    return [latents(1 + (len(video_THWC) - 1) // 4) for video_THWC in videos]

  job = Job("a star", **kwargs)
  assert job.mode == mode
  timeline = modes.plan(job, encode, 16)
  assert len(calls) == (mode != "text")
  assert timeline.crop_hw == ((64, 64) if mode == "text" else (32, 32))


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"strength": 1.5, "video": clip(5)}, "strength 1.5 is not between 0 and 1"),
    ({"given_noise": -0.1}, "given_noise -0.1 is not between"),
    ({"strength": 0.5}, "edit needs a video to work on"),
    ({"extend_after": 1.0}, "extend needs a video to work on"),
    ({"video": clip(5)}, "what is to be done with the video"),
    ({"video": clip(5), "loop": True, "infill": (0, 1)}, "loop and infill exclude"),
    ({"video": clip(5), "loop": True, "image": clip(1)}, "image and loop of a video"),
    ({"loop": True, "image": clip(1)}, "a loop from text has no image"),
    ({"loop": True, "video": clip(9), "gap_strength": -1.0}, "gap_strength -1.0 is"),
    ({"loop": True, "video": clip(9), "gap": 0.0}, "gap 0.0 s is not above 0"),
    ({"image": clip(1), "key_frames": ((0.0, clip(1)),)}, "two images for frame 0"),
    ({"key_frames": ((1.0, clip(1)), (1.01, clip(1)))}, "two images for frame 12"),
    ({"key_frames": ((9.0, clip(1)),)}, "a key frame at 9 s is outside the 17 frames"),
    ({"key_frames": ((-1.0, clip(1)),)}, "a key frame at -1 s is outside"),
    ({"image": clip(5)}, "an image is needed, not 5 frames"),
    ({"image": clip(1), "frames": 1}, "needs 2 frames or more"),
    ({"image": np.zeros((4, 4), np.uint8)}, "must be uint8 .T, H, W, 3. or"),
    (
      {"video": clip(9), "infill": (0.5, 2.0)},
      "infill from 0.5 to 2.0 s is not inside",
    ),
    ({"video": clip(9), "infill": (0.0, 0.75)}, "leaves nothing of the video"),
    (
      {"video": clip(9), "extend_after": 0.01},
      "^extend_after 0.01 s: less than a frame, 0.083 s at 12 fps",
    ),
    ({"video": clip(9), "extend_after": -1.0}, "extend_after -1.0 s is negative"),
    ({"video": clip(9), "mask": np.zeros((32, 32), bool)}, "the mask is empty"),
    ({"interpolate": 3, "video": clip(9)}, "interpolate 3 is not 2 or 4"),
    ({"size": (0, 64)}, "size 0x64: width and height must be positive"),
    ({"frames": 0}, "frames 0: at least 1"),
    ({"seed": -1}, "seed -1 is negative"),
    ({"window": 9, "given": 9}, "given 9 is not less than window 9"),
    ({"window": 5, "given": 7}, "given 7 is not less than window 5"),
    ({"window": 0, "given": 0}, "given 0: at least 1 frame"),
    ({"shots": ((2.0, "a star"), (1.0, "x"))}, "shots begin at"),
    ({"shots": ((2.0, "a star"),)}, "a shot begins at 2.0 s, but the video has 17"),
    ({"video": "no/such.mp4", "loop": True}, "no/such.mp4: cannot be read"),
    ({"video": __file__, "loop": True}, "not a video"),
    ({"fit": "stretch"}, "fit 'stretch' is not crop or pad"),
    ({"preview": 0.5, "loop": True}, "a preview is for text and images, not for loop"),
  ],
)
def test_jobs_that_cannot_be(kwargs, message):
  with pytest.raises(ValueError, match=message):
    make_job(kwargs)


def test_what_is_lost_is_said(sampler, caplog):
  caplog.set_level("INFO", logger="absl")
  made = make_job({"image": clip(1, size=(32, 64)), "size": (32, 32)})
  assert made.crop_hw == (32, 32)
  assert "is 64x32, another aspect ratio than 32x32: cropped" in caplog.text
  make_job({"image": clip(1, size=(32, 64)), "size": (32, 32), "fit": "pad"})
  assert "padded with black" in caplog.text
  make_job({"video": clip(7), "extend_after": 1.0})
  assert "7 frames are not 1 + 4k, 2 at its start are left out" in caplog.text
  assert "has 5 frames, fewer than the 9 that a window takes over" in caplog.text
  assert "an empty prompt" in caplog.text
  sampler.latents([Prompt(request(prompt="x" * 10_000), (5, 2, 2))], OPTIONS, rows=1)
  assert "a prompt of 10000 characters has more than the 40 tokens" in caplog.text


def test_fits():
  wide = np.full((1, 16, 32, 3), 200, np.uint8)
  padded = resizing.resize(wide, (32, 32), "pad")[0]
  assert (padded[:8] == 0).all() and (padded[24:] == 0).all()
  assert (padded[8:24] == 200).all()
  assert (resizing.resize(wide, (32, 32), "crop") == 200).all()
