"""Which published models can be imported, and what is said of the others.

The one place of it: a model that becomes readable moves from OTHERS to READ, or leaves
the checks of `check`.
"""

from typing import Any

from sora_jax.weights import json_file

# Classes of a config.json, or model types without one: the network that they are.
READ = {
  "AutoencoderKLWan": "vae",
  "WanTransformer3DModel": "dit",
  "WanModel": "dit",
  "t5": "text",
  "umt5": "text",
  "clip": "text",
  "clip_text_model": "text",
  "clip_vision_model": "image",
}
MODELS = (
  "Wan 2.1 text-to-video (1.3B, 14B), image-to-video and first-and-last-frame, Wan 2.2 "
  "TI2V-5B, T2V-A14B and I2V-A14B, their VAEs, T5, UMT5 and CLIP's encoders"
)
_VACE = "Wan VACE, with blocks for the control of a video"
# By _class_name of a config.json or model_index.json.
OTHERS = {
  "WanVACEPipeline": _VACE,
  "WanVACETransformer3DModel": _VACE,
  "VaceWanModel": _VACE,
  "WanAnimatePipeline": "Wan 2.2 Animate",
  "WanAnimateTransformer3DModel": "Wan 2.2 Animate",
  "WanModel_S2V": "Wan 2.2 speech-to-video",
  "SkyReelsV2Transformer3DModel": "SkyReels V2",
  "HunyuanVideoTransformer3DModel": "HunyuanVideo",
  "LTXVideoTransformer3DModel": "LTX-Video",
  "CogVideoXTransformer3DModel": "CogVideoX",
  "FluxTransformer2DModel": "Flux, which makes images",
}
# By model_type of a config.json of Wan's own release.
_ORIGINAL = {
  "vace": _VACE,
  "s2v": "Wan 2.2 speech-to-video",
  "animate": "Wan 2.2 Animate",
}
# What images an "i2v" attends to, its tensors tell.
_ORIGINAL_READ = ("t2v", "i2v", "flf2v", "ti2v")


def check(config: dict[str, Any], where: str) -> str:
  """The key of READ that a config.json is of.

  Raises:
    ValueError: if it is of a model that cannot be imported; says which one it is.
  """
  found = config.get("_class_name") or config.get("model_type")
  kind = str(found)
  if kind not in READ:
    _refuse(where, repr(found), OTHERS.get(kind, ""))
  original = config.get("model_type")
  if kind == "WanModel" and original not in _ORIGINAL_READ:
    _refuse(where, f"model_type {original!r}", _ORIGINAL.get(str(original), ""))
  if READ[kind] == "dit" and config.get("vace_layers"):
    _refuse(where, "a model with vace_layers", _VACE)
  return kind


def check_pipeline(folder) -> None:
  """ValueError if a folder's model_index.json is of what cannot be imported."""
  path = folder / "model_index.json"
  if not path.is_file():
    return
  kind = json_file.read(path).get("_class_name")
  if what := OTHERS.get(str(kind)):
    _refuse(str(path), repr(kind), what)


def _refuse(where, subject, what):
  is_what = f" is {what}, and" if what else ""
  raise ValueError(
    f"{where}: {subject}{is_what} cannot be imported; known are {MODELS}"
  )
