"""The grid of time: which frames of a video each of its latent frames holds.

The causal VAE compresses time by `TIME_FACTOR` = 4, all but the first frame, which has
a latent frame for itself so that an image is a video of one frame. Latent frame 0
holds frame 0, latent frame i > 0 the four frames 4i - 3 .. 4i, and k + 1 latent frames
are 1 + 4k frames: a number of frames of that form is *on the grid*.

A frame has a *time* too, counted in latent frames: frame f is at f / 4, so that the
last frame that a latent frame holds is at the whole time i, where the DiT has the
tokens of latent i; other frames lie between. Where a video goes on from given latent
frames, and has no first frame of its own, k more latent frames are 4k more frames.

Functions of counts and indices take and give ints (`frame_at` and `time_of`: numbers or
arrays). Nothing here depends on numpy or JAX, so that every room can import it.
"""

TIME_FACTOR = 4


def latent_frames(frames: int) -> int:
  """Number of latent frames that hold `frames` frames, the last perhaps in part."""
  return 1 + -(-(frames - 1) // TIME_FACTOR)


def whole_latent_frames(frames: int) -> int:
  """Number of latent frames that `frames` frames fill; what is over is not counted."""
  return 1 + (frames - 1) // TIME_FACTOR


def video_frames(latent_frames: int) -> int:
  """Number of frames that a video of `latent_frames` latent frames has: 1 + 4k."""
  return 1 + TIME_FACTOR * (latent_frames - 1)


def is_on_grid(frames: int) -> bool:
  """Whether `frames` is 1 + 4k, so that the last latent frame is filled."""
  return (frames - 1) % TIME_FACTOR == 0


def round_up(frames: int) -> int:
  """The smallest number of frames on the grid that is at least `frames`."""
  return video_frames(latent_frames(frames))


def round_down(frames: int) -> int:
  """The largest number of frames on the grid that is at most `frames`."""
  return video_frames(whole_latent_frames(frames))


def latent_of(frame: int) -> int:
  """Index of the latent frame that holds the frame of index `frame`."""
  return -(-frame // TIME_FACTOR)


def is_last_of_latent(frame: int) -> bool:
  """Whether frame index `frame` is the last that its latent frame holds: at a whole
  time. Frame 0 is, alone in its latent frame."""
  return frame % TIME_FACTOR == 0


def time_of(frame):
  """Time of the frame of index `frame`, in latent frames: frame / 4, a float."""
  return frame / TIME_FACTOR


def frame_at(time):
  """Index of the frame at `time`, which is counted in latent frames: 4 * time.

  Of a latent frame's index it is the last frame that this latent frame holds.
  """
  return TIME_FACTOR * time
