"""Published weights to a checkpoint: safetensors in, models that all commands load out.

  python -m sora_jax.import_weights --source=Wan2.1-T2V-1.3B-Diffusers --out=runs/wan

--source is a diffusers pipeline's folder, Wan's own release with its files converted to
safetensors, or the folder of one network. --out gets vae/model, text/model and
dit/model, as far as they are in the source. All files are checked before anything is
written; then a layer at a time is in memory, whatever the model's size.
"""

import dataclasses
import hashlib
import pathlib
import shutil

import jax
import numpy as np
from absl import flags, logging

from sora_jax.data.tokenizer import Tokenizer
from sora_jax.models.meta import METAS, DiTMeta, FrozenText, TextMeta, VAEMeta
from sora_jax.run import cli
from sora_jax.runtime import checkpoint, safetensors_io
from sora_jax.runtime.lazy_arrays import Streamed
from sora_jax.runtime.safetensors_io import PARAM_DTYPES
from sora_jax.weights import discover, mapping
from sora_jax.weights.discover import NETWORKS

_TEXT_TOKENS = 512  # that Wan pads each caption to
# Of a packed row: captions of some clips, and tokens that sampling doubles until the
# longest clip fits. 8 x 4096 holds Wan's 81 frames of 832x480, which are 32760.
_SEGMENTS, _TOKENS = 4, 4096
_ID_BYTES = 1 << 14


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
      for the 48 latent channels of Wan 2.2, else 16.

  Raises:
    ValueError: before anything is written: see `discover.find`; if the networks do not
      fit each other; if out is the folder of a training run.
  """
  out = pathlib.Path(out).absolute()
  components = discover.find(source, presets, networks)
  for component in components:
    _check(component, out)
  _check_fit(components, out)
  for component in components:
    name = component.published.network
    folder = out / name / "model"
    target = PARAM_DTYPES[dtype or "float32"]
    params = _params(component, None if name == "text" and not dtype else target)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    logging.info("%s: %.2f GB of params from %s", name, size / 1e9, component.source)
    folder.mkdir(parents=True, exist_ok=True)
    if component.tokenizer:
      shutil.copyfile(component.tokenizer, folder / "spiece.model")
    meta = _meta(component, out, reference_fps)
    checkpoint.save_model(folder, params, meta.to_json())
    logging.info("%s: complete in %s", name, folder)
  _link(out)
  missing = [name for name in NETWORKS if not _meta_of(out, METAS[name])]
  if missing:
    logging.info("to sample from %s, import its %s too", out, " and ".join(missing))


def _check(component, out):
  name, config = component.published.network, component.published.config
  if (out / name / "stage.json").exists():
    raise ValueError(f"{out / name} is of a training run; choose another --out")
  if component.tokenizer:
    pieces = Tokenizer(str(component.tokenizer)).vocab_size
    if pieces > config.vocab_size:
      raise ValueError(
        f"{component.tokenizer} has {pieces} pieces, but the text encoder of "
        f"{component.source} {config.vocab_size}"
      )


def _check_fit(components, out):
  """The DiT must have the VAE's channels and the text encoder's width."""
  there = {name: _meta_of(out, kind) for name, kind in METAS.items()}
  configs = {name: meta.model for name, meta in there.items() if meta}
  configs |= {c.published.network: c.published.config for c in components}
  for other, key, dit_key in (
    ("vae", "latent_channels", "channels"),
    ("text", "width", "text_width"),
  ):
    if "dit" not in configs or other not in configs:
      continue
    size, wanted = getattr(configs[other], key), getattr(configs["dit"], dit_key)
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
    prefix = ["dit"] if component.published.network == "dit" else []
    *outer, last = prefix + path.split("/")
    node = params
    for key in outer:
      node = node.setdefault(key, {})
    node[last] = _leaf(parts, component.tensors, dtype)
  return params


def _leaf(parts, tensors, dtype) -> Streamed:
  shape, layered = mapping.leaf_shape(parts), parts[0].layer is not None
  if dtype is None:
    dtypes = [tensors[entry.name].dtype for entry in parts]
    dtype = np.dtype(jax.numpy.result_type(*dtypes))

  def blocks():
    for entry in parts:
      value = entry.load(safetensors_io.read(tensors[entry.name]))
      value = np.ascontiguousarray(value.astype(dtype, copy=False))
      yield value[None] if layered else value

  return Streamed(shape, dtype, 1 if layered else shape[0], blocks)


def _meta(component, out, reference_fps):
  """What the other commands want to know of the model."""
  config, weights = component.published.config, _identify(component)
  if component.published.network == "vae":
    return VAEMeta(config, *component.published.latent_stats, id=weights)
  if component.published.network == "text":
    return TextMeta(config, id=weights)
  return DiTMeta(
    model=config,
    text=FrozenText(features="", pad_to=_TEXT_TOKENS, folder=str(out)),
    max_text_tokens=_TEXT_TOKENS,
    tokens=_TOKENS,
    text_tokens=_SEGMENTS * _TEXT_TOKENS,
    segments=_SEGMENTS,
    reference_fps=reference_fps or (24.0 if config.channels == 48 else 16.0),
    conditional=True,
    vae="",
    id=weights,
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
  meta = _meta_of(out, DiTMeta)
  if not meta:
    return
  vae, encoder = _meta_of(out, VAEMeta), _meta_of(out, TextMeta)
  if vae and not meta.vae:
    meta = dataclasses.replace(meta, vae=vae.id)
  if encoder and meta.frozen_text and not meta.frozen_text.features:
    text = dataclasses.replace(meta.frozen_text, features=encoder.id)
    meta = dataclasses.replace(meta, text=text)
  checkpoint.save_meta(out / "dit" / "model", meta.to_json())


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
