"""What the captioner learns: the next word of a caption, and which caption is whose.

The two losses of CoCa (arXiv:2205.01917): cross-entropy of the tokens of captions, and
the symmetric contrastive loss of CLIP (arXiv:2103.00020) between the clips and captions
of the whole batch, over all devices.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from sora_jax.models import captioner
from sora_jax.models.captioner import Captioner, CaptionerConfig
from sora_jax.models.partition import PARAMS
from sora_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class CaptionerLossConfig:
  """What the loss is made of.

  Attributes:
    contrastive_weight: of the contrastive loss beside that of captions. CoCa: 0.5.
    styled_from: step of the second phase. Before, the decoder learns all captions as
      ones of any style.
    styled_share: of the captions that say their style, in the second phase.
  """

  contrastive_weight: float = 0.5
  styled_from: int = 0
  styled_share: float = 0.8

  def __post_init__(self):
    if self.contrastive_weight < 0 or self.styled_from < 0:
      raise ValueError(
        f"captioner contrastive_weight {self.contrastive_weight} or styled_from "
        f"{self.styled_from} is negative"
      )
    if not 0 <= self.styled_share <= 1:
      raise ValueError(f"captioner styled_share {self.styled_share} is not in 0 to 1")


@dataclasses.dataclass(frozen=True)
class _Objective:
  """The three functions of the task; see `make` for the fields."""

  model: CaptionerConfig
  loss_config: CaptionerLossConfig
  patch_width: int
  segments: int
  dtype: jnp.dtype
  patch_side: int

  @property
  def _network(self) -> Captioner:
    return Captioner(self.model, self.dtype, self.patch_side)

  def init(self, key: Array):
    """Params of the captioner."""
    ids_BL = jnp.zeros((1, 1), jnp.int32)
    text = captioner.Text(ids_BL, ids_BL, ids_BL)
    patch_BLP, position_BL3 = jnp.zeros((1, 1, self.patch_width)), jnp.zeros((1, 1, 3))
    variables = self._network.init(
      key, patch_BLP, ids_BL, position_BL3, text, self.segments
    )
    return {"captioner": variables["params"]}

  def loss(self, params, batch, key: Array):
    """Both losses, and metrics."""
    config = self.loss_config
    styled = jax.random.bernoulli(key, config.styled_share, batch["text_S"].shape)
    styled &= batch["step"] >= config.styled_from
    first = batch["text_position_S"] == 0
    any_style = self.model.vocab_size + captioner.STYLES.index("any")
    text_BS = jnp.where(first & ~styled, any_style, batch["text_S"])
    total, metrics = self._losses(params, batch, text_BS)
    return total, {"padding": 1.0 - jnp.mean(batch["segment_L"] > 0), **metrics}

  def evaluate(self, params, batch, key: Array):
    """The losses of captions that all say their style."""
    del key
    total, metrics = self._losses(params, batch, batch["text_S"])
    return {"loss": total, **metrics}

  def _losses(self, params, batch, text_BS):
    segment_BS = batch["text_segment_S"]
    text = captioner.Text(text_BS, segment_BS, batch["text_position_S"])
    logits_BSV, clip_BNE, text_BNE, scale = self._network.apply(
      {"params": params["captioner"]},
      batch["patch_LP"],
      batch["segment_L"],
      batch["position_L3"],
      text,
      self.segments,
    )
    next_BS, said_BS = next_tokens(text_BS, segment_BS)
    caption, right = caption_loss(logits_BSV, next_BS, said_BS)
    # A clip that could not be read has neither tokens nor text.
    number_N = 1 + jnp.arange(self.segments)
    paired_BN = jnp.any(segment_BS[:, :, None] == number_N, axis=1)
    contrastive, found = contrastive_loss(
      *(x.reshape(-1, x.shape[-1]) for x in (clip_BNE, text_BNE)),
      scale,
      paired_BN.reshape(-1),
    )
    total = caption + self.loss_config.contrastive_weight * contrastive
    return total, {
      "caption_loss": caption,
      "contrastive_loss": contrastive,
      "words_right": right,
      "captions_found": found,
      "scale": scale,
    }


def make(
  model: CaptionerConfig,
  loss_config: CaptionerLossConfig,
  patch_width: int,
  segments: int,
  dtype: jnp.dtype = jnp.float32,
  patch_side: int = 1,
) -> Task:
  """The task over batches of packed rows, `packing.packed_row.PackedBatch`.

  Args:
    model, loss_config: sizes, and what the loss is made of.
    patch_width: numbers of a token.
    segments: most clips that a row can hold.
    dtype: of the computation; params, embeddings and losses are float32.
    patch_side: height and width of a patch.
  """
  objective = _Objective(model, loss_config, patch_width, segments, dtype, patch_side)
  return Task(objective.init, objective.loss, objective.evaluate)


def next_tokens(text_BS: Array, segment_BS: Array) -> tuple[Array, Array]:
  """(the token after each, whether it is of the same text): int and bool [B, S]."""
  next_BS, next_segment_BS = (
    jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (text_BS, segment_BS)
  )
  return next_BS, (segment_BS > 0) & (next_segment_BS == segment_BS)


def caption_loss(logits_BSV: Array, next_BS: Array, said_BS: Array):
  """(mean cross-entropy of the tokens that are said, share whose likeliest is right).

  Args:
    logits_BSV: of the next token. next_BS: the tokens that came.
    said_BS: which count.
  """
  # Tokens that do not count may be ids of styles, which have no logit.
  next_BS = jnp.where(said_BS, next_BS, 0)
  peak_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
  picked_BS = jnp.take_along_axis(logits_BSV, next_BS[..., None], axis=-1)[..., 0]
  count = jnp.maximum(jnp.sum(said_BS), 1)
  right = jnp.sum(said_BS & (jnp.argmax(logits_BSV, axis=-1) == next_BS)) / count
  return jnp.sum((peak_BS - picked_BS) * said_BS) / count, right


def contrastive_loss(clip_ME: Array, text_ME: Array, scale: Array, paired_M: Array):
  """(symmetric InfoNCE over M clips and texts, share of clips that find their text).

  Args:
    clip_ME, text_ME: embeddings of length 1.
    scale: of their products, 1 / temperature.
    paired_M: which rows are there; the others take no part.
  """
  logits_MM = scale * clip_ME @ text_ME.T
  logits_MM = jnp.where(paired_M[:, None] & paired_M[None, :], logits_MM, -1e30)
  own_M = jnp.diagonal(logits_MM)
  to_text_M, to_clip_M = (jax.nn.logsumexp(logits_MM, axis=axis) for axis in (1, 0))
  count = jnp.maximum(jnp.sum(paired_M), 1)
  loss = jnp.sum(jnp.where(paired_M, 0.5 * (to_text_M + to_clip_M) - own_M, 0.0))
  # Equal texts are equally likely, and as right.
  found = jnp.sum(paired_M & (own_M >= logits_MM.max(axis=1))) / count
  return loss / count, found


# As those of the DiT: into a sublayer params x tensor, out of it tensor x params.
SHARDING_RULES = (
  (r".*/blocks/((cross_)?(query|key|value)|mlp_up)/kernel", P(None, PARAMS, "tensor")),
  (r".*/blocks/((attention|cross)_out|mlp_down)/kernel", P(None, "tensor", PARAMS)),
  (r".*/(piece|patch|position|gist|clip|text)_embed/kernel", P(PARAMS, None)),
  (r".*/pool_(key|value)/kernel", P(PARAMS, "tensor")),
  (r".*/token_embed/embedding", P(None, PARAMS)),
  (r".*/head/kernel", P(PARAMS, None)),
  (r".*/(bias|scale|query|log_scale)", P()),
)
