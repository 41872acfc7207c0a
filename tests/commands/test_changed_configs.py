"""Commands on a finished run whose config has changed, as a user types them."""

import json
import shutil

import jax
import numpy as np
import pytest
import sealed
import tiny

from sora_jax.runtime import checkpoint

MADE_FROM = {"vae": ("vae", "encode"), "dit": ("dit", "sample", "evaluate")}


def stage_files(workdir):
  return {
    path.parent.name: path.stat().st_mtime_ns for path in workdir.glob("*/stage.json")
  }


# The schedule with a decay has its turn in the VAE, whose programs compile faster.
@pytest.mark.parametrize("stage, decay", [("dit", 0), ("vae", 3)], ids=str)
def test_more_steps_of_a_finished_run(tiny_run, commands, tmp_path, stage, decay):
  train, only = f"--config.{stage}.train", f"--config.stages=('{stage}',)"
  schedule = (f"{train}.schedule=wsd", f"{train}.decay_steps={decay}") if decay else ()
  longer = f"{train}.steps={2 * tiny.STEPS}"
  unseen = "--config.sample.prompts=()"  # previews would be compiled, too
  run, whole = tmp_path / "run", tmp_path / "whole"
  for folder in (run, whole):
    shutil.copytree(tiny_run.workdir, folder)
    if schedule or folder == whole:
      for name in MADE_FROM[stage]:
        shutil.rmtree(folder / name)
  if schedule:
    commands.main(run, only, unseen, *schedule)
  # What was made with the shorter training is made again with the longer one.
  log = commands.main(run, longer, *((only,) if stage == "vae" else ()), *schedule)
  assert f"config.{stage}.train.steps is 16 and was 8: goes on" in log
  assert f"from step {tiny.STEPS - decay} to 16" in log
  if stage == "dit":
    assert log.count("complete already") == 3 and "evaluate: complete after" in log
  commands.main(whole, only, unseen, longer, *schedule)
  (ours, meta), (theirs, other) = (
    checkpoint.load_model(folder / stage / "model") for folder in (run, whole)
  )
  assert meta == other and meta["steps"] == 2 * tiny.STEPS
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_free_keys_of_a_finished_run(tiny_run, commands):
  before = stage_files(tiny_run.workdir)
  log = commands.main(
    tiny_run.workdir,
    "--config.dit.model.remat=full",
    "--config.mesh.fsdp=1",
    "--config.dit.train.log_every=2",
    "--config.precision=bfloat16",
    "--config.data.workers=1",
  )
  assert log.count("complete already") == 6
  assert stage_files(tiny_run.workdir) == before


def test_other_memory_in_the_middle_of_a_run(tiny_run, commands, tmp_path):
  """Out of memory, then on with remat and microbatches."""
  shutil.copytree(tiny_run.workdir, tmp_path, dirs_exist_ok=True)
  path = tmp_path / "dit" / "stage.json"
  sealed.rewrite(path, complete=False)
  shutil.rmtree(tmp_path / "dit" / "checkpoints" / str(tiny.STEPS))
  log = commands.main(
    tmp_path,
    "--config.dit.model.remat=full",
    "--config.dit.train.grad_accumulation=2",
    "--config.stages=('dit',)",
  )
  assert "stage dit: goes on" in log and "from step 6 to 8" in log


def test_other_prompts(tiny_run, commands, tmp_path):
  shutil.copytree(tiny_run.workdir, tmp_path, dirs_exist_ok=True)
  log = commands.main(tmp_path, "--config.sample.prompts=(('a star',(64,64),1,0.0),)")
  assert log.count("complete already") == 5
  folder = tmp_path / "sample"
  (line,) = (folder / "samples.jsonl").read_text().splitlines()
  assert json.loads(line)["file"] == "000-a-star.png"
  # Those of the prompts before are gone, the user's own files stay.
  assert [path.name for path in folder.glob("0*")] == ["000-a-star.png"]
