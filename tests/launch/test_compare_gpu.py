"""The comparison on a GPU at the size of a CPU: our side, and what it refuses."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from golden.make_losses import FAST_COMPILE

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "benchmarks" / "compare_gpu.py"
FAST = " ".join(f"--{name}={value}" for name, value in FAST_COMPILE.items())


def run(*flags, folder):
  # A torch that is not there, also where one is installed.
  (folder / "torch.py").write_text('raise ImportError("no torch")')
  path = os.pathsep.join([str(folder), *filter(None, sys.path)])
  return subprocess.run(
    [sys.executable, SCRIPT, *flags],
    env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": FAST},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_our_side_is_measured(tmp_path):
  flags = ("--small", "--steps=1", "--warmup=1", "--sides=ours", "--attention=chunked")
  kept = tmp_path / "benchmarks.jsonl"
  done = run(*flags, f"--record={kept}", folder=tmp_path)
  assert done.returncode == 0, done.stderr
  *_, header, _, row = done.stdout.splitlines()
  names, cells = (re.findall(r"[^|]+", line) for line in (header, row))
  found = {n.strip(): c.strip() for n, c in zip(names, cells, strict=True)}
  assert float(found["step ms"]) > 0 and float(found["TFLOP/s"]) > 0
  expected = {"side": "ours", "attention": "chunked", "tokens": "192", "ratio": "1.00"}
  assert expected.items() <= found.items()
  (line,) = map(json.loads, kept.read_text().splitlines())
  assert line["settings"]["attention"] == "chunked"
  assert line["machine"]["device"] == "cpu" and line["machine"]["devices"] == 1
  figure = line["figures"]["small, ours: step"]
  assert figure["unit"] == "ms" and f"{figure['value']:.1f}" == found["step ms"]
  assert done.stdout.count("largest error of out, dq, dk, dv") == 4


@pytest.mark.slow
def test_without_torch_it_says_so(tmp_path):
  done = run("--small", folder=tmp_path)
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.endswith(
    "no torch. The other side needs it: pip install torch, or --sides=ours\n"
  )
