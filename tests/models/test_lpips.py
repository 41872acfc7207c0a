"""LPIPS equals torchmetrics' (tests/golden/make_lpips.py); its file and its errors."""

import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from golden.random_weights import random_tensor

from sora_jax.models.lpips import LPIPS, WIDTHS
from sora_jax.weights import lpips

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "lpips.npz")
NARROW = (8, 16, 32, 64, 64)


def tensors():
  tensors = {e.name: random_tensor(e.name, e.shape) for e in lpips.names(NARROW)}
  return {n: np.abs(v) if n.startswith("lin") else v for n, v in tensors.items()}


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "lpips.safetensors"
  safetensors.numpy.save_file(tensors(), path)
  return path


def test_names_are_those_of_the_reference():
  found = set(GOLDEN["names"].tolist())
  assert {entry.name for entry in lpips.names(NARROW)} == found


@pytest.mark.slow
@pytest.mark.parametrize("case", ["square", "wide", "tall"])
def test_distances(file, case):
  params = lpips.load(file, NARROW)
  apply = jax.jit(LPIPS(NARROW).apply)
  x, y = (GOLDEN[f"{case}_{n}"].transpose(0, 2, 3, 1) for n in "xy")
  expected = GOLDEN[f"{case}_distance"]
  assert expected.min() > 0.05
  np.testing.assert_allclose(apply({"params": params}, x, y), expected, rtol=1e-4)
  np.testing.assert_allclose(apply({"params": params}, x, x), 0.0, atol=1e-6)


def test_full_size_by_shape():
  shapes = jax.eval_shape(
    LPIPS().init, jax.random.key(0), *[np.zeros((1, 16, 16, 3), np.float32)] * 2
  )["params"]
  found = {
    "/".join(key.key for key in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
  }
  assert found == {entry.path: entry.our_shape for entry in lpips.names(WIDTHS)}
  assert sum(np.prod(s) for s in found.values()) == 14_714_688 + sum(WIDTHS)


def test_wrong_files(tmp_path, file):
  with pytest.raises(ValueError, match="nothing.safetensors: No such file"):
    lpips.load(tmp_path / "nothing.safetensors")
  with pytest.raises(ValueError, match="not LPIPS on VGG16: net.slice1.0.weight has"):
    lpips.load(file)
  broken = tmp_path / "broken.safetensors"
  broken.write_bytes(file.read_bytes()[:-4])
  with pytest.raises(ValueError, match="truncated"):
    lpips.load(broken, NARROW)
