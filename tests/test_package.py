"""What a wheel and an sdist hold: shipped checkpoints go with the package."""

import shutil
import subprocess
import sys
import tarfile

import pytest
import tiny

from sora_jax.runtime import shipped

SHIPPED = (
  "sora_jax/shipped/README.md",
  "sora_jax/shipped/toy/README.md",
  "sora_jax/shipped/toy/sample.json",
  "sora_jax/shipped/toy/dit/model/params.safetensors",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A copy of what is packed, with a checkpoint of empty files."""
  folder = tmp_path_factory.mktemp("source")
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(tiny.ROOT / name, folder)
  ignored = shutil.ignore_patterns("__pycache__")
  shutil.copytree(tiny.ROOT / "sora_jax", folder / "sora_jax", ignore=ignored)
  for name in SHIPPED:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
  return folder


def build(source, *arguments):
  done = subprocess.run(
    [sys.executable, "setup.py", "-q", *arguments],
    cwd=source,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


def test_shipped_checkpoints_have_a_folder_of_the_package():
  assert shipped.folder() == tiny.ROOT / "sora_jax" / "shipped"
  assert (shipped.folder() / "README.md").is_file()
  # Small, and each with a model card.
  for name in shipped.names():
    files = [p for p in (shipped.folder() / name).rglob("*") if p.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6, name
    assert (shipped.folder() / name / "README.md").is_file()


@pytest.mark.slow
def test_a_wheel_holds_shipped_checkpoints(source, tmp_path):
  """build_py makes what a wheel is packed of."""
  build(source, "build_py", f"--build-lib={tmp_path}")
  for name in (*SHIPPED, "sora_jax/py.typed", "sora_jax/sample.py"):
    assert (tmp_path / name).is_file(), name


@pytest.mark.slow
def test_an_sdist_holds_shipped_checkpoints(source, tmp_path):
  build(source, "sdist", f"--dist-dir={tmp_path}")
  (path,) = tmp_path.glob("*.tar.gz")
  with tarfile.open(path) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
  assert {*SHIPPED, "sora_jax/py.typed", "setup.py"} <= names
