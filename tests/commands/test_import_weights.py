"""Published weights to checkpoints and back (import_weights, export_weights).

The sources are written, and the exports read, by the safetensors library.
"""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from commands.tiny_weights import (
  CONFIGS,
  DIT,
  PLACES,
  STATS,
  STEMS,
  TEXT,
  VAE,
  assert_same,
  load,
  model_of,
  params_of,
  tensors_of,
  write_tokenizer,
)
from safetensors import safe_open
from safetensors.numpy import save_file

from sora_jax import export_weights, import_weights, sample
from sora_jax.diffusion.solvers import Options
from sora_jax.models.meta import METAS, DiTMeta, FrozenText
from sora_jax.runtime import checkpoint, lazy_arrays, safetensors_io, sharding
from sora_jax.tasks import dit as dit_task
from sora_jax.weights import discover, hf_config

pytestmark = pytest.mark.usefixtures("fast_compile")


# --- import


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
