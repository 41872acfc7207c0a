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

from sora_jax.models import layers, partition
from sora_jax.models.attention import attention
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


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """Sizes of the DiT.

  Attributes:
    patch_size: latent (t, h, w) of one token. channels: latent channels.
    width, depth, heads, mlp_width: of the transformer. text_width: of its text input.
    pooled_text: add the mean of a clip's text features to its timestep embedding. A
      short way for what the caption says of the whole clip (as in SD3,
      arXiv:2403.03206); Wan has none.
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
  remat: str = fields.free("none")

  def __post_init__(self):
    if self.width % self.heads or (self.width // self.heads) % 2:
      raise ValueError(
        f"dit width {self.width} over {self.heads} heads must be an even whole number"
      )
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f"dit remat {self.remat!r} is not one of {list(REMAT_POLICIES)}")

  @property
  def patch_width(self) -> int:
    return math.prod(self.patch_size) * self.channels


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


class Reuse(NamedTuple):
  """What the steps of sampling hand on, so that blocks need not run in each of them.

  After TeaCache (arXiv:2411.19108), without its rescaling: the blocks run again once
  what enters them has changed by a share `limit` since, and what they added last is
  added again otherwise. Padding has no say, but all clips of a batch have.

  Attributes:
    seen_BLD: modulated tokens as the first block got them in the call before.
    added_BLD: what the blocks added when they ran last.
    change: sum of the relative changes since then; infinite before the first call.
    limit: of change, below which they do not run.
  """

  seen_BLD: Array
  added_BLD: Array
  change: Array
  limit: Array

  @classmethod
  def start(cls, rows: int, tokens: int, width: int, dtype) -> "Reuse":
    """Before the first call, which runs."""
    zeros_BLD = jnp.zeros((rows, tokens, width), dtype)
    return cls(zeros_BLD, zeros_BLD, jnp.array(jnp.inf), jnp.array(0.0))


class DiT(nn.Module):
  """Predicts the target (velocity by default) of every token of packed rows.

  Args of call:
    x_BLP: noisy and given patches.
    t_BG: noise level of each group, in [0, 1]; given groups hold 0.
    group_BL: group of each token. Groups 2n and 2n + 1 see the text n + 1: a clip has
      one, or several that change with time.
    segment_BL: clip of each token, 0 = padding.
    position_BL3: (t, h, w) of each token, may be fractional.
    text_BSE, text_segment_BS: caption features, and the text that each belongs to; of
      a clip with one text, the number of its segment.
    text_states: of `text_states`, made once for many calls; None: made here.
    reuse: from the call before, see `Reuse`.

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
    text_states: tuple[Array, Array] | None = None,
    reuse: Reuse | None = None,
  ) -> Array | tuple[Array, Reuse]:
    c, dtype = self.config, self.dtype

    def dense(features, name, **kwargs):
      return layers.Dense(features, name=name, **{"dtype": dtype, **kwargs})

    x_BLP = partition.constrain(x_BLP, partition.ROWS, partition.TOKENS)
    x_BLD = _shard(dense(c.width, "patch_embed")(x_BLP.astype(dtype)))
    text_BSE = partition.constrain(text_BSE, partition.ROWS, "context")
    text_BSD = None
    if text_states is None:
      text_BSD = dense(c.width, "text_embed_1")(text_BSE.astype(dtype))
      text_BSD = dense(c.width, "text_embed_2")(nn.gelu(text_BSD))

    # The modulation is small (a row per group) and steers everything: float32.
    t_BGD = layers.timestep_embedding(t_BG, c.frequency_width)
    t_BGD = dense(c.width, "time_embed_1", dtype=jnp.float32)(t_BGD)
    t_BGD = dense(c.width, "time_embed_2", dtype=jnp.float32)(nn.silu(t_BGD))
    if c.pooled_text:
      pooled_BGE = _mean_text(text_BSE, text_segment_BS, t_BG.shape[1])
      t_BGD = t_BGD + dense(c.width, "text_pooled", dtype=jnp.float32)(pooled_BGE)
    modulation_BG6D = dense(
      6 * c.width,
      "time_projection",
      dtype=jnp.float32,
      kernel_init=nn.initializers.zeros,
    )(nn.silu(t_BGD)).reshape(*t_BG.shape, 6, c.width)

    rope = layers.rope_angles(position_BL3, layers.video_rope_dims(c.width // c.heads))
    text_BL = jnp.where(segment_BL > 0, group_BL // 2 + 1, 0)
    segments = (segment_BL, text_BL, text_segment_BS)
    context = (modulation_BG6D, group_BL, segments, rope, text_BSD)

    def run(_, x_BLD):
      block = _Block
      if c.remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
      blocks = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=c.depth,
      )(c, name="blocks")
      return blocks(x_BLD, context, text_states)[0]

    if reuse is None:
      x_BLD = run(self, x_BLD)
    else:
      shift_BLD, scale_BLD = _per_token(modulation_BG6D[:, :, :2], group_BL)
      seen_BLD = layers.layer_norm(x_BLD) * (1 + scale_BLD) + shift_BLD
      seen_BLD = jnp.where(segment_BL[..., None] > 0, seen_BLD, 0.0)
      moved = jnp.sum(jnp.abs(seen_BLD - reuse.seen_BLD))
      size = jnp.sum(jnp.abs(reuse.seen_BLD))
      change = reuse.change + moved / jnp.maximum(size, 1e-6)
      fresh = change >= reuse.limit
      added_BLD = nn.cond(
        fresh,
        lambda module, x_BLD: run(module, x_BLD) - x_BLD,
        lambda _, x_BLD: reuse.added_BLD,
        *(self, x_BLD),
      )
      x_BLD += added_BLD
      change = jnp.where(fresh, 0.0, change)
      reuse = Reuse(seen_BLD.astype(dtype), added_BLD, change, reuse.limit)

    table_2D = self.param(
      "head_modulation",
      nn.initializers.normal(c.width**-0.5),
      (2, c.width),
      jnp.float32,
    )
    shift_BLD, scale_BLD = _per_token(table_2D + t_BGD[:, :, None], group_BL)
    x_BLD = layers.layer_norm(x_BLD).astype(jnp.float32) * (1 + scale_BLD) + shift_BLD
    out_BLP = dense(
      c.patch_width, "head", dtype=jnp.float32, kernel_init=nn.initializers.zeros
    )(x_BLD)
    return out_BLP if reuse is None else (out_BLP, reuse)


class _Block(nn.Module):
  config: DiTConfig

  @nn.compact
  def __call__(self, x_BLD, context, text_states):
    modulation_BG6D, group_BL, segments, rope, text_BSD = context
    segment_BL, text_BL, text_segment_BS = segments
    c, dtype = self.config, x_BLD.dtype
    x_BLD = checkpoint_name(x_BLD, "block")

    def dense(features, name, **kwargs):
      # As the sharding rules of tasks/dit.py have them.
      shared = 1 if name in ("attention_out", "cross_out", "mlp_down") else 0
      return layers.Dense(features, dtype=dtype, shared=shared, name=name, **kwargs)

    def rotated(x_BLD, name):
      K = c.width // c.heads
      x_BLD = dense(c.width, name, halves=K)(x_BLD)
      x_BLD = layers.RMSNorm(name=f"{name}_norm", halves=K)(x_BLD)
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
    else:
      k_BSD, v_BSD = text_states
    h_BLNK = attention(q_BLNK, heads(k_BSD), heads(v_BSD), text_BL, text_segment_BS)
    h_BLD = h_BLNK.reshape(x_BLD.shape)
    x_BLD = x_BLD + _shard(dense(c.width, "cross_out")(h_BLD))

    h_BLD = layers.layer_norm(x_BLD) * (1 + scale2) + shift2
    h_BLD = nn.gelu(dense(c.mlp_width, "mlp_up")(h_BLD))
    h_BLD = checkpoint_name(_shard(dense(c.width, "mlp_down")(h_BLD)), "mlp")
    x_BLD = x_BLD + gate2 * h_BLD
    return x_BLD, None


def text_states(
  config: DiTConfig, params, text_BSE: Array, dtype=jnp.float32
) -> tuple[Array, Array]:
  """Keys and values of the text in all blocks [depth, B, S, D]; steps share them.

  params: of the DiT.
  """

  def dense(params, name, x):
    layer = layers.Dense(config.width, dtype=dtype)
    return layer.apply({"params": params[name]}, x)

  def of_block(block):
    k_BSD = dense(block, "cross_key", text_BSD)
    k_BSD = layers.RMSNorm().apply({"params": block["cross_key_norm"]}, k_BSD)
    return k_BSD, dense(block, "cross_value", text_BSD)

  text_BSE = partition.constrain(text_BSE, partition.ROWS, "context")
  text_BSD = dense(params, "text_embed_1", text_BSE.astype(dtype))
  text_BSD = dense(params, "text_embed_2", nn.gelu(text_BSD))
  names = ("cross_key", "cross_key_norm", "cross_value")
  # Block by block, as their params are gathered.
  return jax.lax.map(of_block, {name: params["blocks"][name] for name in names})


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


def num_flops(config: DiTConfig, tokens: int, text_tokens: int, pairs: int) -> float:
  """FLOPs of one forward pass: matmuls, and attention over the pairs that meet.

  Args:
    tokens, text_tokens: real ones, padding not counted.
    pairs: sum over clips of tokens * (tokens + text tokens).
  """
  D, F = config.width, config.mlp_width
  per_token = config.depth * (6 * D * D + 2 * D * F) + 2 * D * config.patch_width
  per_text = config.depth * 2 * D * D + config.text_width * D + D * D
  return 2.0 * (tokens * per_token + text_tokens * per_text) + (
    4.0 * config.depth * D * pairs
  )
