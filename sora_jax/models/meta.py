"""What a model's folder says of it beside its params: `meta` of model.json, typed.

A VAE, a DiT and a text encoder say different things, so each has a class; training and
`import_weights` write them, all that loads a model reads them. `runtime.checkpoint`
knows only that they are JSON.

A file says its `version` and its `network`. Version 0 are files from before there were
versions: they say neither, may lack what has a default here, and may say more.
"""

import dataclasses
from typing import Any, ClassVar

from sora_jax.models.caption_encoder import TextEncoderConfig
from sora_jax.models.captioner import CaptionerConfig
from sora_jax.models.clip_text import CLIPTextConfig
from sora_jax.models.clip_vision import CLIPVisionConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.models.expander import ExpanderConfig
from sora_jax.models.t5 import T5Config
from sora_jax.models.vae_config import VAEConfig

VERSION = 1


@dataclasses.dataclass(frozen=True)
class _Meta:
  """Reads and writes the fields of a dataclass that derives from it."""

  network: ClassVar[str]  # the folder of a run or checkpoint that such models are in
  noun: ClassVar[str]  # what an error calls the model

  @staticmethod
  def _is_one(values: dict) -> bool:
    """Whether a file of version 0 is one; most kinds came after there were versions."""
    return False

  def facts(self) -> dict[str, Any]:
    """The fields for JSON, without what belongs to the format of the file.

    Optional texts are left out where they are empty, and what may be None where it is.
    """
    facts = dataclasses.asdict(self)
    optional = [f.name for f in dataclasses.fields(self) if f.default in ("", None)]
    return {k: v for k, v in facts.items() if v not in ("", None) or k not in optional}

  def to_json(self) -> dict[str, Any]:
    """The JSON-able dict that `runtime.checkpoint.save_model` takes as meta."""
    return {"version": VERSION, "network": self.network, **self.facts()}

  @classmethod
  def from_json(cls, values: dict[str, Any], folder):
    """Reads what `to_json` made, or a file of an older version.

    Args:
      values: the dict, as `runtime.checkpoint.load_meta` gives it.
      folder: of the model, for messages.

    Raises:
      ValueError: if the file is of a newer version or another network, or if a key is
        unknown, missing or of another type; names the folder and the key.
    """
    where, version = f"{folder}/model.json: meta", values.get("version", 0)
    if version not in range(VERSION + 1):
      raise ValueError(
        f"{where}.version is {version!r}, but this sora_jax reads {VERSION} at most: "
        "the model is of a newer one"
      )
    if values["network"] != cls.network if version else not cls._is_one(values):
      found = f"that of a {values['network']}" if version else "it says other things"
      raise ValueError(f"{folder}: not {cls.noun} (model.json: {found})")
    known = {field.name for field in dataclasses.fields(cls)}
    if not version:
      values = {k: v for k, v in values.items() if k in known}
    values = {k: v for k, v in values.items() if k not in ("version", "network")}
    return _dataclass(cls, values, where)


def _dataclass(cls, values, where):
  """A dataclass of JSON's values: lists become tuples, dicts dataclasses."""
  if not isinstance(values, dict):
    raise ValueError(f"{where} is {values!r}, not a JSON object")
  fields = {field.name: field for field in dataclasses.fields(cls)}
  if unknown := sorted(values.keys() - fields.keys()):
    raise ValueError(f"{where}.{unknown[0]} is unknown to this sora_jax")
  missing = dataclasses.MISSING
  for name, field in fields.items():
    if name not in values and field.default is missing:
      raise ValueError(f"{where}.{name} is missing")
  try:
    return cls(**{
      name: _value(fields[name].type, value, f"{where}.{name}")
      for name, value in values.items()
    })  # fmt: skip
  except ValueError as error:
    text = str(error)
    raise ValueError(text if text.startswith(where) else f"{where}: {text}") from error


def _value(kind, value, where):
  """A value of a field that is annotated with `kind`."""
  if kind == Sampling | None:
    kind = Sampling
  if kind == TextEncoderConfig | FrozenText:
    frozen = isinstance(value, dict) and "features" in value
    kind = FrozenText if frozen else TextEncoderConfig
  if kind == T5Config | CLIPTextConfig:
    is_clip = isinstance(value, dict) and "positions" in value
    kind = CLIPTextConfig if is_clip else T5Config
  if dataclasses.is_dataclass(kind):
    return _dataclass(kind, value, where)
  expected = {int: int, float: (int, float), str: str, bool: bool}.get(
    kind, (list, tuple)
  )
  # In Python a bool is an int, in JSON it is not.
  if not isinstance(value, expected) or (kind is not bool and isinstance(value, bool)):
    name = getattr(kind, "__name__", "list")
    raise ValueError(f"{where} is {value!r}, not of type {name}")
  return tuple(value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class VAEMeta(_Meta):
  """What vae/model says.

  Attributes:
    model: sizes.
    latent_mean, latent_std: statistics of the latents, by channel; others see
      (latent - mean) / std.
    id: of the weights; models that were trained on its latents keep it.
    steps: of its training; 0 if it was imported.
  """

  model: VAEConfig
  latent_mean: tuple[float, ...]
  latent_std: tuple[float, ...]
  id: str = ""
  steps: int = 0

  network: ClassVar[str] = "vae"
  noun: ClassVar[str] = "a VAE"

  @staticmethod
  def _is_one(values):
    return "latent_mean" in values

  def __post_init__(self):
    C = self.model.latent_channels
    for name in ("latent_mean", "latent_std"):
      if len(getattr(self, name)) != C:
        raise ValueError(
          f"{name} has {len(getattr(self, name))} values for {C} latent channels"
        )


@dataclasses.dataclass(frozen=True)
class TextMeta(_Meta):
  """What text/model says, the folder of a frozen text encoder.

  Attributes:
    model: sizes.
    id: of the weights; records and models made with its features keep it.
  """

  model: T5Config | CLIPTextConfig
  id: str

  network: ClassVar[str] = "text"
  noun: ClassVar[str] = "a text encoder"

  @staticmethod
  def _is_one(values):
    model = values.get("model")
    return isinstance(model, dict) and "bias_per_layer" in model


@dataclasses.dataclass(frozen=True)
class ImageMeta(_Meta):
  """What image/model says, the folder of a frozen image encoder.

  Attributes:
    model: sizes.
    id: of the weights; models that read its features keep it.
  """

  model: CLIPVisionConfig
  id: str

  network: ClassVar[str] = "image"
  noun: ClassVar[str] = "an image encoder"


@dataclasses.dataclass(frozen=True)
class FrozenText:
  """The frozen text encoder whose features a DiT reads.

  Attributes:
    features: id of the encoder; "" while an imported checkpoint has none.
    pad_to: tokens that shorter captions are padded to, as in training; 0 = none.
    folder: where text/model was, for a DiT that has none beside it.
  """

  features: str
  pad_to: int
  folder: str = ""


@dataclasses.dataclass(frozen=True)
class Noise:
  """Names of the noise process and of what the network predicts; see `diffusion`."""

  process: str = "flow"
  target: str = "velocity"


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a published model is sampled where a user does not say.

  Attributes:
    method, schedule, shift, steps, guidance_scale, guidance_scale_2: of
      `diffusion.solvers.Options`; the first three are those of the scheduler that was
      published with it.
    negative_prompt: what guidance leads away from.
    size: (width, height) in pixels of a video, and frames: of it; its rate is the
      `reference_fps`.
    expand_timesteps: whether its pipeline tells it a noise level for each token, which
      is how given images enter. Kept for those who export it.
  """

  method: str
  schedule: str
  shift: float
  steps: int
  guidance_scale: float
  negative_prompt: str
  size: tuple[int, int]
  frames: int
  expand_timesteps: bool = False
  guidance_scale_2: float = 0.0


@dataclasses.dataclass(frozen=True)
class DiTMeta(_Meta):
  """What dit/model says.

  Attributes:
    model: sizes.
    text: sizes of the small text encoder that was trained with it and is in its params,
      or the frozen one whose features it reads.
    max_text_tokens: that it reads of a caption.
    tokens, text_tokens, segments: of a packed row in training.
    reference_fps: frames a second at which latent frames are one apart in time.
    conditional: whether it was trained on captions.
    noise: that it was trained to remove.
    vae: id of the VAE whose latents it makes; "" while an imported checkpoint has none.
    steps: of its training; 0 if it was imported.
    init_from: folder of the checkpoint that its training began with.
    id: of the weights.
    boundary: noise level below which the second expert makes the video, of a model that
      has two (Wan 2.2 A14B); 0 = one network for all levels.
    low_noise: whether it is that second expert, although it is in the folder dit/model:
      that of a run which has trained it.
    image: id of the image encoder whose features it reads; "" for most, and while an
      imported checkpoint has none.
    sampling: of a published model; None for one that was trained from nothing here,
      whose recipe says it.
    vocabulary: digest of the small text encoder's tokenizer; "" for those of older
      versions.
  """

  model: DiTConfig
  text: TextEncoderConfig | FrozenText
  max_text_tokens: int
  tokens: int
  text_tokens: int
  segments: int
  reference_fps: float
  conditional: bool
  vae: str
  steps: int = 0
  noise: Noise = Noise()
  init_from: str = ""
  id: str = ""
  boundary: float = 0.0
  image: str = ""
  sampling: Sampling | None = None
  low_noise: bool = False
  vocabulary: str = ""

  network: ClassVar[str] = "dit"
  noun: ClassVar[str] = "a DiT"

  @staticmethod
  def _is_one(values):
    return isinstance(values.get("text"), dict)

  def facts(self):
    """As of the others; models of one network say nothing of experts."""
    facts = super().facts()
    idle = set() if self.boundary else {"boundary", "low_noise"}
    return {name: value for name, value in facts.items() if name not in idle}

  @property
  def frozen_text(self) -> FrozenText | None:
    """The frozen text encoder whose features it reads, if it does."""
    return self.text if isinstance(self.text, FrozenText) else None

  @property
  def text_encoder(self) -> TextEncoderConfig | None:
    """Sizes of the text encoder among its params, if it has one."""
    return self.text if isinstance(self.text, TextEncoderConfig) else None


@dataclasses.dataclass(frozen=True)
class LowNoiseDiTMeta(DiTMeta):
  """What dit_low/model says, the expert for noise levels below the boundary."""

  network: ClassVar[str] = "dit_low"
  noun: ClassVar[str] = "an expert for low noise"

  @staticmethod
  def _is_one(values):
    return False  # there was none before there were versions


@dataclasses.dataclass(frozen=True)
class CaptionerMeta(_Meta):
  """What captioner/model says.

  Attributes:
    model: sizes.
    input: "pixels" or "latents", which it reads patches of.
    patch_size: (t, h, w) of one token in those.
    styles: of its training captions, "any" among them.
    max_text_tokens: longest caption, its style and its end included.
    tokens, segments: of a packed row in training.
    reference_fps: frames a second at which latent frames are one apart in time.
    max_frames, max_pixels, size_multiple: of the clips it was trained on.
    vae: id of the VAE whose latents it reads; "" for pixels.
    steps: of its training.
    id: of the weights.
    vocabulary: digest of its tokenizer; "" for those of older versions.
  """

  model: CaptionerConfig
  input: str
  patch_size: tuple[int, int, int]
  styles: tuple[str, ...]
  max_text_tokens: int
  tokens: int
  segments: int
  reference_fps: float
  max_frames: int
  max_pixels: int
  size_multiple: int
  vae: str = ""
  steps: int = 0
  id: str = ""
  vocabulary: str = ""

  network: ClassVar[str] = "captioner"
  noun: ClassVar[str] = "a captioner"


@dataclasses.dataclass(frozen=True)
class ExpanderMeta(_Meta):
  """What expander/model says.

  Attributes:
    model: sizes.
    max_tokens: of a short and a long caption, with both ends.
    steps: of its training.
    id: of the weights.
    vocabulary: digest of its tokenizer; "" for those of older versions.
  """

  model: ExpanderConfig
  max_tokens: int
  steps: int
  id: str
  vocabulary: str = ""

  network: ClassVar[str] = "expander"
  noun: ClassVar[str] = "an expander of prompts"


# Network -> its class; an expander is read by its own file alone.
METAS = {
  kind.network: kind
  for kind in (
    VAEMeta,
    TextMeta,
    ImageMeta,
    DiTMeta,
    LowNoiseDiTMeta,
    CaptionerMeta,
  )
}
