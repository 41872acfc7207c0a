"""Adapter files of many trainers: the right effect, or the right reason against it.

The effect is computed here in float64, and was by diffusers and PEFT for those files
that they read (golden/make_adapters.py).
"""

import json
import pathlib

import jax
import numpy as np
import pytest
from golden import adapter_cases
from golden.random_weights import random_tensor
from safetensors.numpy import save_file

from sora_jax.models.dit import DiTConfig
from sora_jax.runtime import safetensors_io, sharding
from sora_jax.weights import dit, lora, mapping, merge

pytestmark = pytest.mark.usefixtures("fast_compile")
CONFIG = DiTConfig(
  channels=4, width=24, depth=2, heads=2, mlp_width=32, text_width=16, frequency_width=8
)
READ, REFUSED = adapter_cases.read_cases(), adapter_cases.refused_cases()
ENTRIES = dit.entries(CONFIG, "diffusers")
GOLDEN = np.load(pathlib.Path(adapter_cases.__file__).with_name("adapters.npz"))


@pytest.fixture(scope="module")
def base():
  shapes = {entry.name: entry.shape for entry in ENTRIES}
  return {name: random_tensor(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


def write(folder, tensors, metadata=None, beside=None):
  path = folder / "x.safetensors"
  if beside:
    (folder / "adapter_config.json").write_text(json.dumps(beside))
  planned = [safetensors_io.Plan(k, x.shape, x.dtype) for k, x in tensors.items()]
  safetensors_io.write_file(path, planned, iter(tensors.values()), metadata)
  return path


def merged(base, mesh, *files):
  """The model's tensors, by diffusers' names, with files (path, strength) merged in."""
  params = {"dit": mapping.assemble(ENTRIES, base.__getitem__)}
  params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.P()))
  for path, strength in files:
    params = merge.merge_file(params, path, CONFIG, mesh, strength)
  found = {}
  for entry in ENTRIES:
    value = params["dit"]
    for key in entry.path.split("/"):
      value = value[key]
    value = np.asarray(value if entry.layer is None else value[entry.layer])
    found[entry.name] = entry.save(value)
  return found


def assert_changed(found, base, changes):
  for name, value in found.items():
    wanted = base[name].astype(np.float64) + changes.get(name, 0.0)
    np.testing.assert_allclose(value, wanted, rtol=0, atol=5e-7, err_msg=name)
    assert name not in changes or np.abs(changes[name]).max() > 1e-3


@pytest.mark.parametrize("name", READ)
def test_effect(base, mesh, tmp_path, name):
  case = READ[name]
  path = write(tmp_path, case.tensors, case.metadata, case.beside)
  assert_changed(merged(base, mesh, (path, 1.0)), base, case.changes)


def test_effects_are_those_of_diffusers_and_peft():
  names = {key.split("|")[0] for key in GOLDEN.files}
  assert len(names) >= 15 and names <= set(READ)
  for key in GOLDEN.files:
    name, tensor = key.split("|")
    wanted = READ[name].changes[tensor]
    np.testing.assert_allclose(GOLDEN[key], wanted, atol=5e-7, err_msg=key)


def test_two_files_with_strengths(base, mesh, tmp_path):
  files, changes = [], {}
  for name, strength in (("kohya", 0.5), ("differences", -1.5), ("LoKr", 2.0)):
    (tmp_path / name).mkdir()
    files.append((write(tmp_path / name, READ[name].tensors), strength))
    for tensor, change in READ[name].changes.items():
      changes[tensor] = changes.get(tensor, 0.0) + strength * change
  assert_changed(merged(base, mesh, *files), base, changes)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(tmp_path, name):
  tensors, message = REFUSED[name]
  path = write(tmp_path, tensors)
  with pytest.raises(ValueError, match=message) as error:
    lora.read(path, CONFIG)
  assert str(error.value).startswith(str(path))
  assert "damaged" not in str(error.value)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"use_dora": True}, "use_dora"),
    ({"peft_type": "LOHA"}, "peft_type LOHA"),
    ({"lora_alpha": "x"}, "damaged settings"),
    ({"alpha_pattern": {"(": 1}}, "damaged settings"),
  ],
)
def test_refused_settings(tmp_path, settings, message):
  path = write(tmp_path, READ["peft"].tensors, None, settings)
  with pytest.raises(ValueError, match=message):
    lora.read(path, CONFIG)


@pytest.mark.parametrize(
  ("start", "message"),
  [
    (b"PK\x03\x04\x14\x00\x00\x00", "is a pickle"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "is a pickle"),
    (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
    (b"<!DOCTYPE html><html>", "a web page"),
    (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
  ],
)
def test_files_of_other_kinds(tmp_path, start, message):
  path = tmp_path / "x.safetensors"
  path.write_bytes(start + b" " * 100)
  with pytest.raises(ValueError, match=f"{path}.* {message}"):
    lora.read(path, CONFIG)


def test_metadata_that_is_null_and_types_that_are_not_read(tmp_path):
  path = tmp_path / "x.safetensors"
  save_file(READ["diffusers"].tensors, path)
  sound = path.read_bytes()
  size = int.from_bytes(sound[:8], "little")

  def change(edit):
    header = json.loads(sound[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + sound[8 + size :])

  change(lambda header: header.update(__metadata__=None))
  assert set(lora.read(path, CONFIG).pairs) == {"blocks/query"}
  change(lambda header: [entry.update(dtype="F4") for entry in header.values()])
  with pytest.raises(ValueError, match="types that cannot be read: .* of type F4"):
    lora.read(path, CONFIG)


@pytest.mark.parametrize(
  ("text", "wanted"),
  [
    ("a.safetensors", ("a.safetensors", 0.7)),
    ("a.safetensors:0.8", ("a.safetensors", 0.8)),
    ("gs://x/a:-1e-1", ("gs://x/a", -0.1)),
    ("gs://x/a", ("gs://x/a", 0.7)),
  ],
)
def test_strength_behind_a_name(text, wanted):
  assert merge.with_strength(text, 0.7) == wanted


@pytest.mark.parametrize("text", ["a.safetensors:much", "a:nan", "a:", "a:inf"])
def test_strengths_that_are_none(text):
  with pytest.raises(ValueError, match=r"--lora=a.* (no|its) strength"):
    merge.with_strength(text, 1.0)
