"""How prompts share packed rows while sampling: what fits, and the arrays of a batch.

A unit is what must be in one row: a clip, or two whose predictions are blended. For
training `data.pack` plans epochs; here a clip may need several texts, and a row grows
for one that does not fit.
"""

import dataclasses

import numpy as np

from sora_jax.diffusion import noise_process
from sora_jax.models.dit import DiTConfig
from sora_jax.models.meta import DiTMeta
from sora_jax.packing import patches
from sora_jax.sampling import conditioning
from sora_jax.sampling.conditioning import Prompt

# Where padding costs less than compiling for another length, and what lengths are a
# multiple of, so that they divide by the chips that share them.
_LEAST, _STEP = 4096, 1024


@dataclasses.dataclass(frozen=True)
class RowBudget:
  """What a row can hold; a slot is a text with its two groups of tokens."""

  tokens: int
  text_tokens: int
  slots: int

  def fits(self, *sizes: tuple[int, int, int]) -> bool:
    """Whether clips of these (tokens, text tokens, slots) share a row."""
    room = (self.tokens, self.text_tokens, self.slots)
    return all(
      sum(size) <= r for size, r in zip(zip(*sizes, strict=True), room, strict=True)
    )


@dataclasses.dataclass
class RowClip:
  """A clip of a row: one prompt, or one of the two texts that a prompt blends."""

  prompt: Prompt
  texts: list[tuple[np.ndarray, np.ndarray]]  # of each slot: with and without
  shot_T: np.ndarray  # slot of each latent frame

  @property
  def size(self) -> tuple[int, int, int]:
    t, h, w = self.prompt.grid
    text = max(sum(map(len, side)) for side in zip(*self.texts, strict=True))
    return (t + len(self.prompt.extras)) * h * w, text, len(self.texts)


def size_of(unit: list[RowClip]) -> tuple[int, int, int]:
  """(tokens, text tokens, slots) of a unit."""
  return tuple(map(sum, zip(*[clip.size for clip in unit], strict=True)))


def budget_of(sizes, meta: DiTMeta, ways: int = 1) -> RowBudget:
  """Row of training, or of another length for clips that need more or less.

  Tokens change by themselves, texts and slots together: a long video has one text.

  Args:
    sizes: (tokens, text tokens, slots) of each clip.
    meta: of the model.
    ways: rows that are computed side by side in any case.
  """
  tokens, texts, slots = meta.tokens, meta.text_tokens, meta.segments
  share = -(-sum(size[0] for size in sizes) // ways)
  tokens = row_length(max(min(share, tokens), *(size[0] for size in sizes)), tokens)
  while any(size[1] > texts or size[2] > slots for size in sizes):
    texts, slots = 2 * texts, 2 * slots
  return RowBudget(tokens, texts, slots)


def row_length(wanted: int, trained: int) -> int:
  """Tokens of a row: at least `wanted`, and of few lengths, as each is compiled.

  They are the `trained` length times powers of two; from 4096 on also 5, 6 and 7
  eighths of those, in steps of 1024. A row is not cut below 4096.
  """
  length = trained
  while length < wanted:
    length *= 2
  while length % 2 == 0 and length // 2 >= max(wanted, _LEAST):
    length //= 2
  for eighths in (5, 6, 7):
    part = -(-length * eighths // 8 // _STEP) * _STEP
    if max(wanted, _LEAST) <= part < length:
      return part
  return length


def plan_rows(sizes, budget: RowBudget) -> list[list[int]]:
  """Rows of indices: each clip, longest first, into the first row with room."""
  rows = []
  for index in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
    for row in rows:
      if budget.fits(sizes[index], *(sizes[i] for i in row)):
        row.append(index)
        break
    else:
      rows.append([index])
  return rows


def empty_batch(rows: int, budget: RowBudget, patch_width: int, text) -> dict:
  """Rows of padding, as `denoiser.integrate` takes them.

  text: one of the texts, ids [S] or features [S, E].
  """
  L, S, N = dataclasses.astuple(budget)
  text_name = "text_S" if text.ndim == 1 else "text_SE"
  shapes = {
    **{n: ((L, patch_width), np.float32) for n in ("start_LP", "known_LP")},
    "position_L3": ((L, 3), np.float32),
    "turn_L2": ((L, 2), np.int32),
    "turn_step_L": ((L,), np.float32),
    **{n: ((L,), np.float32) for n in ("twin_weight_L", "follow_L")},
    **{n: ((L,), np.int32) for n in ("segment_L", "group_L", "twin_L")},
    **{n: ((L,), np.uint32) for n in ("seed_L", "token_L")},
    "given_level_N": ((N,), np.float32),
  }
  for prefix in ("", "empty_"):
    for name in ("text_segment_S", "text_position_S"):
      shapes[prefix + name] = ((S,), np.int32)
    shapes[prefix + text_name] = ((S, *text.shape[1:]), text.dtype)
  batch = {n: np.zeros((rows, *shape), dt) for n, (shape, dt) in shapes.items()}
  batch["twin_L"][:] = np.arange(L)
  batch["follow_L"][:] = np.inf
  return batch


@dataclasses.dataclass(frozen=True)
class RowLayout:
  """Writes clips into rows, as training lays them out.

  Attributes:
    model: sizes of the DiT. reference_fps: as in training. process: of the noise.
    text_name: text_S for ids, text_SE for features.
  """

  model: DiTConfig
  reference_fps: float
  process: str
  text_name: str

  def batch(
    self, units_of_rows, rows: int, budget: RowBudget, guidance_scale: float
  ) -> tuple[dict, np.ndarray, list[list[int]]]:
    """Rows of clips, as `denoiser.integrate` takes them.

    Args:
      units_of_rows: of each row its units, of each unit its clips.
      rows: of the batch; those without units are padding.
      budget: of a row. guidance_scale: where a request has none of its own.

    Returns:
      The batch, with tokens_N and start_N (tokens and first level of each slot) for the
      solver; guidance scales [B, N]; of each row where its units begin.
    """
    like = units_of_rows[0][0][0].texts[0][0]
    batch = empty_batch(rows, budget, self.model.patch_width, like)
    text_name = self.text_name
    batch["tokens_N"] = np.zeros((rows, budget.slots))
    batch["start_N"] = np.ones((rows, budget.slots))
    scale_BN = np.full((rows, budget.slots), guidance_scale, np.float32)
    places = []
    for row, units in enumerate(units_of_rows):
      view = {name: value[row] for name, value in batch.items()}
      segment = token = slot = 0
      text_starts = [0, 0]
      places.append([])
      for unit in units:
        places[-1].append(token)
        begins = []
        for clip in unit:
          request, count = clip.prompt.request, clip.size[0]
          here = slice(token, token + count)
          view["segment_L"][here] = segment + 1
          self._put_tokens(view, here, clip, slot)
          for n, pair in enumerate(clip.texts, slot):
            view["tokens_N"][n] = count
            view["start_N"][n] = clip.prompt.strength or 1.0
            view["given_level_N"][n] = clip.prompt.given_noise
            if request.guidance_scale is not None:
              scale_BN[row, n] = request.guidance_scale
            for k, (prefix, text) in enumerate(zip(("", "empty_"), pair, strict=True)):
              there = slice(text_starts[k], text_starts[k] + len(text))
              view[prefix + text_name][there] = text
              view[f"{prefix}text_segment_S"][there] = n + 1
              view[f"{prefix}text_position_S"][there] = np.arange(len(text))
              text_starts[k] = there.stop
          begins.append(token)
          segment, token, slot = segment + 1, here.stop, slot + len(clip.texts)
        if len(unit) == 2:
          self._put_twins(view, unit[0], begins)
    return batch, scale_BN, places

  def _put_tokens(self, view, here, clip, slot):
    """Writes the tokens of a clip into its place of a row."""
    prompt, (t, h, w) = clip.prompt, clip.prompt.grid
    request = prompt.request
    count = t * h * w
    # Noise of its own for each request: it does not depend on its company.
    seeds = (request.seed, prompt.start) if prompt.start else request.seed
    rng = np.random.default_rng(seeds)
    noise_LP = rng.standard_normal(
      (here.stop - here.start, self.model.patch_width), np.float32
    )
    given_L = np.zeros(len(noise_LP), bool)
    given_L[count:] = True
    start_LP = noise_LP.copy()
    if prompt.latent_THWC is not None:
      data_LP = patches.patchify(prompt.latent_THWC, self.model.patch_size)
      if prompt.given_THW is not None:
        given_L[:count] = prompt.given_THW.reshape(-1)
      level_L = np.where(given_L[:count], prompt.given_noise, prompt.strength)
      start_LP[:count] = self._noisy(data_LP, noise_LP[:count], level_L)
      if prompt.strength_THW is not None:
        tokens = slice(here.start, here.start + count)
        view["known_LP"][tokens] = data_LP
        view["follow_L"][tokens] = prompt.strength_THW.reshape(-1)
    position_L3 = patches.grid_positions(prompt.grid)
    scale = self.reference_fps / request.fps
    position_L3[:, 0] *= self.model.patch_size[0] * scale
    if prompt.loop:
      frame_L = np.repeat(np.arange(t), h * w)
      view["turn_L2"][here] = np.stack([frame_L, np.full_like(frame_L, t)], -1)
      view["turn_step_L"][here] = self.model.patch_size[0] * scale
    frame_L3 = patches.grid_positions((1, h, w))
    for i, (at, latent_HWC) in enumerate(prompt.extras):
      place = slice(count + i * h * w, count + (i + 1) * h * w)
      data_LP = patches.patchify(latent_HWC[None], self.model.patch_size)
      level_L = np.full(h * w, prompt.given_noise)
      start_LP[place] = self._noisy(data_LP, noise_LP[place], level_L)
      frame_L3[:, 0] = at * scale
      position_L3 = np.concatenate([position_L3, frame_L3])
    slot_T = slot + clip.shot_T
    # An extra image is of the shot that its frame is in.
    frames = [min(t - 1, int(np.ceil(at))) for at, _ in prompt.extras]
    slot_L = np.repeat(np.concatenate([slot_T, slot_T[frames]]), h * w)
    view["start_LP"][here] = start_LP
    view["position_L3"][here] = position_L3
    view["group_L"][here] = 2 * slot_L + given_L
    view["seed_L"][here] = (request.seed + 1_000_003 * prompt.start) % 2**32
    view["token_L"][here] = np.arange(len(noise_LP))

  def _put_twins(self, view, clip, begins):
    """Each noisy token of two clips looks at the other's prediction."""
    t, h, w = clip.prompt.grid
    weight_L = np.repeat(conditioning.blend_weights(clip.prompt), h * w)
    tokens = np.arange(t * h * w)
    for own, other, weights in ((0, 1, weight_L), (1, 0, 1.0 - weight_L)):
      view["twin_L"][begins[own] + tokens] = begins[other] + tokens
      view["twin_weight_L"][begins[own] + tokens] = weights

  def _noisy(self, data_LP, noise_LP, level_L):
    """x_t of tokens; exact where the level is 0."""
    alpha, sigma = noise_process.alpha_sigma(self.process, level_L[:, None], np)
    noisy_LP = alpha * data_LP + sigma * noise_LP
    return np.where(level_L[:, None] > 0, noisy_LP, data_LP).astype(np.float32)
