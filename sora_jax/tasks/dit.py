"""What the DiT learns: the target of noisy tokens, given clean ones and a caption."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from sora_jax.diffusion import noise_process
from sora_jax.models import dit, dit_cache
from sora_jax.models.caption_encoder import TextEncoder, TextEncoderConfig
from sora_jax.models.dit import DiT, DiTConfig
from sora_jax.models.partition import PARAMS
from sora_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class DiTLossConfig:
  """The noise of training, one level a clip; see `diffusion` for the terms.

  Attributes:
    process, target: one of noise_process.PROCESSES and of noise_process.TARGETS.
    timesteps: how levels are drawn, one of noise_process.TIMESTEPS, with logit_mean and
      logit_std, or mode_scale, for the kinds that have them.
    shift, shift_tokens: moves the drawn levels, see `noise_process.resolution_shift`.
    min_snr_gamma: limit of the min-SNR weights (arXiv:2303.09556: 5); 0 = no weights.
    levels: (low, high) that the drawn ones are squeezed between: those of one expert of
      a model with two.
    bins: parts of [0, 1] for the reported loss by noise level.
  """

  process: str = "flow"
  target: str = "velocity"
  timesteps: str = "logit_normal"
  logit_mean: float = 0.0
  logit_std: float = 1.0
  mode_scale: float = 1.29
  shift: float = 1.0
  shift_tokens: int = 0
  min_snr_gamma: float = 0.0
  levels: tuple[float, float] = (0.0, 1.0)
  bins: int = 4

  def __post_init__(self):
    for name, known in (
      ("process", noise_process.PROCESSES),
      ("target", noise_process.TARGETS),
      ("timesteps", noise_process.TIMESTEPS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f"dit {name} {getattr(self, name)!r} is none of {known}")
    for name in ("shift_tokens", "min_snr_gamma"):
      if getattr(self, name) < 0:
        raise ValueError(f"dit {name} {getattr(self, name)} is negative")
    low, high = self.levels
    if not 0 <= low < high <= 1:
      raise ValueError(f"dit levels {self.levels} are not two rising numbers in 0 to 1")
    if self.shift <= 0:
      raise ValueError(f"dit shift {self.shift} is not positive")


@dataclasses.dataclass(frozen=True)
class _Objective:
  """The three functions of the task; see `make` for the fields."""

  model: DiTConfig
  text: TextEncoderConfig | None
  loss_config: DiTLossConfig
  segments: int
  dtype: jnp.dtype
  accumulate_fp32: bool

  def init(self, key: Array):
    """Params of the DiT, and of the text encoder if it is trained."""
    text_key, dit_key = jax.random.split(key)
    ids_BL = jnp.zeros((1, 1), jnp.int32)
    context = dit.Context(
      group_BL=ids_BL,
      segment_BL=ids_BL,
      position_BL3=jnp.zeros((1, 1, 3)),
      text_BSE=jnp.zeros((1, 1, self.model.text_width)),
      text_segment_BS=ids_BL,
      condition_BLQ=jnp.zeros((1, 1, self.model.condition_width)),
      image_BNJV=jnp.zeros((1, 1, self.model.image_tokens, self.model.image_width)),
    )
    x_BLP, t_BG = jnp.zeros((1, 1, self.model.patch_width)), jnp.zeros((1, 2))
    dit_params = DiT(self.model).init(dit_key, x_BLP, t_BG, *context)["params"]
    if self.text is None:
      return {"dit": dit_params}
    encoder = TextEncoder(self.text)
    text_params = encoder.init(text_key, ids_BL, ids_BL, ids_BL)["params"]
    return {"text": text_params, "dit": dit_params}

  def loss(self, params, batch, key: Array):
    """Mean error of noisy tokens at random levels, and metrics."""
    t_key, eps_key = jax.random.split(key)
    t_BN = _draw_levels(self.loss_config, t_key, batch["segment_L"], self.segments)
    t_BN = self._squeezed(t_BN)
    error_BL, noisy_BL, t_BL = self._errors(params, batch, eps_key, t_BN)
    real_BL = batch["segment_L"] > 0
    config = self.loss_config
    metrics = {
      "padding": 1.0 - jnp.mean(real_BL),
      "given": 1.0 - jnp.sum(noisy_BL) / jnp.maximum(jnp.sum(real_BL), 1),
      **noise_process.loss_bins(error_BL, noisy_BL, t_BL, config.bins),
    }
    if config.min_snr_gamma:
      error_BL *= noise_process.loss_weight(
        t_BL, config.min_snr_gamma, config.target, config.process
      )
    return _mean(error_BL, noisy_BL), metrics

  def evaluate(self, params, batch, key: Array):
    """The loss without weights."""
    # Levels spread evenly over (0, 1), so that few batches give a steady number.
    rows, segments = len(batch["segment_L"]), self.segments
    t_BN = ((0.5 + jnp.arange(rows * segments)) * 0.618034 % 1.0).reshape(
      rows, segments
    )
    t_BN = self._squeezed(t_BN)
    error_BL, noisy_BL, _ = self._errors(params, batch, key, t_BN)
    return {"loss": _mean(error_BL, noisy_BL)}

  def _squeezed(self, t_BN):
    low, high = self.loss_config.levels
    return t_BN if (low, high) == (0.0, 1.0) else low + (high - low) * t_BN

  def _errors(self, params, batch, key: Array, t_BN: Array):
    """Squared error of every token, whether it is noisy, and its noise level: [B, L].

    t_BN: noise level of each segment's noisy tokens.
    """
    process, target = self.loss_config.process, self.loss_config.target
    x0_BLP = batch["patch_LP"]
    # Segments have two groups each: the noisy tokens at level t, the given ones at 0.
    t_BG = jnp.stack([t_BN, jnp.zeros_like(t_BN)], -1).reshape(len(t_BN), -1)
    t_BL = jnp.take_along_axis(t_BG, batch["group_L"], axis=1)
    eps_BLP = jax.random.normal(key, x0_BLP.shape)
    t_BL1 = t_BL[..., None]
    x_BLP = noise_process.add_noise(x0_BLP, eps_BLP, t_BL1, process)
    text_BSE = encode_text(self.text, params, batch, self.dtype)
    predicted_BLP = predict(
      self.model,
      params,
      x_BLP,
      t_BG,
      dit.Context.of_batch(batch, text_BSE),
      self.dtype,
      accumulate_fp32=self.accumulate_fp32,
    )
    target_BLP = noise_process.make_target(x0_BLP, eps_BLP, t_BL1, target, process)
    error_BLP = jnp.square(predicted_BLP - target_BLP)
    noisy_BL = (batch["segment_L"] > 0) & (batch["group_L"] % 2 == 0)
    return error_BLP.mean(-1), noisy_BL.astype(jnp.float32), t_BL


def make(
  model: DiTConfig,
  text: TextEncoderConfig | None,
  loss_config: DiTLossConfig,
  segments: int,
  dtype: jnp.dtype = jnp.float32,
  accumulate_fp32: bool = False,
) -> Task:
  """The task over batches of packed rows, `packing.packed_row.PackedBatch`.

  Args:
    model, text, loss_config: sizes and noise levels; text None: batches hold features
      (text_SE) of a frozen encoder.
    segments: most clips that a row can hold.
    dtype: of the computation; params, modulation and loss are float32.
    accumulate_fp32: whether gradients of several microbatches are added up, see
      `predict`.
  """
  objective = _Objective(model, text, loss_config, segments, dtype, accumulate_fp32)
  return Task(objective.init, objective.loss, objective.evaluate)


def _mean(error_BL, noisy_BL):
  """Over the noisy tokens of all rows."""
  return jnp.sum(error_BL * noisy_BL) / jnp.maximum(jnp.sum(noisy_BL), 1.0)


def _draw_levels(config: DiTLossConfig, key, segment_BL, segments: int) -> Array:
  """A random noise level for each segment, shifted by its length: [B, N]."""
  t_BN = noise_process.sample_timesteps(
    key,
    (len(segment_BL), segments),
    config.timesteps,
    mean=config.logit_mean,
    std=config.logit_std,
    mode_scale=config.mode_scale,
  )
  if config.shift == 1.0 and not config.shift_tokens:
    return t_BN
  ids_N = 1 + jnp.arange(segments)
  tokens_BN = jnp.sum(segment_BL[:, :, None] == ids_N, axis=1)
  shift_BN = noise_process.resolution_shift(
    config.shift, jnp.maximum(tokens_BN, 1), config.shift_tokens
  )
  return noise_process.shift_timesteps(t_BN, shift_BN)


def encode_text(
  config: TextEncoderConfig | None, params, batch, dtype=jnp.float32
) -> Array:
  """Caption features [B, S, E] of packed texts (text_S and its segments, positions).

  Without an encoder of its own, those that the batch holds.
  """
  if config is None:
    return batch["text_SE"]
  features_BSE = TextEncoder(config, dtype).apply(
    {"params": params["text"]},
    batch["text_S"],
    batch["text_segment_S"],
    batch["text_position_S"],
  )
  assert isinstance(features_BSE, Array)  # flax may return more, where it is asked to
  return features_BSE


def predict(
  config: DiTConfig,
  params,
  x_BLP: Array,
  t_BG: Array,
  context: dit.Context,
  dtype: jnp.dtype = jnp.float32,
  reuse: dit_cache.Reuse | None = None,
  accumulate_fp32: bool = False,
) -> Any:
  """The network's output [B, L, P] for packed rows, float32; see `DiT`.

  Args:
    config: sizes of the DiT.
    params: with those of the DiT under "dit".
    x_BLP: noisy and given patches.
    t_BG: noise level of each group.
    context: what the DiT sees beside them.
    dtype: of the computation.
    reuse: from the call before; the result is then (output, next reuse), otherwise
      the output alone.
    accumulate_fp32: cast the blocks' kernels block by block, so that gradients are
      added, block by block, to a total in float32; all at once otherwise, which takes
      less memory.
  """
  params = params["dit"] if accumulate_fp32 else _cast_kernels(params["dit"], dtype)
  network = DiT(config, dtype)
  return network.apply({"params": params}, x_BLP, t_BG, *context, reuse)


def text_states(
  config: DiTConfig, params, text_BSE, dtype=jnp.float32, image_BNJV=None
):
  """States of texts and images for `dit.Context`, computed once for many calls."""
  params = _cast_kernels(params["dit"], dtype)
  return dit_cache.text_states(config.width, params, text_BSE, dtype, image_BNJV)


def _cast_kernels(params, dtype):
  """The blocks' kernels in the dtype of the computation.

  Before the scan over blocks, so that what is gathered for each block is half as large.
  """

  def cast(leaf):
    # Of 8 bits they are cast block by block, or all would be there with more.
    return leaf if leaf.dtype.itemsize == 1 else leaf.astype(dtype)

  return {**params, "blocks": _each_kernel(cast, params["blocks"])}


def _each_kernel(change, blocks):
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: change(leaf) if path[-1].key == "kernel" else leaf, blocks
  )


# Names of how sampling may hold the kernels of the blocks.
WEIGHTS = {"bfloat16": jnp.bfloat16, "float8": jnp.float8_e4m3fn}


def stored(params, weights: str):
  """Params with the kernels of the blocks, which are nearly all, in fewer bits.

  weights: a key of WEIGHTS, or "" for params as they are. "bfloat16" changes nothing in
    a computation in bfloat16; "float8" has three bits of mantissa and no scales.

  Raises:
    ValueError: for another name.
  """
  if not weights:
    return params
  if weights not in WEIGHTS:
    raise ValueError(f"weights {weights!r} is none of {', '.join(WEIGHTS)}")
  blocks = _each_kernel(
    lambda leaf: leaf.astype(WEIGHTS[weights]), params["dit"]["blocks"]
  )
  return {**params, "dit": {**params["dit"], "blocks": blocks}}


# Into a sublayer: params x tensor; out of it: tensor x params, so that one reduction
# ends each sublayer. Kernels under blocks/ have a leading layer axis.
DIT_RULES = (
  (
    r".*/blocks/((cross_|image_)?(query|key|value)|mlp_up)/kernel",
    P(None, PARAMS, "tensor"),
  ),
  (r".*/blocks/((attention|cross)_out|mlp_down)/kernel", P(None, "tensor", PARAMS)),
  (r".*/blocks/modulation", P(None, None, PARAMS)),
  (
    r"dit/(patch_embed|position_embed|text_pooled|(text|time)_embed_[12]|"
    r"time_projection|image_embed/(up|down))/kernel",
    P(None, PARAMS),
  ),
  (r"dit/head/kernel", P(PARAMS, None)),
  (r"dit/head_modulation", P(None, PARAMS)),
  (r".*/(bias|scale|image_embed/positions)", P()),
)
# With the small text encoder that is trained beside it.
SHARDING_RULES = ((r"text/token_embed/embedding", P(None, PARAMS)), *DIT_RULES)
