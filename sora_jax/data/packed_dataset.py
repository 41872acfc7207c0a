"""Rows of packed latent patches and texts, for the DiT.

A clip's way into a row: the manifest says how long it is (`_measure`), the draws of an
epoch say which caption and how many extra images this visit has, the plan which visits
share a row (`_plan`), and `_load` reads their records and writes them as segments.
"""

import dataclasses
import functools
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
from absl import logging

from sora_jax.data import draws, mixture, records
from sora_jax.data.bad_clips import BadClips
from sora_jax.data.caption_texts import CaptionTexts
from sora_jax.data.endless import EndlessDataset, split_indices
from sora_jax.data.mixture import NO_SHARES
from sora_jax.packing import packed_row, patches, planner
from sora_jax.packing.packed_row import Field, PackedRow, Segment


@dataclasses.dataclass(frozen=True)
class PackedOptions:
  """How clips become rows.

  Attributes:
    budget: size of a row.
    patch_size: (pt, ph, pw) in latent pixels.
    reference_fps: pixel frame rate whose latent frames are the unit of t.
    caption_dropout: share of visits with the empty text.
    given_prob: share of videos with given tokens.
    extra_prob: share of videos with image latents appended, where there are any.
    synthetic_captions: share of visits with a caption that a model wrote, of clips that
      have such and others.
    condition_width, image: of a model that reads given frames beside the noise, see
      `packed_row.RowSize`.
  """

  budget: planner.Budget
  patch_size: tuple[int, int, int]
  reference_fps: float
  caption_dropout: float = 0.1
  given_prob: float = 0.5
  extra_prob: float = 0.25
  synthetic_captions: float = 0.95
  condition_width: int = 0
  image: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which clips of a manifest are visited, and how often.

  Attributes:
    split: "train" or "heldout".
    size: index of the budget that latents are taken of, where clips are encoded at
      several; -1 is the last.
    leave_out: ids of clips that are not read.
    shares: of visits, by source, of a mixture; an epoch is then a round of it.
    image_share: of visits, see `mixture.of_clips`.
  """

  split: str = "train"
  size: int = -1
  leave_out: Collection[str] = ()
  shares: Mapping[str, float] = dataclasses.field(default_factory=lambda: NO_SHARES)
  image_share: float | None = None


class TrainingRow(PackedRow, total=False):
  """A row, and which of the clips that it was planned with are missing in it."""

  # Their indices, -1 for none. It stays on the host.
  clip_unreadable_N: Annotated[Any, Field(np.int32, -1)]


class Reader(Protocol):
  """What reads the records of clips; it can be pickled to workers."""

  def read(self, clip: records.LatentClip) -> dict:
    """`latent_THWC` and `extras_NHWC`, float32; RecordError if it cannot be read."""


class PackedDataset(EndlessDataset):
  """Rows of packed latent patches and texts; element i is one `TrainingRow`.

  Segments are visits of clips: their latent, then the chosen images. `clip_N` indexes
  `clips`. A record that cannot be read, or whose clip is left out, takes no segment:
  its tokens are padding, and the other clips of the row are what they are without it.
  """

  def __init__(
    self,
    clips: Sequence[records.LatentClip],
    reader: Reader,
    texts: CaptionTexts,
    options: PackedOptions,
    seed: int,
    choice: Choice = Choice(),
    bad_clips_folder: str | None = None,
  ):
    """Reads no record, but encodes all captions once to know their lengths.

    Args:
      clips: rows of the latents manifest, of all splits.
      reader: of what is packed, such as a `records.LatentReader`; no other data set
        may read by it.
      texts: where captions come from.
      options: how clips become rows.
      seed: of the run.
      choice: which of the clips.
      bad_clips_folder: where bad_clips.jsonl is written; None only logs.

    Raises:
      ValueError: if the split is empty, a latent does not divide into patches, a clip
        is longer than the budget, or has no features; names the clip.
    """
    self._clips = list(clips)
    self._indices = _chosen(clips, choice.split, choice.size)
    self._reader = reader
    self._read_lock = threading.Lock()
    self._texts, self._options, self._seed = texts, options, seed
    self._bad_clips = BadClips(bad_clips_folder)
    self._leave_out = frozenset(choice.leave_out)
    chosen = [self._clips[i] for i in self._indices]
    self._lengths = _measure(chosen, texts, options)
    self._visits = mixture.of_clips(chosen, choice.shares, choice.image_share, seed)
    budget = options.budget
    super().__init__(
      [
        "latents",
        [clip.id for clip in chosen],
        [budget.tokens, budget.text_tokens, budget.segments],
        [
          tuple(options.patch_size),
          seed,
          options.caption_dropout,
          options.extra_prob,
          texts.max_tokens,
        ],
        *texts.fingerprint,
        *self._visits.fingerprint,
        *_synthetic_fingerprint(chosen, options),
      ]
    )

  def fill(self, epoch: int = 0) -> float:
    """Share of an epoch's token slots that hold a token."""
    with self._lock:
      return self._epoch_plan(epoch).fill

  def _plan(self, epoch):
    lengths, budget = self._lengths, self._options.budget
    clip_V, epoch_V = self._visits.of_round(epoch)
    caption_V, extra_V = draws.draw_visits(
      self._seed,
      epoch,
      lengths.caption_count_N[clip_V],
      lengths.extra_count_N[clip_V],
      caption_dropout=self._options.caption_dropout,
      extra_prob=self._options.extra_prob,
      synthetic_counts=lengths.synthetic_count_N[clip_V],
      synthetic_share=self._options.synthetic_captions,
    )
    length_V2 = lengths.of_visits(clip_V, caption_V, extra_V)
    rows = planner.plan(length_V2, budget, self._seed, epoch)
    fill = planner.fill(length_V2, rows, budget)
    logging.info(
      "epoch %d: %d clips in %d rows, %.1f %% full",
      epoch,
      len(length_V2),
      len(rows),
      100 * fill,
    )
    return _Rows(rows, np.stack([clip_V, epoch_V, caption_V, extra_V], 1), fill)

  def _load(self, epoch, entry) -> TrainingRow:
    del epoch  # each visit has that of its clip
    unreadable: list[int] = []
    segments = list(self._segments(entry, unreadable))
    width = segments[0].patch_LP.shape[1] if segments else self._patch_width
    size = packed_row.RowSize(
      self._options.budget,
      width,
      self._texts.width,
      condition_width=self._options.condition_width,
      image=self._options.image,
    )
    packed = packed_row.empty(TrainingRow, size)
    packed["clip_unreadable_N"][: len(unreadable)] = unreadable
    writer = packed_row.RowWriter(packed)
    for segment in segments:
      writer.add(segment)
    return packed

  def _segments(self, entry, unreadable) -> Iterator[Segment]:
    """The visits of a row; appends the clips that cannot be read to `unreadable`."""
    for n, epoch, caption, extra_count in entry:
      index = int(self._indices[n])
      clip = self._clips[index]
      if clip.id in self._leave_out:
        continue
      try:
        record = self._read(clip)
      except records.RecordError as e:
        self._bad_clips.add(clip.id, str(e))
        unreadable.append(index)
        continue
      rng = np.random.default_rng((self._seed, epoch, draws.VISIT, index))
      text = self._texts.text(clip, record, caption)
      segment = segment_of(rng, clip, record, extra_count, text, self._options)
      yield segment._replace(clip=index)

  def _read(self, clip):
    # A reader serves one thread at a time.
    with self._read_lock:
      record = self._reader.read(clip)
    if len(record["extras_NHWC"]) != len(clip.extras):
      raise records.RecordError(
        f"{clip.shard}: record {clip.index}: {len(record['extras_NHWC'])} extra "
        f"latents, the manifest says {len(clip.extras)}"
      )
    return record

  @functools.cached_property
  def _patch_width(self):
    """P, from the first record that can be read: for a row without a single one."""
    for index in self._indices:
      try:
        with self._read_lock:
          latent_THWC = self._reader.read(self._clips[index])["latent_THWC"]
      except records.RecordError:
        continue
      return latent_THWC.shape[-1] * int(np.prod(self._options.patch_size))
    raise ValueError("none of the latent records can be read; see bad_clips.jsonl")

  def __getstate__(self):
    return {**super().__getstate__(), "_read_lock": None}

  def __setstate__(self, state):
    super().__setstate__(state)
    self._read_lock = threading.Lock()


def segment_of(
  rng: np.random.Generator,
  clip: records.LatentClip,
  record: dict,
  extra_count: int,
  text: np.ndarray,
  options: PackedOptions,
) -> Segment:
  """One visit of a clip: its latent, then some of its images, all of them given.

  Args:
    rng: of the visit.
    clip, record: what is known of the clip, and its latents.
    extra_count: images that are appended.
    text: of the clip.
    options: how clips become rows.
  """
  scale = options.reference_fps / clip.fps
  grid = patches.grid_shape(clip.shape, options.patch_size)
  patch_LP = patches.patchify(record["latent_THWC"], options.patch_size)
  times = np.zeros(0, np.float32)
  if extra_count:
    chosen = np.sort(rng.permutation(len(clip.extras))[:extra_count])
    times = np.array([clip.extras[i] for i in chosen], np.float32)
    extras_NHWC = record["extras_NHWC"][chosen]
    extra_NLP = patches.patchify(extras_NHWC[:, None], options.patch_size)
    extra_LP = extra_NLP.reshape(-1, patch_LP.shape[1])
    patch_LP = np.concatenate([patch_LP, extra_LP])
  # Images at the end of a latent frame; they need patches of one frame.
  ends = [int(time) for time in times if time.is_integer()]
  given_THW = draws.draw_given(rng, grid, options.given_prob, ends)
  given_L = np.ones(len(patch_LP), bool)
  given_L[: given_THW.size] = given_THW.reshape(-1)
  position_L3 = patches.clip_positions(
    grid, options.patch_size[0] * scale, times * scale
  )
  segment = Segment(patch_LP, position_L3, given_L, [text])
  return segment._replace(**_beside(clip, record, options))


def _beside(clip, record, options) -> dict[str, Any]:
  """What a model reads of given frames beside the noise.

  Raises:
    ValueError: if the record was made for a model that reads none.
  """
  found = {}
  if options.condition_width:
    names = ["condition_THWC", *(["image_JV"] if options.image else [])]
    if missing := [name for name in names if name not in record]:
      raise ValueError(
        f"{clip.shard}: {clip.id} has no {missing[0]}, which this model reads: delete "
        "the folder encode/ to make it again"
      )
    found["condition_LQ"] = patches.patchify(
      record["condition_THWC"], options.patch_size
    )
  if options.image:
    found["image_JV"] = record["image_JV"]
  return found


class _Lengths(NamedTuple):
  """What plans are made of, for the N clips of a split.

  Attributes:
    token_N, frame_token_N: tokens of the clip, and of one image of its size.
    extra_count_N, caption_count_N: images and captions that a visit can choose from.
    synthetic_count_N: how many of the captions, the last ones, a model wrote.
    caption_length: text tokens of all captions in one array, and last of the empty
      text, which index -1 reaches.
  """

  token_N: np.ndarray
  frame_token_N: np.ndarray
  extra_count_N: np.ndarray
  caption_count_N: np.ndarray
  synthetic_count_N: np.ndarray
  caption_length: np.ndarray

  def of_visits(self, clip_V, caption_V, extra_V) -> np.ndarray:
    """(tokens, text tokens) of visits with these captions and images: int [V, 2]."""
    start_N = np.cumsum(self.caption_count_N) - self.caption_count_N
    place_V = np.where(caption_V < 0, -1, start_N[clip_V] + caption_V)
    token_V = self.token_N[clip_V] + extra_V * self.frame_token_N[clip_V]
    return np.stack([token_V, self.caption_length[place_V]], axis=1)


def _chosen(clips, split, size) -> np.ndarray:
  """Indices of the clips of a split, encoded at the budget of index `size`."""
  indices = split_indices(clips, split)
  size_N = np.array([clips[i].budget for i in indices])
  wanted = int(size_N.max()) if size < 0 else size
  indices = indices[size_N == wanted]
  if not len(indices):
    raise ValueError(f"no clip of split {split!r} is encoded at budget {wanted}")
  return indices


def _measure(clips, texts, options) -> _Lengths:
  budget = options.budget
  # A million clips have a handful of shapes.
  grid_of = functools.cache(lambda s: patches.grid_shape(s, options.patch_size))
  tokens, frame_tokens, extra_counts = [], [], []
  for clip in clips:
    try:
      t, h, w = grid_of(clip.shape)
      # Image latents have one frame, which only a patch of one frame divides.
      if clip.extras and options.extra_prob:
        grid_of((1, *clip.shape[1:]))
    except ValueError as e:
      raise ValueError(f"{clip.id}: {e}") from e
    room = budget.tokens - t * h * w
    if room < 0:
      raise ValueError(
        f"{clip.id}: {t * h * w} tokens, but a row holds {budget.tokens}"
      )
    # An image has nothing to say about itself; a long clip takes what fits.
    usable = min(len(clip.extras), room // (h * w)) if t > 1 else 0
    tokens.append(t * h * w)
    frame_tokens.append(h * w)
    extra_counts.append(usable)
  if texts.max_tokens > budget.text_tokens:
    raise ValueError(
      f"max_text_tokens is {texts.max_tokens}, but a row holds {budget.text_tokens}"
    )
  return _Lengths(
    token_N=np.array(tokens, np.int64),
    frame_token_N=np.array(frame_tokens, np.int64),
    extra_count_N=np.array(extra_counts, np.int64),
    caption_count_N=np.array([len(clip.captions) for clip in clips], np.int64),
    synthetic_count_N=np.array([clip.synthetic for clip in clips], np.int64),
    caption_length=np.asarray(texts.lengths(clips), np.int64),
  )


def _synthetic_fingerprint(clips, options) -> list:
  """What tells draws with synthetic captions apart; without such there is nothing."""
  counts = [[clip.synthetic, len(clip.captions)] for clip in clips]
  if not any(synthetic for synthetic, _ in counts):
    return []
  return [["synthetic", options.synthetic_captions, counts]]


class _Rows:
  """Plan of one epoch: row i is a list of (clip, its epoch, caption, extras)."""

  def __init__(self, rows, visit_V4, fill):
    self._rows = rows
    self._visit_V4 = visit_V4
    self.fill = fill

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, i):
    return self._visit_V4[self._rows[i]].tolist()
