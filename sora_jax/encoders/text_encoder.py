"""A frozen text encoder (T5, UMT5, CLIP) as others use it: captions to features."""

import html
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sora_jax.data import t5_tokenizer
from sora_jax.data.clip_tokenizer import ClipTokenizer
from sora_jax.encoders import model_folders
from sora_jax.models.clip_text import CLIPTextConfig, CLIPTextEncoder
from sora_jax.models.meta import TextMeta
from sora_jax.models.partition import PARAMS
from sora_jax.models.t5 import T5Encoder
from sora_jax.runtime import checkpoint, sharding
from sora_jax.runtime.residency import Residency

RULES = (
  (r"token_embed/embedding", P(None, PARAMS)),
  (r"blocks/(query|key|value|mlp_gate|mlp_up)/kernel", P(None, PARAMS, "tensor")),
  (r"blocks/(attention_out|mlp_down)/kernel", P(None, "tensor", PARAMS)),
  (r"(blocks/)?position_bias/embedding", P()),
  (r".*/scale", P()),
)
CLIP_RULES = (
  (r"(token|position)_embed/embedding", P(None, PARAMS)),
  (r"blocks/(query|key|value|mlp_up)/kernel", P(None, PARAMS, "tensor")),
  (r"blocks/(attention_out|mlp_down)/kernel", P(None, "tensor", PARAMS)),
  (r".*/(bias|scale)", P()),
)
_LENGTHS = (16, 64, 128, 256, 512)  # that captions are padded to, for few programs
_BATCH = 16


class FrozenTextEncoder:
  """Captions to features, jitted, with params sharded over the mesh.

  Attributes:
    width: of the features.
    id: of the weights; records and models made with its features keep it.
  """

  def __init__(
    self,
    folder,
    mesh,
    dtype=jnp.float32,
    expected: str = "",
    residency: Residency | None = None,
  ):
    """Loads text/model as `import_weights` writes it, with its tokenizer.

    Args:
      folder: of the checkpoint, or of a run that was trained on its features.
      mesh: that params and batches are sharded over.
      dtype: of params and of most of the computation: frozen params need no float32.
      expected: the id that it must have, where features of it are in use already.
      residency: that says when the params are on the devices; always without it.

    Raises:
      ValueError: if there is no complete text encoder, no tokenizer or one of more
        pieces than the encoder has, or one of another id than expected.
    """
    folder = model_folders.of_text(folder)
    meta = TextMeta.from_json(checkpoint.load_meta(folder), folder)
    if expected and meta.id != expected:
      raise ValueError(
        f"{folder} is another text encoder ({meta.id}) than the one whose features "
        f"were trained on ({expected})"
      )
    config = meta.model
    self._tokenizer: t5_tokenizer.T5Tokenizer | ClipTokenizer
    network: T5Encoder | CLIPTextEncoder
    if isinstance(config, CLIPTextConfig):
      rules, network = CLIP_RULES, CLIPTextEncoder(config, dtype)
      self._longest: int | None = config.positions
      vocabulary = folder / "tokenizer.json"
      self._tokenizer = ClipTokenizer(str(vocabulary))
    else:
      rules, network, self._longest = RULES, T5Encoder(config, dtype), None
      vocabulary = pathlib.Path(t5_tokenizer.find(folder))
      self._tokenizer = t5_tokenizer.T5Tokenizer(str(vocabulary))
    if self._tokenizer.vocab_size > config.vocab_size:
      raise ValueError(
        f"{vocabulary} has {self._tokenizer.vocab_size} pieces, but the text encoder "
        f"{config.vocab_size}"
      )
    self._residency = residency or Residency()

    def load():
      return checkpoint.load_model(
        folder, lambda shapes: sharding.param_shardings(shapes, rules, mesh), dtype
      )[0]

    self._residency.put("text", load)
    self._encode = jax.jit(network.apply, out_shardings=NamedSharding(mesh, P()))
    self._mesh, self._dtype = mesh, dtype
    self.width, self.id = config.width, meta.id

  def encode(self, texts: list[str], max_tokens: int = 512) -> list[np.ndarray]:
    """Features of each text, [S, width] in the dtype of the computation.

    S is the number of its tokens, at most max_tokens, the end's included; CLIP reads no
    more than its 77. All processes of the mesh must call it alike.
    """
    if self._longest:
      max_tokens = min(max_tokens, self._longest)
    ids = [self._tokenizer.encode(clean(text), max_tokens) for text in texts]
    features: dict[int, np.ndarray] = {}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    rows = sharding.whole_batch(_BATCH, self._mesh)
    for start in range(0, len(order), rows):
      part = order[start : start + rows]
      longest = len(ids[part[-1]])
      size = next((n for n in _LENGTHS if n >= longest), longest)
      size = min(size, self._longest or size)
      text_BS = np.zeros((rows, size), np.int32)
      mask_BS = np.zeros((rows, size), bool)
      for row, i in enumerate(part):
        text_BS[row, : len(ids[i])], mask_BS[row, : len(ids[i])] = ids[i], True
      batch = NamedSharding(self._mesh, P(sharding.BATCH_AXES))
      with jax.set_mesh(self._mesh):
        placed = (
          jax.make_array_from_callback(x.shape, batch, x.__getitem__)
          for x in (text_BS, mask_BS)
        )
        features_BSE = self._encode({"params": self._residency.get("text")}, *placed)
      features_BSE = np.asarray(jax.device_get(features_BSE)).astype(self._dtype)
      for row, i in enumerate(part):
        features[i] = features_BSE[row, : len(ids[i])]
    return [features[i] for i in range(len(ids))]


def clean(text: str) -> str:
  """Captions of the web as Wan cleans them: entities resolved, single spaces."""
  return " ".join(html.unescape(html.unescape(text)).split())
