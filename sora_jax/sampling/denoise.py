"""Prompts to latents: packs them into rows, integrates those, and takes them apart.

One compiled function serves every mode of `prompting` and every length of a bucket:
what is given, where clips begin, loops, shots and blends are arrays of the batch.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.data import tokenizer
from sora_jax.diffusion import noise_process, solvers
from sora_jax.models.dit import DiTConfig, Reuse
from sora_jax.models.meta import DiTMeta
from sora_jax.packing import patches
from sora_jax.runtime import sharding, text
from sora_jax.sampling import batching, conditioning
from sora_jax.sampling.batching import RowClip
from sora_jax.sampling.conditioning import Prompt
from sora_jax.tasks import dit as dit_task


class Denoiser:
  """Packs prompts of any sizes into rows and integrates them together."""

  def __init__(self, meta: DiTMeta, vocabulary, dtype, mesh, encode_text=None):
    """Args: meta of the DiT; others as of `generate.Sampler`."""
    self.meta, self.mesh = meta, mesh
    self.model, text = meta.model, meta.text_encoder
    self._encode_text = encode_text
    if text:
      self._tokenizer = tokenizer.Tokenizer(str(vocabulary))
    self._process, self._target = meta.noise.process, meta.noise.target
    self._layout = batching.RowLayout(
      self.model,
      meta.reference_fps,
      self._process,
      "text_S" if encode_text is None else "text_SE",
    )
    self.integrate = program(
      self.model, text, dtype, mesh, **dataclasses.asdict(meta.noise)
    )

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
      rows: packed rows computed at once; a multiple of the mesh's batch shards.

    Raises:
      ValueError: for options that the model's noise process cannot be sampled with.
    """
    negative = "".join(prompt.request.negative_prompt for prompt in prompts)
    options.check(self._process, self._target, negative)
    for prompt in prompts:
      scale = prompt.request.guidance_scale
      if scale not in (None, 1.0) and options.guidance_scale == 1.0:
        raise ValueError(
          f"guidance_scale {scale} of a request needs options with guidance, not 1"
        )
    if not self.meta.conditional:
      prompts, options = _unconditional(prompts, options)
    clips = self._clips(prompts)
    sizes = [batching.size_of(unit) for unit in clips]
    ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    budget = batching.budget_of(sizes, self.meta, ways)
    planned = batching.plan_rows(sizes, budget)
    rows = min(rows, len(planned)) if rows else len(planned)
    rows = -(-rows // ways) * ways
    latents, begin = {}, time.monotonic()
    for i in range(0, len(planned), rows):
      part = planned[i : i + rows]
      batch, scale_BN, places = self._layout.batch(
        [[clips[j] for j in row] for row in part], rows, budget, options.guidance_scale
      )
      patch_BLP = self._run(params, batch, scale_BN, options)
      for row, indices in enumerate(part):
        for index, start in zip(indices, places[row], strict=True):
          patch_LP = patch_BLP[row, start:]
          latents[index] = self._latent(patch_LP, prompts[index])
      done = len(latents)
      eta = (time.monotonic() - begin) / done * (len(prompts) - done)
      logging.info(
        "sampled %d/%d, ETA %s", done, len(prompts), text.format_seconds(eta)
      )
    return [latents[i] for i in range(len(prompts))]

  def _run(self, params, batch, scale_BN, options):
    with jax.set_mesh(self.mesh):
      patch_BLP = self.integrate(
        params,
        sharding.shard_alike(batch, self.mesh),
        self._table(batch, options),
        scale_BN,
        options=static_options(options),
      )
    return np.asarray(jax.device_get(patch_BLP))

  def _latent(self, patch_LP, prompt):
    latent_THWC = patches.unpatchify(patch_LP, prompt.grid, self.model.patch_size)
    if prompt.given_THW is None:
      return latent_THWC
    # With noise on given tokens, the network saw them noisy; the result has them as is.
    given = prompt.given_THW
    for dim, patch in enumerate(self.model.patch_size):
      given = np.repeat(given, patch, axis=dim)
    return np.where(given[..., None], prompt.latent_THWC, latent_THWC)

  def _clips(self, prompts) -> list[list[RowClip]]:
    """Clips of each prompt: one, or two whose predictions are blended."""
    wanted = []
    for prompt in prompts:
      pairs, shot_T = conditioning.texts(prompt)
      sides = [pairs]
      if prompt.request.blend:
        sides.append([(prompt.request.blend, prompt.request.negative_prompt)])
      wanted.append([(prompt, side, shot_T) for side in sides])
    pairs = {pair for unit in wanted for _, side, _ in unit for pair in side}
    known = self._encode_texts(sorted(set(sum(pairs, ()))))

    def clip(prompt, side, shot_T):
      return RowClip(prompt, [tuple(known[t] for t in pair) for pair in side], shot_T)

    return [[clip(*part) for part in unit] for unit in wanted]

  def _encode_texts(self, texts) -> dict[str, np.ndarray]:
    """Ids or features of each text; says which ones are too long."""
    limit = self.meta.max_text_tokens
    if self._encode_text is None:
      # One id over the limit is enough to see that a text is cut.
      for text, length in zip(
        texts, self._tokenizer.lengths(texts, limit + 1), strict=True
      ):
        if length > limit:
          logging.warning(
            "a prompt of %d characters has more than the %d tokens that the model "
            "reads: the rest is left out (%.40s...)",
            *(len(text), limit, text),
          )
      made = [np.array(self._tokenizer.encode(text, limit), np.int32) for text in texts]
    else:
      pad_to = self.meta.frozen_text.pad_to
      made = [
        np.pad(features_SE, ((0, max(0, pad_to - len(features_SE))), (0, 0)))
        for features_SE in self._encode_text(texts, limit)
      ]
    return dict(zip(texts, made, strict=True))

  def _table(self, batch, options) -> solvers.Table:
    slots = batch.pop("tokens_N"), batch.pop("start_N")
    return solver_table(*slots, options, self._process)


def solver_table(
  tokens_BN, start_BN, options: solvers.Options, process: str
) -> solvers.Table:
  """The solver's coefficients for slots of so many tokens: [calls, ..., B, N].

  start_BN: noise level that each begins at.
  """
  shift_BN = noise_process.resolution_shift(
    options.shift, np.maximum(tokens_BN, 1.0), options.shift_tokens
  )
  levels = solvers.schedule(
    options.steps, np.broadcast_to(shift_BN, tokens_BN.shape), start_BN
  )
  return solvers.make_table(options.method, levels, process, options.eta)


def static_options(options: solvers.Options) -> solvers.Options:
  """What of them is compiled in: what is an array must not make another program."""
  return dataclasses.replace(
    options,
    steps=1,
    shift=1.0,
    shift_tokens=0,
    guidance_scale=float(options.guidance_scale != 1.0),
  )


def program(model: DiTConfig, text, dtype, mesh, *, process: str, target: str):
  """`integrate`, jitted; text: config of the encoder trained with the model, or None.

  Its result is whole on every host, which each then decodes.
  """
  return jax.jit(
    functools.partial(integrate, model, text, dtype, process=process, target=target),
    static_argnames="options",
    out_shardings=NamedSharding(mesh, PartitionSpec()),
  )


def _unconditional(prompts, options):
  """The same without texts, which the model does not know."""
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


def integrate(
  model,
  text,
  dtype,
  params,
  batch,
  table,
  guidance_scale,
  *,
  process,
  target,
  options,
):
  """Noise to latents of packed rows [B, L, P]; pure.

  Args:
    model, text, dtype: sizes, and dtype of the computation.
    params: of the networks.
    batch: rows as in training, and start_LP: what tokens begin from; given ones (of
      odd groups) hold their data, and keep it. Groups 2n and 2n + 1 belong to text
      n + 1. given_level_N: noise on given tokens. turn_L2: (frame, frames) of a loop,
      whose positions turn, and turn_step_L: time of a frame. twin_L, twin_weight_L:
      token whose prediction of the data is blended with the own one, and how much.
    known_LP, follow_L: data of tokens, and the noise level above which it stands for
    what the network predicts of them.
    table: of the solver, by text: [calls, ..., B, N].
    guidance_scale: [B, N] or one number.
    process, target: of the model.
    options: static; its guidance_scale is 0 for no guidance at all.
  """
  segment_BL, given_BL = batch["segment_L"], batch["group_L"] % 2 == 1
  slot_BL = batch["group_L"] // 2

  def text_of(prefix):
    names = ("text_S" if text else "text_SE", "text_segment_S", "text_position_S")
    packed = {name: batch[prefix + name] for name in names}
    return packed, dit_task.encode_text(text, params, packed, dtype)

  (packed, text_BSE), (empty, empty_BSE) = text_of(""), text_of("empty_")
  context = {**batch, **packed}
  # Both in one call of twice the rows.
  names = ("segment_L", "group_L", "text_segment_S")
  twice = {
    name: jnp.concatenate([context[name], {**context, **empty}[name]]) for name in names
  }
  slots = table.level.shape[-1]
  counts_BLN = (segment_BL[:, :, None] == 1 + jnp.arange(slots)) & ~given_BL[:, :, None]

  def at(c_BN, index_BL):
    # No matmul with a one-hot: accelerators round a float32 matmul's inputs.
    c_BL = jnp.take_along_axis(c_BN, index_BL, axis=1)
    return jnp.where(segment_BL > 0, c_BL, 0.0)[..., None]

  def per_token(c_BN):
    return at(c_BN, slot_BL)

  def clip_mean(x_BL):
    total_BN = jnp.sum(jnp.where(counts_BLN, x_BL[:, :, None], 0.0), axis=1)
    mean_BN = total_BN / jnp.maximum(counts_BLN.sum(axis=1), 1)
    return at(mean_BN, jnp.maximum(segment_BL - 1, 0))[..., 0]

  def positions(index):
    """Loops have turned by one frame with each call of the network."""
    frame_BL, frames_BL = batch["turn_L2"][..., 0], batch["turn_L2"][..., 1]
    turned_BL = (frame_BL + index) % jnp.maximum(frames_BL, 1)
    time_BL, *place = jnp.moveaxis(batch["position_L3"], -1, 0)
    time_BL = jnp.where(frames_BL > 0, turned_BL * batch["turn_step_L"], time_BL)
    return jnp.stack([time_BL, *place], -1)

  both_BSE = text_BSE
  if options.guidance_scale:
    both_BSE = jnp.concatenate([text_BSE, empty_BSE])
  states = dit_task.text_states(model, params, both_BSE, dtype)
  calls = len(table.level)

  def network(x_BLP, level_BN, index, context, text_BSE, states, memory):
    # Each text has two groups: noisy tokens, and given ones.
    t_BG = jnp.stack([level_BN, batch["given_level_N"]], -1).reshape(len(level_BN), -1)
    position_BL3 = positions(index)
    if len(x_BLP) > len(t_BG):
      t_BG, position_BL3 = (jnp.concatenate([x, x]) for x in (t_BG, position_BL3))
    context = {**context, "position_L3": position_BL3}
    inputs = (x_BLP, t_BG, context, text_BSE, dtype, states)
    if not options.reuse:
      return dit_task.predict(model, params, *inputs), memory
    # The last call draws what is finest.
    limit = jnp.where(index < calls - 1, options.reuse, 0.0)
    return dit_task.predict(model, params, *inputs, memory._replace(limit=limit))

  def plain(x_BLP, level_BN, index, memory):
    own = jax.tree.map(lambda x: x[:, : len(x_BLP)], states)
    return network(x_BLP, level_BN, index, context, text_BSE, own, memory)

  def guided(x_BLP, level_BN, index, memory):
    both_BLP = jnp.concatenate([x_BLP, x_BLP])
    predicted, memory = network(
      both_BLP, level_BN, index, twice, both_BSE, states, memory
    )
    low, high = options.guidance_interval
    inside_BN = (level_BN >= low) & (level_BN <= high)
    scale_BL1 = per_token(jnp.where(inside_BN, guidance_scale, 1.0))
    parts = jnp.split(predicted, 2)
    return solvers.guide(*parts, scale_BL1, options, clip_mean), memory

  def data(*state):
    x_BLP, level_BN, index, memory = state
    low, high = options.guidance_interval
    if not options.guidance_scale:
      predicted, memory = plain(*state)
    elif (low, high) == (0.0, 1.0):
      predicted, memory = guided(*state)
    else:
      inside = jnp.any((level_BN >= low) & (level_BN <= high))
      predicted, memory = jax.lax.cond(inside, guided, plain, *state)
    if options.cfg_zero:
      step = index // 2 if options.method == "heun" else index
      predicted = jnp.where(step < options.zero_steps, 0.0, predicted)
    own_BLP = noise_process.to_x0(
      predicted, x_BLP, per_token(level_BN), target, process
    )
    twin_BLP = jnp.take_along_axis(own_BLP, batch["twin_L"][..., None], axis=1)
    # Of a token without a twin the weight is 0: it keeps its value exactly.
    own_BLP += batch["twin_weight_L"][..., None] * (twin_BLP - own_BLP)
    follows_BL1 = per_token(level_BN) > batch["follow_L"][..., None]
    return jnp.where(follows_BL1, batch["known_LP"], own_BLP), memory

  def noise(index):
    """Of each token by its clip's seed, so that it does not depend on the row."""

    def draw(seed, token):
      key = jax.random.fold_in(jax.random.key(seed), index)
      return jax.random.normal(jax.random.fold_in(key, token), (model.patch_width,))

    return jax.vmap(jax.vmap(draw))(batch["seed_L"], batch["token_L"])

  memory = ()
  if options.reuse:
    memory = Reuse.start(*both_BSE.shape[:1], segment_BL.shape[1], model.width, dtype)
  return solvers.integrate(
    data,
    batch["start_LP"],
    table,
    noise if options.stochastic else None,
    per_token,
    given_BL[..., None],
    memory,
  )
