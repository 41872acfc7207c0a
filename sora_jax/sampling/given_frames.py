"""Videos of models that read given frames beside the noise, as Wan's for images.

Other models have given frames as tokens of their own (see `conditioning`). These get,
for each latent cell, a mask of its four frames and the latents of a video that has the
given frames at their places and grey everywhere else; some attend to what CLIP sees in
the first frame, or in the first and the last.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from sora_jax.models.dit import DiTConfig
from sora_jax.packing import conditions, time_grid
from sora_jax.sampling import modes
from sora_jax.sampling.conditioning import Timeline
from sora_jax.sampling.job import Job
from sora_jax.sampling.media import Encode
from sora_jax.sampling.windows import Windows

# Images [H, W, 3] -> features [B, tokens, V].
EncodeImages = Callable[[list[np.ndarray]], np.ndarray]


def plan(
  job: Job,
  multiple: int,
  model: DiTConfig,
  encode: Encode,
  encode_images: EncodeImages | None,
) -> Timeline:
  """A job with given images on the grid of latents; see `modes.plan`.

  Args:
    job: what to make. multiple: of pixels. model: sizes of the DiT.
    encode: pixels to latents.
    encode_images: of a model that attends to images.

  Raises:
    ValueError: for a job without images or with a video, and for one that lacks the
      images that the model attends to.
  """
  if job.mode != "image":
    raise ValueError(
      f"this model makes videos of given images: give --image; mode {job.mode!r} is "
      "for models that take given frames as tokens"
    )
  canvas, frames = modes.canvas(job, multiple), modes.frames_of(job)
  images = modes.images_of(job, canvas, frames)
  whole = time_grid.round_up(frames)
  places = [0, frames - 1] if model.image_positions else [0]
  if model.image_width and any(at not in images for at in places):
    needed = "--image and --last_image" if model.image_positions else "--image"
    raise ValueError(f"this model attends to its given images: give {needed}")
  video_THWC = conditions.grey_but({at: x[0] for at, x in images.items()}, whole)
  (latent_THWC,) = encode([video_THWC])
  features_JV = None
  if model.image_width:
    assert encode_images is not None
    seen = encode_images([images[at][0] for at in places])
    features_JV = seen.reshape(-1, seen.shape[-1])
  timeline = modes.timeline(job, canvas, frames)
  return dataclasses.replace(
    timeline,
    condition_THWC=conditions.channels(latent_THWC, images),
    image_JV=features_JV,
  )


def whole_video(job: Job) -> Windows:
  """How such videos are cut: not at all, since later windows would have no image."""
  return dataclasses.replace(job.windows, length=0)
