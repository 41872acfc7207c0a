"""Published weights to checkpoints and back (import_weights, export_weights).

The sources are written, and the exports read, by the safetensors library.
"""

import dataclasses
import json
import pickle
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from golden.random_weights import random_tensor
from safetensors import safe_open
from safetensors.numpy import save_file

from sora_jax import export_weights, import_weights, sample
from sora_jax.data import t5_tokenizer, tokenizer
from sora_jax.diffusion.solvers import Options
from sora_jax.models.dit import DiTConfig
from sora_jax.models.meta import METAS, DiTMeta, FrozenText
from sora_jax.models.t5 import T5Config
from sora_jax.models.vae_config import VAEConfig
from sora_jax.runtime import checkpoint, lazy_arrays, safetensors_io, sharding
from sora_jax.tasks import dit as dit_task
from sora_jax.weights import discover, hf_config, mapping

VAE = VAEConfig(
  width=4,
  width_multipliers=(1, 2),
  downsample=("st",),
  blocks=1,
  latent_channels=4,
  decoder_width=8,
)
DIT = DiTConfig(
  channels=4,
  width=24,
  depth=2,
  heads=2,
  mlp_width=32,
  text_width=16,
  frequency_width=8,
)
TEXT = T5Config(
  vocab_size=320,
  width=16,
  depth=2,
  heads=2,
  head_dim=8,
  mlp_width=24,
  bias_per_layer=True,
)
STATS = ((0.5, -1.0, 0.25, 0.0), (1.5, 2.0, 0.5, 1.0))
CONFIGS = {"vae": VAE, "text": TEXT, "dit": DIT}
PLACES = {"vae": "vae", "text": "text_encoder", "dit": "transformer"}
STEMS = {"vae": "diffusion_pytorch_model", "text": "model"}
STEMS["dit"] = STEMS["vae"]


pytestmark = pytest.mark.usefixtures("fast_compile")


def model_of(network, layout="diffusers"):
  stats = STATS if network == "vae" else None
  return hf_config.Published(network, layout, CONFIGS[network], stats)


def tensors_of(network, layout="diffusers"):
  """Random tensors that are the same params in both layouts."""
  made = {}
  for entry in model_of(network, layout).entries():
    ours = random_tensor(f"{entry.path}.{entry.layer}.weight", entry.our_shape)
    dtype = ml_dtypes.bfloat16 if network == "text" else np.float32
    made[entry.name] = np.ascontiguousarray(entry.save(ours).astype(dtype))
  return made


def params_of(network):
  tensors = tensors_of(network)
  params = mapping.assemble(model_of(network).entries(), tensors.__getitem__)
  return {"dit": params} if network == "dit" else params


def write_component(folder, network):
  folder.mkdir(parents=True)
  config, tensors = hf_config.to_json(model_of(network)), tensors_of(network)
  (folder / "config.json").write_text(json.dumps(config))
  stem = STEMS[network]
  if network != "dit":
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
    return
  names = {}
  for part in (0, 1):
    shard = f"{stem}-{part + 1:05d}-of-00002.safetensors"
    some = {k: tensors[k] for i, k in enumerate(sorted(tensors)) if i % 2 == part}
    save_file(some, folder / shard, {"format": "pt"})
    names |= dict.fromkeys(some, shard)
  index = {"metadata": {}, "weight_map": names}
  (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_pipeline(folder):
  for network, place in PLACES.items():
    write_component(folder / place, network)
  write_tokenizer(folder / "tokenizer")
  return folder


def write_tokenizer(folder):
  tokenizer.train(["a red circle", "b"], str(folder / "spiece.model"), 300)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  return write_pipeline(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def imported(pipeline, tmp_path_factory):
  out = tmp_path_factory.mktemp("imported") / "wan"
  import_weights.run(pipeline, out)
  return out


@pytest.fixture
def source(pipeline, tmp_path):
  """A pipeline for a test to break."""
  return shutil.copytree(pipeline, tmp_path / "source")


def load(out, network):
  params, meta = checkpoint.load_model(out / network / "model")
  return jax.tree.map(np.asarray, params), meta


def assert_same(a, b, **kwargs):
  jax.tree.map_with_path(
    lambda path, x, y: np.testing.assert_array_equal(x, y, str(path), **kwargs), a, b
  )


# --- import


@pytest.mark.parametrize("network", CONFIGS)
def test_params_of_a_pipeline(imported, network):
  params, meta = load(imported, network)
  assert_same(params, params_of(network), strict=True)
  assert METAS[network].from_json(meta, network).model == CONFIGS[network]


def test_params_go_straight_to_their_devices(imported):
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  params, _ = checkpoint.load_model(
    imported / "dit" / "model",
    lambda shapes: sharding.param_shardings(shapes, dit_task.DIT_RULES, mesh),
  )
  kernel = params["dit"]["blocks"]["mlp_up"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 24 // 4, 32 // 2)
  assert_same(jax.tree.map(np.asarray, params), params_of("dit"), strict=True)


def test_what_models_say_of_each_other(imported):
  metas = {name: load(imported, name)[1] for name in CONFIGS}
  assert metas["dit"]["vae"] == metas["vae"]["id"] != ""
  assert metas["dit"]["text"]["features"] == metas["text"]["id"] != ""
  assert (metas["vae"]["latent_mean"], metas["vae"]["latent_std"]) == tuple(
    map(list, STATS)
  )
  assert metas["dit"]["reference_fps"] == 16.0
  # What a trained DiT says is all there.
  assert set(metas["dit"]) == {
    *("model", "text", "max_text_tokens", "tokens", "text_tokens", "segments"),
    *("reference_fps", "conditional", "noise", "vae", "steps", "id"),
    *("version", "network", "sampling"),
  }


@pytest.mark.slow
def test_samples_from_an_imported_checkpoint(imported):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  model = sample.Sampler.from_checkpoint(imported, mesh)
  # Rows as short as the clips, for the test's time.
  model.denoiser.meta = dataclasses.replace(
    model.meta, tokens=128, text_tokens=1024, segments=2
  )
  requests = [sample.Request(text, 8, 8, 5, 16.0) for text in ("a red circle", "b")]
  first, second = model.sample(requests, Options(steps=2))
  assert first.shape == (5, 8, 8, 3) and first.dtype == np.uint8
  # The same noise, another caption.
  assert first.std() > 0 and np.any(first != second)


def test_original_release(imported, tmp_path, monkeypatch):
  """Wan's own names, a file for each network, sizes from the files' names."""
  monkeypatch.setitem(hf_config.PRESETS["vae"], "wan2.1", VAE)
  monkeypatch.setitem(hf_config.PRESETS["text"], "umt5-xxl", TEXT)
  monkeypatch.setitem(hf_config.vae_model.LATENT_STATS, "wan2.1", STATS)
  source = tmp_path / "Wan2.1-T2V-1.3B"
  source.mkdir()
  for network, stem in (
    ("vae", "Wan2.1_VAE"),
    ("text", "models_t5_umt5-xxl-enc-bf16"),
    ("dit", STEMS["dit"]),
  ):
    save_file(tensors_of(network, "original"), source / f"{stem}.safetensors")
  config = {
    "_class_name": "WanModel",
    "model_type": "t2v",
    "dim": DIT.width,
    "eps": 1e-6,
    "ffn_dim": DIT.mlp_width,
    "freq_dim": DIT.frequency_width,
    "in_dim": DIT.channels,
    "num_heads": DIT.heads,
    "num_layers": DIT.depth,
    "out_dim": DIT.channels,
    "text_dim": DIT.text_width,
    "text_len": 512,
  }
  (source / "config.json").write_text(json.dumps(config))
  write_tokenizer(source / "google" / "umt5-xxl")
  import_weights.run(source, tmp_path / "out")
  for network in CONFIGS:
    ours, meta = load(tmp_path / "out", network)
    theirs, other = load(imported, network)
    assert_same(ours, theirs, strict=True)
    assert meta["model"] == other["model"]


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_sizes_from_a_preset(tmp_path, monkeypatch, layout):
  monkeypatch.setitem(hf_config.PRESETS["dit"], "S", DIT)
  source, out = tmp_path / "source", tmp_path / "out"
  source.mkdir()
  save_file(tensors_of("dit", layout), source / f"{STEMS['dit']}.safetensors")
  with pytest.raises(ValueError, match="no network here.* --preset says the sizes"):
    import_weights.run(source, out)
  import_weights.run(source, out, presets=["S"], reference_fps=12.0)
  params, meta = load(out, "dit")
  assert_same(params, params_of("dit"), strict=True)
  assert meta["reference_fps"] == 12.0
  with pytest.raises(ValueError, match="several networks of one kind"):
    import_weights.run(source, out, presets=["S", "B"])


def test_networks_one_after_the_other(pipeline, tmp_path):
  for network in ("dit", "vae", "text"):
    import_weights.run(pipeline / PLACES[network], tmp_path)
  vae, text, dit = (load(tmp_path, name)[1] for name in ("vae", "text", "dit"))
  assert (dit["vae"], dit["text"]["features"]) == (vae["id"], text["id"])


def test_one_network_of_a_pipeline(pipeline, tmp_path):
  import_weights.run(pipeline, tmp_path, networks=["vae"])
  assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_dtype(pipeline, tmp_path):
  import_weights.run(pipeline, tmp_path, networks=["dit", "text"], dtype="bfloat16")
  params, _ = load(tmp_path, "dit")
  expected = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params_of("dit"))
  assert_same(params, expected, strict=True)
  import_weights.run(pipeline, tmp_path, networks=["text"], dtype="float32")
  params, _ = load(tmp_path, "text")
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_text_encoders_of_other_versions(source, imported, tmp_path):
  """The embedding under its second name only, and a decoder's tensors beside it."""
  path = source / "text_encoder" / "model.safetensors"
  tensors = tensors_of("text")
  tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
  tensors["decoder.final_layer_norm.weight"] = np.ones(16, np.float32)
  save_file(tensors, path)
  import_weights.run(source, tmp_path / "out", networks=["text"])
  assert_same(load(tmp_path / "out", "text")[0], load(imported, "text")[0])


# --- memory


def test_a_block_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(lazy_arrays, "_TOGETHER_BYTES", 1)
  made = []

  def leaf(name, rows):
    def blocks():
      for row in range(0, 6, rows):
        made.append((name, row))
        yield np.full((rows, 2), row, np.float32)

    return lazy_arrays.Streamed((6, 2), np.dtype(np.float32), rows, blocks)

  tree = {"a": leaf("a", 1), "b": {"c": leaf("c", 2)}}
  checkpoint.save_model(tmp_path, tree, {"meta": 1})
  assert sorted(made) == made and len(made) == 9  # neither interleaved nor twice
  back, meta = checkpoint.stream_model(tmp_path)
  assert meta == {"meta": 1} and (back["a"].rows, back["b"]["c"].rows) == (1, 2)
  for block, row in zip(back["b"]["c"].blocks(), (0, 2, 4), strict=True):
    np.testing.assert_array_equal(block, np.full((2, 2), row, np.float32))
  assert_same(
    back["a"].whole(), np.repeat(np.arange(6, dtype=np.float32), 2).reshape(6, 2)
  )


def test_params_of_published_sizes_are_read_by_layer():
  """Of the 14B, which is 57 GB, no block is more than a layer of one leaf."""
  model = hf_config.preset("wan2.1-t2v-14b", "diffusers")
  shapes = {e.name: e.shape for e in model.entries()}
  tensors = {
    n: safetensors_io.Tensor(None, 0, s, np.dtype("f4")) for n, s in shapes.items()
  }
  component = discover.Component(model, None, tensors)
  leaves = jax.tree.leaves(import_weights._params(component, np.dtype("f4")))
  assert sum(leaf.nbytes for leaf in leaves) == 4 * 14_288_491_584
  # That of time_projection, which no other layer has.
  assert max(x.nbytes * x.rows // x.shape[0] for x in leaves) == 5120 * 30720 * 4


# --- export


@pytest.fixture(scope="module")
def exported(imported, tmp_path_factory):
  out = tmp_path_factory.mktemp("exported")
  export_weights.run(imported, out, shard_bytes=10_000)
  return out


def read_all(folder):
  made, files_read = {}, sorted(folder.glob("*.safetensors"))
  for path in files_read:
    with safe_open(path, "numpy") as f:
      assert f.metadata() == {"format": "pt"}
      made |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
  return made, files_read


@pytest.mark.parametrize("network", CONFIGS)
def test_round_trip_is_bit_identical(pipeline, exported, network):
  folder = exported / PLACES[network]
  made, shards = read_all(folder)
  assert_same(made, tensors_of(network), strict=True)
  config = json.loads((folder / "config.json").read_text())
  dtype = "bfloat16" if network == "text" else "float32"
  assert config == hf_config.to_json(model_of(network), dtype)
  index = folder / f"{STEMS[network]}.safetensors.index.json"
  names = json.loads(index.read_text())["weight_map"]
  assert set(names) == set(made) and set(names.values()) == {p.name for p in shards}
  assert len(shards) > 1


def test_an_export_is_a_pipeline(exported, imported, tmp_path):
  index = json.loads((exported / "model_index.json").read_text())
  assert {k for k, v in index.items() if isinstance(v, list) and v[0]} == {
    *("scheduler", "tokenizer"),
    *PLACES.values(),
  }
  import_weights.run(exported, tmp_path)
  for network in CONFIGS:
    assert_same(load(tmp_path, network)[0], load(imported, network)[0], strict=True)


def test_an_export_of_a_run_has_the_encoder_that_it_reads(imported, tmp_path, caplog):
  run = tmp_path / "run"
  shutil.copytree(imported, run)
  shutil.rmtree(run / "text")
  export_weights.run(run, tmp_path / "out")
  assert (tmp_path / "out" / "model_index.json").is_file()
  made, _ = read_all(tmp_path / "out" / "text_encoder")
  assert_same(made, tensors_of("text"), strict=True)
  export_weights.run(run, tmp_path / "dit", networks=["dit"])
  assert [path.name for path in (tmp_path / "dit").iterdir()] == ["transformer"]
  # It is gone, or is another one now.
  meta = checkpoint.load_meta(run / "dit" / "model")
  for text, message in (
    ({"folder": str(tmp_path / "gone")}, ""),
    ({"features": "other"}, r"text.model is another one than .*trained with \(other\)"),
  ):
    changed = {**meta, "text": {**meta["text"], **text}}
    checkpoint.save_meta(run / "dit" / "model", changed)
    if message:
      with pytest.raises(ValueError, match=message):
        export_weights.run(run, tmp_path / "other")
      assert not (tmp_path / "other").exists()
    else:
      with caplog.at_level("INFO"):
        export_weights.run(run, tmp_path / "part")
      assert "gone/text/model is not there: no pipeline without it" in caplog.text
      assert not (tmp_path / "part" / "model_index.json").exists()


def test_export_of_params_that_were_trained(tmp_path):
  """Saved by Orbax as jax.Array, several layers to a chunk."""
  text = FrozenText("x", pad_to=512)
  meta = DiTMeta(DIT, text, 512, 128, 1024, 2, 16.0, True, "vae-0").to_json()
  checkpoint.save_model(
    tmp_path / "dit" / "model", jax.tree.map(jax.numpy.asarray, params_of("dit")), meta
  )
  export_weights.run(tmp_path, tmp_path / "out", dtype="bfloat16")
  made, _ = read_all(tmp_path / "out" / "transformer")
  expected = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors_of("dit").items()}
  assert_same(made, expected, strict=True)
  for changes, message in (
    ({"text": {"vocab_size": 300}}, "its text encoder was trained with it"),
    ({"noise": {"process": "vp", "target": "eps"}}, "Wan is a velocity of a flow"),
    (
      {"model": {**meta["model"], "depth": 3}},
      r"blocks/key/kernel has \(2, 24, 24\)",
    ),
    ({"model": {**meta["model"], "pooled_text": True}}, "pooled_text"),
  ):
    checkpoint.save_meta(tmp_path / "dit" / "model", {**meta, **changes})
    with pytest.raises(ValueError, match=message):
      export_weights.run(tmp_path, tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_errors_of_an_export(imported, exported, tmp_path):
  with pytest.raises(ValueError, match="vae is there already; choose another --out"):
    export_weights.run(imported, exported)
  with pytest.raises(ValueError, match="no checkpoint with vae, text, dit"):
    export_weights.run(tmp_path, tmp_path / "out")
  with pytest.raises(ValueError, match="has no dit"):
    export_weights.run(tmp_path, tmp_path / "out", networks=["dit"])


# --- what a user can get wrong


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
