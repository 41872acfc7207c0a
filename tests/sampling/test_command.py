"""`sample` as a command: flags, sidecars, files."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from sampling.toy_media import clip

from sora_jax import sample
from sora_jax.data.video import reader, writer
from sora_jax.diffusion.solvers import Options
from sora_jax.run import cli
from sora_jax.sampling import flags as job_flags
from sora_jax.sampling.defaults import Defaults
from sora_jax.sampling.job import Job
from sora_jax.sampling.pipeline import NonFiniteSample


@pytest.fixture(scope="module")
def command(sampler):
  """Runs the command in this process, with the model that is loaded already."""
  values = flags.FLAGS
  if "checkpoint" not in values:
    cli.define_flags()
    sample._define_flags()

  def run(*arguments):
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
      patch.setattr(sample.Sampler, "from_checkpoint", lambda *_, **__: sampler)
      sample._main(values(["sample", *arguments]))

  return run


def test_a_sidecar_makes_the_same_again(command, tmp_path):
  source, first, again = (tmp_path / f"{name}.mp4" for name in ("in", "a", "b"))
  writer.write(source, clip(9), 12)
  command(
    "--checkpoint=runs/tiny",
    "--prompt=a red circle",
    f"--video={source}",
    "--extend_after=0.7",
    "--shot=0.9:a blue star",
    "--steps=2",
    "--seed=5",
    "--negative_prompt=noise",
    "--guidance_interval=0,0.9",
    f"--out={first}",
  )
  made = json.loads((tmp_path / "a.mp4.json").read_text())
  assert made["job"]["extend_after"] == 0.7 and made["options"]["steps"] == 2
  assert len(reader.read(first)) == 17
  command(f"--from={first}.json", f"--out={again}")
  assert first.read_bytes() == again.read_bytes()
  assert json.loads((tmp_path / "b.mp4.json").read_text()) == made
  # A flag changes what it says, and nothing else.
  command(f"--from={first}.json", "--seed=6", f"--out={again}")
  assert first.read_bytes() != again.read_bytes()
  writer.write(source, clip(9, 1), 12)
  with pytest.raises(ValueError, match="in.mp4 has changed since"):
    command(f"--from={first}.json", f"--out={again}")


@pytest.mark.parametrize("part", ["params", "autoencoder"])
def test_a_damaged_model_makes_no_black_video(command, sampler, tmp_path, part):
  new = ["--checkpoint=runs/tiny", "--prompt=a star", "--size=32x32", "--frames=5"]
  new += ["--steps=1", f"--out={tmp_path / 'x.mp4'}"]
  nan = functools.partial(jax.tree.map, lambda leaf: leaf * np.nan)
  place, name = sampler.autoencoder.residency._held, {"params": "dit"}.get(part, "vae")
  message = "latents are NaN" if part == "params" else "decoded pixels that are NaN"
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(place, name, nan(place[name]))
    for more in ([], ["--prompt=a circle"]):
      with pytest.raises(NonFiniteSample, match=f"'a star'.*: .*{message}"):
        command(*new, *more)
  assert not list(tmp_path.iterdir())
  command(*new)
  assert (tmp_path / "x.mp4").exists()


def test_a_black_video_is_an_error(command, sampler, tmp_path, monkeypatch):
  new = ["--checkpoint=runs/tiny", "--size=32x32", "--frames=5", "--steps=1"]
  out, black = tmp_path / "x.mp4", np.zeros((5, 32, 32, 3), np.uint8)
  monkeypatch.setattr(sampler, "stream", lambda *_: iter([black, black]))
  monkeypatch.setattr(sampler, "sample", lambda requests, _: [black for _ in requests])
  for prompts in (["--prompt=a star"], ["--prompt=a star", "--prompt=a circle"]):
    with pytest.raises(ValueError, match=r"x(-000)?.mp4 is not written: every pixel"):
      command(*new, *prompts, f"--out={out}")
    assert not list(tmp_path.iterdir())
  # A video that was given may be black, and so may what follows it.
  given = tmp_path / "given.mp4"
  writer.write(given, black, 12)
  command(*new[:1], f"--video={given}", "--extend_after=1", "--steps=1", f"--out={out}")
  assert out.exists()


def test_a_sidecar_keeps_what_windows_take_over(command, tmp_path):
  """An old one leaves 9 frames out, which other windows than 33 would not have now."""
  out = tmp_path / "a.mp4"

  def made(*arguments):
    command(*arguments, f"--out={out}")
    job = json.loads((tmp_path / "a.mp4.json").read_text())["job"]
    return job["window"], job.get("given")

  new = ["--checkpoint=runs/tiny", "--prompt=a star", "--size=32x32", "--steps=1"]
  assert made(*new, "--frames=5", "--window=13") == (13, 5)
  assert made(f"--from={out}.json") == (13, 5)
  old = json.loads((tmp_path / "a.mp4.json").read_text())
  del old["job"]["given"]
  (tmp_path / "old.json").write_text(json.dumps(old))
  assert made(f"--from={tmp_path / 'old.json'}") == (13, None)
  assert made(f"--from={out}.json") == (13, None)


def test_a_checkpoints_own_defaults_hold_where_no_flag_was_given(command, tmp_path):
  usual = Defaults(
    Options(steps=2, method="ddim", eta=0.5, guidance_interval=(0.2, 0.9)),
    *((32, 48), 5, 8.0),
  )
  (tmp_path / "m").mkdir()
  (tmp_path / "m" / "sample.json").write_text(json.dumps(usual.to_json()))
  out = tmp_path / "x.mp4"

  def made(*arguments):
    command(f"--out={out}", *arguments)
    described = json.loads((tmp_path / "x.mp4.json").read_text())
    options = described["options"]
    interval = tuple(options.pop("guidance_interval"))
    return described["job"], Options(**options, guidance_interval=interval)

  own = [f"--checkpoint={tmp_path / 'm'}", "--prompt=a star"]
  job = {
    "prompt": "a star", "size": [32, 48], "frames": 5, "fps": 8.0, "window": 33
  }  # fmt: skip
  assert made(*own) == (job, usual.options)
  assert reader.read(out).shape == (5, 48, 32, 3)
  # What a flag leaves without a meaning is left out, and not an error.
  plain = Options(steps=3, guidance_scale=1.0)
  flags_given = ["--fps=6", "--steps=3", "--method=euler", "--guidance_scale=1"]
  assert made(*own, *flags_given) == ({**job, "fps": 6.0}, plain)
  # A sidecar says all, and what an old one leaves out had the package's default.
  old = json.loads((tmp_path / "x.mp4.json").read_text())
  del old["job"]["size"], old["job"]["fps"], old["options"]["eta"]
  (tmp_path / "old.json").write_text(json.dumps(old))
  again = {**job, "size": [64, 64], "fps": 12.0}
  assert made(f"--from={tmp_path / 'old.json'}") == (again, plain)


def test_previews_are_written_first(command, tmp_path):
  out = tmp_path / "x.png"
  command("--checkpoint=runs/tiny", "--prompt=a star", "--size=32x64", "--steps=2",
          "--preview=0.5", f"--out={out}")  # fmt: skip
  assert reader.read(tmp_path / "x-preview.png").shape == (1, 32, 16, 3)
  assert reader.read(out).shape == (1, 64, 32, 3)


def test_every_field_of_a_job_and_of_the_options_is_a_flag(command):
  """With its default and its help text; not given, it is the field's default."""
  with flagsaver.flagsaver():
    flags.FLAGS(["sample"])
    for config, without in ((Job, ("prompt", "guidance_scale")), (Options, ())):
      values = job_flags.values(config, flags.FLAGS, {}, without)
      for field in dataclasses.fields(config):
        if field.name not in without:
          name = field.metadata.get("flag", field.name)
          assert field.metadata["help"] in flags.FLAGS[name].help
          assert values[field.name] == field.default, name
          assert type(values[field.name]) is type(field.default), name


def test_flags_are_read_into_the_types_of_the_fields(command):
  given = {
    "--size=33x31": ("size", (33, 31)),
    "--infill=0.5,1": ("infill", (0.5, 1.0)),
    "--shot=0.5:a star: blue": ("shots", ((0.5, "a star: blue"),)),
    "--nocfg_zero": ("cfg_zero", False),
    "--guidance_interval=0.1,0.9": ("guidance_interval", (0.1, 0.9)),
  }
  with flagsaver.flagsaver():
    flags.FLAGS(["sample", *given])
    values = job_flags.values(Job, flags.FLAGS, {}, ("prompt", "guidance_scale"))
    values |= job_flags.values(Options, flags.FLAGS, {})
    assert {name: values[name] for name, _ in given.values()} == dict(given.values())
    # What a sidecar holds takes the place of flags that were not given.
    kept = job_flags.values(
      Job, flags.FLAGS, {"fps": 7.0, "size": (8, 8)}, ("prompt", "guidance_scale")
    )
    assert kept["fps"] == 7.0 and kept["size"] == (33, 31)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--size=64"], "--size=64 is not WIDTHxHEIGHT"),
    (["--size=0x64"], "--size=0x64 is not WIDTHxHEIGHT"),
    (["--shot=a star"], "--shot=a star is not SECONDS:"),
    (["--key_frame=x:y.png"], "--key_frame=x is not SECONDS:"),
    (["--infill=1"], "--infill=1 is not FROM,TO"),
    (["--guidance_interval=a,b"], "--guidance_interval=a,b is not LOW,HIGH"),
    (["--out=x.avi"], "must end in .mp4"),
    (["--last_image=no.png"], "no.png: cannot be read"),
    (["--strength=2"], "strength 2.0 is not between 0 and 1"),
    (["--from=no.json"], "--from=no.json is no description of a video"),
    (["--frames=9", "--out=x.png"], "holds one image, but --frames=9"),
    (["--image=a.png", "--out=x.png"], "holds one image, but --image makes a video"),
    (["--last_image=a.png", "--out=x.png"], "image, but --last_image makes a video"),
    (["--key_frame=1:a.png", "--out=x.png"], "image, but --key_frame makes a video"),
    (["--window=9", "--given=9"], "given 9 is not less than window 9$"),
    (["--window=3"], "window 3: at least 5 frames, or 0 for all at once$"),
    (["--given=0"], "given 0: at least 1 frame$"),
    (["--given=33"], "given 33: at most 32 frames, .* a larger window$"),
    (["--window=13", "--given=17"], "given 17 is not less than window 13$"),
    (["--guidance_rescale=2"], "guidance_rescale 2.0 is not between 0 and 1"),
    (["--shift=0"], "shift 0.0 is not above 0"),
    (["--seed=-1"], "seed -1 is negative"),
    (["--out=/proc/none/x.mp4"], "--out=/proc/none/x.mp4: "),
  ],
)
def test_flags_that_cannot_be(command, arguments, message):
  with pytest.raises(ValueError, match=message):
    command("--checkpoint=runs/tiny", "--prompt=a star", *arguments)


class _Longer:
  """An expander that counts what it is asked."""

  by, asked = "longer", 0

  def expand(self, texts, seed=0):
    self.asked += len(texts)
    return [f"{text}, quickly" for text in texts]


def test_an_expanded_prompt_is_kept(command, sampler, tmp_path, monkeypatch, caplog):
  expander = _Longer()
  monkeypatch.setattr(sampler, "expander", expander)
  first, again = tmp_path / "a.mp4", tmp_path / "b.mp4"
  new = ["--checkpoint=runs/tiny", "--size=32x32", "--frames=9", "--steps=1"]
  command(*new, "--prompt=a star", "--shot=0.3:a dog", "--expand", f"--out={first}")
  made = json.loads((tmp_path / "a.mp4.json").read_text())
  assert made["job"]["prompt"] == "a star, quickly"
  assert made["job"]["shots"] == [[0.3, "a dog, quickly"]]
  texts = {"a star": "a star, quickly", "a dog": "a dog, quickly"}
  assert made["expanded"] == {"by": "longer", "texts": texts}
  assert "'a star' is expanded to 'a star, quickly'" in caplog.text
  # Nobody is asked again.
  command(f"--from={first}.json", f"--out={again}")
  assert expander.asked == 2 and first.read_bytes() == again.read_bytes()
  assert json.loads((tmp_path / "b.mp4.json").read_text()) == made
  # Another prompt has nothing to do with that.
  command(f"--from={first}.json", "--prompt=a cat", f"--out={again}")
  other = json.loads((tmp_path / "b.mp4.json").read_text())
  assert other["job"]["prompt"] == "a cat"
  assert set(other["expanded"]["texts"]) == {"a dog"}
  with pytest.raises(ValueError, match="--from has a prompt as it is"):
    command(f"--from={first}.json", "--expand", f"--out={again}")
  with pytest.raises(ValueError, match="--expand_model needs --expand"):
    command(*new, "--prompt=x", "--expand_model=m", f"--out={again}")
  for flag, words in (
    (["--expand_model=m"], "--expand_model is for --expand_endpoint"),
    (["--expand_endpoint=http://x", "--expand_top_p=0.5"], "top_p is for the model's"),
  ):
    with pytest.raises(ValueError, match=words):
      command(*new, "--prompt=x", "--expand", *flag, f"--out={again}")
  monkeypatch.setattr(sampler, "expander", None)
  with pytest.raises(ValueError, match="no expander of prompts: .*train_expander"):
    command(*new, "--prompt=x", "--expand", f"--out={again}")


def test_python_expands(sampler, monkeypatch):
  monkeypatch.setattr(sampler, "expander", _Longer())
  assert sampler.expand("a star").texts == {"a star": "a star, quickly"}
  how = {"size": (32, 32), "frames": 5, "options": Options(steps=1)}
  long = sampler.video("a star, quickly", **how)
  short = sampler.video("a star", expand=True, **how)
  assert (long == short).all() and (long != sampler.video("a star", **how)).any()
  asked = [sample.Request("a star", 32, 32, 5, 12.0)]
  (long,) = sampler.sample([dataclasses.replace(asked[0], prompt="a star, quickly")],
                           Options(steps=1))  # fmt: skip
  (short,) = sampler.sample(asked, Options(steps=1), expand=True)
  assert (long == short).all()
