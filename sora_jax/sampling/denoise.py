"""Prompts to latents: packs them into rows, integrates those, and takes them apart.

The way through `Denoiser.__call__`, each step a pure function but for the program:
texts are encoded (`units`), units share rows (`batching.budget_of`, `plan_rows`), rows
are written (`sample_batch.RowLayout.batch`), integrated (`integrate.program`), and the
latents of each prompt taken out of them (`sample_batch.take_apart`).
"""

import dataclasses
import os
from collections.abc import Callable, Sequence

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
      words = tokenizer.Tokenizer(str(vocabulary))
      self._encode_texts = lambda texts: _ids(words, texts, limit)
    process, target = meta.noise.process, meta.noise.target
    self._networks = integrate.Networks(
      self.model, meta.text_encoder, dtype, process, target
    )
    self._layout = sample_batch.RowLayout(self.model, meta.reference_fps, process)
    self.integrate = integrate.program(self._networks, mesh)

  def __call__(
    self,
    params,
    prompts: Sequence[Prompt],
    options: solvers.Options,
    rows: int = 4,
  ) -> list[np.ndarray]:
    """Latents of the prompts, in order: float32 [T, H, W, C] each.

    Args:
      params: of the DiT and its text encoder.
      prompts: what to make.
      options: of the solver and of guidance.
      rows: packed rows computed at once, rounded up to the mesh's batch shards; 0 is
        all.

    Raises:
      ValueError: for options that the model's noise process cannot be sampled with.
    """
    _check(prompts, options, self._networks)
    if not self.meta.conditional:
      prompts, options = _unconditional(prompts, options)
    all_units = units(prompts, self._encode_texts)
    sizes = [batching.size_of(unit) for unit in all_units]
    budget = batching.budget_of(sizes, self.meta, sharding.batch_shards(self.mesh))
    planned = batching.plan_rows(sizes, budget)
    rows = min(rows, len(planned)) if rows else len(planned)
    rows = sharding.whole_batch(rows, self.mesh)
    latents: dict[int, np.ndarray] = {}
    with Progress("sampled", len(prompts), "prompts", jax.process_index()) as progress:
      for first in range(0, len(planned), rows):
        here = planned[first : first + rows]
        batch, slots = self._layout.batch(
          all_units, here, rows, budget, options.guidance_scale
        )
        patch_BLP = self._run(params, batch, slots, options)
        latents |= sample_batch.take_apart(
          patch_BLP, batch.packed, prompts, self.model.patch_size
        )
        progress.advance(sum(map(len, here)))
    return [latents[i] for i in range(len(prompts))]

  def _run(self, params, batch, slots, options) -> np.ndarray:
    table = integrate.solver_table(slots, options, self._networks.process)
    with jax.set_mesh(self.mesh):
      parts = batch.on_device()
      parts = type(parts)(*(sharding.shard_alike(part, self.mesh) for part in parts))
      patch_BLP = self.integrate(
        params, parts, table, options=integrate.static_options(options)
      )
    return np.asarray(jax.device_get(patch_BLP))


def _check(prompts, options, networks: integrate.Networks) -> None:
  """Raises ValueError for options that do not go with the model or with a request."""
  negative = "".join(prompt.request.negative_prompt for prompt in prompts)
  options.check(networks.process, networks.target, negative)
  for prompt in prompts:
    scale = prompt.request.guidance_scale
    if scale not in (None, 1.0) and options.guidance_scale == 1.0:
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
) -> list[list[RowClip]]:
  """Clips of each prompt: one, or two whose predictions are blended.

  encode_texts: texts -> ids or features of each; called once, without duplicates.
  """
  wanted = []
  for prompt in prompts:
    pairs, shot_T = conditioning.texts(prompt)
    sides = [pairs]
    if prompt.request.blend:
      sides.append([(prompt.request.blend, prompt.request.negative_prompt)])
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
