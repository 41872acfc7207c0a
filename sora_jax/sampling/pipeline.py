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

from sora_jax.data.video import resizing
from sora_jax.diffusion import solvers
from sora_jax.encoders.autoencoder import Autoencoder, NonFiniteError
from sora_jax.encoders.image_encoder import FrozenImageEncoder
from sora_jax.language import expansion
from sora_jax.language.expander import TrainedExpander
from sora_jax.models.meta import LowNoiseDiTMeta
from sora_jax.packing import time_grid
from sora_jax.runtime import sharding, shipped
from sora_jax.runtime.prefetch import ahead
from sora_jax.runtime.residency import Residency
from sora_jax.sampling import (
  decoding,
  experts,
  given_frames,
  media,
  modes,
  parts,
  text_features,
  windows,
)
from sora_jax.sampling.conditioning import Prompt, Request, Timeline
from sora_jax.sampling.decoding import NonFiniteSample
from sora_jax.sampling.defaults import Defaults
from sora_jax.sampling.defaults import read as read_defaults
from sora_jax.sampling.denoise import Denoiser
from sora_jax.sampling.job import Job

# Latent frames that the decoder is given at once: few sizes, for few compilations.
_DECODE_CHUNKS = (4, 1)
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
    expander: expansion.Expander | None = None,
  ):
    """Args: as `from_checkpoint` loads them; vocabulary is a sentencepiece file.

    params: or a function that loads them, when the autoencoder's residency says so.
    encode_text: (texts, max_tokens) -> features of each, for a model that was trained
    on those of a frozen text encoder, and takes the place of the vocabulary.
    expander: of prompts; another one may take its place at any time.
    """
    self.meta, self.autoencoder = meta, autoencoder
    self._put(params if callable(params) else lambda: params)
    self.vocabulary, self.dtype = vocabulary, dtype
    self.defaults, self.expander = defaults or Defaults(), expander
    self.encode_images: given_frames.EncodeImages | None = None
    self.expert_ids: list[str] = []
    self.denoiser = Denoiser(meta, vocabulary, dtype, autoencoder.mesh, encode_text)

  @classmethod
  def from_checkpoint(
    cls,
    folder,
    mesh=None,
    dtype=None,
    loras: experts.Loras = (),
    loras_low: experts.Loras = (),
    weights: str = "",
    low_memory: bool = False,
  ) -> "Sampler":
    """Loads a run's folder, with vae/model and dit/model in it.

    A frozen text encoder is in text/model, or where it was in training. An expander of
    prompts is in expander/model, if there is one.

    Args:
      folder: of the run, or of an imported or shipped checkpoint; or the name of one
        that comes with the package.
      mesh: that params are sharded over. By default all local devices share a video;
        for many small ones see `sharding.sampling_mesh`.
      dtype: of the computation.
      loras: safetensors files of adapters that are merged in, and how strongly; 1 is
        as they were trained.
      loras_low: of the second expert of a model with two.
      weights: a key of `tasks.dit.WEIGHTS`, which the kernels of the DiT's blocks are
        held in, adapters included; "" holds them as they were saved.
      low_memory: text encoder, DiT (or each of its experts) and VAE take turns on the
        devices: each is loaded when it is needed, and again for each window of a long
        video.

    Raises:
      ValueError: if one of the models is missing, damaged, or made for another.
    """
    folder = shipped.find(folder)
    if not folder.is_dir():
      raise ValueError(f"{folder}: no such checkpoint folder")
    if dtype is None:
      dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    mesh = mesh or sharding.sampling_mesh(1)
    residency = Residency(one_at_a_time=low_memory)
    autoencoder = Autoencoder(folder / "vae" / "model", mesh, dtype, residency)
    model = folder / "dit" / "model"
    meta, loads = experts.load(folder, mesh, loras, loras_low, weights)
    if meta.vae != autoencoder.meta.id:
      raise ValueError(
        f"{folder}: dit/model was trained on latents of another VAE than vae/model "
        f"({meta.vae} and {autoencoder.meta.id}); take both of one run"
      )
    encode_text = text_features.of_checkpoint(
      folder, meta, mesh, dtype, residency, remember=low_memory
    )
    vocabulary = model / "tokenizer.model"
    defaults = read_defaults(folder)
    made = cls(loads[0], meta, autoencoder, vocabulary, dtype, encode_text, defaults)
    if len(loads) > 1:
      residency.put(LowNoiseDiTMeta.network, loads[1])
      made.expert_ids = experts.ids(folder)
    made.expander = TrainedExpander(folder) if TrainedExpander.is_in(folder) else None
    if meta.model.image_width:
      images = FrozenImageEncoder(folder, mesh, dtype, meta.image, residency)
      made.encode_images = images.encode
    return made

  @property
  def params(self):
    """Params of the DiT, and of the text encoder that was trained with it."""
    return self.autoencoder.residency.get("dit")

  @params.setter
  def params(self, params):
    self._put(lambda: params)

  def _put(self, load):
    """Has the residency load the DiT so; its head, which is small, stays for its id."""
    self._head = None

    def load_and_look():
      params = load()
      self._head = params["dit"]["head"]["kernel"]
      return params

    self.autoencoder.residency.put("dit", load_and_look)

  @property
  def size_multiple(self) -> int:
    """Widths and heights are multiples of it, or cut from the next one."""
    return self.autoencoder.config.space_factor * self.denoiser.model.patch_size[1]

  @property
  def model_id(self) -> str:
    """Tells models apart: a hash of what the DiT's folder says, and of its head.

    Of two experts also of both ids. Loads the DiT if it was never loaded before.
    """
    if self._head is None:
      self.autoencoder.residency.get("dit")
    head = np.asarray(jax.device_get(self._head))
    text = json.dumps(self.meta.facts(), sort_keys=True) + "".join(self.expert_ids)
    return hashlib.sha256(text.encode() + head.tobytes()).hexdigest()[:16]

  def expand(self, texts: str | Sequence[str], seed: int = 0) -> expansion.Expansion:
    """Makes texts as long as the captions of training, see `language.expansion`.

    Args:
      texts: one, or several.
      seed: of an expander that draws its words.

    Raises:
      ValueError: if there is no expander, or a text is too long or cannot be expanded.
    """
    if self.expander is None:
      raise ValueError(
        "this model has no expander of prompts: python -m sora_jax.train_expander "
        "makes one of its training captions, or an endpoint is one"
      )
    texts = [texts] if isinstance(texts, str) else texts
    made = expansion.expand(self.expander, texts, seed)
    for short, long in made.texts.items():
      logging.info("%r is expanded to %r", short, long)
    return made

  # --- texts to videos, many at once

  def sample(
    self,
    requests: Sequence[Request],
    options: solvers.Options | None = None,
    *,
    rows: int = 4,
    expand: bool = False,
  ) -> list[np.ndarray]:
    """Videos of the requests, in order: uint8 [T, H, W, 3] each.

    A video off the model's grid is made on the next larger one and cut.

    Args:
      requests: what to make.
      options: of the solver and of guidance (guidance_scale 1 is half the work); the
        checkpoint's own if not given.
      rows: packed rows computed at once.
      expand: make the prompts longer first, see `expand`.

    Raises:
      ValueError: for options that the model's noise process cannot be sampled with.
      NonFiniteSample: what was made is NaN or infinite.
    """
    if not requests:
      return []
    if expand:
      requests = self._expanded(requests)
    if self.denoiser.model.condition_channels:
      raise ValueError(
        "this model makes videos of given images: give --image, or image= of video()"
      )
    legal = [self.legal(request) for request in requests]
    latents = self.latents([self._text_prompt(r) for r in legal], options, rows=rows)
    videos = decoding.decode(self.autoencoder, latents, legal)
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

    Raises:
      NonFiniteSample: some of them are NaN or infinite; names the prompt.
    """
    options = options or self.defaults.options
    held = experts.held_by(self.autoencoder.residency, self.meta.boundary)
    latents = self.denoiser(held, prompts, options, rows)
    for prompt, latent_THWC in zip(prompts, latents, strict=True):
      if not np.isfinite(latent_THWC).all():
        raise NonFiniteSample(
          f"{decoding.shown(prompt.request)}: its latents are NaN or infinite, so that "
          "there is no video. Look at the model (does it sample without adapters, or "
          "from an earlier checkpoint?), at the strength of adapters, and at "
          "guidance_scale "
          f"{options.guidance_scale:g}"
        )
    return latents

  # --- everything to a video

  def video(
    self, prompt: str = "", *, options=None, tile=None, expand=False, **job
  ) -> np.ndarray:
    """One video, uint8 [T, H, W, 3], of what `job.Job` says; an image has one frame.

    Args:
      prompt: what to make.
      options: of the solver and of guidance, `solvers.Options`; the checkpoint's own if
        not given, as are size, frames and fps.
      tile: see `Autoencoder.decode_stream`.
      expand: make the prompt longer first, see `expand`.
      **job: of `job.Job`: size, frames, seed, image, video, extend_after, loop, ...

    Raises:
      ValueError: for what cannot be made; says why.
    """
    wanted = Job(prompt, **job)
    if expand:
      (wanted,) = self._expanded([wanted])
    return np.concatenate(list(self.stream(wanted, options, tile)))

  def _expanded(self, asked):
    """Jobs or requests with their texts made longer by the seed of the first."""
    texts = [text for one in asked for text in expansion.texts_of(one)]
    made = self.expand(texts, asked[0].seed).texts
    return [dataclasses.replace(one, **expansion.replaced(one, made)) for one in asked]

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
    options = options or self.defaults.options
    job = self.defaults.fill(job, options)
    if job.preview:
      job = self.refined(job, np.concatenate(list(self.preview(job, options, tile))))
    return self._stream(job, options, tile, watch)

  def preview(self, job: Job, options=None, tile=None) -> Iterator[np.ndarray]:
    """Chunks of the small version of a job that has a preview."""
    options = options or self.defaults.options
    job = self.defaults.fill(job, options)
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
    timeline, cut = self.timeline(job)

    def denoise(prompt):
      (latent_THWC,) = self.latents([prompt], options)
      if watch is not None:
        watch(prompt, latent_THWC)
      return latent_THWC

    if timeline.loop or timeline.closes:
      latent_THWC = self._circle(timeline, cut, denoise, tile)
      videos, skip = self._around(timeline, latent_THWC, tile)
    else:
      walk = self._walk(timeline, cut, denoise, tile)
      videos, skip = (video_BTHWC for _, video_BTHWC in walk), 0
    # The decoder is started without waiting for frames. So accelerators go on to the
    # next window while frames of this one are fetched, and written to a file.
    try:
      with contextlib.closing(ahead(videos)) as videos_BTHWC:
        yield from parts.cut(videos_BTHWC, timeline, skip)
    except NonFiniteError as error:
      raise NonFiniteSample(f"{job.prompt!r}: {error}") from error

  def timeline(self, job: Job) -> tuple[Timeline, windows.Windows]:
    """What is known of a job's video, and how it is cut into windows."""
    model, multiple = self.denoiser.model, self.size_multiple
    if not model.condition_channels:
      return modes.plan(job, self._encode_all, multiple), job.windows
    encoders = (self._encode_all, self.encode_images)
    timeline = given_frames.plan(job, multiple, model, *encoders)
    return timeline, given_frames.whole_video(job)

  def _walk(self, timeline, cut, denoise, tile) -> Iterator[tuple[np.ndarray, Any]]:
    """Parts of a video in order: (latents, frames that are still being decoded)."""
    decode = self.autoencoder.decoder(tile)
    # Of a latent frame at least each, as far back as a window looks.
    tail: collections.deque[Any] = collections.deque(maxlen=max(cut.given, 1))

    def shown(latent_THWC):
      for part_THWC in parts.pieces(latent_THWC, _DECODE_CHUNKS):
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
        anchor_HWC = self.encode(parts.from_end(tail, back)[None])[0]
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
        window = windows.previous_window(timeline, cut, state)
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
    # In the middle of a video, the first frame is the last one of what leads to it.
    return np.concatenate([latent_THWC[-1:], latent_THWC[1:-1]])

  def _around(self, timeline, latent_THWC, tile):
    """(frames of a loop, how many to skip): its end is decoded before its start."""
    front = np.take(latent_THWC, np.arange(-_WARM_UP, 0), axis=0, mode="wrap")
    chunks, skip = [front, latent_THWC], time_grid.video_frames(_WARM_UP)
    if timeline.closes:
      # It begins with the last frame of its first latent, as a video does.
      chunks.append(latent_THWC[:1])
      skip += time_grid.TIME_FACTOR - 1
    pieces = (
      self._copied(piece)
      for chunk in chunks
      for piece in parts.pieces(chunk, _DECODE_CHUNKS)
    )
    return self.autoencoder.decode_stream(pieces, tile), skip

  # --- pixels and latents

  def _copied(self, x_THWC):
    return np.repeat(x_THWC[None], self.autoencoder.batch_size(1), axis=0)

  def encode(self, video_THWC: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] of 1 + 4k frames -> latents [t, h, w, C]."""
    return self.autoencoder.encode_video(video_THWC)

  def _encode_all(self, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [self.encode(video_THWC) for video_THWC in videos]
