"""Grain pipelines: pixel clips for the VAE, packed latents for the DiT.

Both data sets are endless and have random access: element i is found from i alone,
through epoch plans that every process computes alike, and its random draws depend on
(seed, epoch, clip) only. So the state of an iterator is one global index, and a run
goes on exactly where it stopped, on any number of hosts and workers.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import sys
import threading
from collections.abc import Sequence

import grain
import ml_dtypes
import numpy as np
from absl import flags, logging

from sora_jax.data import records
from sora_jax.data.clips import Clip
from sora_jax.data.video import reader
from sora_jax.packing import patches, planner, time_grid

Batch = dict[str, np.ndarray]

# What a draw is for: keeps the random streams of one epoch apart.
_ORDER, _CROP, _PLAN, _VISIT = range(4)

GIVEN_PATTERNS = ("first", "last", "ends", "frames", "gap", "box")


# --- random draws: pure functions


def draw_visits(
  seed: int,
  epoch: int,
  caption_counts: np.ndarray,
  extra_counts: np.ndarray,
  *,
  caption_dropout: float,
  extra_prob: float,
) -> tuple[np.ndarray, np.ndarray]:
  """Draws what decides the length of every clip's visit in an epoch.

  One vectorised draw for all clips: a generator for each costs 15 s a million clips.

  Args:
    seed: of the run.
    epoch: of the visits.
    caption_counts: int [N], captions of each clip.
    extra_counts: int [N], image latents kept with each clip.
    caption_dropout: probability of the empty text.
    extra_prob: probability that a clip with image latents gets 1 or more of them.

  Returns:
    caption_N: index of the caption, -1 for the empty text.
    extra_N: how many image latents are appended.
  """
  rng = np.random.default_rng((seed, epoch, _PLAN))
  choice, dropped, with_extra, extra = rng.random((4, len(caption_counts)))
  caption_N = np.floor(choice * caption_counts).astype(np.int64)
  caption_N[(caption_counts == 0) | (dropped < caption_dropout)] = -1
  extra_N = 1 + np.floor(extra * extra_counts).astype(np.int64)
  extra_N[(extra_counts == 0) | (with_extra >= extra_prob)] = 0
  return caption_N, extra_N


def draw_given(
  rng: np.random.Generator, grid: tuple[int, int, int], prob: float
) -> np.ndarray:
  """Draws which tokens of a clip are given: bool [t, h, w], never all of them.

  A single frame has none; neither has a share 1 - prob of the other clips.
  """
  if grid[0] < 2 or rng.random() >= prob:
    return np.zeros(grid, bool)
  return given_mask(rng, grid, GIVEN_PATTERNS[rng.integers(len(GIVEN_PATTERNS))])


def given_mask(
  rng: np.random.Generator, grid: tuple[int, int, int], pattern: str
) -> np.ndarray:
  """A random mask of one pattern: bool [t, h, w], some tokens given, never all.

  "first": the first frame, or more. "last": likewise at the end. "ends": both.
  "frames": some frames anywhere. "gap": all but a run of frames inside.
  "box": all but a box of the frame, through time, or only that box.
  A grid too small for its pattern has its first frame given.

  Args:
    rng: generator.
    grid: patches (t, h, w); t at least 2.
    pattern: one of GIVEN_PATTERNS.
  """
  t, h, w = grid
  assert t > 1, grid
  given = np.zeros(grid, bool)
  if pattern == "first":
    given[: _prefix(rng, t - 1)] = True
  elif pattern == "last":
    given[t - _prefix(rng, t - 1) :] = True
  elif pattern == "ends" and t > 2:
    head = _prefix(rng, t - 2)
    given[:head] = True
    given[t - _prefix(rng, t - 1 - head) :] = True
  elif pattern == "frames":
    given[rng.permutation(t)[: rng.integers(1, t)]] = True
  elif pattern == "gap" and t > 2:
    start = rng.integers(1, t - 1)
    given[:] = True
    given[start : rng.integers(start + 1, t)] = False
  elif pattern == "box" and h * w > 1:
    while True:
      top, bottom = np.sort(rng.choice(h + 1, 2, replace=False))
      left, right = np.sort(rng.choice(w + 1, 2, replace=False))
      if (bottom - top) * (right - left) < h * w:
        break
    given[:, top:bottom, left:right] = True
    if rng.random() < 0.5:
      given = ~given
  elif pattern in GIVEN_PATTERNS:
    given[0] = True
  else:
    raise ValueError(f"pattern {pattern!r} is none of {GIVEN_PATTERNS}")
  return given


def _prefix(rng, limit):
  """1 in half of the draws (the case people ask for), else up to limit."""
  return 1 if rng.random() < 0.5 else int(rng.integers(1, limit + 1))


# --- data sets


class _Endless:
  """Elements 0, 1, 2, ... of epochs of different sizes.

  A subclass has `_plan(epoch)` -> a sequence with one entry an element, and
  `_load(epoch, entry)` -> the element. Plans are kept for the last two epochs only.
  """

  def __init__(self, fingerprint):
    self.fingerprint = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:16]
    self._starts = [0]  # element that each epoch begins with
    self._plans = {}
    self._lock = threading.Lock()

  def __len__(self):
    return sys.maxsize

  def __getitem__(self, index: int) -> Batch:
    with self._lock:
      epoch, offset = self._find(index)
      entry = self._epoch_plan(epoch)[offset]
    return self._load(epoch, entry)

  def elements_per_epoch(self, epoch: int = 0) -> int:
    """Number of elements of an epoch."""
    with self._lock:
      return len(self._epoch_plan(epoch))

  def epoch_starts(self, index: int) -> list[int]:
    """First elements of all epochs up to the one of `index`, that one included.

    Kept in checkpoints: without them, resuming in epoch n makes n plans anew.
    """
    with self._lock:
      epoch, _ = self._find(index)
      return self._starts[: epoch + 1]

  def set_epoch_starts(self, starts: Sequence[int]) -> None:
    """Takes over what `epoch_starts` returned for the same data set."""
    with self._lock:
      if len(starts) > len(self._starts):
        self._starts = [int(start) for start in starts]

  def _find(self, index):
    while index >= self._starts[-1]:
      plan = self._epoch_plan(len(self._starts) - 1)
      self._starts.append(self._starts[-1] + len(plan))
    # The newest epoch, but for a few elements around its start.
    epoch = len(self._starts) - 2
    while index < self._starts[epoch]:
      epoch -= 1
    return epoch, index - self._starts[epoch]

  def _epoch_plan(self, epoch):
    if epoch not in self._plans:
      if len(self._plans) > 1:
        del self._plans[next(iter(self._plans))]
      self._plans[epoch] = self._plan(epoch)
    return self._plans[epoch]

  def __getstate__(self):
    return {**self.__dict__, "_plans": {}, "_lock": None}

  def __setstate__(self, state):
    self.__dict__.update(state, _lock=threading.Lock())


class ClipDataset(_Endless):
  """Pixel clips of one static size, for the VAE. Element i is one visit of a clip.

  An element has `video_THWC` uint8, a random window in time and space of the clip,
  smaller clips padded at the end of each axis by repeating the edge; `valid_3` int32,
  its valid (t, h, w), all 0 for a clip that cannot be read; `clip` int32, its index
  in `clips`.
  """

  def __init__(
    self,
    clips: Sequence[Clip],
    crop: tuple[int, int, int],
    seed: int,
    *,
    split: str = "train",
    bad_clips_folder: str | None = None,
  ):
    """Raises ValueError if the split is empty or the crop is not (1 + 4k, H, W)."""
    if not time_grid.is_on_grid(crop[0]):
      raise ValueError(f"a crop has 1 + 4k frames, got {crop[0]}")
    self._clips = list(clips)
    self._indices = _split_indices(clips, split)
    self._crop = tuple(crop)
    self._seed = seed
    self._bad_clips = BadClips(bad_clips_folder)
    ids = [self._clips[i].id for i in self._indices]
    super().__init__(["clips", ids, self._crop, seed])

  def _plan(self, epoch):
    rng = np.random.default_rng((self._seed, epoch, _ORDER))
    return rng.permutation(self._indices)

  def _load(self, epoch, index):
    index = int(index)
    clip = self._clips[index]
    T, H, W = self._crop
    t, h, w = min(T, clip.frames), min(H, clip.height), min(W, clip.width)
    rng = np.random.default_rng((self._seed, epoch, _CROP, index))
    first, top, left = (
      int(rng.integers(n + 1))
      for n in (clip.frames - t, clip.height - h, clip.width - w)
    )
    try:
      video_THWC = reader.read(
        clip.path,
        start=clip.start + first / clip.fps,
        frames=t,
        fps=clip.fps,
        size=(clip.height, clip.width),
      )
    # A file can break in more ways than the decoder names; none of them ends a run.
    except (ValueError, RuntimeError, OSError) as e:
      self._bad_clips.add(clip.id, getattr(e, "reason", str(e)))
      video_THWC = np.zeros((T, H, W, 3), np.uint8)
      t = h = w = 0
    else:
      video_THWC = video_THWC[:, top : top + h, left : left + w]
      video_THWC = np.pad(
        video_THWC, ((0, T - t), (0, H - h), (0, W - w), (0, 0)), mode="edge"
      )
    return {
      "video_THWC": video_THWC,
      "valid_3": np.array([t, h, w], np.int32),
      "clip": np.array(index, np.int32),
    }


def empty_row(
  budget: planner.Budget, patch_width: int, text_width: int | None = None
) -> Batch:
  """A row of padding: the names, shapes and dtypes that `PackedDataset` gives.

  Args:
    budget: size of a row.
    patch_width: P, numbers of one token.
    text_width: of a frozen encoder's features; None = the texts are ids.
  """
  L, S, N = dataclasses.astuple(budget)
  row = {
    "patch_LP": np.zeros((L, patch_width), np.float32),
    "segment_L": np.zeros(L, np.int32),
    "position_L3": np.zeros((L, 3), np.float32),
    "group_L": np.zeros(L, np.int32),
    "text_segment_S": np.zeros(S, np.int32),
    "clip_N": np.full(N, -1, np.int32),
  }
  if text_width is None:
    return row | {n: np.zeros(S, np.int32) for n in ("text_S", "text_position_S")}
  return row | {"text_SE": np.zeros((S, text_width), ml_dtypes.bfloat16)}


class PackedDataset(_Endless):
  """Rows of packed latent patches and texts, for the DiT. Element i is one row.

  An element has, for L tokens, S text tokens and N segments (the budget's):
    patch_LP float32: clean patches, (latent - mean) / std.
    segment_L int32: 1..N in the order of the row, 0 for padding.
    position_L3 float32: (t, h, w); t in latent frames at `reference_fps`, so real
      time; h and w in patches. Extra tokens sit at their own, fractional t.
    group_L int32: 2 * (segment - 1) + given; 0 for padding.
    text_S, text_segment_S, text_position_S int32: the texts; segment 0 is padding.
      With `empty_text` instead of ids and positions text_SE bfloat16: their features.
    clip_N int32: index in `clips` of each segment, -1 for none.
  A record that cannot be read takes no segment: its tokens are padding.
  """

  def __init__(
    self,
    clips: Sequence[records.LatentClip],
    folder: str,
    tokenizer,
    budget: planner.Budget,
    patch_size: tuple[int, int, int],
    seed: int,
    *,
    max_text_tokens: int,
    reference_fps: float,
    split: str = "train",
    caption_dropout: float = 0.1,
    given_prob: float = 0.5,
    extra_prob: float = 0.25,
    latent_mean: np.ndarray | float = 0.0,
    latent_std: np.ndarray | float = 1.0,
    bad_clips_folder: str | None = None,
    empty_text: records.EmptyText | None = None,
    pad_text_to: int = 0,
  ):
    """Reads no record, but encodes all captions once to know their lengths.

    Args:
      clips: rows of the latents manifest, of all splits.
      folder: of the shards.
      tokenizer: a `tokenizer.Tokenizer`; None with `empty_text`.
      budget: size of a row.
      patch_size: (pt, ph, pw) in latent pixels.
      seed: of the run.
      max_text_tokens: longest text of one clip, its end included; longer ones are cut.
      reference_fps: pixel frame rate whose latent frames are the unit of t.
      split: "train" or "heldout".
      caption_dropout: share of visits with the empty text.
      given_prob: share of videos with given tokens.
      extra_prob: share of videos with image latents appended, where there are any.
      latent_mean: of each channel, or one number.
      latent_std: likewise.
      bad_clips_folder: where bad_clips.jsonl is written; None only logs.
      empty_text: takes the place of no caption, where records hold features.
      pad_text_to: zero features that are attended fill up each caption to that many.

    Raises:
      ValueError: if the split is empty, a latent does not divide into patches, a clip
        is longer than the budget, or has no features; names the clip.
    """
    self._clips = list(clips)
    self._indices = _split_indices(clips, split)
    self._empty_text = empty_text
    self._pad_text_to = pad_text_to
    self._reader = records.LatentReader(folder)
    self._tokenizer = tokenizer
    self._budget = budget
    self._patch_size = tuple(patch_size)
    self._seed = seed
    self._max_text_tokens = max_text_tokens
    self._reference_fps = reference_fps
    self._caption_dropout = caption_dropout
    self._given_prob = given_prob
    self._extra_prob = extra_prob
    self._mean = np.asarray(latent_mean, np.float32)
    self._std = np.asarray(latent_std, np.float32)
    self._bad_clips = BadClips(bad_clips_folder)
    self._read_lock = threading.Lock()
    self._measure()
    fingerprint = [
      "latents",
      [self._clips[i].id for i in self._indices],
      [budget.tokens, budget.text_tokens, budget.segments],
      [self._patch_size, seed, caption_dropout, extra_prob, max_text_tokens],
    ]
    if empty_text:
      fingerprint.append([empty_text.encoder, pad_text_to])
    super().__init__(fingerprint)

  def fill(self, epoch: int = 0) -> float:
    """Share of an epoch's token slots that hold a token."""
    with self._lock:
      return self._epoch_plan(epoch).fill

  def _measure(self):
    """Finds the lengths that plans are made of."""
    clips = [self._clips[i] for i in self._indices]
    # A million clips have a handful of shapes.
    grid_of = functools.cache(lambda s: patches.grid_shape(s, self._patch_size))
    tokens, frame_tokens, extra_counts = [], [], []
    for clip in clips:
      try:
        t, h, w = grid_of(clip.shape)
        # Image latents have one frame, which only a patch of one frame divides.
        if clip.extras and self._extra_prob:
          grid_of((1, *clip.shape[1:]))
      except ValueError as e:
        raise ValueError(f"{clip.id}: {e}") from e
      room = self._budget.tokens - t * h * w
      if room < 0:
        raise ValueError(
          f"{clip.id}: {t * h * w} tokens, but a row holds {self._budget.tokens}"
        )
      # An image has nothing to say about itself; a long clip takes what fits.
      usable = min(len(clip.extras), room // (h * w)) if t > 1 else 0
      tokens.append(t * h * w)
      frame_tokens.append(h * w)
      extra_counts.append(usable)
    if self._max_text_tokens > self._budget.text_tokens:
      raise ValueError(
        f"max_text_tokens is {self._max_text_tokens}, but a row holds "
        f"{self._budget.text_tokens}"
      )
    self._tokens_N = np.array(tokens, np.int64)
    self._frame_tokens_N = np.array(frame_tokens, np.int64)
    self._extra_counts_N = np.array(extra_counts, np.int64)
    self._caption_counts_N = np.array([len(clip.captions) for clip in clips], np.int64)
    # Lengths of all captions in one array; those of clip n begin at caption_start_N[n].
    # The last entry is the empty text, which -1 reaches.
    self._caption_start_N = np.cumsum(self._caption_counts_N) - self._caption_counts_N
    self._caption_length = np.array(self._caption_lengths(clips), np.int64)

  def _caption_lengths(self, clips):
    if self._empty_text is None:
      texts = [caption for clip in clips for caption in clip.captions]
      return self._tokenizer.lengths([*texts, ""], self._max_text_tokens)
    for clip in clips:
      if len(clip.text_lengths) != len(clip.captions):
        raise ValueError(
          f"{clip.id}: features of {len(clip.text_lengths)} of {len(clip.captions)} "
          "captions; encode it again with config.text"
        )
    lengths = [length for clip in clips for length in clip.text_lengths]
    return np.maximum([*lengths, len(self._empty_text.features_SE)], self._pad_text_to)

  def _draw(self, epoch):
    caption_N, extra_N = draw_visits(
      self._seed,
      epoch,
      self._caption_counts_N,
      self._extra_counts_N,
      caption_dropout=self._caption_dropout,
      extra_prob=self._extra_prob,
    )
    place_N = np.where(caption_N < 0, -1, self._caption_start_N + caption_N)
    length_N2 = np.stack(
      [
        self._tokens_N + extra_N * self._frame_tokens_N,
        self._caption_length[place_N],
      ],
      axis=1,
    )
    return length_N2, caption_N, extra_N

  def _plan(self, epoch):
    length_N2, caption_N, extra_N = self._draw(epoch)
    rows = planner.plan(length_N2, self._budget, self._seed, epoch)
    fill = planner.fill(length_N2, rows, self._budget)
    logging.info(
      "epoch %d: %d clips in %d rows, %.1f %% full",
      epoch,
      len(length_N2),
      len(rows),
      100 * fill,
    )
    return _Rows(rows, caption_N, extra_N, fill)

  def _load(self, epoch, entry):
    row = None
    segment = token = text_token = 0
    for n, caption_index, extra_count in entry:
      index = int(self._indices[n])
      clip = self._clips[index]
      try:
        # A reader serves one thread at a time.
        with self._read_lock:
          record = self._reader.read(clip)
        if len(record["extras_NHWC"]) != len(clip.extras):
          raise records.RecordError(
            f"{clip.shard}: record {clip.index}: {len(record['extras_NHWC'])} extra "
            f"latents, the manifest says {len(clip.extras)}"
          )
      except records.RecordError as e:
        self._bad_clips.add(clip.id, str(e))
        continue
      rng = np.random.default_rng((self._seed, epoch, _VISIT, index))
      patch_lP, position_l3, given_l = self._tokens(rng, clip, record, extra_count)
      if row is None:
        row = self._empty_row(patch_lP.shape[1])
      text_length = self._put_text(row, text_token, clip, record, caption_index)
      here = slice(token, token + len(patch_lP))
      there = slice(text_token, text_token + text_length)
      row["patch_LP"][here] = patch_lP
      row["position_L3"][here] = position_l3
      row["group_L"][here] = 2 * segment + given_l
      row["segment_L"][here] = segment + 1
      row["text_segment_S"][there] = segment + 1
      row["clip_N"][segment] = index
      segment, token, text_token = segment + 1, here.stop, there.stop
    return row or self._empty_row(self._patch_width)

  def _put_text(self, row, start, clip, record, caption_index):
    """Writes ids or features of a caption into a row; how many places it takes."""
    if self._empty_text is None:
      text = clip.captions[caption_index] if caption_index >= 0 else ""
      ids = self._tokenizer.encode(text, self._max_text_tokens)
      row["text_S"][start : start + len(ids)] = ids
      row["text_position_S"][start : start + len(ids)] = np.arange(len(ids))
      return len(ids)
    features_SE = self._empty_text.features_SE
    if caption_index >= 0:
      features_SE = record["texts"][caption_index]
    row["text_SE"][start : start + len(features_SE)] = features_SE
    return max(len(features_SE), self._pad_text_to)

  def _empty_row(self, P):
    features = self._empty_text
    return empty_row(self._budget, P, features and features.features_SE.shape[1])

  def _tokens(self, rng, clip, record, extra_count):
    """Tokens of one visit: patches [l, P], positions [l, 3], given bool [l]."""
    scale = self._reference_fps / clip.fps
    latent_THWC = (record["latent_THWC"] - self._mean) / self._std
    grid = patches.grid_shape(clip.shape, self._patch_size)
    patch_lP = patches.patchify(latent_THWC, self._patch_size)
    position_l3 = patches.grid_positions(grid)
    position_l3[:, 0] *= self._patch_size[0] * scale
    given_l = draw_given(rng, grid, self._given_prob).reshape(-1)
    if not extra_count:
      return patch_lP, position_l3, given_l
    chosen = np.sort(rng.permutation(len(clip.extras))[:extra_count])
    extras_NHWC = (record["extras_NHWC"][chosen] - self._mean) / self._std
    extra_grid = (1, *grid[1:])
    extra_lP = patches.patchify(extras_NHWC[:, None], self._patch_size)
    extra_l3 = np.tile(patches.grid_positions(extra_grid), (extra_count, 1))
    times = np.array([clip.extras[i] for i in chosen], np.float32) * scale
    extra_l3[:, 0] = np.repeat(times, grid[1] * grid[2])
    return (
      np.concatenate([patch_lP, extra_lP.reshape(-1, patch_lP.shape[1])]),
      np.concatenate([position_l3, extra_l3]),
      np.concatenate([given_l, np.ones(len(extra_l3), bool)]),
    )

  @functools.cached_property
  def _patch_width(self):
    """P, from the first record that can be read: for a row without a single one."""
    for index in self._indices:
      try:
        with self._read_lock:
          latent_THWC = self._reader.read(self._clips[index])["latent_THWC"]
      except records.RecordError:
        continue
      return latent_THWC.shape[-1] * int(np.prod(self._patch_size))
    raise ValueError("none of the latent records can be read; see bad_clips.jsonl")

  def __getstate__(self):
    return {**super().__getstate__(), "_read_lock": None}

  def __setstate__(self, state):
    super().__setstate__(state)
    self._read_lock = threading.Lock()


class _Rows:
  """Plan of one epoch: row i is a list of (clip, caption index, number of extras)."""

  def __init__(self, rows, caption_N, extra_N, fill):
    self._rows = rows
    self._caption_N = caption_N
    self._extra_N = extra_N
    self.fill = fill

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, i):
    return [(n, int(self._caption_N[n]), int(self._extra_N[n])) for n in self._rows[i]]


def _split_indices(clips, split):
  indices = np.flatnonzero([clip.split == split for clip in clips])
  if not len(indices):
    splits = sorted({clip.split for clip in clips})
    raise ValueError(f"no clip of split {split!r} among {len(clips)} clips of {splits}")
  return indices


class BadClips:
  """Notes clips that could not be read, once a process, in <folder>/bad_clips.jsonl."""

  def __init__(self, folder: str | None):
    self._path = None
    if folder is not None:
      os.makedirs(folder, exist_ok=True)
      self._path = os.path.join(os.fspath(folder), "bad_clips.jsonl")
    self._seen = set()

  def add(self, clip_id: str, reason: str) -> None:
    """Logs a clip and appends {"id", "reason"}."""
    if clip_id in self._seen:
      return
    self._seen.add(clip_id)
    logging.warning("left out clip %s: %s", clip_id, reason)
    if self._path is None:
      return
    line = json.dumps({"id": clip_id, "reason": reason}, ensure_ascii=False) + "\n"
    # One write to a descriptor in append mode: lines of several workers do not mix.
    descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
      os.write(descriptor, line.encode())
    finally:
      os.close(descriptor)


# --- batches


class Batches:
  """Endless batches of a data set: this host's rows of each global batch.

  State is JSON-able, the same on all hosts, and good for any number of hosts and
  workers: it is the global index of the next element.
  """

  def __init__(
    self,
    dataset: ClipDataset | PackedDataset,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
  ):
    """Args: batch_size is the global one. 0 workers: one thread of this process.

    Raises:
      ValueError: if the hosts cannot share a batch evenly.
    """
    if batch_size % process_count:
      raise ValueError(
        f"batch_size {batch_size} is not divisible by {process_count} processes"
      )
    self._dataset = dataset
    workers_options = None
    if workers:
      # Grain reads absl flags when it starts workers; notebooks never parse any.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      workers_options = grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=2
      )
    # Elements of the threads' buffer are whole batches: two are enough, and one thread
    # leaves the cores to the train step. Grain's defaults are 16 and 500.
    self._iterator = iter(
      grain.experimental.ElasticIterator(
        grain.MapDataset.source(dataset),
        batch_size,
        grain.sharding.ShardOptions(process_index, process_count),
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=2),
        multiprocessing_options=workers_options,
      )
    )

  def __iter__(self):
    return self

  def __next__(self) -> Batch:
    return next(self._iterator)

  def get_state(self) -> dict:
    """State after the last batch that was returned."""
    state = self._iterator.get_state()
    starts = self._dataset.epoch_starts(state["global_next_index"])
    return {
      **state,
      "epoch_starts": starts,
      "fingerprint": self._dataset.fingerprint,
    }

  def set_state(self, state: dict) -> None:
    """Goes on after the batch that `state` was taken behind."""
    if state["fingerprint"] == self._dataset.fingerprint:
      self._dataset.set_epoch_starts(state["epoch_starts"])
    else:
      logging.warning(
        "the data set is not the one of the checkpoint (other clips, sizes or seed): "
        "going on at element %d of the new one",
        state["global_next_index"],
      )
    self._iterator.set_state({"global_next_index": int(state["global_next_index"])})

  def close(self) -> None:
    """Stops threads and workers."""
    self._iterator.close()


def first_batches(
  dataset: ClipDataset | PackedDataset,
  batch_size: int,
  count: int,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> list[Batch]:
  """The first `count` batches, for evaluation: always the same ones.

  Raises:
    ValueError: if the hosts cannot share a batch evenly.
  """
  if batch_size % process_count:
    raise ValueError(
      f"batch_size {batch_size} is not divisible by {process_count} processes"
    )
  batches = []
  for start in range(0, count * batch_size, batch_size):
    indices = range(start + process_index, start + batch_size, process_count)
    elements = [dataset[i] for i in indices]
    batches.append({k: np.stack([e[k] for e in elements]) for k in elements[0]})
  return batches


def report_bad_clips(folder: str, total: int) -> int:
  """Logs how many clips of `total` could not be read so far, and why; the count."""
  path = os.path.join(os.fspath(folder), "bad_clips.jsonl")
  if not os.path.exists(path):
    return 0
  with open(path, encoding="utf-8") as file:
    # Several processes may have noted the same clip.
    reasons = {row["id"]: row["reason"] for row in map(json.loads, file)}
  counts = collections.Counter(reasons.values()).most_common(5)
  shown = "; ".join(f"{count} x {reason}" for reason, count in counts)
  logging.warning(
    "%d of %d clips could not be read: %s; all in %s", len(reasons), total, shown, path
  )
  return len(reasons)
