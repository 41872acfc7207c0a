"""What `check` says of a run: whole, not checked, lost, and how to get it back."""

import json
import pathlib
import shutil

import pytest
import sealed

from sora_jax.run import integrity

DATA = "encode/latents-00000-of-00003.array_record"


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def arrays_of(folder):
  """The files that hold arrays, and their index."""
  return [path for path in folder.rglob("d/*") if path.stat().st_size]


def states(workdir):
  return {finding.thing: finding for finding in integrity.examine(workdir)}


@pytest.fixture(scope="module")
def found(tiny_run):
  return states(tiny_run.workdir)


def test_a_finished_run_is_whole(tiny_run, found):
  assert {finding.state for finding in found.values()} == {integrity.WHOLE}
  assert found.keys() == {
    *(f"{name}/stage.json" for name in ("data", "vae", "encode", "dit", "sample")),
    "evaluate/stage.json", "data/manifest.jsonl", "data: media files",
    "vae/checkpoints/6", "vae/checkpoints/8", "vae/model",
    "dit/checkpoints/6", "dit/checkpoints/8", "dit/model", "encode: shards",
  }  # fmt: skip


def test_a_relative_folder_is_that_folder(tiny_run, found, monkeypatch):
  monkeypatch.chdir(tiny_run.workdir)
  assert states(pathlib.Path()) == found


def old_stage(workdir):
  path = workdir / "vae" / "stage.json"
  stage = json.loads(path.read_text())
  del stage["checksum"]
  sealed.delete(path)
  path.write_text(json.dumps(stage))


BREAKS = {
  "a checkpoint's bit": (
    lambda w: [flip(path) for path in arrays_of(w / "dit/checkpoints/8")],
    ("dit/checkpoints/8", "lost", "", "training goes on from step 6"),
  ),
  "a checkpoint's file": (
    lambda w: [path.unlink() for path in arrays_of(w / "vae/checkpoints/6")],
    ("vae/checkpoints/6", "lost", "", "since step 8 is newer and whole"),
  ),
  "host of another step": (
    lambda w: shutil.copyfile(
      w / "dit/checkpoints/6/host/metadata", w / "dit/checkpoints/8/host/metadata"
    ),
    ("dit/checkpoints/8", "lost", "it is of step 6", "from step 6"),
  ),
  "a model's bit": (
    lambda w: [flip(path) for path in arrays_of(w / "vae/model")],
    ("vae/model", "lost", "params-0", "made of the checkpoint of step 8"),
  ),
  "another model": (
    lambda w: sealed.rewrite(
      w / "dit/model/model.json",
      meta={**json.loads((w / "dit/model/model.json").read_text())["meta"], "id": "x"},
    ),
    ("dit/model", "lost", "it is x, and the stage made", "sora_jax.train_dit"),
  ),
  "a shard's bit": (
    lambda w: flip(w / DATA), (DATA, "lost", "its bytes are not", "sora_jax.encode"),
  ),
  "an empty shard": (
    lambda w: (w / DATA).write_bytes(b""), (DATA, "lost", "has 0 bytes, not", "encode"),
  ),
  "a shard": (
    lambda w: (w / DATA).unlink(), (DATA, "lost", "is missing", "only it is made"),
  ),
  "stage.json": (
    lambda w: (w / "dit/stage.json").write_text("[]"),
    ("dit/stage.json", "lost", "stage.json: not a JSON object", "stage.json.bak over"),
  ),
  "stage.json of an older version": (
    old_stage, ("vae/stage.json", "not checked", "older version", ""),
  ),
  "the manifest": (
    lambda w: (w / "data/manifest.jsonl").write_text("\n"),
    ("data/manifest.jsonl", "lost", "not the one that the stage", "put a copy back"),
  ),
  "media": (
    lambda w: [p.unlink() for p in (w / "data").rglob("*.mp4")],
    ("data: media files", "lost", "are missing or empty, such as", "mount or copy"),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_lost_is_named_and_nothing_else(tiny_run, found, tmp_path, name):
  shutil.copytree(tiny_run.workdir, tmp_path, dirs_exist_ok=True)
  do, (thing, state, note, remedy) = BREAKS[name]
  do(tmp_path)
  now = states(tmp_path)
  changed = {k for k in now if k not in found or now[k].state != found[k].state}
  assert changed == {thing}, now
  assert now[thing].state == state
  assert note in now[thing].note and remedy in now[thing].remedy
  assert "\n" not in now[thing].note + now[thing].remedy
  assert bool(now[thing].remedy) == (state == integrity.LOST)


def test_the_command(commands, tiny_run, tmp_path):
  log = commands.run("check", str(tiny_run.workdir))
  assert f"nothing of {tiny_run.workdir} is lost" in log
  shutil.copytree(tiny_run.workdir, tmp_path, dirs_exist_ok=True)
  flip(tmp_path / DATA)
  log = commands.run("check", str(tmp_path), returncode=1)
  assert f"{DATA} is lost. To get it back: delete it, if it is there, and run" in log
  assert "Traceback" not in log
  log = commands.run("check", str(tmp_path / "nothing"), returncode=1)
  assert "nothing: no run here" in log


def test_a_lost_shard_is_made_again_bit_for_bit(commands, tiny_run, tmp_path):
  shutil.copytree(tiny_run.workdir, tmp_path, dirs_exist_ok=True)
  before = (tmp_path / DATA).read_bytes()
  (tmp_path / DATA).write_bytes(before[:-9])
  log = commands.main(tmp_path, '--config.stages=("dit",)', returncode=0)
  assert "stage dit: complete already" in log
  log = commands.main(tmp_path)
  assert f"bytes, not {len(before)}: it is made again" in log
  assert (tmp_path / DATA).read_bytes() == before
  assert log.count("complete already") == 5
