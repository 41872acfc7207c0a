"""Features of prompts, for models that were trained on those of a frozen encoder."""

import pathlib
from collections.abc import Callable

import numpy as np

from sora_jax.encoders.text_encoder import FrozenTextEncoder
from sora_jax.models.meta import DiTMeta
from sora_jax.runtime.residency import Residency

# (texts, most tokens of each) -> features of each, [S, width].
EncodeText = Callable[[list[str], int], list[np.ndarray]]


def of_checkpoint(
  folder: pathlib.Path,
  meta: DiTMeta,
  mesh,
  dtype,
  residency: Residency,
  remember: bool = False,
) -> EncodeText | None:
  """What makes features for the DiT of a folder; None if it reads texts itself.

  The encoder is in text/model, or where it was in training.

  remember: whether those of the last texts are kept, so that the encoder need not come
    back for them.
  """
  if not (text := meta.frozen_text):
    return None
  encoder = FrozenTextEncoder(folder, mesh, dtype, text.features, residency)
  return _remembering(encoder.encode) if remember else encoder.encode


def _remembering(encode_text: EncodeText) -> EncodeText:
  """Keeps the features of the last texts: their encoder need not come back for them."""
  known: dict[str, np.ndarray] = {}

  def encode(texts, max_tokens):
    nonlocal known
    if fresh := [text for text in texts if text not in known]:
      known |= dict(zip(fresh, encode_text(fresh, max_tokens), strict=True))
    known = {text: known[text] for text in texts}
    return [known[text] for text in texts]

  return encode
