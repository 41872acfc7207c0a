"""Adapters in files: as diffusers writes and reads them (golden/make_wan_lora.py)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import test_wan_dit

from sora_jax.models import lora
from sora_jax.models.dit import DiT
from sora_jax.runtime import safetensors_io
from sora_jax.weights import lora as lora_files

GOLDEN = test_wan_dit.GOLDEN / "wan_lora.safetensors"
IMAGE = test_wan_dit.CONFIGS["2.1"]


def read_file(path):
  return {
    name: safetensors_io.read(t) for name, t in safetensors_io.read_header(path).items()
  }


def write_file(path, tensors, metadata=None):
  planned = [safetensors_io.Plan(name, x.shape, x.dtype) for name, x in tensors.items()]
  safetensors_io.write_file(path, planned, iter(tensors.values()), metadata)
  return path


@pytest.mark.slow
def test_a_file_of_diffusers_gives_its_output():
  found = lora_files.read(GOLDEN, IMAGE).pairs
  adapters = {}
  for module, pair in found.items():
    adapters |= {
      f"{module}/{x}": v for x, v in zip((lora.A, lora.B), pair, strict=True)
    }
  params = lora.merge(test_wan_dit.weights(IMAGE), lora.nest(adapters), 1.0)
  _, patch_LP, levels, given_L, position_L3, text_SE, grid = test_wan_dit.clip("image")
  L, S = len(patch_LP), len(text_SE)
  apply = jax.jit(DiT(IMAGE).apply)
  inputs = (
    patch_LP[None], jnp.full((1, 2), levels[0] / 1000), jnp.zeros((1, L), jnp.int32),
    jnp.ones((1, L), jnp.int32), position_L3[None], text_SE[None],
    jnp.ones((1, S), jnp.int32),
  )  # fmt: skip
  out_BLP = apply.lower({"params": params}, *inputs).compile()(
    {"params": params}, *inputs
  )
  latent_CTHW = np.load(GOLDEN.with_suffix(".npz"))["image"][0]
  wanted = test_wan_dit.patches.patchify(
    latent_CTHW.transpose(1, 2, 3, 0), IMAGE.patch_size
  )
  assert test_wan_dit.relative_error(np.asarray(out_BLP[0]), wanted) < 1e-5
  # Without them it would be another.
  assert test_wan_dit.relative_error(test_wan_dit.expected("image"), wanted) > 0.1


def test_our_file_is_that_of_diffusers(tmp_path):
  pairs = {
    module: (a, b / np.float32(5 / 3))
    for module, (a, b) in lora_files.read(GOLDEN, IMAGE).pairs.items()
  }
  path = tmp_path / "adapter.safetensors"
  lora_files.write(path, pairs, IMAGE, 5.0)
  ours, theirs = read_file(path), read_file(GOLDEN)
  assert set(ours) == set(theirs)
  for name, value in ours.items():
    np.testing.assert_allclose(value, theirs[name], rtol=1e-6, err_msg=name)
  settings, wanted = (
    json.loads(safetensors_io.read_metadata(p)["lora_adapter_metadata"])
    for p in (path, GOLDEN)
  )
  for key in ("r", "lora_alpha", "target_modules"):
    value, other = settings[f"transformer.{key}"], wanted[f"transformer.{key}"]
    assert value == (sorted(other) if isinstance(other, list) else other)


def other_names(tensors):
  """As Wan's own tools have them: the original layout, down and up, alpha a tensor."""
  rename = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.2.ffn.net.2": "blocks.2.ffn.2",
  }
  made = {}
  for theirs, name in rename.items():
    for kind, other in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
      value = tensors[f"transformer.{theirs}.{kind}.weight"]
      made[f"diffusion_model.{name}.{other}.weight"] = value
  made["diffusion_model.blocks.0.self_attn.q.alpha"] = np.float32([6.0])
  return made


def test_a_file_with_wans_own_names(tmp_path):
  """Layers that it leaves out are zero; alpha is 1 x the rank where there is none."""
  path = write_file(tmp_path / "x.safetensors", other_names(read_file(GOLDEN)))
  found, golden = (lora_files.read(p, IMAGE).pairs for p in (path, GOLDEN))
  assert set(found) == {"blocks/query", "blocks/mlp_down"}
  (a, b), (golden_a, golden_b) = found["blocks/query"], golden["blocks/query"]
  np.testing.assert_array_equal(a[0], golden_a[0])
  np.testing.assert_allclose(b[0], golden_b[0] * (6 / 5), rtol=1e-6)
  assert not a[1:].any() and not b[1:].any()
  np.testing.assert_allclose(
    found["blocks/mlp_down"][1][2], golden["blocks/mlp_down"][1][2] * (3 / 5), rtol=1e-6
  )


def test_alpha_beside_a_file_of_peft(tmp_path):
  tensors = {
    name.replace("transformer.", "base_model.model."): value
    for name, value in read_file(GOLDEN).items()
  }
  path = write_file(tmp_path / "adapter_model.safetensors", tensors)
  settings = {"r": 3, "lora_alpha": 5, "use_dora": False}
  (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
  found, golden = (lora_files.read(p, IMAGE).pairs for p in (path, GOLDEN))
  for module, pair in golden.items():
    for a, b in zip(pair, found[module], strict=True):
      np.testing.assert_array_equal(a, b)


def test_wrong_files(tmp_path):
  tensors = read_file(GOLDEN)
  query = "transformer.blocks.0.attn1.to_q.lora_"

  def fails(changed, message, metadata=None):
    path = write_file(tmp_path / "x.safetensors", changed, metadata)
    with pytest.raises(ValueError, match=message):
      lora_files.read(path, IMAGE)

  extra = {"transformer.blocks.0.attn2.add_k_proj.lora_A.weight": np.zeros((1, 1))}
  extra = {name: value.astype(np.float32) for name, value in extra.items()}
  fails(tensors | extra, "image-to-video model.*: .*add_k_proj")
  half = {name: value for name, value in tensors.items() if name != f"{query}B.weight"}
  fails(half, r"lora_A and lora_B is missing of blocks\.0\.attn1\.to_q")
  wrong = np.zeros((3, 7), np.float32)
  fails(tensors | {f"{query}A.weight": wrong}, r"to_q has .* \(3, 7\).* \(3, 48\)")
  dora = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}
  fails(tensors, "with use_dora .DoRA. cannot be read", dora)
  with pytest.raises(ValueError, match="nothing: no such adapter file"):
    lora_files.read(tmp_path / "nothing", IMAGE)
  with pytest.raises(ValueError, match="Wan has no layer text_pooled"):
    lora_files.check(IMAGE, ["text_pooled"])
