"""What a user can get wrong with published weights: an error, and nothing written."""

import dataclasses
import json
import pickle
import shutil

import ml_dtypes
import numpy as np
import pytest
from commands.tiny_weights import (
  STATS,
  STEMS,
  VAE,
  load,
  model_of,
  tensors_of,
  write_tokenizer,
)
from safetensors import safe_open
from safetensors.numpy import save_file

from sora_jax import export_weights, import_weights
from sora_jax.data import t5_tokenizer, tokenizer
from sora_jax.runtime import safetensors_io
from sora_jax.weights import hf_config

pytestmark = pytest.mark.usefixtures("fast_compile")


def rewrite(path, change):
  with safe_open(path, "numpy") as f:
    tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
  change(tensors)
  save_file(tensors, path)


def fails(source, tmp_path, message, **kwargs):
  """The import raises, and has written nothing."""
  with pytest.raises(ValueError, match=message) as error:
    import_weights.run(source, tmp_path / "out", **kwargs)
  assert not (tmp_path / "out").exists()
  return str(error.value)


VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


def test_truncated(source, tmp_path):
  path = source / VAE_FILE
  data = path.read_bytes()
  for size, message in (
    (len(data) - 5, f"{VAE_FILE}: truncated: {len(data) - 5} bytes, .* {len(data)}"),
    (1000, f"{VAE_FILE}: truncated inside its header: 1000 bytes"),
    (3, "not a safetensors file"),
  ):
    path.write_bytes(data[:size])
    fails(source, tmp_path, message)
  path.write_bytes(data + b"x")
  fails(source, tmp_path, "damaged")


def test_shards(source, tmp_path):
  folder, stem = source / "transformer", STEMS["dit"]
  shard = folder / f"{stem}-00002-of-00002.safetensors"
  name = sorted(tensors_of("dit"))[1]
  rewrite(shard, lambda tensors: tensors.update(new=tensors[name]))
  fails(source, tmp_path, "00002.safetensors: new is not in the index")
  rewrite(shard, lambda tensors: [tensors.pop("new"), tensors.pop(name)])
  fails(source, tmp_path, f"00002.safetensors: {name} is missing")
  shard.unlink()
  fails(source, tmp_path, f"names files that are not there: {shard.name}")
  (folder / f"{stem}.safetensors.index.json").unlink()
  fails(source, tmp_path, "index.json is missing")


def test_wrong_missing_and_unknown_tensors_are_all_named(source, tmp_path):
  def change(tensors):
    tensors["encoder.conv_in.weight"] = np.zeros((4, 3, 3, 3), np.float32)
    del tensors["decoder.conv_out.bias"]
    tensors["discriminator.weight"] = np.zeros(2, np.float32)

  rewrite(source / VAE_FILE, change)
  message = fails(source, tmp_path, "vae: 3 tensors are wrong")
  for line in (
    r"decoder.conv_out.bias is missing",
    "encoder.conv_in.weight has shape (4, 3, 3, 3) instead of (4, 3, 3, 3, 3)",
    "discriminator.weight is not a tensor of this network",
  ):
    assert line in message
  rewrite(source / VAE_FILE, lambda t: [t.pop(k) for k in sorted(t)[:25]])
  message = fails(source, tmp_path, "tensors are wrong")
  assert message.count(";") == 19 and message.endswith("more)")


def test_pickles(source, tmp_path):
  (source / VAE_FILE).unlink()
  fails(source, tmp_path, "no diffusion_pytorch_model.safetensors and no")
  path = source / "vae" / "diffusion_pytorch_model.bin"
  path.write_bytes(pickle.dumps({"x": 1}))
  fails(source, tmp_path, f"{path} is a pickle, .* Convert it once")
  path.rename(source / VAE_FILE)  # a new name does not help
  fails(source, tmp_path, "is a pickle, which can run any program")
  shutil.rmtree(source / "vae")
  path = source / "Wan2.1_VAE.pth"
  path.write_bytes(b"PK")
  fails(source, tmp_path, f"{path} is a pickle, .*Wan2.1_VAE.safetensors")


@pytest.mark.slow
def test_types_of_tensors(source, tmp_path):
  name, types = "encoder.conv_in.weight", ("float8_e4m3fn", "float8_e5m2", "<f2", "<f8")
  value = tensors_of("vae")[name]
  folder = source / "vae"
  tensors = tensors_of("vae")
  for i, kind in enumerate(types):
    tensors[name] = value.astype(getattr(ml_dtypes, kind, kind))
    rewrite_any(folder / "diffusion_pytorch_model.safetensors", tensors)
    import_weights.run(folder, tmp_path / str(i))
    params, _ = load(tmp_path / str(i), "vae")
    (entry,) = (e for e in model_of("vae").entries() if e.name == name)
    for key in entry.path.split("/"):
      params = params[key]
    np.testing.assert_array_equal(params, entry.load(tensors[name].astype(np.float32)))
  tensors[name] = value.astype(np.int8)
  rewrite_any(folder / "diffusion_pytorch_model.safetensors", tensors)
  fails(source, tmp_path, f"vae: weights of whole numbers .*{name} is int8")


def rewrite_any(path, tensors):
  """As `save_file`, of types that it does not know, too."""
  planned = [safetensors_io.Plan(k, x.shape, x.dtype) for k, x in tensors.items()]
  safetensors_io.write_file(path, planned, iter(tensors.values()))


def test_pipelines_that_are_not_read(source, tmp_path):
  index = source / "model_index.json"
  index.write_text(json.dumps({"_class_name": "WanVACEPipeline"}))
  message = "model_index.json: 'WanVACEPipeline' is Wan VACE.*; known are Wan 2.1"
  fails(source, tmp_path, message)
  config = source / "transformer" / "config.json"
  config.write_text(json.dumps({"_class_name": "WanVACETransformer3DModel"}))
  import_weights.run(source, tmp_path / "vae", networks=["vae"])  # is like any other
  assert (tmp_path / "vae" / "vae" / "model" / "model.json").is_file()


def test_networks_that_do_not_fit(source, tmp_path):
  path = source / "transformer" / "config.json"
  config = json.loads(path.read_text())
  path.write_text(json.dumps({**config, "text_dim": 32}))
  fails(source, tmp_path, "text_embedder.linear_1.weight has shape")
  path.write_text("{")
  fails(source, tmp_path, "config.json: no JSON object")
  path.write_text(json.dumps(config))
  path = source / "vae"
  shutil.rmtree(path)
  other = dataclasses.replace(VAE, latent_channels=8)
  model = hf_config.Published("vae", "diffusers", other, (STATS[0] * 2, STATS[1] * 2))
  path.mkdir()
  (path / "config.json").write_text(json.dumps(hf_config.to_json(model)))
  tensors = {e.name: np.zeros(e.shape, np.float32) for e in model.entries()}
  save_file(tensors, source / VAE_FILE)
  fails(source, tmp_path, "vae's latent_channels 8 is not the dit's channels 4")


def test_a_tokenizer_of_transformers_5(source, tmp_path):
  """tokenizer.json alone is imported, and leaves as it came."""
  old = source / "tokenizer" / "spiece.model"
  words = t5_tokenizer.T5Tokenizer(str(old))
  ids = words.encode("a red & blue 🎉</s> circle", 99)
  (source / "tokenizer" / "tokenizer.json").write_text(words.to_json())
  old.unlink()
  out, back = tmp_path / "out", tmp_path / "back"
  import_weights.run(source, out, networks=["text"])
  found = t5_tokenizer.find(out / "text" / "model")
  assert t5_tokenizer.T5Tokenizer(found).encode("a red & blue 🎉</s> circle", 99) == ids
  export_weights.run(out, back)
  assert (back / "tokenizer" / "tokenizer.json").read_text() == words.to_json()
  settings = json.loads((back / "tokenizer" / "tokenizer_config.json").read_text())
  assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
  # Another import replaces it, of whichever kind.
  write_tokenizer(source / "tokenizer")
  (source / "tokenizer" / "tokenizer.json").unlink()
  import_weights.run(source, out, networks=["text"])
  assert t5_tokenizer.find(out / "text" / "model").endswith("spiece.model")


def test_folders(source, imported, tmp_path):
  fails(tmp_path / "nowhere", tmp_path, "no such folder")
  fails(source, tmp_path, "--preset=umt5-xxl is not needed", presets=["umt5-xxl"])
  (source / "tokenizer" / "spiece.model").unlink()
  fails(source, tmp_path, "text_encoder: the text encoder has no tokenizer")
  tokenizer.train(
    [chr(i) * 3 for i in range(300, 800)], str(source / "tokenizer/spiece.model"), 900
  )
  fails(source, tmp_path, r"spiece.model has \d+ pieces, but the text encoder .* 320")
  (source / "transformer_2").mkdir()
  fails(source, tmp_path, "transformer_2 has no config.json")
  (tmp_path / "run" / "vae").mkdir(parents=True)
  (tmp_path / "run" / "vae" / "stage.json").write_text("{}")
  with pytest.raises(ValueError, match="vae is of a training run"):
    import_weights.run(source / "vae", tmp_path / "run")


def test_commands(pipeline, tmp_path, commands):
  out, back = tmp_path / "out", tmp_path / "back"
  args = (f"--source={pipeline}", f"--out={out}")
  log = commands.run("import_weights", *args, "--only=vae,dit")
  assert f"to sample from {out}, import its text too" in log
  commands.run("export_weights", f"--checkpoint={out}", f"--out={back}")
  assert sorted(path.name for path in back.iterdir()) == ["transformer", "vae"]
