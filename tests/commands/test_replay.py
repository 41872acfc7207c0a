"""`--config.replay` as a command: a step of a finished run once more, and no change."""

import pytest
import tiny


def contents(folder):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_a_step_is_repeated_and_nothing_is_saved(tiny_run, commands, stage):
  before = contents(tiny_run.workdir)
  flags = [*tiny.tiny_flags(tiny_run.workdir), "--config.replay=8"]
  log = commands.run(f"train_{stage}", *flags)
  (row,) = (
    row
    for row in tiny.rows(tiny_run.workdir / stage / "metrics.jsonl")
    if row["step"] == 8 and "loss" in row
  )
  assert f"{stage}: replays step 8 from step 6 on" in log
  for name in ("loss", "grad_norm"):
    assert f"{name} {row[name]:.9g} " in log
  assert "gradient norms by module:" in log and "clips of its batch: ['" in log
  assert contents(tiny_run.workdir) == before


def test_replay_is_of_one_stage(tiny_run, commands):
  log = commands.main(tiny_run.workdir, "--config.replay=5", returncode=1)
  assert "config.replay 5 repeats a step of one stage: python -m sora_jax.train" in log
  assert "Traceback" not in log
