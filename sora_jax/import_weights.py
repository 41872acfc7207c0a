"""Published weights to a checkpoint: safetensors in, models that all commands load out.

  python -m sora_jax.import_weights --source=Wan2.1-T2V-1.3B-Diffusers --out=runs/wan

--source is a diffusers pipeline's folder, Wan's own release with its files converted to
safetensors, or the folder of one network. --out gets vae/model, text/model and
dit/model, with dit_low/model of a model with two experts and image/model of one that
looks at images, as far as they are there. All files are checked before anything is
written; then a layer at a time is in memory, whatever the model's size.
"""

import dataclasses
import hashlib
import pathlib
import shutil

import jax
import numpy as np
from absl import flags, logging

from sora_jax.data import clip_tokenizer, t5_tokenizer
from sora_jax.models.meta import (
  METAS,
  DiTMeta,
  FrozenText,
  ImageMeta,
  LowNoiseDiTMeta,
  TextMeta,
  VAEMeta,
)
from sora_jax.run import cli
from sora_jax.runtime import checkpoint, safetensors_io
from sora_jax.runtime.lazy_arrays import Streamed
from sora_jax.runtime.safetensors_io import PARAM_DTYPES
from sora_jax.weights import discover, json_file, mapping, pipeline_config
from sora_jax.weights.discover import NETWORKS

_TEXT_TOKENS = 512  # that Wan pads each caption to
# Of a packed row: captions of some clips, and tokens that sampling doubles until the
# longest clip fits. 8 x 4096 holds Wan's 81 frames of 832x480, which are 32760.
_SEGMENTS, _TOKENS = 4, 4096
_ID_BYTES = 1 << 14
_DITS = {kind.network: kind for kind in (DiTMeta, LowNoiseDiTMeta)}


def run(
  source,
  out,
  *,
  presets=(),
  networks=(),
  dtype: str = "",
  reference_fps: float = 0.0,
) -> None:
  """Imports the networks of a folder.

  Args:
    source: the folder, see `discover.find`.
    out: folder of the checkpoint; imported models of these networks are replaced.
    presets: sizes of networks without a config.json.
    networks: only these of NETWORKS; all if empty.
    dtype: of the params, a key of PARAM_DTYPES. Without it float32, for training, but
      for the text encoder, which stays as it is in its file.
    reference_fps: frames a second that the DiT was trained with; if 0 those of Wan: 24
      for Wan 2.2 TI2V, else 16.

  Raises:
    ValueError: before anything is written: see `discover.find`; if the networks do not
      fit each other; if out is the folder of a training run.
  """
  out = pathlib.Path(out).absolute()
  components = _with_tokens(discover.find(source, presets, networks))
  for component in components:
    _check(component, out)
  _check_fit(components, out)
  boundary = _boundary(pathlib.Path(source), components)
  metas = [_meta(component, out, reference_fps, boundary) for component in components]
  for component, meta in zip(components, metas, strict=True):
    name = component.published.network
    folder = out / name / "model"
    target = PARAM_DTYPES[dtype or "float32"]
    params = _params(component, None if name == "text" and not dtype else target)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    logging.info("%s: %.2f GB of params from %s", name, size / 1e9, component.source)
    folder.mkdir(parents=True, exist_ok=True)
    if component.tokenizer:
      _write_tokenizer(component, folder)
    checkpoint.save_model(folder, params, meta.to_json())
    logging.info("%s: complete in %s", name, folder)
  _link(out)
  dit = _meta_of(out, DiTMeta)
  idle = [] if dit and dit.boundary else ["dit_low"]
  idle += [] if dit and dit.model.image_width else ["image"]
  needed = [name for name in NETWORKS if name not in idle]
  missing = [name for name in needed if not _meta_of(out, METAS[name])]
  if missing:
    logging.info("to sample from %s, import its %s too", out, " and ".join(missing))


def _with_tokens(components):
  """Components whose DiT has the tokens that the image encoder beside it makes.

  Wan's configs say them only where they have positions.
  """
  encoders = [c.published for c in components if c.published.network == "image"]
  made = []
  for component in components:
    published = component.published
    if published.network in _DITS and encoders and published.config.image_width:
      tokens = encoders[0].config.tokens
      if not published.config.image_positions:
        config = dataclasses.replace(published.config, image_tokens=tokens)
        component = component._replace(published=published._replace(config=config))
      elif published.config.image_tokens != 2 * tokens:
        raise ValueError(
          f"{component.source}: it has positions for {published.config.image_tokens} "
          f"tokens of two images, but its image encoder makes {tokens} of each"
        )
    made.append(component)
  return made


def _check(component, out):
  name, config = component.published.network, component.published.config
  if (out / name / "stage.json").exists():
    raise ValueError(f"{out / name} is of a training run; choose another --out")
  if component.tokenizer and not component.published.is_clip:
    pieces = t5_tokenizer.T5Tokenizer(str(component.tokenizer)).vocab_size
    if pieces > config.vocab_size:
      raise ValueError(
        f"{component.tokenizer} has {pieces} pieces, but the text encoder of "
        f"{component.source} {config.vocab_size}"
      )


def _write_tokenizer(component, folder):
  if component.published.is_clip:
    clip_tokenizer.write(component.tokenizer, folder / "tokenizer.json")
  else:
    for name in t5_tokenizer.NAMES:  # of an earlier import
      (folder / name).unlink(missing_ok=True)
    shutil.copyfile(component.tokenizer, folder / component.tokenizer.name)


def _check_fit(components, out):
  """The DiT must have the VAE's channels and the text encoder's width."""
  there = {name: _meta_of(out, kind) for name, kind in METAS.items()}
  configs = {name: meta.model for name, meta in there.items() if meta}
  configs |= {c.published.network: c.published.config for c in components}
  dit = configs.get("dit") or configs.get("dit_low")
  for other, key, dit_key in (
    ("vae", "latent_channels", "channels"),
    ("text", "width", "text_width"),
    ("image", "width", "image_width"),
  ):
    if not dit or other not in configs:
      continue
    size, wanted = getattr(configs[other], key), getattr(dit, dit_key)
    if size != wanted:
      raise ValueError(
        f"the {other}'s {key} {size} is not the dit's {dit_key} {wanted}: they are of "
        "different models"
      )


def _meta_of(out, kind):
  """Meta of the checkpoint's model of a kind; None if it is not there."""
  folder = out / kind.network / "model"
  if not (folder / "model.json").exists():
    return None
  return kind.from_json(checkpoint.load_meta(folder), folder)


def _params(component, dtype) -> dict:
  """Params whose leaves read their tensors when they are written."""
  params: dict = {}
  for path, parts in mapping.by_leaf(component.published.entries()).items():
    # The DiT's params are as its task has them.
    prefix = ["dit"] if component.published.network in _DITS else []
    *outer, last = prefix + path.split("/")
    node = params
    for key in outer:
      node = node.setdefault(key, {})
    node[last] = _leaf(parts, component.tensors, dtype)
  return params


def _leaf(parts, tensors, dtype) -> Streamed:
  shape, layered = mapping.leaf_shape(parts), parts[0].layer is not None
  if dtype is None:
    dtypes = [_widened(tensors[entry.name].dtype) for entry in parts]
    dtype = np.dtype(jax.numpy.result_type(*dtypes))

  def blocks():
    for entry in parts:
      value = entry.load(safetensors_io.read(tensors[entry.name]))
      value = value.astype(dtype, copy=False)
      # By the sum, which is one pass and takes no memory.
      if not np.isfinite(value.sum(dtype=np.float64)):
        file = tensors[entry.name].file
        raise ValueError(f"{file}: {entry.name} has NaN or infinite values")
      value = np.ascontiguousarray(value)
      yield value[None] if layered else value

  return Streamed(shape, dtype, 1 if layered else shape[0], blocks)


def _widened(dtype) -> np.dtype:
  """The dtype that params of a file's are kept in: of all that devices compute with."""
  if dtype.itemsize == 1:
    return PARAM_DTYPES["bfloat16"]  # holds all of float8
  return PARAM_DTYPES["float32"] if dtype.itemsize == 8 else dtype


def _boundary(source, components) -> float:
  """Noise level at which experts change; 0 for one network.

  Raises:
    ValueError: if the pipeline says no level, or has one expert only.
  """
  nets = {one.published.network: one.published.config for one in components}
  index = source / pipeline_config.INDEX
  said = json_file.read(index) if index.is_file() else {}
  ratio = said.get("boundary_ratio")
  if "dit_low" not in nets and not (ratio and "dit" in nets):
    return 0.0
  if ratio is None and not index.is_file():
    ratio = pipeline_config.usual_boundary(nets["dit_low"])
  if not isinstance(ratio, float) or not 0 < ratio < 1:
    raise ValueError(
      f"{index}: boundary_ratio is {ratio!r}, but there are two transformers, which "
      "need a number between 0 and 1"
    )
  return ratio


def _meta(component, out, reference_fps, boundary):
  """What the other commands want to know of the model."""
  config, weights = component.published.config, _identify(component)
  if component.published.network == "vae":
    return VAEMeta(config, *component.published.latent_stats, id=weights)
  if component.published.network == "text":
    return TextMeta(config, id=weights)
  if component.published.network == "image":
    return ImageMeta(config, id=weights)
  sampling, fps = pipeline_config.read(component.source, config, boundary)
  return _DITS[component.published.network](
    model=config,
    text=FrozenText(features="", pad_to=_TEXT_TOKENS, folder=str(out)),
    max_text_tokens=_TEXT_TOKENS,
    tokens=_TOKENS,
    text_tokens=_SEGMENTS * _TEXT_TOKENS,
    segments=_SEGMENTS,
    reference_fps=reference_fps or fps,
    conditional=True,
    vae="",
    id=weights,
    boundary=boundary,
    sampling=sampling,
  )


def _identify(component) -> str:
  """An id of the weights, from each tensor's name, shape, type and first bytes."""
  digest = hashlib.sha256()
  for name, tensor in sorted(component.tensors.items()):
    digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
    with open(tensor.file, "rb") as f:
      f.seek(tensor.place)
      digest.update(f.read(min(tensor.nbytes, _ID_BYTES)))
  return f"{component.published.network}-{digest.hexdigest()[:16]}"


def _link(out) -> None:
  """Tells the DiT which VAE and text encoder are its own, in whatever order they came.

  Both stay what they are once they are known: features of others would not fit.
  """
  vae, encoder, images = (
    _meta_of(out, kind) for kind in (VAEMeta, TextMeta, ImageMeta)
  )
  for kind in _DITS.values():
    if meta := _meta_of(out, kind):
      if images and meta.model.image_width and not meta.image:
        meta = dataclasses.replace(meta, image=images.id)
      _link_one(out, meta, vae, encoder)


def _link_one(out, meta, vae, encoder):
  if vae and not meta.vae:
    meta = dataclasses.replace(meta, vae=vae.id)
  if encoder and meta.frozen_text and not meta.frozen_text.features:
    text = dataclasses.replace(meta.frozen_text, features=encoder.id)
    meta = dataclasses.replace(meta, text=text)
  checkpoint.save_meta(out / meta.network / "model", meta.to_json())


# --- the command


def _define_flags():
  flags.DEFINE_string("source", None, "Folder of published weights.", required=True)
  flags.DEFINE_string("out", None, "Folder of the checkpoint to make.", required=True)
  flags.DEFINE_list("only", [], f"Networks to import, of {','.join(NETWORKS)}.")
  flags.DEFINE_list(
    "preset", [], "Sizes of networks that have no config.json: wan2.1-t2v-1.3b,umt5-xxl"
  )
  flags.DEFINE_enum(
    "dtype", None, list(PARAM_DTYPES),
    "Of the params; by default float32, but the text encoder's as they are.",
  )  # fmt: skip
  flags.DEFINE_float(
    "reference_fps", 0.0, "Frames a second the DiT was trained with; 0: Wan's.", 0.0
  )


def _main(argv):
  args = cli.start_copying(argv)
  run(
    args.source,
    args.out,
    presets=args.preset,
    networks=args.only,
    dtype=args.dtype or "",
    reference_fps=args.reference_fps,
  )


if __name__ == "__main__":
  _define_flags()
  cli.run_app(_main)
