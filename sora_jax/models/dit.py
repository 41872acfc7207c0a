"""Diffusion transformer over packed spacetime patches.

The blocks are Wan's (arXiv:2503.20314), itself a DiT (arXiv:2212.09748) with 3D RoPE,
QK-norm, text by cross-attention and one shared timestep projection plus a learned table
per block (adaLN-single of PixArt, arXiv:2310.00426). Noise level is per token, through
groups, so given (clean) and noisy tokens share one sequence.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from sora_jax.models import image_embed, layers, partition
from sora_jax.models.attention import attention
from sora_jax.models.dit_cache import Reuse, run_or_reuse
from sora_jax.packing.packed_row import PackedBatch
from sora_jax.runtime import fields

# What a block may keep for the backward pass beside its input, by the names given here
# and in `attention`. "offload" keeps both in the host's memory.
REMAT_POLICIES = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "attention_saved": jax.checkpoint_policies.save_only_these_names("attention"),
  # The gradient of the MLP's gate needs its output.
  "attention_mlp_saved": jax.checkpoint_policies.save_only_these_names(
    "attention", "mlp"
  ),
  # All that a matmul with a kernel made, and attention; the rest is made again.
  "matmuls_saved": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("attention"),
  ),
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["attention", "block"],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


# Blocks that are compiled one by one on CPU.
_FEW = 8


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """Sizes of the DiT.

  Attributes:
    patch_size: latent (t, h, w) of one token. channels: latent channels.
    width, depth, heads, mlp_width: of the transformer. text_width: of its text input.
    pooled_text: add the mean of a clip's text features to its timestep embedding. A
      short way for what the caption says of the whole clip (as in SD3,
      arXiv:2403.03206); Wan has none.
    absolute_positions: frequencies an axis of sines and cosines of (t, h, w) that are
      added to each token, through a layer; 0 = none (Wan). Rotary positions tell where
      tokens are to each other, and not where they are in a frame: "moves right" begins
      on its left.
    rope_theta: base of the rotary frequencies, see `layers.rope_angles`. Wan's 10,000
      is for grids of a hundred tokens; on those of a few, most channels hardly turn.
    condition_channels: of what the first layer reads of given frames beside the noise,
      0 = none; see `packing.conditions`.
    image_width, image_tokens: of the features of given images that the blocks attend
      to beside the text, and how many of a clip; 0 = none.
    image_positions: whether those tokens have learned positions, as where they are of
      two images.
    remat: a key of REMAT_POLICIES.
  """

  patch_size: tuple[int, int, int] = (1, 2, 2)
  channels: int = 16
  width: int = 384
  depth: int = 6
  heads: int = 6
  mlp_width: int = 1536
  text_width: int = 256
  frequency_width: int = 256
  pooled_text: bool = False
  absolute_positions: int = 0
  rope_theta: float = 1e4
  condition_channels: int = 0
  image_width: int = 0
  image_tokens: int = 0
  image_positions: bool = False
  remat: str = fields.free("none")

  def __post_init__(self):
    if self.width % self.heads or (self.width // self.heads) % 2:
      raise ValueError(
        f"dit width {self.width} over {self.heads} heads must be an even whole number"
      )
    if self.absolute_positions < 0 or self.rope_theta <= 0:
      raise ValueError(
        f"dit absolute_positions {self.absolute_positions} is negative, or rope_theta "
        f"{self.rope_theta} is not positive"
      )
    if min(self.condition_channels, self.image_width, self.image_tokens) < 0 or bool(
      self.image_width
    ) != bool(self.image_tokens):
      raise ValueError(
        f"dit condition_channels {self.condition_channels}, image_width "
        f"{self.image_width} or image_tokens {self.image_tokens} is negative, or one "
        "of the last two is 0 and the other is not"
      )
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f"dit remat {self.remat!r} is not one of {list(REMAT_POLICIES)}")

  @property
  def patch_width(self) -> int:
    return math.prod(self.patch_size) * self.channels

  @property
  def condition_width(self) -> int:
    return math.prod(self.patch_size) * self.condition_channels


def _preset(width, depth, heads, mlp_width=None, **kwargs):
  mlp_width = mlp_width or 4 * width
  return DiTConfig(width=width, depth=depth, heads=heads, mlp_width=mlp_width, **kwargs)


PRESETS = {
  # The sizes of arXiv:2212.09748, and two for pods.
  "S": _preset(384, 12, 6),
  "B": _preset(768, 12, 12),
  "L": _preset(1024, 24, 16),
  "XL": _preset(1152, 28, 16),
  "2b": _preset(2048, 28, 16),
  "14b": _preset(5120, 40, 40, 13824),
  # arXiv:2503.20314, with UMT5-XXL's features.
  "wan2.1-t2v-1.3b": _preset(1536, 30, 12, 8960, text_width=4096),
  "wan2.1-t2v-14b": _preset(5120, 40, 40, 13824, text_width=4096),
  "wan2.2-ti2v-5b": _preset(3072, 30, 24, 14336, text_width=4096, channels=48),
}
_WAN = PRESETS["wan2.1-t2v-14b"]
# With an image: a mask of 4 frames and the latents of it, and CLIP ViT-H's features.
_WAN_I2V = dataclasses.replace(_WAN, condition_channels=4 + 16)
_CLIP = {"image_width": 1280, "image_tokens": 257}
PRESETS |= {
  "wan2.1-i2v-14b": dataclasses.replace(_WAN_I2V, **_CLIP),
  "wan2.1-flf2v-14b": dataclasses.replace(
    _WAN_I2V, image_width=1280, image_tokens=2 * 257, image_positions=True
  ),
  # Of either expert.
  "wan2.2-t2v-a14b": _WAN,
  "wan2.2-i2v-a14b": _WAN_I2V,
}


class Context(NamedTuple):
  """What the DiT sees beside patches and noise levels, for rows of L and S tokens.

  Attributes:
    group_BL: noise group of each token. Groups 2n and 2n + 1 see the text n + 1: a clip
      has one, or several that change with time.
    segment_BL: clip of each token, 0 = padding.
    position_BL3: (t, h, w) of each token, may be fractional.
    text_BSE, text_segment_BS: caption features, and the text that each belongs to; of
      a clip with one text, the number of its segment.
    text_states: from `dit_cache.text_states`, computed once for many calls; None: the
      call computes them.
    absolute_BL3: position_BL3 for `absolute_positions`, where the others are turned to
      close a loop; None: they are the same.
    condition_BLQ: patches of the condition's channels.
    image_BNJV: features of each slot's images.
  """

  group_BL: Array
  segment_BL: Array
  position_BL3: Array
  text_BSE: Array
  text_segment_BS: Array
  text_states: tuple[Array, ...] | None = None
  absolute_BL3: Array | None = None
  condition_BLQ: Array | None = None
  image_BNJV: Array | None = None

  @classmethod
  def of_batch(cls, batch: PackedBatch, text_BSE: Array) -> "Context":
    """What a batch says of its tokens and texts; text_BSE: features of those."""
    return cls(
      batch["group_L"],
      batch["segment_L"],
      batch["position_L3"],
      text_BSE,
      batch["text_segment_S"],
      condition_BLQ=batch.get("condition_LQ"),
      image_BNJV=batch.get("image_NJV"),
    )


class DiT(nn.Module):
  """Predicts the target (velocity by default) of every token of packed rows.

  Args of call:
    x_BLP: noisy and given patches.
    t_BG: noise level of each group, in [0, 1]; given groups hold 0.
    reuse: from the call before, see `dit_cache.Reuse`.
    The others are the fields of `Context`, in its order.

  Returns:
    [B, L, P] float32; with reuse, that and what the next call gets.
  """

  config: DiTConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x_BLP: Array,
    t_BG: Array,
    group_BL: Array,
    segment_BL: Array,
    position_BL3: Array,
    text_BSE: Array,
    text_segment_BS: Array,
    text_states: tuple[Array, ...] | None = None,
    absolute_BL3: Array | None = None,
    condition_BLQ: Array | None = None,
    image_BNJV: Array | None = None,
    reuse: Reuse | None = None,
  ) -> Array | tuple[Array, Reuse]:
    c = self.config
    if c.condition_channels:
      assert condition_BLQ is not None, "a model of given frames needs them"
      x_BLP = _beside(c, x_BLP, condition_BLQ)
    x_BLP = partition.constrain(x_BLP, partition.ROWS, partition.TOKENS)
    x_BLD = _shard(self._dense(c.width, "patch_embed")(x_BLP.astype(self.dtype)))
    if c.absolute_positions:
      where_BL3 = position_BL3 if absolute_BL3 is None else absolute_BL3
      features = layers.position_features(where_BL3, c.absolute_positions)
      x_BLD += self._dense(c.width, "position_embed")(features.astype(self.dtype))
    text_BSE = partition.constrain(text_BSE, partition.ROWS, "context")
    text_BSD = self._embed_text(text_BSE) if text_states is None else None
    image_BKD = image_segment_BK = None
    if c.image_width:
      assert image_BNJV is not None, "a model of images needs their features"
      image_segment_BK = image_embed.segments(image_BNJV)
      if text_states is None:
        embed = image_embed.ImageEmbed(
          c.width, c.image_positions, self.dtype, name="image_embed"
        )
        image_BKD = embed(image_BNJV)

    t_BGD = self._embed_time(t_BG, text_BSE, text_segment_BS)
    modulation_BG6D = self._modulation(t_BGD)
    dims = layers.video_rope_dims(c.width // c.heads)
    rope = layers.rope_angles(position_BL3, dims, c.rope_theta)
    text_BL = jnp.where(segment_BL > 0, group_BL // 2 + 1, 0)
    segments = (segment_BL, text_BL, text_segment_BS, image_segment_BK)
    context = (modulation_BG6D, group_BL, segments, rope, text_BSD, image_BKD)

    def blocks(module, x_BLD):
      return module._blocks(x_BLD, context, text_states)

    if reuse is None:
      x_BLD = blocks(self, x_BLD)
    else:
      shift_BLD, scale_BLD = _per_token(modulation_BG6D[:, :, :2], group_BL)
      seen_BLD = layers.layer_norm(x_BLD) * (1 + scale_BLD) + shift_BLD
      seen_BLD = jnp.where(segment_BL[..., None] > 0, seen_BLD, 0.0)
      x_BLD, reuse = run_or_reuse(self, blocks, x_BLD, seen_BLD, reuse)

    out_BLP = self._head(x_BLD, t_BGD, group_BL)
    return out_BLP if reuse is None else (out_BLP, reuse)

  def _dense(self, features, name, dtype=None, **kwargs):
    return layers.Dense(features, name=name, dtype=dtype or self.dtype, **kwargs)

  def _embed_text(self, text_BSE):
    text_BSD = self._dense(self.config.width, "text_embed_1")(
      text_BSE.astype(self.dtype)
    )
    return self._dense(self.config.width, "text_embed_2")(nn.gelu(text_BSD))

  # The modulation is small (a row per group) and steers everything: float32.

  def _embed_time(self, t_BG, text_BSE, text_segment_BS):
    """Embedding of each group's noise level, and of its clip's text: [B, G, D]."""
    c = self.config
    t_BGD = layers.timestep_embedding(t_BG, c.frequency_width)
    t_BGD = self._dense(c.width, "time_embed_1", jnp.float32)(t_BGD)
    t_BGD = self._dense(c.width, "time_embed_2", jnp.float32)(nn.silu(t_BGD))
    if c.pooled_text:
      pooled_BGE = _mean_text(text_BSE, text_segment_BS, t_BG.shape[1])
      t_BGD = t_BGD + self._dense(c.width, "text_pooled", jnp.float32)(pooled_BGE)
    return t_BGD

  def _modulation(self, t_BGD):
    """Shift, scale and gate of attention and MLP, which all blocks share."""
    project = self._dense(
      6 * self.config.width,
      "time_projection",
      jnp.float32,
      kernel_init=nn.initializers.zeros,
    )
    return project(nn.silu(t_BGD)).reshape(*t_BGD.shape[:2], 6, self.config.width)

  def _blocks(self, x_BLD, context, text_states):
    c, block = self.config, _Block
    if c.remat != "none":
      block = nn.remat(block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
    blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, 0),
      length=c.depth,
      # On CPU a loop copies what it keeps for the backward pass in and out.
      unroll=c.depth if _few_on_cpu(c) else 1,
    )(c, name="blocks")
    return blocks(x_BLD, context, text_states)[0]

  def _head(self, x_BLD, t_BGD, group_BL):
    c = self.config
    table_2D = self.param(
      "head_modulation",
      nn.initializers.normal(c.width**-0.5),
      (2, c.width),
      jnp.float32,
    )
    shift_BLD, scale_BLD = _per_token(table_2D + t_BGD[:, :, None], group_BL)
    x_BLD = layers.layer_norm(x_BLD).astype(jnp.float32) * (1 + scale_BLD) + shift_BLD
    return self._dense(
      c.patch_width, "head", jnp.float32, kernel_init=nn.initializers.zeros
    )(x_BLD)


class _Block(nn.Module):
  config: DiTConfig

  @nn.compact
  def __call__(self, x_BLD, context, text_states):
    modulation_BG6D, group_BL, segments, rope, text_BSD, image_BKD = context
    segment_BL, text_BL, text_segment_BS, image_segment_BK = segments
    c, dtype = self.config, x_BLD.dtype
    x_BLD = checkpoint_name(x_BLD, "block")

    def dense(features, name, **kwargs):
      # As the sharding rules of tasks/dit.py have them.
      shared = 1 if name in ("attention_out", "cross_out", "mlp_down") else 0
      return layers.Dense(features, dtype=dtype, shared=shared, name=name, **kwargs)

    def rotated(x_BLD, name):
      K = c.width // c.heads
      x_BLD = dense(c.width, name, rope_half_split=K)(x_BLD)
      x_BLD = layers.RMSNorm(name=f"{name}_norm", rope_half_split=K)(x_BLD)
      return layers.apply_rope(heads(x_BLD), *rope)

    def heads(x):
      return x.reshape(*x.shape[:-1], c.heads, c.width // c.heads)

    table_6D = self.param(
      "modulation", nn.initializers.zeros, (6, c.width), jnp.float32
    )
    # A residual gate starts at 0 through the projection; the table lets it open.
    shift1, scale1, gate1, shift2, scale2, gate2 = _per_token(
      (modulation_BG6D + table_6D).astype(dtype), group_BL
    )

    h_BLD = layers.layer_norm(x_BLD) * (1 + scale1) + shift1
    q_BLNK, k_BLNK = rotated(h_BLD, "query"), rotated(h_BLD, "key")
    v_BLNK = heads(dense(c.width, "value")(h_BLD))
    h_BLNK = attention(q_BLNK, k_BLNK, v_BLNK, segment_BL, segment_BL)
    h_BLD = h_BLNK.reshape(x_BLD.shape)
    x_BLD = x_BLD + gate1 * _shard(dense(c.width, "attention_out")(h_BLD))

    h_BLD = nn.LayerNorm(epsilon=1e-6, dtype=dtype, name="cross_norm")(x_BLD)
    q_BLNK = heads(
      layers.RMSNorm(name="cross_query_norm")(dense(c.width, "cross_query")(h_BLD))
    )
    if text_states is None:
      k_BSD = dense(c.width, "cross_key")(text_BSD)
      k_BSD = layers.RMSNorm(name="cross_key_norm")(k_BSD)
      v_BSD = dense(c.width, "cross_value")(text_BSD)
      states = (k_BSD, v_BSD)
      if c.image_width:
        k_BKD = dense(c.width, "image_key")(image_BKD)
        k_BKD = layers.RMSNorm(name="image_key_norm")(k_BKD)
        states += (k_BKD, dense(c.width, "image_value")(image_BKD))
    else:
      states = text_states
    k, v, *images = map(heads, states)
    h_BLNK = attention(q_BLNK, k, v, text_BL, text_segment_BS)
    if images:
      h_BLNK += attention(q_BLNK, *images, text_BL, image_segment_BK)
    h_BLD = h_BLNK.reshape(x_BLD.shape)
    x_BLD = x_BLD + _shard(dense(c.width, "cross_out")(h_BLD))

    h_BLD = layers.layer_norm(x_BLD) * (1 + scale2) + shift2
    h_BLD = nn.gelu(dense(c.mlp_width, "mlp_up")(h_BLD))
    h_BLD = checkpoint_name(_shard(dense(c.width, "mlp_down")(h_BLD)), "mlp")
    x_BLD = x_BLD + gate2 * h_BLD
    return x_BLD, None


def _beside(config: DiTConfig, x_BLP: Array, condition_BLQ: Array) -> Array:
  """Patches with the channels of the condition behind those of the noise."""
  cells = math.prod(config.patch_size)
  parts = (
    x.astype(x_BLP.dtype).reshape(*x.shape[:2], cells, -1)
    for x in (x_BLP, condition_BLQ)
  )
  return jnp.concatenate(list(parts), axis=-1).reshape(*x_BLP.shape[:2], -1)


def _few_on_cpu(config: DiTConfig) -> bool:
  """Returns whether all blocks may be compiled one by one, and on what is for CPUs."""
  few = config.remat == "none" and config.depth <= _FEW
  return few and partition.platform() == "cpu"


def _shard(x_BLD: Array) -> Array:
  """Tokens as they lie between sublayers."""
  return partition.constrain(x_BLD, partition.ROWS, partition.TOKENS)


def _mean_text(text_BSE: Array, text_segment_BS: Array, groups: int) -> Array:
  """Mean text features of each group's clip: float32 [B, G, E]."""
  # Groups 2n and 2n + 1 belong to segment n + 1.
  one_hot_BSN = jax.nn.one_hot(text_segment_BS - 1, groups // 2, dtype=jnp.float32)
  count_BN1 = one_hot_BSN.sum(axis=1)[..., None]
  mean_BNE = jnp.einsum("bsn,bse->bne", one_hot_BSN, text_BSE.astype(jnp.float32))
  return jnp.repeat(mean_BNE / jnp.maximum(count_BN1, 1.0), 2, axis=1)


def _per_token(modulation_BGMD: Array, group_BL: Array) -> list[Array]:
  """Gathers the M modulation vectors of each token's group: M arrays [B, L, D]."""
  # A one-hot matmul: its gradient is a matmul too, where a gather's is a scatter.
  one_hot_BLG = jax.nn.one_hot(
    group_BL, modulation_BGMD.shape[1], dtype=modulation_BGMD.dtype
  )
  # One matmul a vector, the modulation first: so the gradient is fast on CPU as well.
  return [
    jnp.einsum("bgd,blg->bld", modulation_BGMD[:, :, i], one_hot_BLG)
    for i in range(modulation_BGMD.shape[2])
  ]


def num_flops(
  config: DiTConfig, tokens: float, text_tokens: float, pairs: float
) -> float:
  """FLOPs of one forward pass: matmuls, and attention over the pairs that meet.

  Args:
    tokens, text_tokens: real ones, padding not counted.
    pairs: sum over clips of tokens * (tokens + text tokens).
  """
  D, F = config.width, config.mlp_width
  per_token = config.depth * (6 * D * D + 2 * D * F)
  per_token += D * (2 * config.patch_width + config.condition_width)
  per_text = config.depth * 2 * D * D + config.text_width * D + D * D
  return 2.0 * (tokens * per_token + text_tokens * per_text) + (
    4.0 * config.depth * D * pairs
  )
