"""Which meshes a search tries, and a program for a TPU where its compiler is there."""

import json
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from planning.test_plan import CUBE, recipe_of

from sora_jax.planning import cost_model, hardware, hlo, lowering, report, search
from sora_jax.runtime import files, sharding


def test_candidates_divide():
  built = recipe_of(rows=64, tokens=4096)
  found = search.candidates(built, CUBE)
  assert len({json.dumps(c) for c in found}) == len(found) > 10
  for c in found:
    sizes = [c[f"mesh.{axis}"] for axis in sharding.AXES]
    assert np.prod(sizes) == 64
    assert c["dit.rows"] % (sizes[0] * sizes[1]) == 0
    assert c["dit.tokens"] % (128 * sizes[2]) == 0
    assert built.dit.model.heads % sizes[3] == 0
    assert c["dit.rows"] * c["dit.tokens"] == 64 * 4096
  assert found[0]["mesh.context"] == found[0]["mesh.tensor"] == 1
  assert found[0]["dit.model.remat"] == "attention_mlp_saved"
  two = search.candidates(built, hardware.parse("v5p:4x4x4", slices=2))
  assert {c["mesh.data"] for c in two} == {2}


def test_search_resumes_and_ranks(monkeypatch, tmp_path):
  built, calls = recipe_of(rows=64, tokens=4096), []

  def run(command, *, timeout, **kwargs):
    calls.append(command)
    number = len(calls)
    if number == 2:
      raise subprocess.TimeoutExpired(command, timeout)
    if number == 3:
      return types.SimpleNamespace(returncode=1, stderr="noise\nE it is too much\n")
    folder = next(a for a in command if a.startswith("--out=")).partition("=")[2]
    result = {
      "programs": [{"fits": number != 1, "peak": 9e10}],
      "speed": {"step_seconds": 2.0, "mfu": 0.4, "tokens_per_day": 1e9 * number},
    }
    files.write_json(tmp_path / folder / "v5p-4x4x4-1.json", result)
    return types.SimpleNamespace(returncode=0, stderr="")

  monkeypatch.setattr(subprocess, "run", run)
  first = search.search(built, CUBE, tmp_path, ["--topology=v5p:4x4x4"], trials=3)
  assert len(calls) == len(first) == 3
  assert "--topology=v5p:4x4x4" in calls[0]
  assert "--config.dit.model.remat=attention_mlp_saved" in calls[0]
  ranked = search.search(built, CUBE, tmp_path, ["--topology=v5p:4x4x4"], trials=5)
  assert len(calls) == len(ranked) == 5
  lines = report.ranking(ranked)
  assert lines[0].split()[:2] == ["trial", "step"]
  assert lines[2].startswith("1. ") and lines[2].split()[-3] == "5e+09"
  assert "4e+09" in lines[3] and lines[4].split()[-1] == "NO"
  assert any("E it is too much" in line for line in lines)
  assert any("longer than" in line for line in lines)


def test_trials_that_others_make_needless():
  def trial(remat, fits, **others):
    overrides = {"mesh.context": 1, **others, "dit.model.remat": remat}
    return {"overrides": overrides, "result": {"programs": [{"fits": fits}]}}

  wanted = trial("attention_saved", True)["overrides"]
  for other, fits, expected in (
    ("full", True, False),
    ("full", False, True),
    ("attention_mlp_saved", True, True),
    ("attention_mlp_saved", False, False),
  ):
    assert search.needless(wanted, [trial(other, fits)]) is expected
  elsewhere = trial("full", False, **{"mesh.context": 2})
  failed = {"overrides": {**wanted, "dit.model.remat": "full"}, "error": "x"}
  assert not search.needless(wanted, [elsewhere, failed])


def test_error_of_a_trial():
  text = "E0000 noise\nValueError: too much\n----\nFor simplicity, JAX has removed\n"
  assert report.error_line(text) == "ValueError: too much"
  assert report.error_line("killed\n") == "killed"
  assert report.error_line("") == "no message"


def test_a_search_without_candidates(tmp_path):
  with pytest.raises(ValueError, match="no mesh of 64 devices .*rows 8 of 96 tokens"):
    search.search(recipe_of(), CUBE, tmp_path, [])


# --- the compiler for TPUs, where it is installed


def test_a_program_for_a_tpu():
  pytest.importorskip("libtpu")
  topology = hardware.parse("v5p:2x2x1")
  mesh = sharding.make_mesh(fsdp=4, devices=lowering.devices(topology))
  assert sorted(lowering.places(mesh, topology)[:, 1:3].tolist()) == [
    [0, 0], [0, 1], [1, 0], [1, 1]
  ]  # fmt: skip

  def place(*spec):
    where = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=where)

  lowered = jax.jit(jnp.matmul).lower(place("fsdp"), place("fsdp"))
  program = lowering.compile_program("matmul", lowered)
  analysis = hlo.analyze(program.text, 4)
  assert analysis.matmul_flops == 2 * 4096**3 / 4
  assert analysis.collectives["all-gather"].wire == 2 * 4096**2 * 3 / 4
  found = cost_model.seconds(analysis, lowering.places(mesh, topology), topology)
  # The compiler's own cycles, and no better than the peak.
  assert 1.0 <= found.matmul / (2 * 4096**3 / 4 / 459e12) < 2.0
