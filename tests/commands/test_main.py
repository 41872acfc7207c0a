"""Runs of all stages, typed as a user types them: files, resume, wrong input."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
import tiny

from sora_jax import train_dit, train_vae
from sora_jax.data import records
from sora_jax.data.clips import read_manifest
from sora_jax.data.video import probe, reader, writer
from sora_jax.run import recipe as recipes
from sora_jax.run import stages
from sora_jax.runtime import checkpoint, sharding

STAGES = recipes.DEFAULT_STAGES


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


# --- one run


def test_a_run_makes_samples(tiny_run):
  folder = tiny_run.workdir / "sample"
  samples = lines(folder / "samples.jsonl")
  assert [sample["prompt"] for sample in samples] == [
    "a red circle moves right",
    "a cyan triangle",
  ]
  films = [folder / sample["file"] for sample in samples]
  assert [film.suffix for film in films] == [".mp4", ".png"]
  for film, sample in zip(films, samples, strict=True):
    shape = (sample["frames"], sample["height"], sample["width"], 3)
    assert reader.read(film).shape == shape
  assert probe.probe(films[0]).fps == pytest.approx(12)
  with PIL.Image.open(folder / "contact_sheet.png") as sheet:
    # Two rows of frames of 64x64 drawn twice as large.
    assert sheet.height > 2 * 128 and sheet.width > 128
  others = ["contact_sheet.png", "samples.jsonl", "stage.json", "stage.json.bak"]
  assert sorted(path.name for path in folder.iterdir()) == sorted(
    [*(film.name for film in films), *others]
  )


def test_a_run_is_evaluated(tiny_run):
  results = json.loads((tiny_run.workdir / "evaluate" / "results.json").read_text())
  assert results["vae"]["clips"] == 2 and results["vae"]["unread"] == 0
  assert 5 < results["vae"]["psnr"] < 40 and -1 < results["vae"]["ssim"] < 1
  assert {"color", "shape", "count"} <= set(results["attributes"])
  for row in results["attributes"].values():
    assert all(0 <= row[name] <= 1 for name in ("samples", "chance", "real"))
    assert row["low"] <= row["samples"] <= row["high"]
    assert row["n"] <= 2 and row["real_n"] == row["n"]
  sampling = dict(results["sampling"])
  assert sampling.pop("seconds_a_sample") > 0
  assert sampling == {"prompts": 2, "seeds": 1, "samples": 2}
  # The table and the next command to try are in the log.
  for text in ("PSNR", "chance", "color", f"--checkpoint={tiny_run.workdir}"):
    assert text in tiny_run.log
  samples = lines(tiny_run.workdir / "evaluate" / "samples" / "samples.jsonl")
  assert len(samples) == 2


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_a_run_has_metrics(tiny_run, stage):
  folder = tiny_run.workdir / stage
  trained = [row for row in tiny.rows(folder / "metrics.jsonl") if "loss" in row]
  assert [row["step"] for row in trained] == list(range(1, tiny.STEPS + 1))
  assert all(np.isfinite(row["loss"]) for row in trained)
  assert trained[-1]["progress"] == 1
  evaluated = [
    row["step"] for row in tiny.rows(folder / "metrics.jsonl") if "loss" not in row
  ]
  assert evaluated == [5, tiny.STEPS]
  (events,) = (folder / "tensorboard").iterdir()
  assert "tfevents" in events.name
  assert b"GIF89a" in events.read_bytes()  # reconstructions, or samples
  assert f"step {tiny.STEPS}/{tiny.STEPS} (100.0%)" in tiny_run.log


def test_a_run_keeps_to_its_folders(tiny_run):
  assert sorted(path.name for path in tiny_run.workdir.iterdir()) == sorted(STAGES)
  left_over = [
    path for path in tiny_run.workdir.rglob("*") if path.name.endswith((".tmp", ".old"))
  ]
  assert not left_over


def test_typed_again_all_is_skipped(tiny_run, commands):
  def state():
    return {path: path.stat().st_mtime_ns for path in tiny_run.workdir.rglob("*")}

  before = state()
  log = commands.main(tiny_run.workdir)
  assert log.count("complete already") == len(STAGES)
  assert "begins" not in log
  assert state() == before


# --- interruptions


def test_an_interrupted_run_ends_as_if_it_had_not_been(tiny_run, commands, tmp_path):
  # What the previews of training show is not compared.
  flags = (
    "--config.stages=('data','vae','encode','dit')",
    "--config.sample.prompts=()",
  )
  killed = -signal.SIGKILL
  code, log = commands.interrupt(tmp_path, "vae", 6, signal.SIGKILL, *flags)
  assert code == killed, log
  assert not (tmp_path / "vae" / "model").exists()
  resumed = f"from step {newest_checkpoint(tmp_path / 'vae')} to"

  code, log = commands.interrupt(tmp_path, "dit", 1, signal.SIGTERM, *flags)
  assert code == 0, log
  assert "stage data: complete already" in log and resumed in log
  assert "SIGTERM: saving after this step, then exit" in log
  assert "dit: stopped by a signal" in log and "Traceback" not in log
  stopped = newest_checkpoint(tmp_path / "dit")
  assert 1 <= stopped <= tiny.STEPS

  code, log = commands.interrupt(tmp_path, "dit", 5, signal.SIGKILL, *flags)
  assert code == killed, log
  assert "stage encode: complete already" in log
  assert f"from step {stopped} to" in log
  assert not (tmp_path / "dit" / "model").exists()
  resumed = f"from step {newest_checkpoint(tmp_path / 'dit')} to"

  log = commands.main(tmp_path, *flags)
  assert resumed in log

  for stage in ("vae", "dit"):
    assert_same_params(tiny_run.workdir / stage / "model", tmp_path / stage / "model")
    # Each step is there once, with the loss of the other run.
    curves = [
      [(row["step"], row["loss"]) for row in metrics if "loss" in row]
      for metrics in (
        tiny.rows(folder / stage / "metrics.jsonl")
        for folder in (tiny_run.workdir, tmp_path)
      )
    ]
    assert curves[0] == curves[1]
  assert_same_next_batches(tiny_run.workdir, tmp_path)


def newest_checkpoint(folder):
  """Step of the newest complete checkpoint, 0 if there is none."""
  names = (path.name for path in (folder / "checkpoints").iterdir())
  return max((int(name) for name in names if name.isdigit()), default=0)


def assert_same_params(a, b):
  (params_a, meta_a), (params_b, meta_b) = map(checkpoint.load_model, (a, b))
  assert meta_a == meta_b
  assert jax.tree.structure(params_a) == jax.tree.structure(params_b)
  jax.tree.map(np.testing.assert_array_equal, params_a, params_b)


def assert_same_next_batches(*workdirs):
  recipe = recipes.read(tiny.get_config())
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  for module, stage in ((train_vae, "vae"), (train_dit, "dit")):
    batches = []
    for workdir in workdirs:
      saved = workdir / stage / "checkpoints" / str(tiny.STEPS) / "host" / "metadata"
      state = json.loads(saved.read_text())["host"]["data"]
      data = module.setup(recipe, workdir, mesh).data
      data.set_state(state)
      batches.append([next(data) for _ in range(3)])
      data.close()
    jax.tree.map(np.testing.assert_array_equal, *batches)


# --- a folder of the user's own files


def make_folder(folder, captions):
  """Videos of two sizes, images, one file that is no video and one that is damaged."""
  rng = np.random.default_rng(0)
  names = [f"holiday/{i}.mp4" for i in range(4)] + ["A.PNG", "b.png", "damaged.mp4"]
  for number, name in enumerate(names):
    frames = 1 if name.lower().endswith(".png") else 17
    height = 64 if number % 2 else 48
    noise = rng.integers(0, 256, (frames, height // 8, 10, 3), np.uint8)
    writer.write(folder / name, noise.repeat(8, axis=1).repeat(8, axis=2), 12)
    if captions:
      text = (folder / name).with_suffix(".txt")
      text.write_text(f"noise number {number}\n\nein Rauschen, 噪声\n")
  (folder / "text.mp4").write_text("not a video")
  # The header and the first frames stay whole: only decoding all of it can tell.
  data = bytearray((folder / "damaged.mp4").read_bytes())
  data[len(data) // 2 :] = b"\xff" * len(data[len(data) // 2 :])
  (folder / "damaged.mp4").write_bytes(data)
  return names


def test_a_folder_without_captions(tiny_run, commands, tmp_path):
  """A damaged file does not end the run; without captions the model has no prompt."""
  folder, workdir = tmp_path / "clips", tmp_path / "run"
  names = [*make_folder(folder, captions=False), "text.mp4"]
  # Without it the damaged file may be the one that is held out.
  splits = [{"split": "heldout"} if name == "holiday/3.mp4" else {} for name in names]
  manifest = [
    json.dumps({"path": name, **split})
    for name, split in zip(names, splits, strict=True)
  ]
  (folder / "manifest.jsonl").write_text("\n".join(manifest))
  log = commands.main(
    workdir,
    f"--config.data.source={folder}",
    "--config.data.heldout_share=0",
    # Measuring would find the damage; here it is for later stages to find.
    "--config.data.measure=False",
    "--config.stages=('data','vae','encode','dit','evaluate')",
    "--config.sample.prompts=()",
  )
  assert "no clip has a caption: the model will be unconditional" in log
  assert f"left out {folder}/text.mp4: not a video" in log
  assert "6 clips to train on, 1 held out, 1 files left out" in log
  assert "1 of 7 clips could not be read: 1 x damaged" in log
  assert "attributes are not evaluated" in log
  latents = records.read_latents_manifest(str(workdir / "encode" / "latents.jsonl"))
  assert sorted(clip.id for clip in latents) == [
    "A", "b", *(f"holiday/{i}" for i in range(4))
  ]  # fmt: skip
  assert not any(clip.captions for clip in latents)
  (rejected,) = lines(workdir / "data" / "rejected.jsonl")
  assert rejected["path"] == str(folder / "text.mp4")
  assert {row["id"] for row in lines(workdir / "encode" / "bad_clips.jsonl")} == {
    "damaged"
  }
  assert checkpoint.load_meta(workdir / "dit" / "model")["steps"] == tiny.STEPS


@pytest.mark.slow
def test_a_folder_with_captions(tmp_path):
  """Text files beside the videos are their captions."""
  folder, workdir = tmp_path / "clips", tmp_path / "run"
  names = make_folder(folder, captions=True)
  config = tiny.get_config()
  config.data.source = str(folder)
  stages.run(("data",), recipes.read(config), workdir)
  found = read_manifest(workdir / "data/manifest.jsonl")
  assert {c.path: c.captions for c in found} == {
    str(folder / name): (f"noise number {number}", "ein Rauschen, 噪声")
    for number, name in enumerate(names)
    if name != "damaged.mp4"
  }
  heldout = [c for c in found if c.split == "heldout"]
  assert 1 <= len(heldout) <= 3 and any(c.frames > 1 for c in heldout)
  reasons = {
    row["path"]: row["reason"] for row in lines(workdir / "data/rejected.jsonl")
  }
  assert "damaged" in reasons.pop(str(folder / "damaged.mp4"))
  assert set(reasons) == {str(folder / "text.mp4")}


# --- wrong input

# Starting a command costs seconds of imports, so they are made once and each command
# line runs in a fork of that process.
_FORKS = """
import json, os, runpy, sys, tempfile, traceback
import sora_jax.run.stages, sora_jax.evaluate, sora_jax.train_dit

def run(module, *flags):
  with tempfile.TemporaryFile("w+") as log:
    if not (child := os.fork()):
      os.dup2(log.fileno(), 1)
      os.dup2(log.fileno(), 2)
      sys.argv = [module, *flags]
      sys.modules.pop(f"sora_jax.{module}", None)
      code = 0
      try:
        runpy.run_module(f"sora_jax.{module}", run_name="__main__", alter_sys=True)
      except SystemExit as e:
        code = e.code if isinstance(e.code, int) else bool(e.code)
        if isinstance(e.code, str):
          print(e.code, file=sys.stderr)
      except BaseException:
        traceback.print_exc()
        code = 1
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(int(code))
    _, status = os.waitpid(child, 0)
    log.seek(0)
    return os.waitstatus_to_exitcode(status), log.read()

json.dump([run(*command) for command in json.load(sys.stdin)], sys.stdout)
"""
MAIN = ("main", "--config=CONFIG", "--workdir=RUN")
SAMPLE = ("sample", "--checkpoint=RUN", "--prompt=a star")
# Command line -> what its message must hold.
WRONG = {
  MAIN[:1]: ["--config must have a value"],
  ("evaluate", "--config=CONFIG", "--checkpoint=RUN"): ["--checkpoint is for a suite"],
  ("evaluate", "--config=CONFIG", "--suite=sampling", "--steps=8,x"): [
    "--steps:",
    "'x'",
  ],
  ("main", "--confg=CONFIG"): ["Unknown command line flag 'confg'", "config ?"],
  ("main", "--config=nowhere.py"): ["nowhere.py", "No such file"],
  (*MAIN, "more"): ["unexpected arguments: ['more']"],
  (*MAIN, "--config.nope=1"): ["--config.nope", "no key 'nope'"],
  (*MAIN, "--config.vae.modle.width=3"): ["--config.vae.modle.width", '"model"'],
  (*MAIN, "--config.vae.model.wdith=3"): ["--config.vae.model.wdith", '"width"'],
  (*MAIN, "--config.vae.batch_size=two"): ["--config.vae.batch_size=two"],
  (*MAIN, "--config.vae.batch_size=1.5"): ["--config.vae.batch_size=1.5"],
  (*MAIN, "--config.stages=('data','vea')"): ["config.stages", "['vea']"],
  (*MAIN, "--config.dit.tokens=50"): ["config.dit.tokens 50", "max_frames 17", "80"],
  (*MAIN, "--config.data.size_multiple=8"): ["config.data.size_multiple 8", "16"],
  # A finished stage was made with another value.
  (*MAIN, "--config.vae.model.width=16"): [
    "config.vae.model.width is 16, but stage vae",
    "was made with 8",
    "--workdir",
    "delete RUN/vae",
  ],
  (*MAIN, "--config.data.train_clips=7"): [
    "config.data.train_clips is 7, but stage data",
    "delete RUN/data",
  ],
  ("main", "--config=CONFIG", "--workdir=NEW", "--config.stages=('dit',)"): [
    "stage dit needs stage encode",
    "python -m sora_jax.encode",
  ],
  ("train_vae", "--config=CONFIG", "--workdir=NEW"): ["stage vae needs stage data"],
  ("prepare", "--config=CONFIG", "--workdir=NEW", "--config.data.source=/nowhere"): [
    "/nowhere: no such folder"
  ],
  ("sample",): ["--checkpoint is missing"],
  SAMPLE[:2]: ["no prompt", "--prompt", "--prompts_file"],
  ("sample", "--checkpoint=NOWHERE", "--prompt=a"): [
    "NOWHERE: no such checkpoint folder"
  ],
  ("sample", "--checkpoint=RUN/data", "--prompt=a"): [
    "RUN/data/vae/model: no complete model here",
    "train it to the end",
  ],
  (*SAMPLE[:2], "--prompts_file=NOWHERE.txt"): [
    "--prompts_file: NOWHERE.txt is not a file"
  ],
  (*SAMPLE, "--size=64"): ["--size=64 is not WIDTHxHEIGHT"],
  (*SAMPLE, "--size=64x0"): ["--size=64x0 is not WIDTHxHEIGHT"],
  (*SAMPLE, "--out=x.avi"): ["--out=x.avi", ".mp4, .webm, .gif or .png"],
  (*SAMPLE, "--out=x.png", "--frames=5"): ["--out=x.png", "one image", "--frames=5"],
  (*SAMPLE, "--frames=0"): ["--frames=0"],
  (*SAMPLE, "--fps=0"): ["--fps=0"],
  (*SAMPLE, "--steps=0"): ["--steps=0"],
  (*SAMPLE, "--method=rk4"): ["--method=rk4", "euler|heun"],
  (*SAMPLE, "--guidance=2"): ["'guidance'", "guidance_scale, guidance_scale_2 ?"],
  (*SAMPLE, "red"): ["unexpected arguments ['red']", "quote"],
}


@pytest.fixture(scope="module")
def refusals(tiny_run, tmp_path_factory):
  """Command line of WRONG -> its exit code and log, and the paths in it."""
  new = tmp_path_factory.mktemp("new") / "run"
  paths = {
    "RUN": str(tiny_run.workdir),
    "CONFIG": tiny.__file__,
    "NEW": str(new),
    "NOWHERE": str(new / "other"),
  }

  def fill(text):
    for name, path in paths.items():
      text = text.replace(name, path)
    return text

  commands = [[fill(part) for part in command] for command in WRONG]
  made = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", _FORKS],
    input=json.dumps(commands),
    capture_output=True,
    cwd=tiny.ROOT,
    env={**os.environ, "XLA_FLAGS": ""},
    text=True,
    check=True,
  )
  return dict(zip(WRONG, json.loads(made.stdout), strict=True)), fill


@pytest.mark.parametrize("command", WRONG, ids=lambda command: " ".join(command))
def test_wrong_input_is_said_in_a_line(refusals, command):
  made, fill = refusals
  code, log = made[command]
  assert code == 1, log
  assert "Traceback" not in log
  for text in WRONG[command]:
    assert fill(text) in log
  errors = [line for line in log.splitlines() if line.startswith(("E", "FATAL"))]
  assert len(errors) == 1 or "unexpected arguments" in log, log


def test_wrong_input_leaves_the_run_as_it_is(refusals, tiny_run):
  del refusals
  for stage in STAGES:
    assert json.loads((tiny_run.workdir / stage / "stage.json").read_text())["complete"]
