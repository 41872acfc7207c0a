"""Prompts to latents: packs them into rows, integrates those, and takes them apart.

The way through `Denoiser.__call__`, each step a pure function but for the program:
texts are encoded (`units`), units share rows (`batching.budget_of`, `plan_rows`), rows
are written (`sample_batch.RowLayout.batch`), integrated (`integrate.program`), and the
latents of each prompt taken out of them (`sample_batch.take_apart`).
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from sora_jax.data import caption_texts, tokenizer
from sora_jax.diffusion import solvers
from sora_jax.models.meta import DiTMeta
from sora_jax.runtime import sharding
from sora_jax.runtime.progress import Progress
from sora_jax.sampling import batching, conditioning, integrate, sample_batch
from sora_jax.sampling.batching import RowClip
from sora_jax.sampling.conditioning import Prompt
from sora_jax.sampling.experts import Experts


class Denoiser:
  """Packs prompts of any sizes into rows and integrates them together."""

  def __init__(
    self,
    meta: DiTMeta,
    vocabulary: str | os.PathLike,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh,
    encode_text: Callable[[list[str], int], list[np.ndarray]] | None = None,
  ):
    """Compiles nothing yet.

    Args:
      meta: of the DiT's folder.
      vocabulary: file of the tokenizer; not read with encode_text.
      dtype: of the computation.
      mesh: that params are on.
      encode_text: (texts, most tokens) -> features, of a frozen text encoder.
    """
    self.meta, self.mesh = meta, mesh
    self.model = meta.model
    limit = meta.max_text_tokens
    if frozen := meta.frozen_text:
      assert encode_text is not None, "a model of features needs their encoder"
      self._encode_texts = lambda texts: [
        caption_texts.pad_features(features_SE, frozen.pad_to)
        for features_SE in encode_text(texts, limit)
      ]
    else:
      words = tokenizer.Tokenizer(str(vocabulary), meta.vocabulary)
      self._encode_texts = lambda texts: _ids(words, texts, limit)
    process, target = meta.noise.process, meta.noise.target
    self._networks = integrate.Networks(
      self.model, meta.text_encoder, dtype, process, target
    )
    self._layout = sample_batch.RowLayout(self.model, meta.reference_fps, process)
    self.integrate = integrate.program(self._networks, mesh)

  def __call__(
    self,
    params: Callable[[], Any] | Experts,
    prompts: Sequence[Prompt],
    options: solvers.Options,
    rows: int = 4,
  ) -> list[np.ndarray]:
    """Latents of the prompts, in order: float32 [T, H, W, C] each.

    Args:
      params: gives those of the DiT and its text encoder, or of two experts. It is
        asked when the texts are encoded, so that a frozen text encoder may be on the
        devices before.
      prompts: what to make.
      options: of the solver and of guidance.
      rows: packed rows computed at once, rounded up to the mesh's batch shards; 0 is
        all.

    Raises:
      ValueError: for options that the model's noise process cannot be sampled with.
    """
    experts = params if isinstance(params, Experts) else Experts((params,))
    _check(prompts, options, self._networks, experts)
    if not self.meta.conditional:
      prompts, options = _unconditional(prompts, options)
    guided = any(
      experts.options(number, options).guidance_scale != 1.0
      for number in range(len(experts))
    )
    all_units = units(prompts, self._encode_texts, guided)
    sizes = [batching.size_of(unit) for unit in all_units]
    budget = batching.budget_of(sizes, self.meta, sharding.batch_shards(self.mesh))
    # Those of a row go on to the next expert in the same call of the solver.
    switches, calls = self._switches(all_units, experts, options)
    chunks = []
    for switch in sorted(set(switches)):
      same = [i for i, other in enumerate(switches) if other == switch]
      planned = [
        [same[i] for i in row]
        for row in batching.plan_rows([sizes[i] for i in same], budget)
      ]
      size = min(rows, len(planned)) if rows else len(planned)
      size = sharding.whole_batch(size, self.mesh)
      chunks += [
        _Chunk(planned[i : i + size], size, experts.calls(switch, calls))
        for i in range(0, len(planned), size)
      ]
    patches = self._run(experts, chunks, all_units, budget, options)
    latents: dict[int, np.ndarray] = {}
    with Progress("sampled", len(prompts), "prompts", jax.process_index()) as progress:
      for chunk, (packed, patch_BLP) in zip(chunks, patches, strict=True):
        latents |= sample_batch.take_apart(
          patch_BLP, packed, prompts, self.model.patch_size
        )
        progress.advance(sum(map(len, chunk.planned)))
    return [latents[i] for i in range(len(prompts))]

  def _switches(self, all_units, experts: Experts, options) -> tuple[list[int], int]:
    """(the first call of each unit that is not the first expert's, all calls)."""
    slots = sample_batch.SolverSlots(
      np.array([unit[0].size[0] for unit in all_units], np.float64),
      np.array([unit[0].prompt.strength or 1.0 for unit in all_units]),
    )
    table = integrate.solver_table(slots, options, self._networks.process)
    return experts.switch(table.time), len(table.time)

  def _run(self, experts: Experts, chunks, all_units, budget, options):
    """Yields (packed rows, patches) of each chunk.

    Expert by expert, so that only one needs to be on the devices. What one hands to the
    next waits on the host.
    """
    states: list[Any] = [None] * len(chunks)
    for number in range(len(experts)):
      ends, own = number == len(experts) - 1, experts.options(number, options)
      params = None
      for i, chunk in enumerate(chunks):
        calls = chunk.calls[number]
        batch, slots = self._layout.batch(
          all_units, chunk.planned, chunk.rows, budget, own.guidance_scale
        )
        # A part may have no calls: a weak edit begins below the boundary.
        if calls.stop > calls.start:
          params = experts.loaders[number]() if params is None else params
          table = integrate.solver_table(slots, options, self._networks.process)
          table = jax.tree.map(lambda c, calls=calls: c[calls], table)
          part = (table, own, states[i], calls.start, ends)
          states[i] = self._part(params, batch, *part)
        elif ends:
          states[i] = states[i].x
        if ends:
          yield batch.packed, states[i]
      del params  # room for the next

  def _part(self, params, batch, table, options, state, first, ends):
    """Patches, or the state for the next expert, as numpy arrays."""
    with jax.set_mesh(self.mesh):
      parts = batch.on_device()
      parts = type(parts)(*(sharding.shard_alike(part, self.mesh) for part in parts))
      if state is not None:
        state = solvers.State(**sharding.shard_alike(state._asdict(), self.mesh))
      made = self.integrate(
        params,
        parts,
        table,
        options=integrate.static_options(options),
        state=state,
        first=np.int32(first),
        ends=ends,
      )
    return jax.tree.map(np.asarray, jax.device_get(made))


class _Chunk(NamedTuple):
  """Rows that are computed side by side.

  Attributes:
    planned: of each row, the indices of its units.
    rows: with those of padding.
    calls: of the solver, those of each expert.
  """

  planned: list[list[int]]
  rows: int
  calls: list[slice]


def _check(prompts, options, networks: integrate.Networks, experts: Experts) -> None:
  """Raises ValueError for options that do not go with the model or with a request."""
  negative = "".join(prompt.request.negative_prompt for prompt in prompts)
  options.check(networks.process, networks.target, negative)
  if options.guidance_scale_2 and len(experts) == 1:
    raise ValueError(
      f"guidance_scale_2 {options.guidance_scale_2:g} is for models with two experts"
    )
  for prompt in prompts:
    scale = prompt.request.guidance_scale
    if scale not in (None, 1.0) and 1.0 in (
      options.guidance_scale,
      options.guidance_scale_2,
    ):
      raise ValueError(
        f"guidance_scale {scale} of a request needs options with guidance, not 1"
      )


def _unconditional(prompts, options):
  """Prompts and options without texts, which the model does not know."""
  if any(prompt.request.prompt for prompt in prompts):
    logging.warning("the model was trained without captions: it ignores prompts")
  silent = {"prompt": "", "negative_prompt": "", "shots": (), "blend": ""}
  prompts = [
    dataclasses.replace(
      prompt,
      request=dataclasses.replace(prompt.request, **silent, guidance_scale=None),
    )
    for prompt in prompts
  ]
  options = dataclasses.replace(
    options, guidance_scale=1.0, guidance_rescale=0.0, cfg_zero=False
  )
  return prompts, options


def units(
  prompts: Sequence[Prompt],
  encode_texts: Callable[[list[str]], list[np.ndarray]],
  guided: bool = True,
) -> list[list[RowClip]]:
  """Clips of each prompt: one, or two whose predictions are blended.

  encode_texts: texts -> ids or features of each; called once, without duplicates.
  guided: without it the negative texts have no effect, and are not encoded.
  """
  wanted = []
  for prompt in prompts:
    pairs, shot_T = conditioning.texts(prompt)
    sides = [pairs]
    if prompt.request.blend:
      sides.append([(prompt.request.blend, prompt.request.negative_prompt)])
    if not guided:
      sides = [[(own, own) for own, _ in side] for side in sides]
    wanted.append([(prompt, side, shot_T) for side in sides])
  texts = sorted({t for unit in wanted for _, side, _ in unit for p in side for t in p})
  known = dict(zip(texts, encode_texts(texts), strict=True))
  return [
    [
      RowClip(prompt, [(known[own], known[negative]) for own, negative in side], shot_T)
      for prompt, side, shot_T in unit
    ]
    for unit in wanted
  ]


def _ids(words: tokenizer.Tokenizer, texts: list[str], limit: int) -> list[np.ndarray]:
  """Ids of each text; says which ones are too long."""
  # One id over the limit is enough to see that a text is cut.
  lengths = words.lengths(texts, limit + 1)
  for caption, length in zip(texts, lengths, strict=True):
    if length > limit:
      logging.warning(
        "a prompt of %d characters has more than the %d tokens that the model "
        "reads: the rest is left out (%.40s...)",
        *(len(caption), limit, caption),
      )
  return [np.array(words.encode(caption, limit), np.int32) for caption in texts]
