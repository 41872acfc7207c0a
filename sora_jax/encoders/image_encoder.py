"""A frozen vision tower of CLIP as others use it: images to features."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from sora_jax.encoders import model_folders
from sora_jax.models.clip_vision import CLIPVisionEncoder, without_last
from sora_jax.models.meta import ImageMeta
from sora_jax.models.partition import PARAMS
from sora_jax.runtime import checkpoint, sharding
from sora_jax.runtime.residency import Residency

RULES = (
  (r"blocks/(query|key|value|mlp_up)/kernel", P(None, PARAMS, "tensor")),
  (r"blocks/(attention_out|mlp_down)/kernel", P(None, "tensor", PARAMS)),
  (r"(class_embed|patch_embed/kernel|position_embed/embedding|.*/(bias|scale))", P()),
)


class FrozenImageEncoder:
  """Images to features, jitted, with params sharded over the mesh.

  Attributes:
    meta: of the model's folder.
  """

  def __init__(
    self,
    folder,
    mesh,
    dtype=jnp.float32,
    expected: str = "",
    residency: Residency | None = None,
  ):
    """Loads image/model as `import_weights` writes it.

    Args:
      folder: of the checkpoint, or of a run that began with it.
      mesh: that params and batches are sharded over.
      dtype: of the computation.
      expected: the id that it must have, where a model reads its features.
      residency: that says when the params are on the devices; always without it.

    Raises:
      ValueError: if there is no complete image encoder, or one of another id.
    """
    folder = model_folders.of_images(folder)
    self.meta = ImageMeta.from_json(checkpoint.load_meta(folder), folder)
    if expected and self.meta.id != expected:
      raise ValueError(
        f"{folder} is another image encoder ({self.meta.id}) than the one whose "
        f"features the DiT reads ({expected})"
      )

    def load():
      params, _ = checkpoint.load_model(
        folder, lambda shapes: sharding.param_shardings(shapes, RULES, mesh)
      )
      return without_last(params)

    self._residency, self._mesh = residency or Residency(), mesh
    self._residency.put("image", load)
    network = CLIPVisionEncoder(self.meta.model, dtype)
    self._encode = jax.jit(network.apply, out_shardings=NamedSharding(mesh, P()))

  def encode(self, images: list[np.ndarray]) -> np.ndarray:
    """Features of uint8 images [H, W, 3] of any sizes: float32 [B, tokens, width]."""
    config = self.meta.model
    pixels_BHWC = np.stack([_square(image, config.image_size) for image in images])
    pixels_BHWC = (pixels_BHWC / 255.0 - config.mean) / config.std
    rows = sharding.whole_batch(len(images), self._mesh)
    padded = np.concatenate(
      [pixels_BHWC, pixels_BHWC[:1].repeat(rows - len(images), 0)]
    )
    with jax.set_mesh(self._mesh):
      placed = sharding.shard_alike({"x": padded.astype(np.float32)}, self._mesh)["x"]
      features = self._encode({"params": self._residency.get("image")}, placed)
    return np.asarray(jax.device_get(features))[: len(images)]


def _square(image_HWC: np.ndarray, size: int) -> np.ndarray:
  """The middle of an image whose shorter side is resized, as CLIP's processor does."""
  height, width = image_HWC.shape[:2]
  short = min(height, width)
  height, width = (int(size * n / short) for n in (height, width))
  image = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC)
  top, left = (height - size) // 2, (width - size) // 2
  return np.asarray(image.crop((left, top, left + size, top + size)))
