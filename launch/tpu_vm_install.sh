#!/usr/bin/env bash
# On each worker of a TPU VM: unpacks the code and installs it for TPU.
# Usage: tpu_vm_install.sh FOLDER ARCHIVE
set -euo pipefail

folder=$1
archive=$2

mkdir -p "$folder"
tar -xzf "$archive" -C "$folder"
# Images of TPU VMs have an older Python than jax needs.
if [[ ! -x "$folder/.venv/bin/python" ]]; then
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --python 3.12 "$folder/.venv"
fi
python3 -m uv pip install --quiet --python "$folder/.venv/bin/python" \
  -e "${folder}[tpu]"
"$folder/.venv/bin/python" -c 'import jax; print("jax", jax.__version__)'
