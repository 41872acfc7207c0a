"""A captioner: clips to texts, and how well a clip and a text go together.

It is CoCa (arXiv:2205.01917) over packed rows: a bidirectional transformer reads a
clip's spacetime patches, a causal one the text alone, and a causal one with
cross-attention to a summary of the clip says the next word. The first two end in one
embedding each, which the contrastive loss compares. The text's is the state of its last
token, the end of text, which sees all of it. The clip's summary are tokens pooled by
attention with a few learned queries. All of them make its gist, one vector, which is
what its embedding is made of, and which each token of its text gets, too: so that there
is a way from the words to the clip before any attention has learnt where to look.

A text is a token for its style, see STYLES, then the ids of its tokenizer with the end
of text. The style takes the place of a begin of text, and asks for words of its kind.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from sora_jax.models import layers, partition
from sora_jax.models.attention import attention
from sora_jax.models.captioner_config import PRESETS as PRESETS
from sora_jax.models.captioner_config import CaptionerConfig
from sora_jax.models.captioner_config import num_flops as num_flops
from sora_jax.models.dit import REMAT_POLICIES
from sora_jax.packing.caption_styles import STYLES

# Blocks that are compiled one by one on CPU.
_FEW = 8


class Text(NamedTuple):
  """Packed texts: ids with the style first, text of each token, index in its text."""

  text_BS: Array
  segment_BS: Array
  position_BS: Array


class ClipStates(NamedTuple):
  """Tokens that say what is in packed clips, and the clip of each, 0 = none."""

  x_BLD: Array
  segment_BL: Array


class Prompted(NamedTuple):
  """What the M texts of a row are said about, while decoding.

  Attributes:
    clip: keys and values of the clips' tokens in each block, [depth, B, L, D] each.
    gist_BMD: of the clip of each text.
    segment_BL: of the clips' tokens. clip_BM: the clip of each text, 0 = none.
  """

  clip: tuple[Array, Array]
  gist_BMD: Array
  segment_BL: Array
  clip_BM: Array


class Past(NamedTuple):
  """Keys and values of T tokens of M texts, [depth, B, M, T, N, K] each.

  Of the blocks that read the text alone, and of those that see the clip.
  """

  text: tuple[Array, Array]
  caption: tuple[Array, Array]


class Captioner(nn.Module):
  """Use it through `apply(..., method=Captioner.encode)` and its other methods.

  patch_side: height and width of a patch, which config.stem_pieces cuts.
  """

  config: CaptionerConfig
  dtype: jnp.dtype = jnp.float32
  patch_side: int = 1

  def setup(self):
    c = self.config
    self.clip = _ClipEncoder(c, self.dtype, self.patch_side, name="clip")
    self.token_embed = nn.Embed(
      c.vocab_size + len(STYLES),
      c.width,
      embedding_init=nn.initializers.normal(1.0),
      dtype=self.dtype,
      name="token_embed",
    )
    self.text = _Blocks(c, c.text_depth, name="text")
    self.text_norm = layers.RMSNorm(name="text_norm")
    self.text_embed = layers.Dense(c.embed_width, use_bias=False, name="text_embed")
    self.caption = _Blocks(c, c.caption_depth, cross=True, name="caption")
    self.caption_norm = layers.RMSNorm(name="caption_norm")
    self.head = layers.Dense(c.vocab_size, name="head")
    # That of CoCa and CLIP: 1 / 0.07.
    self.log_scale = self.param(
      "log_scale", nn.initializers.constant(2.659), (), jnp.float32
    )

  def __call__(self, patch_BLP, segment_BL, position_BL3, text: Text, segments: int):
    """All that training compares.

    Args:
      patch_BLP, segment_BL, position_BL3: packed clips, as `packing.PackedRow` has
        them.
      text: the texts, of the clips of equal segments.
      segments: N, most clips of a row.

    Returns:
      (logits [B, S, vocab] of each next token, float32; embeddings [B, N, E] of clips
      and of texts, of length 1; the scale of their products, a scalar).
    """
    clips = self.encode(patch_BLP, segment_BL, position_BL3, segments)
    x_BSD = self._read(text)
    logits_BSV = self._say(x_BSD, clips, text)
    clip_BNE = self.embed_clips(clips)
    text_BNE = self._embed(x_BSD, text, segments)
    # As CLIP: a scale above 100 makes training unstable.
    scale = jnp.exp(jnp.minimum(self.log_scale, jnp.log(100.0)))
    return logits_BSV, clip_BNE, text_BNE, scale

  def encode(self, patch_BLP, segment_BL, position_BL3, segments: int) -> ClipStates:
    """Summaries of packed clips, of N = segments clips a row at most."""
    return self.clip(patch_BLP, segment_BL, position_BL3, segments)

  def embed_clips(self, clips: ClipStates) -> Array:
    """Embeddings of the clips of each row, float32 [B, N, E] of length 1."""
    return self.clip.embed(clips)

  def embed_texts(self, text: Text, segments: int) -> Array:
    """Embeddings of the texts of each row, float32 [B, N, E] of length 1."""
    return self._embed(self._read(text), text, segments)

  def prompt(self, clips: ClipStates, clip_BM: Array) -> Prompted:
    """What texts about the clips of these numbers are decoded with."""
    gist_BMD = _of_clips(self.clip.gist(clips), clip_BM)
    return Prompted(self.caption.keys(clips.x_BLD), gist_BMD, clips.segment_BL, clip_BM)

  def step(
    self, ids_BM: Array, time: Array, past: Past, prompted: Prompted
  ) -> tuple[Array, Past]:
    """Reads token number `time` of each text: (logits [B, M, vocab] of the next, past).

    Equals what `__call__` says of that token.
    """
    position_BM1 = jnp.broadcast_to(time, (*ids_BM.shape, 1))
    rope = layers.rope_angles(position_BM1, (self.config.head_dim,))
    x_BMD = self.token_embed(ids_BM)
    x_BMD, text = self.text(x_BMD, _Seen(rope, time=time), past.text)
    x_BMD = x_BMD + prompted.gist_BMD
    seen = _Seen(rope, time=time, text=prompted.clip_BM, clip=prompted.segment_BL)
    x_BMD, caption = self.caption(x_BMD, seen, past.caption, prompted.clip)
    logits_BMV = self.head(self.caption_norm(x_BMD)).astype(jnp.float32)
    return logits_BMV, Past(text, caption)

  def _read(self, text: Text) -> Array:
    """States of the texts alone."""
    x_BSD = self.token_embed(text.text_BS)
    return self.text(x_BSD, self._seen(text))[0]

  def _say(self, x_BSD, clips: ClipStates, text: Text) -> Array:
    seen = self._seen(text)._replace(text=text.segment_BS, clip=clips.segment_BL)
    x_BSD = x_BSD + _of_clips(self.clip.gist(clips), text.segment_BS)
    x_BSD, _ = self.caption(x_BSD, seen, None, self.caption.keys(clips.x_BLD))
    return self.head(self.caption_norm(x_BSD)).astype(jnp.float32)

  def _seen(self, text: Text) -> "_Seen":
    """Each token sees those of its text up to itself."""
    S = text.segment_BS.shape[1]
    same_BSS = text.segment_BS[:, :, None] == text.segment_BS[:, None, :]
    rope = layers.rope_angles(text.position_BS[..., None], (self.config.head_dim,))
    return _Seen(rope, mask=same_BSS & jnp.tri(S, dtype=bool))

  def _embed(self, x_BSD, text: Text, segments: int) -> Array:
    # The last token of each text: the next one is of another, or there is none.
    following_BS = jnp.pad(text.segment_BS[:, 1:], ((0, 0), (0, 1)))
    last_BS = text.segment_BS != following_BS
    of_text_BSN = jax.nn.one_hot(text.segment_BS - 1, segments, dtype=x_BSD.dtype)
    of_text_BSN *= last_BS[..., None]
    x_BND = jnp.einsum("bsn,bsd->bnd", of_text_BSN, x_BSD)
    return _unit(self.text_embed(self.text_norm(x_BND)))


class _Seen(NamedTuple):
  """What the tokens of a sequence see: the fields that are not None say which.

  Attributes:
    rope: angles of the tokens' positions.
    segment: of packed clips: tokens see those of their own.
    mask: of packed texts, [B, S, S].
    time: while decoding, the index of the one token of each text.
    text, clip: which text sees which clip's tokens, by equal numbers.
  """

  rope: tuple[Array, Array]
  segment: Array | None = None
  mask: Array | None = None
  time: Array | None = None
  text: Array | None = None
  clip: Array | None = None


class _ClipEncoder(nn.Module):
  config: CaptionerConfig
  dtype: jnp.dtype
  patch_side: int

  def setup(self):
    c = self.config
    self.stem = _PatchEmbed(c, self.dtype, self.patch_side, name="stem")
    self.position_embed = layers.Dense(c.width, dtype=self.dtype, name="position_embed")
    self.stack = _Blocks(c, c.depth, name="encoder")
    self.final_norm = layers.RMSNorm(name="final_norm")
    self.summary = _Pool(c, name="summary")
    self.summary_norm = layers.RMSNorm(name="summary_norm")
    self.gist_embed = layers.Dense(c.width, name="gist_embed")
    self.gist_norm = layers.RMSNorm(name="gist_norm")
    self.clip_embed = layers.Dense(c.embed_width, use_bias=False, name="clip_embed")

  def __call__(self, patch_BLP, segment_BL, position_BL3, segments) -> ClipStates:
    c = self.config
    x_BLD = self.stem(patch_BLP.astype(self.dtype))
    features = layers.position_features(position_BL3, c.absolute_positions)
    x_BLD = _shard(x_BLD + self.position_embed(features.astype(self.dtype)))
    dims = layers.video_rope_dims(c.head_dim)
    rope = layers.rope_angles(position_BL3, dims, c.rope_theta)
    x_BLD, _ = self.stack(x_BLD, _Seen(rope, segment=segment_BL))
    states = ClipStates(self.final_norm(x_BLD), segment_BL)
    x_BLD, segment_BL = self.summary(states, segments)
    return ClipStates(self.summary_norm(x_BLD), segment_BL)

  def gist(self, clips: ClipStates) -> Array:
    """One vector for each clip, of all of its summary: [B, N, D]."""
    c = self.config
    x_BNP = clips.x_BLD.reshape(len(clips.x_BLD), -1, c.summary_tokens * c.width)
    return self.gist_norm(self.gist_embed(x_BNP))

  def embed(self, clips: ClipStates) -> Array:
    """Embeddings [B, N, E] of what `__call__` says of clips."""
    return _unit(self.clip_embed(self.gist(clips)))


class _PatchEmbed(nn.Module):
  """Patches [B, L, P] to tokens, by the pieces of each if the config says so.

  A matrix sees colours. One small network for all pieces sees edges, too.
  """

  config: CaptionerConfig
  dtype: jnp.dtype
  side: int

  @nn.compact
  def __call__(self, patch_BLP):
    c, pieces = self.config, self.config.stem_pieces
    if pieces > 1:
      B, L, _ = patch_BLP.shape
      edge = self.side // pieces
      piece = patch_BLP.reshape(B, L, pieces, edge, pieces, edge, -1)
      piece = piece.swapaxes(3, 4).reshape(B, L * pieces**2, -1)
      dense = layers.Dense(c.stem_width, dtype=self.dtype, name="piece_embed")
      patch_BLP = nn.gelu(dense(piece)).reshape(B, L, -1)
    return layers.Dense(c.width, dtype=self.dtype, name="patch_embed")(patch_BLP)


class _Pool(nn.Module):
  """Attention pooling: the same learned queries for each clip, to the clip's tokens."""

  config: CaptionerConfig

  @nn.compact
  def __call__(self, clips: ClipStates, segments: int) -> ClipStates:
    """Tokens of clip 1, then of clip 2, ...: [B, N * summary_tokens, D]."""
    c, queries = self.config, self.config.summary_tokens
    x_BLD, segment_BL = clips
    B = len(x_BLD)
    query = self.param(
      "query", nn.initializers.normal(1.0), (queries, c.width), jnp.float32
    )
    q_BLD = jnp.tile(query.astype(x_BLD.dtype), (B, segments, 1))
    k_BLD, v_BLD = (
      layers.Dense(c.width, name=f"pool_{name}")(x_BLD) for name in ("key", "value")
    )
    q, k, v = (x.reshape(B, -1, c.heads, c.head_dim) for x in (q_BLD, k_BLD, v_BLD))
    number_BN = jnp.broadcast_to(1 + jnp.arange(segments), (B, segments))
    # A clip that is not there sees padding; it is nobody's.
    number_BN = jnp.where(number_BN <= segment_BL.max(1, keepdims=True), number_BN, 0)
    number_BL = jnp.repeat(number_BN, queries, axis=1)
    pooled = attention(q, k, v, number_BL, segment_BL)
    return ClipStates(pooled.reshape(q_BLD.shape), number_BL)


class _Blocks(nn.Module):
  """A stack of blocks, by a scan."""

  config: CaptionerConfig
  depth: int
  cross: bool = False

  def setup(self):
    c, block = self.config, _Block
    if c.remat != "none":
      block = nn.remat(block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
    self.blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, 0, 0),
      out_axes=0,
      length=self.depth,
      # On CPU a loop copies what it keeps for the backward pass in and out.
      unroll=self.depth if self._few_on_cpu() else 1,
    )(c, self.cross, name="blocks")
    if self.cross:
      self.clip_keys = _ClipKeys(c, self.depth, name="clip_keys")

  def _few_on_cpu(self) -> bool:
    few = self.config.remat == "none" and self.depth <= _FEW
    return few and partition.platform() == "cpu"

  def __call__(self, x_BLD, seen: _Seen, past=None, clip=None) -> tuple[Array, Any]:
    """(tokens, what the next token needs of these; None without `past`)."""
    return self.blocks(x_BLD, seen, past, clip)

  def keys(self, clip_BLD: Array) -> tuple[Array, Array]:
    """Keys and values [depth, B, L, D] of the clips' tokens in all blocks."""
    return self.clip_keys(clip_BLD)


class _ClipKeys(nn.Module):
  """What the blocks of the decoder attend to: made once for all tokens of a text."""

  config: CaptionerConfig
  depth: int

  @nn.compact
  def __call__(self, clip_BLD):
    blocks = nn.scan(
      _ClipKeysOfBlock,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.depth,
    )
    return blocks(self.config, name="blocks")((), clip_BLD)[1]


class _ClipKeysOfBlock(nn.Module):
  config: CaptionerConfig

  @nn.compact
  def __call__(self, carry, clip_BLD):
    D = self.config.width
    k_BLD, v_BLD = (
      layers.Dense(D, use_bias=False, dtype=clip_BLD.dtype, shared=0, name=name)(
        clip_BLD
      )
      for name in ("cross_key", "cross_value")
    )
    return carry, (layers.RMSNorm(name="cross_key_norm")(k_BLD), v_BLD)


class _Block(nn.Module):
  """Pre-norm attention with rotary positions, cross-attention if wanted, and an MLP."""

  config: CaptionerConfig
  cross: bool

  @nn.compact
  def __call__(self, x_BLD, seen: _Seen, past, clip):
    c, dtype = self.config, x_BLD.dtype

    def dense(features, name, **kwargs):
      # As the sharding rules of tasks/captioner.py have them.
      shared = 1 if name in ("attention_out", "cross_out", "mlp_down") else 0
      kwargs |= {"use_bias": False, "dtype": dtype, "shared": shared}
      return layers.Dense(features, name=name, **kwargs)

    def heads(x):
      return x.reshape(*x.shape[:-1], c.heads, c.head_dim)

    def rotated(h_BLD, name):
      # Only what is rotated has its channels in the order that `apply_rope` wants.
      h_BLD = dense(c.width, name, rope_half_split=c.head_dim)(h_BLD)
      norm = layers.RMSNorm(name=f"{name}_norm", rope_half_split=c.head_dim)
      return layers.apply_rope(heads(norm(h_BLD)), *seen.rope)

    h_BLD = layers.RMSNorm(name="attention_norm")(x_BLD)
    q, k, v = (
      rotated(h_BLD, "query"),
      rotated(h_BLD, "key"),
      dense(c.width, "value")(h_BLD),
    )
    h_BLNK, past = _attend(q, k, heads(v), seen, past)
    h_BLD = h_BLNK.reshape(x_BLD.shape)
    x_BLD = x_BLD + _shard(dense(c.width, "attention_out")(h_BLD))
    if self.cross:
      h_BLD = layers.RMSNorm(name="cross_norm")(x_BLD)
      q = heads(
        layers.RMSNorm(name="cross_query_norm")(dense(c.width, "cross_query")(h_BLD))
      )
      assert seen.text is not None and seen.clip is not None
      k, v = map(heads, clip)
      h_BLNK = attention(q, k, v, seen.text, seen.clip)
      h_BLD = h_BLNK.reshape(x_BLD.shape)
      x_BLD = x_BLD + _shard(dense(c.width, "cross_out")(h_BLD))
    h_BLD = layers.RMSNorm(name="mlp_norm")(x_BLD)
    h_BLD = nn.gelu(dense(c.mlp_width, "mlp_up")(h_BLD))
    return x_BLD + _shard(dense(c.width, "mlp_down")(h_BLD)), past


def no_past(config: CaptionerConfig, clip_BM: Array, tokens: int, dtype) -> Past:
  """The past of texts without a token, which can have that many with their style."""

  def empty(depth):
    shape = (depth, *clip_BM.shape, tokens, config.heads, config.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

  return Past(empty(config.text_depth), empty(config.caption_depth))


def _attend(q, k, v, seen: _Seen, past):
  """(attention of the tokens to what they see, keys and values for the next token)."""
  if seen.segment is not None:
    return attention(q, k, v, seen.segment, seen.segment), None
  if seen.mask is not None:
    # Texts are short: all scores of a row are made.
    return jax.nn.dot_product_attention(q, k, v, mask=seen.mask[:, None]), None
  assert seen.time is not None  # decoding
  k_BMTNK, v_BMTNK = (
    jax.lax.dynamic_update_slice_in_dim(kept, new[:, :, None], seen.time, axis=2)
    for kept, new in zip(past, (k, v), strict=True)
  )
  score = jnp.einsum("bmnk,bmtnk->bmnt", q, k_BMTNK, preferred_element_type=jnp.float32)
  visible_T = jnp.arange(k_BMTNK.shape[2]) <= seen.time
  score = jnp.where(visible_T, score * q.shape[-1] ** -0.5, -1e30)
  weight = jax.nn.softmax(score, axis=-1).astype(v.dtype)
  return jnp.einsum("bmnt,bmtnk->bmnk", weight, v_BMTNK), (k_BMTNK, v_BMTNK)


def _shard(x_BLD: Array) -> Array:
  """Tokens as they lie between sublayers."""
  return partition.constrain(x_BLD, partition.ROWS, partition.TOKENS)


def _of_clips(x_BND: Array, clip_BS: Array) -> Array:
  """What clips of these numbers have, 0 for none: [B, S, D]."""
  of_clip_BSN = jax.nn.one_hot(clip_BS - 1, x_BND.shape[1], dtype=x_BND.dtype)
  return jnp.einsum("bsn,bnd->bsd", of_clip_BSN, x_BND)


def _unit(x: Array) -> Array:
  """Vectors of length 1, float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
