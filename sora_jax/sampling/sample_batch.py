"""The arrays of a batch of rows to sample: what they are, written, taken apart."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple, TypedDict, cast

import numpy as np

from sora_jax.diffusion import noise_process
from sora_jax.models.dit import DiTConfig
from sora_jax.packing import packed_row, patches
from sora_jax.packing.packed_row import (
  Field,
  Float32,
  Int32,
  PackedBatch,
  PackedText,
  Place,
  RowWriter,
  Segment,
  TextWriter,
)
from sora_jax.packing.planner import Budget
from sora_jax.sampling import conditioning
from sora_jax.sampling.batching import RowClip
from sora_jax.sampling.conditioning import Prompt

# --- what a batch holds


class SamplingRow(TypedDict):
  """What sampling needs of a row beside a `PackedRow`; see there for the names.

  The patches of that row are what is known of the latents.
  """

  # What tokens begin as, at the first level; given ones hold their data, and keep it.
  start_LP: Float32
  # Noise level above which a token's known patch stands for what the network predicts.
  follow_L: Annotated[Any, Field(np.float32, np.inf)]
  # Loops, whose positions turn: (latent frame, latent frames), and time of a frame.
  turn_L2: Int32
  turn_step_L: Float32
  # Token whose prediction of the data is blended with the own one, and how much of it.
  twin_L: Int32
  twin_weight_L: Float32
  # Noise of a token in solvers that draw some: seed of its clip, and its index there.
  seed_L: Annotated[Any, Field(np.uint32)]
  token_L: Annotated[Any, Field(np.uint32)]
  # Level of noise that the network sees on the given tokens of each slot.
  given_level_N: Float32
  # Guidance scale of each slot.
  guidance_scale_N: Float32


# The same with a leading axis of rows.
SamplingBatch = SamplingRow


class NegativeRow(PackedText, total=False):
  """What guidance leads away from: other texts, and nothing of images in time.

  Images that lead somewhere are met closer than by the texts' guidance alone.
  """

  # As in `PackedRow`, but 0 for the tokens of images.
  segment_L: Int32


class SampleBatch(NamedTuple):
  """Rows as `integrate` takes them; also one row of them.

  Attributes:
    packed: clips and their texts, as in training.
    negative: for each slot, what guidance leads away from.
    sampling: how tokens begin and what else the solver must know of them.
  """

  packed: PackedBatch
  negative: NegativeRow
  sampling: SamplingBatch

  def row(self, index: int) -> "SampleBatch":
    """Views of one row, to write into."""
    return SampleBatch(
      packed_row.row_of(self.packed, index),
      packed_row.row_of(self.negative, index),
      packed_row.row_of(self.sampling, index),
    )

  def on_device(self) -> "SampleBatch":
    """The arrays that go to the devices: all but `clip_N`."""
    packed = {name: x for name, x in self.packed.items() if name != "clip_N"}
    return self._replace(packed=cast(PackedBatch, packed))


class SolverSlots(NamedTuple):
  """What the solver's table depends on, for each slot; stays on the host.

  Attributes:
    tokens_BN: tokens of the slot's clip, 0 for none.
    start_BN: noise level that it begins at.
  """

  tokens_BN: np.ndarray
  start_BN: np.ndarray


def empty_batch(rows: int, size: packed_row.RowSize) -> SampleBatch:
  """Rows of padding."""
  packed = packed_row.empty(PackedBatch, size, rows)
  negative = packed_row.empty(NegativeRow, size, rows)
  sampling = packed_row.empty(SamplingBatch, size, rows)
  sampling["twin_L"][:] = np.arange(size.budget.tokens)
  return SampleBatch(packed, negative, sampling)


# --- clips into rows, and latents out of them


@dataclasses.dataclass(frozen=True)
class RowLayout:
  """Writes clips into rows, as training lays them out.

  Attributes:
    model: sizes of the DiT.
    reference_fps: as in training.
    process: of the noise.
  """

  model: DiTConfig
  reference_fps: float
  process: str

  def batch(
    self,
    units: Sequence[list[RowClip]],
    planned: Sequence[Sequence[int]],
    rows: int,
    budget: Budget,
    guidance_scale: float,
  ) -> tuple[SampleBatch, SolverSlots]:
    """Rows of clips.

    Args:
      units: clips of each prompt.
      planned: of each row, the indices of its units, which `clip_N` then holds.
      rows: of the batch; those that are not planned are padding.
      budget: of a row.
      guidance_scale: where a request has none of its own.
    """
    text = units[planned[0][0]][0].texts[0][0]
    image_JV = units[planned[0][0]][0].prompt.image_JV
    size = packed_row.RowSize(
      budget,
      self.model.patch_width,
      condition_width=self.model.condition_width,
      image=None if image_JV is None else image_JV.shape,
    )
    if text.ndim > 1:
      size = size._replace(text_width=text.shape[1], text_dtype=text.dtype)
    batch = empty_batch(rows, size)
    batch.sampling["guidance_scale_N"][:] = guidance_scale
    shape = (rows, budget.segments)
    slots = SolverSlots(np.zeros(shape), np.ones(shape))
    for index, indices in enumerate(planned):
      row_slots = SolverSlots(*(value[index] for value in slots))
      self._write_row(batch.row(index), row_slots, {i: units[i] for i in indices})
    return batch, slots

  def _write_row(self, row: SampleBatch, slots: SolverSlots, units) -> None:
    """Writes the units of a row, by their index."""
    writer, negatives = RowWriter(row.packed), TextWriter(row.negative)
    for index, unit in units.items():
      places: list[Place] = []
      for clip in unit:
        known = self._known(clip.prompt)
        # The first of two that are blended is the result.
        segment = self._segment(clip, known)._replace(clip=-1 if places else index)
        place = writer.add(segment)
        for slot, (_, negative) in zip(place.slots, clip.texts, strict=True):
          negatives.add(negative, slot)
        segment_L = row.packed["segment_L"][place.tokens].copy()
        segment_L[math.prod(clip.prompt.grid) :] = 0
        row.negative["segment_L"][place.tokens] = segment_L
        self._write_tokens(row.sampling, place, clip.prompt, known)
        _write_slots(row.sampling, slots, place, clip.prompt)
        places.append(place)
      if len(unit) == 2:
        _write_twins(row.sampling, unit[0].prompt, places)

  def _segment(self, clip: RowClip, known: "_Known") -> Segment:
    """What a packed row holds of a clip."""
    prompt, (t, h, w) = clip.prompt, clip.prompt.grid
    scale = self._scale(prompt)
    times = [at * scale for at, _ in prompt.extras]
    # An extra image is of the shot that its frame is in.
    frames = [min(t - 1, int(np.ceil(at))) for at, _ in prompt.extras]
    return Segment(
      patch_LP=known.patch_LP,
      position_L3=patches.clip_positions(
        prompt.grid, self.model.patch_size[0] * scale, times
      ),
      given_L=known.given_L,
      texts=[own for own, _ in clip.texts],
      text_L=np.repeat(np.concatenate([clip.shot_T, clip.shot_T[frames]]), h * w),
      condition_LQ=None
      if prompt.condition_THWC is None
      else patches.patchify(prompt.condition_THWC, self.model.patch_size),
      image_JV=prompt.image_JV,
    )

  def _known(self, prompt: Prompt) -> "_Known":
    """What is known of a clip's tokens, those of extra images behind the others."""
    (t, h, w), patch_size = prompt.grid, self.model.patch_size
    count = t * h * w
    tokens = count + len(prompt.extras) * h * w
    known = _Known(
      patch_LP=np.zeros((tokens, self.model.patch_width), np.float32),
      given_L=np.arange(tokens) >= count,
      level_L=np.full(tokens, prompt.given_noise, np.float64),
      known_L=np.arange(tokens) >= count,
    )
    for i, (_, latent_HWC) in enumerate(prompt.extras):
      place = slice(count + i * h * w, count + (i + 1) * h * w)
      known.patch_LP[place] = patches.patchify(latent_HWC[None], patch_size)
    if prompt.latent_THWC is not None:
      known.patch_LP[:count] = patches.patchify(prompt.latent_THWC, patch_size)
      known.known_L[:count] = True
      if prompt.given_THW is not None:
        known.given_L[:count] = prompt.given_THW.reshape(-1)
      free_L = ~known.given_L[:count]
      known.level_L[:count][free_L] = prompt.strength
    return known

  def _write_tokens(
    self, sampling: SamplingRow, place: Place, prompt: Prompt, known: "_Known"
  ) -> None:
    """Writes how the tokens of a clip begin, and how they go on."""
    here, (t, h, w) = place.tokens, prompt.grid
    request = prompt.request
    # Noise of its own for each request: it does not depend on its company.
    seeds = (request.seed, prompt.start) if prompt.start else request.seed
    rng = np.random.default_rng(seeds)
    noise_LP = rng.standard_normal(known.patch_LP.shape, np.float32)
    sampling["start_LP"][here] = known.start(noise_LP, self.process)
    sampling["seed_L"][here] = (request.seed + 1_000_003 * prompt.start) % 2**32
    sampling["token_L"][here] = np.arange(len(noise_LP))
    if prompt.latent_THWC is not None and prompt.strength_THW is not None:
      follow_L = prompt.strength_THW.reshape(-1)
      sampling["follow_L"][here.start : here.start + len(follow_L)] = follow_L
    if prompt.loop:
      frame_L = np.repeat(np.arange(t), h * w)
      sampling["turn_L2"][here] = np.stack([frame_L, np.full_like(frame_L, t)], -1)
      step = self.model.patch_size[0] * self._scale(prompt)
      sampling["turn_step_L"][here] = step

  def _scale(self, prompt):
    """Latent frames of training in one of the prompt's."""
    return self.reference_fps / prompt.request.fps


class _Known(NamedTuple):
  """What is known of a clip's tokens.

  Attributes:
    patch_LP: their data, 0 where it is not known.
    known_L: whether it is.
    given_L: whether they stay as they are.
    level_L: noise level that known ones begin at.
  """

  patch_LP: np.ndarray
  known_L: np.ndarray
  given_L: np.ndarray
  level_L: np.ndarray

  def start(self, noise_LP: np.ndarray, process: str) -> np.ndarray:
    """What tokens begin as: data with noise on it, exact at level 0; else noise."""
    level_L1, known_L1 = self.level_L[:, None], self.known_L[:, None]
    alpha, sigma = noise_process.alpha_sigma(process, level_L1, np)
    noisy_LP = alpha * self.patch_LP + sigma * noise_LP
    known_LP = np.where(level_L1 > 0, noisy_LP, self.patch_LP).astype(np.float32)
    return np.where(known_L1, known_LP, noise_LP)


def _write_slots(sampling, slots: SolverSlots, place: Place, prompt: Prompt) -> None:
  here = slice(place.slots.start, place.slots.stop)
  slots.tokens_BN[here] = place.tokens.stop - place.tokens.start
  slots.start_BN[here] = prompt.strength or 1.0
  sampling["given_level_N"][here] = prompt.given_noise
  if prompt.request.guidance_scale is not None:
    sampling["guidance_scale_N"][here] = prompt.request.guidance_scale


def _write_twins(sampling, prompt: Prompt, places: Sequence[Place]) -> None:
  """Each noisy token of two clips looks at the other's prediction."""
  t, h, w = prompt.grid
  weight_L = np.repeat(conditioning.blend_weights(prompt), h * w)
  tokens = np.arange(t * h * w)
  first, second = (place.tokens.start + tokens for place in places)
  for own, other, weights in (
    (first, second, weight_L),
    (second, first, 1.0 - weight_L),
  ):
    sampling["twin_L"][own] = other
    sampling["twin_weight_L"][own] = weights


def take_apart(
  patch_BLP: np.ndarray,
  packed: PackedBatch,
  prompts: Sequence[Prompt],
  patch_size: tuple[int, int, int],
) -> Iterator[tuple[int, np.ndarray]]:
  """Index and latents of each prompt that the rows hold, in any order.

  patch_BLP: of the rows, as `integrate` returns them.
  """
  for patch_LP, segment_L, clip_N in zip(
    patch_BLP, packed["segment_L"], packed["clip_N"], strict=True
  ):
    for n in np.flatnonzero(clip_N >= 0):
      index = int(clip_N[n])
      yield index, latent_of(patch_LP[segment_L == n + 1], prompts[index], patch_size)


def latent_of(patch_LP: np.ndarray, prompt: Prompt, patch_size) -> np.ndarray:
  """Latents [T, H, W, C] of a clip's tokens; given ones are exactly what was given."""
  latent_THWC = patches.unpatchify(patch_LP, prompt.grid, patch_size)
  if prompt.given_THW is None:
    return latent_THWC
  # With noise on given tokens, the network saw them noisy; the result has them as is.
  assert prompt.latent_THWC is not None
  given = prompt.given_THW
  for dim, patch in enumerate(patch_size):
    given = np.repeat(given, patch, axis=dim)
  return np.where(given[..., None], prompt.latent_THWC, latent_THWC)
