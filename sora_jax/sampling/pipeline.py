"""A trained model as Python calls it: prompts, images and videos in, videos out.

  sampler = Sampler.from_checkpoint("runs/quickstart")
  video_THWC = sampler.video("a red circle moves right", size=(64, 64), frames=17)
  video_THWC = sampler.video("it goes on", video="x.mp4", extend_after=2.0)

Long videos are made window by window and decoded as they come: `Sampler.stream`.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from sora_jax.data.buckets import frame_bucket
from sora_jax.data.video import resizing
from sora_jax.diffusion import solvers
from sora_jax.encoders.autoencoder import Autoencoder, in_chunks
from sora_jax.encoders.text_encoder import FrozenTextEncoder
from sora_jax.models.meta import DiTMeta
from sora_jax.packing import time_grid
from sora_jax.runtime import checkpoint, sharding, shipped
from sora_jax.runtime.prefetch import ahead
from sora_jax.sampling import media, modes, windows
from sora_jax.sampling.conditioning import Prompt, Request, Timeline
from sora_jax.sampling.defaults import Defaults
from sora_jax.sampling.defaults import read as read_defaults
from sora_jax.sampling.denoise import Denoiser
from sora_jax.sampling.job import Job
from sora_jax.tasks import dit as dit_task
from sora_jax.weights import merge

# Frames that the encoder is given at once, and latent frames that the decoder is: few
# sizes, for few compilations.
_ENCODE_CHUNK, _DECODE_CHUNKS = 32, (4, 1)
# Latent frames of a loop's end that are decoded in front of its start, since a causal
# decoder looks back.
_WARM_UP = 4


class Sampler:
  """Makes videos and images of any size from prompts, images and videos."""

  def __init__(
    self,
    params,
    meta,
    autoencoder,
    vocabulary,
    dtype,
    encode_text=None,
    defaults: Defaults | None = None,
  ):
    """Args: as `from_checkpoint` loads them; vocabulary is a sentencepiece file.

    encode_text: (texts, max_tokens) -> features of each, for a model that was trained
    on those of a frozen text encoder, and takes the place of the vocabulary.
    """
    self.params, self.meta, self.autoencoder = params, meta, autoencoder
    self.vocabulary, self.dtype = vocabulary, dtype
    self.defaults = defaults or Defaults()
    self.denoiser = Denoiser(meta, vocabulary, dtype, autoencoder.mesh, encode_text)

  @classmethod
  def from_checkpoint(
    cls, folder, mesh=None, dtype=None, loras: Sequence[tuple[str, float]] = ()
  ) -> "Sampler":
    """Loads a run's folder, with vae/model and dit/model in it.

    A frozen text encoder is in text/model, or where it was in training.

    Args:
      folder: of the run, or of an imported or shipped checkpoint; or the name of one
        that comes with the package.
      mesh: that params are sharded over. By default all local devices share a video;
        for many small ones see `sharding.sampling_mesh`.
      dtype: of the computation.
      loras: safetensors files of adapters that are merged in, and how strongly; 1 is
        as they were trained.

    Raises:
      ValueError: if one of the models is missing, damaged, or made for another.
    """
    folder = shipped.find(folder)
    if not folder.is_dir():
      raise ValueError(f"{folder}: no such checkpoint folder")
    if dtype is None:
      dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    mesh = mesh or sharding.sampling_mesh(1)
    autoencoder = Autoencoder(folder / "vae" / "model", mesh, dtype)
    model = folder / "dit" / "model"
    meta = DiTMeta.from_json(checkpoint.load_meta(model), model)
    rules = dit_task.DIT_RULES if meta.frozen_text else dit_task.SHARDING_RULES
    params, _ = checkpoint.load_model(
      model,
      lambda shapes: sharding.param_shardings(shapes, rules, mesh),
    )
    if meta.vae != autoencoder.meta.id:
      raise ValueError(
        f"{folder}: dit/model was trained on latents of another VAE than vae/model "
        f"({meta.vae} and {autoencoder.meta.id}); take both of one run"
      )
    for path, strength in loras:
      params = merge.merge_file(params, path, meta.model, mesh, strength)
    encode_text = None
    if text := meta.frozen_text:
      place = folder
      if not (folder / "text" / "model").is_dir():
        place = pathlib.Path(text.folder or folder)
      encode_text = FrozenTextEncoder(place, mesh, dtype, text.features).encode
    vocabulary = model / "tokenizer.model"
    defaults = read_defaults(folder)
    return cls(params, meta, autoencoder, vocabulary, dtype, encode_text, defaults)

  @property
  def size_multiple(self) -> int:
    """Widths and heights are multiples of it, or cut from the next one."""
    return self.autoencoder.config.space_factor * self.denoiser.model.patch_size[1]

  @property
  def model_id(self) -> str:
    """Tells models apart: a hash of what the DiT's folder says, and of its head."""
    head = np.asarray(jax.device_get(self.params["dit"]["head"]["kernel"]))
    text = json.dumps(self.meta.facts(), sort_keys=True).encode()
    return hashlib.sha256(text + head.tobytes()).hexdigest()[:16]

  # --- texts to videos, many at once

  def sample(
    self,
    requests: Sequence[Request],
    options: solvers.Options | None = None,
    *,
    rows: int = 4,
  ) -> list[np.ndarray]:
    """Videos of the requests, in order: uint8 [T, H, W, 3] each.

    A video off the model's grid is made on the next larger one and cut.

    Args:
      requests: what to make.
      options: of the solver and of guidance (guidance_scale 1 is half the work); the
        checkpoint's own if not given.
      rows: packed rows computed at once.

    Raises:
      ValueError: for options that the model's noise process cannot be sampled with.
    """
    if not requests:
      return []
    legal = [self.legal(request) for request in requests]
    latents = self.latents([self._text_prompt(r) for r in legal], options, rows=rows)
    videos = self._decode(latents, legal)
    return [
      video_THWC[: request.frames, : request.height, : request.width]
      for video_THWC, request in zip(videos, requests, strict=True)
    ]

  def _text_prompt(self, request):
    height, width = (n // self.size_multiple for n in (request.height, request.width))
    return Prompt(request, (time_grid.latent_frames(request.frames), height, width))

  def legal(self, request: Request) -> Request:
    """The request on the grid, or the next larger one; says what it changed."""
    request.check()
    multiple = self.size_multiple
    legal = dataclasses.replace(
      request,
      width=-(-request.width // multiple) * multiple,
      height=-(-request.height // multiple) * multiple,
      frames=time_grid.round_up(request.frames),
    )
    if legal != request:
      logging.info(
        "%dx%d, %d frames is off the model's grid (multiples of %d, 1 + 4k frames): "
        "cut from %dx%d, %d frames",
        *(request.width, request.height, request.frames, multiple),
        *(legal.width, legal.height, legal.frames),
      )
    return legal

  def latents(
    self,
    prompts: Sequence[Prompt],
    options: solvers.Options | None = None,
    *,
    rows: int = 4,
  ) -> list[np.ndarray]:
    """Latents of prompts: float32 [T, H, W, C] each.

    Given ones are exactly what the prompt says. See `Denoiser`.
    """
    return self.denoiser(self.params, prompts, options or self.defaults.options, rows)

  # --- everything to a video

  def video(self, prompt: str = "", *, options=None, tile=None, **job) -> np.ndarray:
    """One video, uint8 [T, H, W, 3], of what `job.Job` says; an image has one frame.

    Args:
      prompt: what to make.
      options: of the solver and of guidance, `solvers.Options`; the checkpoint's own if
        not given, as are size, frames and fps.
      tile: see `Autoencoder.decode_stream`.
      **job: of `job.Job`: size, frames, seed, image, video, extend_after, loop, ...

    Raises:
      ValueError: for what cannot be made; says why.
    """
    return np.concatenate(list(self.stream(Job(prompt, **job), options, tile)))

  def stream(
    self,
    job: Job,
    options: solvers.Options | None = None,
    tile: int | None = None,
    watch: Callable[[Prompt, np.ndarray], None] | None = None,
  ) -> Iterator[np.ndarray]:
    """Makes what `video` does, in chunks: memory does not grow with the duration.

    A thread makes what comes next meanwhile: JAX's contexts of the caller, such as
    `jax.default_matmul_precision`, do not hold there.

    watch: is called with each window's prompt and the latents made of it.
    """
    job, options = self.defaults.fill(job), options or self.defaults.options
    if job.preview:
      job = self.refined(job, np.concatenate(list(self.preview(job, options, tile))))
    return self._stream(job, options, tile, watch)

  def preview(self, job: Job, options=None, tile=None) -> Iterator[np.ndarray]:
    """Chunks of the small version of a job that has a preview."""
    job, options = self.defaults.fill(job), options or self.defaults.options
    half = tuple(max(self.size_multiple, n // 2) for n in self._canvas(job).crop[::-1])
    small = dataclasses.replace(job, size=half, preview=0.0)
    return self._stream(small, options, tile)

  def refined(self, job: Job, small_THWC: np.ndarray) -> Job:
    """The job that makes a preview again at full size, of the same composition."""
    job = self.defaults.fill(job)
    canvas = self._canvas(job)
    return dataclasses.replace(
      job,
      preview=0.0,
      strength=job.preview,
      size=canvas.crop[::-1],
      fps=canvas.fps,
      video=resizing.resize(small_THWC, canvas.crop),
    )

  def _canvas(self, job):
    return media.canvas(job, self.size_multiple)

  def _stream(self, job, options, tile, watch=None) -> Iterator[np.ndarray]:
    """The way of a job: timeline -> windows -> latents -> frames, cut to its size."""
    timeline = modes.plan(job, self._encode_all, self.size_multiple)

    def denoise(prompt):
      (latent_THWC,) = self.latents([prompt], options)
      if watch is not None:
        watch(prompt, latent_THWC)
      return latent_THWC

    if timeline.loop or timeline.closes:
      latent_THWC = self._circle(timeline, job.windows, denoise, tile)
      videos, skip = self._around(timeline, latent_THWC, tile)
    else:
      walk = self._walk(timeline, job.windows, denoise, tile)
      videos, skip = (video_BTHWC for _, video_BTHWC in walk), 0
    # The decoder is started without waiting for frames. So accelerators go on to the
    # next window while frames of this one are fetched, and written to a file.
    with contextlib.closing(ahead(videos)) as videos_BTHWC:
      yield from _cut(videos_BTHWC, timeline, skip)

  def _walk(self, timeline, cut, denoise, tile) -> Iterator[tuple[np.ndarray, Any]]:
    """Parts of a video in order: (latents, frames that are still being decoded)."""
    decode = self.autoencoder.decoder(tile)
    # Of a latent frame at least each, as far back as a window looks.
    tail: collections.deque[Any] = collections.deque(maxlen=max(cut.given, 1))

    def shown(latent_THWC):
      for part_THWC in _parts(latent_THWC):
        tail.append(decode(self._copied(part_THWC)))
        yield part_THWC, tail[-1]

    state = windows.begin(timeline)
    for chunk_THWC in self._known(timeline, cut, denoise):
      yield from shown(chunk_THWC)
      state = windows.see(timeline, cut, state, chunk_THWC)
    while not windows.finished(timeline, state):
      anchor_HWC = None
      if state.needs_anchor:
        # The frame that the window begins with, as an image.
        back = time_grid.frame_at(len(state.last_THWC) - 1)
        anchor_HWC = self.encode(_from_end(tail, back)[None])[0]
      window = windows.next_window(timeline, cut, state, anchor_HWC)
      state, fresh_THWC = windows.step(
        timeline, cut, state, window, denoise(window.prompt)
      )
      end = timeline.backwards + timeline.end
      if window.new < end:
        logging.info("made %d of %d latent frames", state.known, end)
      yield from shown(fresh_THWC)
    if timeline.after_THWC is not None and not timeline.closes:
      yield from shown(timeline.after_THWC)

  def _known(self, timeline, cut, denoise) -> Iterator[np.ndarray]:
    """Latents up to the end of what is given, in chunks.

    What comes before its start is made from there to the front, but is wanted from the
    front on: files hold it until then, so that memory does not grow.
    """
    state = windows.begin_backwards(timeline, cut)
    with tempfile.TemporaryDirectory() as folder:
      paths = []
      while state.left:
        image_THWC = self.autoencoder.decode(self._copied(state.head_THWC[:1]))[0]
        still_HWC = self.encode(modes.still(image_THWC))[1]
        window = windows.previous_window(timeline, cut, state, still_HWC)
        state, final_THWC = windows.step_back(
          cut, state, window, denoise(window.prompt)
        )
        paths.append(pathlib.Path(folder) / f"{state.left}.npy")
        np.save(paths[-1], final_THWC)
      if len(state.first_THWC):
        yield state.first_THWC
      for path in reversed(paths):
        yield np.load(path)

  def _circle(self, timeline, cut, denoise, tile) -> np.ndarray:
    """All latents of a loop, none of which is a first frame's."""
    if timeline.loop:
      return denoise(windows.next_window(timeline, cut, windows.begin(timeline)).prompt)
    walk = self._walk(timeline, cut, denoise, tile)
    latent_THWC = np.concatenate([part_THWC for part_THWC, _ in walk])
    # In the middle of a video, the first frame has another latent.
    latent_THWC[0] = timeline.after_THWC[0]
    return latent_THWC

  def _around(self, timeline, latent_THWC, tile):
    """(frames of a loop, how many to skip): its end is decoded before its start."""
    front = np.take(latent_THWC, np.arange(-_WARM_UP, 0), axis=0, mode="wrap")
    chunks, skip = [front, latent_THWC], time_grid.video_frames(_WARM_UP)
    if timeline.closes:
      # It begins with the last frame of its first latent, as a video does.
      chunks.append(latent_THWC[:1])
      skip += time_grid.TIME_FACTOR - 1
    parts = (self._copied(part) for chunk in chunks for part in _parts(chunk))
    return self.autoencoder.decode_stream(parts, tile), skip

  # --- pixels and latents

  def _copied(self, x_THWC):
    return np.repeat(x_THWC[None], self.autoencoder.batch_size(1), axis=0)

  def encode(self, video_THWC: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] of 1 + 4k frames -> latents [t, h, w, C], chunk by chunk."""
    frames = len(video_THWC)
    if frames > 1:
      # Padding is exact, as the encoder is causal, and saves compilations.
      over = -(frames - 1) % _ENCODE_CHUNK
      video_THWC = np.pad(video_THWC, ((0, over), (0, 0), (0, 0), (0, 0)), mode="edge")
    chunks = in_chunks(self._copied(video_THWC), _ENCODE_CHUNK)
    latents = [np.asarray(x)[0] for x in self.autoencoder.encode_stream(chunks)]
    return np.concatenate(latents)[: time_grid.latent_frames(frames)]

  def _encode_all(self, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [self.encode(video_THWC) for video_THWC in videos]

  def _decode(self, latents, requests) -> list[np.ndarray]:
    """Videos of latents, those of a size together."""
    groups: dict[tuple, list[int]] = {}
    for i, request in enumerate(requests):
      key = (request.height, request.width, request.frames == 1)
      groups.setdefault(key, []).append(i)
    videos = {}
    for group in groups.values():
      # One length for all of a size: the decoder is causal, so padding is exact.
      frames = frame_bucket(max(requests[i].frames for i in group))
      length = self.autoencoder.config.latent_shape(
        frames, requests[group[0]].height, requests[group[0]].width
      )[0]
      size = self.autoencoder.batch_size(min(8, len(group)))
      for start in range(0, len(group), size):
        part = group[start : start + size]
        padded = [latents[i] for i in part] + [latents[part[0]]] * (size - len(part))
        batch = np.stack(
          [
            np.pad(x, ((0, length - len(x)), (0, 0), (0, 0), (0, 0)), mode="edge")
            for x in padded
          ]
        )
        decoded = self.autoencoder.decode(batch)
        for i, video_THWC in zip(part, decoded, strict=False):
          videos[i] = video_THWC[: requests[i].frames]
    return [videos[i] for i in range(len(requests))]


def _cut(videos_BTHWC, timeline: Timeline, skip: int) -> Iterator[np.ndarray]:
  """uint8 [T, H, W, 3] of a timeline's frames, after the first `skip` ones."""
  left, (height, width) = timeline.frames, timeline.crop_hw or (None, None)
  for video_BTHWC in videos_BTHWC:
    video_THWC = np.asarray(video_BTHWC)[0]
    shown_THWC = video_THWC[skip:][:left, :height, :width]
    skip, left = max(0, skip - len(video_THWC)), left - len(shown_THWC)
    if len(shown_THWC):
      yield shown_THWC
    if not left:
      return


def _from_end(videos_BTHWC, back: int) -> np.ndarray:
  """The frame [H, W, 3] so many before the last of some consecutive parts."""
  for video_BTHWC in reversed(videos_BTHWC):
    if back < video_BTHWC.shape[1]:
      return np.asarray(video_BTHWC)[0, -1 - back]
    back -= video_BTHWC.shape[1]
  raise ValueError(f"no frame is {back} frames before what is left")


def _parts(latent_THWC) -> Iterator[np.ndarray]:
  """Pieces of _DECODE_CHUNKS frames."""
  while len(latent_THWC):
    size = next(n for n in _DECODE_CHUNKS if n <= len(latent_THWC))
    yield latent_THWC[:size]
    latent_THWC = latent_THWC[size:]
