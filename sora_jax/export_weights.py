"""A checkpoint to safetensors in the layout of diffusers.

  python -m sora_jax.export_weights --checkpoint=runs/wan --out=wan-diffusers

Writes vae/, text_encoder/ with tokenizer/, and transformer/, as far as the checkpoint
has them, for the `from_pretrained` of diffusers and transformers. With all of them it
is a folder for diffusers' WanPipeline; a run has the encoders, and the other one of two
experts, of the checkpoint that it began with. What was imported leaves bit for bit as
it came.
"""

import pathlib
import shutil

import jax
import numpy as np
from absl import flags, logging

from sora_jax.data import t5_tokenizer
from sora_jax.encoders import model_folders
from sora_jax.models.meta import METAS, Noise
from sora_jax.run import cli
from sora_jax.runtime import checkpoint, files, safetensors_io, sharding
from sora_jax.runtime.safetensors_io import PARAM_DTYPES
from sora_jax.weights import image_processor, mapping, pipeline_config
from sora_jax.weights.discover import NETWORKS
from sora_jax.weights.hf_config import Published, to_json

# Network -> folder and stem of its files.
_PLACES = {
  "vae": ("vae", "diffusion_pytorch_model"),
  "text": ("text_encoder", "model"),
  "image": ("image_encoder", "model"),
  "dit": ("transformer", "diffusion_pytorch_model"),
  "dit_low": ("transformer_2", "diffusion_pytorch_model"),
}
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
SHARD_BYTES = 5 * 10**9


def run(
  source, out, *, networks=(), dtype: str = "", shard_bytes: int = SHARD_BYTES
) -> list[pathlib.Path]:
  """Exports the models of a checkpoint; the folders that it made.

  Args:
    source: folder of the checkpoint, or of a run.
    out: folder for the networks' folders, which must not be there.
    networks: only these of NETWORKS; all that the checkpoint has if empty, and the
      encoders that a run reads.
    dtype: of the tensors, a key of PARAM_DTYPES; as the params are saved if "".
    shard_bytes: of a file.

  Raises:
    ValueError: if the checkpoint has none of the networks, or one that diffusers does
      not; if its experts are not of one model; if a folder is there already. Then
      nothing was written.
  """
  source, out = pathlib.Path(source), pathlib.Path(out)
  found = {}
  for name, folder in _folders(source).items():
    if (name in networks or not networks) and (folder / "model.json").exists():
      found[name] = (folder, *_open(name, folder))
  if {"dit", "dit_low"} <= set(found):
    model_folders.check_alike(found["dit"][0], found["dit_low"][0])
  if missing := [name for name in networks if name not in found]:
    raise ValueError(f"{source} has no {' and no '.join(missing)}")
  if not found:
    raise ValueError(f"{source}: no checkpoint with vae, text, dit")
  for name in found:
    if (out / _PLACES[name][0]).exists():
      raise ValueError(
        f"{out / _PLACES[name][0]} is there already; choose another --out"
      )
  for name, (folder, _, published, leaves) in found.items():
    _write(out, name, published, leaves, dtype, shard_bytes)
    if name == "text":
      _write_tokenizer(out / "tokenizer", folder, published.is_clip)
  if {"vae", "text", "dit"} <= set(found):
    dit, text = (found[name][1] for name in ("dit", "text"))
    image = found["image"][1] if "image" in found else None
    whole = bool(dit.boundary) == ("dit_low" in found)
    if whole and bool(dit.model.image_width) == bool(image):
      _write_pipeline(out, dit, text, image)
    else:
      one = ", but one of two experts" if dit.boundary and not whole else ""
      logging.info("%s has no whole pipeline%s: networks alone", source, one)
  return [out / _PLACES[name][0] for name in found]


def _folders(source) -> dict[str, pathlib.Path]:
  """Network -> folder of its model, which may not be there.

  Raises:
    ValueError: if an encoder is another one than the DiT was trained with.
  """
  own = {name: source / name / "model" for name in NETWORKS}
  if not (own["dit"] / "model.json").exists():
    return own
  meta = model_folders.read_meta(own["dit"])
  experts = model_folders.of_dit(source, whole=False)
  if meta.boundary and len(experts) < 2:
    began = f", nor in {meta.init_from}, where it began" if meta.init_from else ""
    logging.warning(
      "the other one of two experts is not in %s%s: no pipeline without it",
      source,
      began,
    )
  encoders = {}
  if meta.frozen_text and meta.frozen_text.features:
    encoders["text"] = model_folders.of_text(source), meta.frozen_text.features
  if meta.image:
    encoders["image"] = model_folders.of_images(source), meta.image
  for name, (folder, wanted) in encoders.items():
    if not (folder / "model.json").exists():
      logging.warning("%s is not there: no pipeline without it", folder)
    elif checkpoint.load_meta(folder).get("id") != wanted:
      raise ValueError(
        f"{folder} is another one than {own['dit']} was trained with ({wanted})"
      )
    own[name] = folder
  del own["dit"]  # of a run it may be the second expert
  found = own | experts
  return {name: found[name] for name in NETWORKS if name in found}


def _open(name, folder):
  """Its meta, what it is as a published model, and its leaves by path."""
  params, values = checkpoint.stream_model(folder)
  meta = METAS[folder.parent.name].from_json(values, folder)
  stats = None
  if name in ("dit", "dit_low"):
    _check_dit(folder, meta)
    params = params["dit"]
  if name == "vae":
    stats = (meta.latent_mean, meta.latent_std)
  published = Published(name, "diffusers", meta.model, stats)
  leaves = {
    sharding.path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  parts = mapping.by_leaf(published.entries())
  wanted = {path: mapping.leaf_shape(part) for path, part in parts.items()}
  have = {path: leaf.shape for path, leaf in leaves.items()}
  if wrong := [p for p in sorted(wanted | have) if wanted.get(p) != have.get(p)]:
    lines = [f"{p} has {have.get(p)} instead of {wanted.get(p)}" for p in wrong]
    raise ValueError(f"{folder}: params do not fit: {safetensors_io.listed(lines)}")
  return meta, published, leaves


def _check_dit(folder, meta):
  """Raises for a model that Wan's code would run wrongly, or not at all."""
  if not meta.frozen_text:
    raise ValueError(
      f"{folder}: its text encoder was trained with it, for which diffusers has no "
      "place; a DiT over features of T5 or UMT5 can be exported"
    )
  if meta.noise != Noise("flow", "velocity"):
    raise ValueError(f"{folder}: Wan is a velocity of a flow, this is {meta.noise}")


def _write(out, name, published, leaves, dtype, shard_bytes):
  place, stem = _PLACES[name]
  parts = mapping.by_leaf(published.entries())

  def dtype_of(path):
    return PARAM_DTYPES[dtype] if dtype else np.dtype(leaves[path].dtype)

  def values():
    for path, part in parts.items():
      leaf = leaves[path]
      slices = leaf.slices() if part[0].layer is not None else iter([leaf.whole()])
      for entry, value in zip(part, slices, strict=True):
        yield entry.save(value).astype(dtype_of(path), copy=False)

  planned = [
    safetensors_io.Plan(entry.name, entry.shape, dtype_of(path))
    for path, part in parts.items()
    for entry in part
  ]
  paths = safetensors_io.write(out / place, stem, planned, values(), shard_bytes)
  names = {str(tensor.dtype) for tensor in planned}
  config = to_json(published, names.pop() if len(names) == 1 else "float32")
  files.write_json(out / place / "config.json", config)
  size = sum(tensor.nbytes for tensor in planned)
  logging.info(
    "%s: %.2f GB in %d files in %s", name, size / 1e9, len(paths), out / place
  )


def _write_tokenizer(folder, model, is_clip):
  folder.mkdir(parents=True, exist_ok=True)
  if is_clip:
    shutil.copyfile(model / "tokenizer.json", folder / "tokenizer.json")
    files.write_json(
      folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"}
    )
    return
  source = pathlib.Path(t5_tokenizer.find(model))
  shutil.copyfile(source, folder / source.name)
  if source.name != "tokenizer.json":
    text = t5_tokenizer.T5Tokenizer(str(source)).to_json()
    files.write_text(folder / "tokenizer.json", text)
  # Of a T5Tokenizer, transformers 5 takes the pieces alone and leaves out the bytes
  # that spell what has none.
  config = {
    "tokenizer_class": _TOKENIZER_CLASS,
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "model_max_length": 512,
  }
  files.write_json(folder / "tokenizer_config.json", config)


def _write_pipeline(out, dit, text, image):
  usual, _ = pipeline_config.family(dit.model, boundary=dit.boundary)
  sampling = dit.sampling or usual
  umt5 = "UMT5" if text.model.bias_per_layer else "T5"
  scheduler = pipeline_config.scheduler_json(sampling)
  transformer = ["diffusers", "WanTransformer3DModel"]
  index = {
    "_class_name": "WanPipeline",
    "boundary_ratio": dit.boundary or None,
    "expand_timesteps": sampling.expand_timesteps,
    "scheduler": ["diffusers", scheduler["_class_name"]],
    "text_encoder": ["transformers", f"{umt5}EncoderModel"],
    "tokenizer": ["transformers", _TOKENIZER_CLASS],
    "transformer": transformer,
    "transformer_2": transformer if dit.boundary else [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
  }
  if dit.model.condition_channels:
    index["_class_name"] = "WanImageToVideoPipeline"
    index["image_encoder"] = index["image_processor"] = [None, None]
  if image:
    index["image_encoder"] = ["transformers", "CLIPVisionModel"]
    index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    processor = image_processor.to_json(image.model)
    place = out / "image_processor" / image_processor.NAME
    files.write_json(place, processor)
  files.write_json(out / pipeline_config.INDEX, index)
  files.write_json(out / pipeline_config.SCHEDULER, scheduler)


# --- the command


def _define_flags():
  flags.DEFINE_string("checkpoint", None, "Folder of a checkpoint.", required=True)
  flags.DEFINE_string("out", None, "Folder to write.", required=True)
  flags.DEFINE_list("only", [], f"Networks to export, of {','.join(NETWORKS)}.")
  flags.DEFINE_enum(
    "dtype", None, list(PARAM_DTYPES), "Of the tensors; as the params are by default."
  )
  flags.DEFINE_float("shard_gb", SHARD_BYTES / 1e9, "Gigabytes of a file.", 1e-9)


def _main(argv):
  args = cli.start_copying(argv)
  run(
    args.checkpoint,
    args.out,
    networks=args.only,
    dtype=args.dtype or "",
    shard_bytes=round(args.shard_gb * 1e9),
  )


if __name__ == "__main__":
  _define_flags()
  cli.run_app(_main)
