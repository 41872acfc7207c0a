"""A trained captioner as other code uses it: clips to captions, and to similarities.

captioner = Captioner.from_checkpoint("runs/captioner")
captioner.caption([(video_THWC, 24.0)], style="short")
captioner.similarity([(video_THWC, 24.0)], ["a red circle moves left"])
"""

import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.data import pixel_records, sources
from sora_jax.data.caption_texts import StyledCaptionIds
from sora_jax.data.tokenizer import EOS, PAD, Tokenizer
from sora_jax.data.video import resizing
from sora_jax.encoders.autoencoder import Autoencoder
from sora_jax.models import captioner, decoding
from sora_jax.models.meta import CaptionerMeta
from sora_jax.packing import packed_row, patches, planner, time_grid
from sora_jax.packing.packed_row import PackedRow
from sora_jax.runtime import checkpoint, sharding
from sora_jax.tasks.captioner import SHARDING_RULES

METHODS = ("greedy", "beam", "nucleus")
_ROWS = 8  # packed rows of clips, and texts, that are computed at once
_NO_TEXT = np.zeros(0, np.int32)


class VideoClip(NamedTuple):
  """Frames uint8 [T, H, W, 3] of any size and number, and their rate a second."""

  video_THWC: np.ndarray
  fps: float


class Captioner:
  """Captions clips of any sizes and lengths, and compares them with captions.

  Clips are packed into rows of one size, as in training, so that there is one program
  for each method and number of rows. Longer ones than any in training lose frames
  evenly, larger ones are made smaller.

  Attributes:
    meta: what the model's folder says, such as the styles that it knows.
  """

  def __init__(self, params, meta: CaptionerMeta, tokenizer, vae=None, mesh=None,
               dtype=jnp.float32):  # fmt: skip
    """Args: as `from_checkpoint` loads them; vae: for a captioner that reads latents.

    Raises:
      ValueError: if the vocabulary is not the one that it was trained with, or the VAE
        another.
    """
    if tokenizer.vocab_size > meta.model.vocab_size:
      raise ValueError(
        f"the tokenizer has {tokenizer.vocab_size} pieces, but the captioner "
        f"{meta.model.vocab_size}: it is of another vocabulary"
      )
    if meta.vae and (vae is None or vae.meta.id != meta.vae):
      raise ValueError(
        f"the captioner reads latents of the VAE {meta.vae!r}, not of "
        f"{vae.meta.id if vae else 'none'!r}"
      )
    self.meta, self._vae, self._params = meta, vae, params
    self._mesh = mesh or sharding.sampling_mesh(_ROWS)
    self._texts = StyledCaptionIds(
      tokenizer, meta.max_text_tokens, meta.model.vocab_size
    )
    self._network = captioner.Captioner(meta.model, dtype, meta.patch_size[1])
    whole = NamedSharding(self._mesh, PartitionSpec())
    jit = functools.partial(jax.jit, out_shardings=whole)
    self._embed_clips = jit(self._clip_embeddings)
    self._embed_texts = jit(self._text_embeddings)
    options = ("method", "beams", "length_power", "top_p", "temperature")
    self._say = jit(self._captions, static_argnames=options)

  @classmethod
  def from_checkpoint(cls, folder, mesh=None, dtype=jnp.float32) -> "Captioner":
    """Loads the captioner of a run.

    Args:
      folder: of the run, with captioner/model in it, or of the model. One that reads
        latents needs vae/model of the run, too.
      mesh: that rows lie on; all local devices by default.
      dtype: of the computation.

    Raises:
      ValueError: if there is no complete captioner, or what it needs.
    """
    folder = pathlib.Path(folder)
    inside = folder / "captioner" / "model"
    folder = inside if inside.is_dir() else folder
    meta = CaptionerMeta.from_json(checkpoint.load_meta(folder), folder)
    mesh = mesh or sharding.sampling_mesh(_ROWS)
    params, _ = checkpoint.load_model(
      folder,
      lambda shapes: sharding.param_shardings(shapes, SHARDING_RULES, mesh),
      jnp.float32,
    )
    vae = None
    if meta.input == "latents":
      vae = Autoencoder(folder.parents[1] / "vae" / "model", None, dtype)
    tokenizer = Tokenizer(str(folder / "tokenizer.model"), meta.vocabulary)
    return cls(params, meta, tokenizer, vae, mesh, dtype)

  def caption(
    self,
    clips: Sequence[VideoClip | tuple[np.ndarray, float]],
    style: str = "descriptive",
    method: str = "greedy",
    seed: int | Sequence[int] = 0,
    *,
    beams: int = 4,
    length_power: float = 1.0,
    top_p: float = 0.9,
    temperature: float = 1.0,
    rows: int = _ROWS,
  ) -> list[str]:
    """Captions of clips.

    Args:
      clips: (frames uint8 [T, H, W, 3], frames a second) each.
      style: one of self.meta.styles.
      method: "greedy", "beam" or "nucleus", see `models.decoding`.
      seed: of nucleus; one for all, or one a clip, so that its caption does not depend
        on which others there are.
      beams, length_power: of beam. top_p, temperature: of nucleus.
      rows: packed rows at once, at most.

    Raises:
      ValueError: for an unknown style or method, options out of range, and a clip that
        is none.
    """
    self._check(style, method, beams, top_p, temperature)
    seeds = list(range(len(clips))) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(clips):
      raise ValueError(f"{len(seeds)} seeds for {len(clips)} clips")
    base = np.uint32(seed % 2**32 if isinstance(seed, int) else 0)
    # What a method does not read must not make another program of it.
    options = {
      "beam": {"beams": beams, "length_power": length_power},
      "nucleus": {"top_p": top_p, "temperature": temperature},
    }.get(method, {})
    first = self._texts.encode("", style)[0]
    texts = [""] * len(clips)
    for batch, clip_BN in self._batches(clips, rows):
      seed_BN = np.array([0, *(s % 2**32 for s in seeds)], np.uint32)[clip_BN + 1]
      inputs = {**batch, "seed_N": seed_BN, "base": base, "first": first}
      ids_BNT = self._run(self._say, inputs, method=method, **options)
      for row, segment in zip(*np.nonzero(clip_BN >= 0), strict=True):
        ids_T = ids_BNT[row, segment]
        texts[clip_BN[row, segment]] = self._texts.tokenizer.decode(ids_T)
    return texts

  def embed_clips(self, clips, *, rows: int = _ROWS) -> np.ndarray:
    """Embeddings of clips, see `caption`: float32 [n, E] of length 1."""
    found = np.zeros((len(clips), self.meta.model.embed_width), np.float32)
    for batch, clip_BN in self._batches(clips, rows):
      embed_BNE = self._run(self._embed_clips, batch)
      found[clip_BN[clip_BN >= 0]] = embed_BNE[clip_BN >= 0]
    return found

  def embed_captions(self, captions: Sequence[str], *, rows: int = 64) -> np.ndarray:
    """Embeddings of captions, cut to what was read in training: float32 [n, E].

    Raises:
      ValueError: for what is no text.
    """
    ids = []
    for caption in captions:
      if not isinstance(caption, str):
        raise ValueError(f"a caption is a text, not {caption!r}")
      ids.append(self._texts.encode(caption))
    found = np.zeros((len(ids), self.meta.model.embed_width), np.float32)
    rows = sharding.whole_batch(max(1, min(rows, len(ids))), self._mesh)
    for start in range(0, len(ids), rows):
      part = ids[start : start + rows]
      batch = _empty(self.meta.max_text_tokens, rows)
      for row, text in enumerate(part):
        writer = packed_row.TextWriter(packed_row.row_of(batch, row))
        writer.add(text, 0)
      found[start : start + len(part)] = self._run(self._embed_texts, batch)[
        : len(part)
      ]
    return found

  def similarity(self, clips, captions: Sequence[str]) -> np.ndarray:
    """Cosine of each clip's embedding and that of its caption: float32 [n] in -1 to 1.

    Raises:
      ValueError: if there are not as many clips as captions.
    """
    if len(clips) != len(captions):
      raise ValueError(f"{len(clips)} clips and {len(captions)} captions")
    return np.sum(self.embed_clips(clips) * self.embed_captions(captions), axis=-1)

  def _check(self, style, method, beams, top_p, temperature):
    if style not in self.meta.styles:
      raise ValueError(
        f"style {style!r} is none of {self.meta.styles}, which the captioner has "
        "learnt: a clip needs captions of several lengths for that"
      )
    if method not in METHODS:
      raise ValueError(f"method {method!r} is none of {METHODS}")
    if beams < 1 or not 0 < top_p <= 1 or temperature <= 0:
      raise ValueError(
        f"beams {beams} must be at least 1, top_p {top_p} in (0, 1], temperature "
        f"{temperature} above 0"
      )

  def _batches(self, clips, rows) -> Iterator[tuple[PackedRow, np.ndarray]]:
    """(batch of packed rows, number of each segment's clip [B, N]); -1 is none."""
    meta = self.meta
    prepared = [self._prepare(clip) for clip in clips]
    lengths = [(patches.num_tokens(p.shape, meta.patch_size), 1) for p in prepared]
    budget = planner.Budget(meta.tokens, meta.segments, meta.segments)
    plan = planner.plan(lengths, budget, seed=0, epoch=0)
    rows = sharding.whole_batch(max(1, min(rows, len(plan))), self._mesh)
    channels = math.prod(meta.patch_size) * self._channels
    size = packed_row.RowSize(budget, channels)
    for start in range(0, len(plan), rows):
      batch = packed_row.empty(PackedRow, size, rows)
      for row, numbers in enumerate(plan[start : start + rows]):
        writer = packed_row.RowWriter(packed_row.row_of(batch, row))
        for number in numbers:
          writer.add(self._segment(prepared[number], number))
      clip_BN = batch.pop("clip_N")
      yield batch, clip_BN

  @property
  def _channels(self) -> int:
    return self._vae.config.latent_channels if self._vae else pixel_records.CHANNELS

  def _prepare(self, clip) -> "_Prepared":
    video_THWC, fps = clip
    video_THWC = np.asarray(video_THWC)
    if video_THWC.dtype != np.uint8 or video_THWC.ndim != 4 or not video_THWC.size:
      raise ValueError(
        f"a clip is uint8 [T, H, W, 3], not {video_THWC.dtype} {video_THWC.shape}"
      )
    if video_THWC.shape[-1] != 3 or not (math.isfinite(fps) and fps > 0):
      raise ValueError(f"a clip of {video_THWC.shape} at {fps} frames a second")
    meta = self.meta
    # Fewer frames of the same seconds: positions are in real time.
    every = -(-len(video_THWC) // meta.max_frames)
    video_THWC, fps = video_THWC[::every], fps / every
    video_THWC = video_THWC[: time_grid.round_down(len(video_THWC))]
    height, width = video_THWC.shape[1:3]
    size = sources.legal_size(height, width, meta.max_pixels, meta.size_multiple)
    video_THWC = resizing.resize(video_THWC, size)
    edge = self._vae.config.space_factor if self._vae else 1
    frames = time_grid.latent_frames(len(video_THWC))
    return _Prepared(video_THWC, fps, (frames, size[0] // edge, size[1] // edge))

  def _segment(self, clip: "_Prepared", number: int) -> packed_row.Segment:
    if self._vae:
      rows = self._vae.batch_size(1)
      video_BTHWC = np.repeat(clip.video_THWC[None], rows, axis=0)
      latent_THWC = self._vae.encode(video_BTHWC)[0]
    else:
      latent_THWC = pixel_records.fold(clip.video_THWC)
    patch_LP = patches.patchify(latent_THWC, self.meta.patch_size)
    grid = patches.grid_shape(clip.shape, self.meta.patch_size)
    position_L3 = patches.clip_positions(grid, self.meta.reference_fps / clip.fps)
    given_L = np.zeros(len(patch_LP), bool)
    return packed_row.Segment(patch_LP, position_L3, given_L, [_NO_TEXT], clip=number)

  def _run(self, program: Callable, inputs, **options) -> np.ndarray:
    """A program's result for rows of a batch, scalars beside them."""
    with jax.set_mesh(self._mesh):
      placed = sharding.shard_alike(inputs, self._mesh)
      return np.asarray(jax.device_get(program(self._params, placed, **options)))

  def _apply(self, params, *inputs, method):
    variables = {"params": params["captioner"]}
    return self._network.apply(variables, *inputs, method=method)

  def _encode(self, params, batch):
    inputs = (batch["patch_LP"], batch["segment_L"], batch["position_L3"])
    encode = captioner.Captioner.encode
    return self._apply(params, *inputs, self.meta.segments, method=encode)

  def _clip_embeddings(self, params, batch):
    clips = self._encode(params, batch)
    return self._apply(params, clips, method=captioner.Captioner.embed_clips)

  def _text_embeddings(self, params, batch):
    text = captioner.Text(
      batch["text_S"], batch["text_segment_S"], batch["text_position_S"]
    )
    return self._apply(params, text, 1, method=captioner.Captioner.embed_texts)[:, 0]

  def _captions(self, params, batch, *, method, **options):
    """Ids [B, N, T] of a caption of each segment."""
    clips = self._encode(params, batch)
    segments = self.meta.segments
    number_N = 1 + jnp.arange(segments)
    wanted_BN = number_N <= clips.segment_BL.max(axis=1, keepdims=True)
    clip_BN = jnp.where(wanted_BN, number_N, 0)
    clip_BM = jnp.repeat(clip_BN, options.get("beams", 1), axis=1)
    prompted = self._apply(params, clips, clip_BM, method=captioner.Captioner.prompt)

    def step(ids_BM, time, past):
      logits_BMV, past = self._apply(
        params, ids_BM, time, past, prompted, method=captioner.Captioner.step
      )
      return decoding.below(self._texts.tokenizer.vocab_size, logits_BMV), past

    tokens = self.meta.max_text_tokens - 1
    past = captioner.no_past(self.meta.model, clip_BM, tokens, self._network.dtype)
    first_BN = jnp.full(clip_BN.shape, batch["first"])
    search = {"end": EOS, "tokens": tokens, "pad": PAD}
    if method == "beam":
      found = decoding.beam(step, past, first_BN, wanted_BN, **search, **options)
      return found.ids_BMT
    choose = decoding.greedy
    if method == "nucleus":
      base = jax.random.key(batch["base"])
      key_of = jax.vmap(jax.vmap(lambda seed: jax.random.fold_in(base, seed)))
      choose = decoding.nucleus(key_of(batch["seed_N"]), **options)
    return decoding.generate(step, past, first_BN, wanted_BN, choose, **search).ids_BMT


class _Prepared(NamedTuple):
  """Frames on the grid of time and size, their rate, the shape of what is packed."""

  video_THWC: np.ndarray
  fps: float
  shape: tuple[int, int, int]


def _empty(tokens: int, rows: int) -> packed_row.PackedText:
  """Rows of one text each."""
  size = packed_row.RowSize(planner.Budget(1, tokens, 1), 1)
  return packed_row.empty(packed_row.PackedText, size, rows)


def similarity_scorer(folder: str) -> Callable:
  """A score for config.data.score_fn: how well a clip goes with its captions.

    config.data.score_fn = "sora_jax.encoders.captioner:similarity_scorer:FOLDER"
    config.data.filter.scores = (("similarity", 0.2),)

  Args:
    folder: as of `Captioner.from_checkpoint`.

  Returns:
    score(video_THWC, captions, fps) -> {"similarity": the mean of its captions}; a clip
    without captions has 0.
  """
  model = Captioner.from_checkpoint(folder)

  def score(video_THWC, captions, fps):
    if not captions:
      return {"similarity": 0.0}
    clip = model.embed_clips([(video_THWC, fps)])[0]
    return {"similarity": float(np.mean(model.embed_captions(captions) @ clip))}

  return score
