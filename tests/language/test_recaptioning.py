"""Captions of a manifest: nothing is lost or asked twice, and bytes are the same."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import sys
import threading

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from language.chat_server import good, question_digest
from language.conftest import SECRET

from sora_jax import recaption
from sora_jax.data.clips import Clip, SyntheticCaption, read_manifest, write_manifest
from sora_jax.data.video import writer as video_writer
from sora_jax.language import chat, kept, recaptioning, styles, writers
from sora_jax.language.recaptioning import Share
from sora_jax.models.captioner import CaptionerConfig
from sora_jax.models.meta import CaptionerMeta
from sora_jax.run import cli, stages

LEARNT = ("any", "descriptive", "short")
ASKED = styles.prompted(["descriptive", "short"], {})
COUNT = 6


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory):
  """Clips of one colour each, and their manifest."""
  folder = tmp_path_factory.mktemp("clips")
  clips = []
  for i in range(COUNT):
    path = folder / f"{i}.png"
    image_THWC = np.full((1, 16, 16, 3), 40 * i, np.uint8)
    video_writer.write(path, image_THWC, 1)
    clips.append(Clip(f"c{i}", str(path), 0.0, 1, 1.0, 16, 16, (f"own {i}",)))
  write_manifest(folder / "manifest.jsonl", clips)
  return folder


@pytest.fixture
def manifest(clips_folder, tmp_path):
  shutil.copytree(clips_folder, tmp_path / "data")
  return tmp_path / "data" / "manifest.jsonl"


@pytest.fixture
def vision(talk):
  return lambda **fields: writers.Vision(talk(**fields), threads=3)


def recaptioned(manifest, writer, asked=ASKED, **more):
  recaptioning.run(manifest, writer, asked)
  return recaptioning.merge(manifest, writer, asked, **more)


def test_captions_and_where_they_are_from(server, vision, manifest):
  before = read_manifest(manifest)
  summary = recaptioned(manifest, vision())
  assert summary == (2 * COUNT, 0, (200 * COUNT, 20 * COUNT))
  clips = read_manifest(manifest)
  # The clips' own captions stay, as does all else.
  assert [dataclasses.replace(clip, synthetic=()) for clip in clips] == before
  for clip in clips:
    assert [c.style for c in clip.synthetic] == ["descriptive", "short"]
    assert [c.prompt for c in clip.synthetic] == [s.digest for s in ASKED]
    assert {c.by for c in clip.synthetic} == {"m"}
    assert clip.training_captions == (*clip.captions, *(c.text for c in clip.synthetic))
  assert len({c.text for clip in clips for c in clip.synthetic}) == 2 * COUNT
  images = [p for p in server.bodies[0]["messages"][0]["content"] if "image_url" in p]
  assert len(images) == 1  # an image is no video of eight frames
  for path in manifest.parent.rglob("*.json*"):
    assert SECRET not in path.read_text()


def test_nothing_is_asked_twice(server, vision, manifest):
  recaptioned(manifest, vision())
  written = manifest.read_bytes()
  recaptioned(manifest, vision())
  assert len(server.bodies) == 2 * COUNT and manifest.read_bytes() == written
  # A file under another name is the same clip; another style or window is another.
  clips = read_manifest(manifest)
  shutil.copy(clips[0].path, manifest.parent / "copy.png")
  copy = dataclasses.replace(clips[0], id="z", path=str(manifest.parent / "copy.png"))
  write_manifest(manifest, [*clips, copy])
  recaptioned(manifest, vision())
  assert len(server.bodies) == 2 * COUNT
  assert read_manifest(manifest)[-1].synthetic == clips[0].synthetic
  recaptioned(manifest, vision(), styles.prompted(["short"], {"short": "Be short."}))
  assert len(server.bodies) == 3 * COUNT
  assert {len(clip.synthetic) for clip in read_manifest(manifest)} == {3}


@pytest.mark.parametrize("failure", ["drop", 429, 500, b"{", "hang"], ids=str)
def test_half_a_batch_is_lost(server, vision, manifest, failure):
  recaptioned(manifest, vision())
  whole, answered = manifest.read_bytes(), sorted(server.answered)
  shutil.rmtree(manifest.parent / recaptioning.FOLDER)
  server.answered.clear()
  count = len(server.bodies)
  server.plan = lambda n: failure if n < count + 2 * COUNT and n % 2 else None
  recaptioned(manifest, vision(timeout=0.3))
  assert manifest.read_bytes() == whole
  assert sorted(server.answered) == answered  # each question once


@pytest.mark.parametrize(
  "body, reason",
  [
    (good(""), "the answer is empty"),
    (good("  \n"), "the answer is empty"),
    (good("I'm sorry, but I can't help."), "the model refuses: I'm sorry, but"),
    (good("x", refusal="not this"), "the model refuses: not this"),
    (good("x", finish="content_filter"), "the answer was filtered"),
    (good("half a", finish="length"), "the answer is cut off: .* max_tokens"),
    (good("x" * 10_000), "has 10000 characters, more than 2000"),
    (good([{"type": "text"}]), "the answer is no text but list"),
    (good(None), "the answer is no text but NoneType"),
    (good("a\x00b"), r"control character U\+0000"),
    (good("a\ud800b"), r"control character U\+D800"),
  ],
)
def test_malformed_answers_are_listed(server, vision, manifest, body, reason):
  server.plan = {3: body}
  summary = recaptioned(manifest, vision())
  assert summary[:2] == (2 * COUNT - 1, 1)
  listed = (manifest.parent / recaptioning.FOLDER / "failed.jsonl").read_text()
  (row,) = map(json.loads, listed.splitlines())
  with pytest.raises(AssertionError, match=reason):
    raise AssertionError(row["reason"])
  # It was paid for, and would be the same again.
  recaptioned(manifest, vision())
  assert len(server.bodies) == 2 * COUNT


@pytest.mark.parametrize(
  "text", ["a dog", "赤い円が動く", "دائرة حمراء", "🟥 'x' \\ \u2028y"]
)
def test_captions_of_any_script(server, vision, manifest, text):
  server.say = lambda _: f" {text}\n"
  recaptioned(manifest, vision())
  expected = text.replace("\u2028", " ")
  assert {c.text for c in read_manifest(manifest)[0].synthetic} == {
    " ".join(expected.split())
  }


@pytest.mark.parametrize(
  "said, text",
  [
    ('"A dog."', "A dog."),
    ('A sign reads "STOP."', 'A sign reads "STOP."'),
    ("<think>a cat?\nno</think>\n\nA dog.", "A dog."),
    ("Sorry, reads a note on a door.", "Sorry, reads a note on a door."),
    ("I can't believe it, says a sign.", "I can't believe it, says a sign."),
  ],
)
def test_what_is_a_caption_of_an_answer(said, text):
  assert writers.checked(chat.Reply(said, "", "stop", (0, 0)), 99) == (text, "")


@pytest.mark.parametrize(
  "said",
  [
    "Sorry, but I can't help with that.",
    "I cannot describe this.",
    "As an AI I",
    "I'm unable to see it",
  ],
)
def test_what_is_none(said):
  assert "refuses" in writers.checked(chat.Reply(said, "", "stop", (0, 0)), 99)[1]


def test_rejected_clips_do_not_keep_others_from_being_asked(
  server, vision, manifest, monkeypatch
):
  """As a content policy does; they are the first ones, and more than the limit."""
  monkeypatch.setattr(recaptioning, "MOST_FAILURES", 4)
  clips = read_manifest(manifest)
  seen = {
    question_digest({"messages": writers.question_of(style.prompt, [image])})
    for clip in clips[:4]
    for style in ASKED
    for image in [writers.jpeg(writers._frames(clip)[0][0], 512)]
  }
  server.plan = lambda n: 400 if question_digest(server.bodies[n]) in seen else None
  with pytest.raises(ValueError, match="questions in a row had no answer"):
    recaptioned(manifest, vision())
  for _ in range(2):
    with contextlib.suppress(ValueError):  # of those that were not asked before
      recaptioned(manifest, vision())
  assert recaptioned(manifest, vision())[:2] == (2 * COUNT - 8, 8)
  listed = (manifest.parent / recaptioning.FOLDER / "failed.jsonl").read_text()
  assert listed.count("status 400") == 8


def test_copies_count_once_and_fail_together(server, vision, manifest):
  clips = read_manifest(manifest)
  copies = [dataclasses.replace(clips[0], id=f"copy{i}") for i in range(3)]
  write_manifest(manifest, [*copies, clips[1]])
  asked = ASKED[:1]
  server.plan = lambda n: 500 if n < 1 else None
  talk = vision(retries=0)
  first = recaptioned(manifest, talk, asked)
  listed = (manifest.parent / recaptioning.FOLDER / "failed.jsonl").read_text()
  without = [clip for clip in read_manifest(manifest) if not clip.synthetic]
  assert first.failed == len(without) == len(listed.splitlines())
  second = recaptioned(manifest, talk, asked)
  assert second == (4, 0, (200, 20))  # of two questions, not of four


def test_an_earlier_caption_stays_where_there_is_no_new_one(server, vision, manifest):
  asked = ASKED[:1]
  recaptioned(manifest, vision(), asked)
  before = read_manifest(manifest)
  count = len(server.bodies)
  server.plan = lambda n: 500 if n - count in (1, 3) else None
  server.say = lambda body: "new"
  summary = recaptioned(manifest, vision(retries=0, max_tokens=9), asked)
  assert summary[:2] == (COUNT - 2, 2)
  after = read_manifest(manifest)
  kept_ones = [a.synthetic == b.synthetic for a, b in zip(before, after, strict=True)]
  assert sum(kept_ones) == 2
  assert all(len(clip.synthetic) == 1 for clip in after)


def test_what_fails_for_now_is_asked_by_the_next_run(server, vision, manifest):
  server.plan = {0: 400}
  assert recaptioned(manifest, vision())[:2] == (2 * COUNT - 1, 1)
  assert recaptioned(manifest, vision())[:2] == (2 * COUNT, 0)
  assert len(server.bodies) == 2 * COUNT + 1


def test_an_endpoint_that_fails_always(server, vision, manifest, monkeypatch):
  monkeypatch.setattr(recaptioning, "MOST_FAILURES", 4)
  server.plan = lambda n: 400 if n > 2 else None
  before = manifest.read_bytes()
  # One more may have been asked by then.
  message = "[45] questions in a row had no answer.* is kept"
  with pytest.raises(ValueError, match=message):
    recaptioned(manifest, vision())
  assert manifest.read_bytes() == before and len(server.answered) == 3
  server.plan = {}
  recaptioned(manifest, vision())
  assert sorted(server.answered) == sorted(set(server.answered))


def test_not_one_caption(server, vision, manifest):
  server.plan = lambda n: good("")
  with pytest.raises(ValueError, match="not one caption could be made; .*failed.jsonl"):
    recaptioned(manifest, vision())
  assert not read_manifest(manifest)[0].synthetic


def test_clips_that_cannot_be_read(server, vision, manifest):
  clips = read_manifest(manifest)
  pathlib.Path(clips[0].path).unlink()
  pathlib.Path(clips[1].path).write_bytes(b"no image")
  summary = recaptioned(manifest, vision())
  assert summary[:2] == (2 * COUNT - 4, 4)


def test_a_manifest_without_clips(vision, tmp_path):
  path = tmp_path / "manifest.jsonl"
  path.write_text("\n")
  with pytest.raises(ValueError, match="manifest.jsonl: it has no clip to caption"):
    recaptioning.run(path, vision(), ASKED)


# --- killed, and several processes


class Killed(BaseException):
  """As a signal: it goes through all that catches errors."""


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(server, vision, manifest, seed):
  recaptioned(manifest, vision())
  whole = manifest.read_bytes()
  shutil.rmtree(manifest.parent / recaptioning.FOLDER)
  write_manifest(
    manifest, [dataclasses.replace(c, synthetic=()) for c in read_manifest(manifest)]
  )
  server.answered.clear()
  rng = np.random.default_rng(seed)
  answers = manifest.parent / recaptioning.FOLDER / "answers-00000.jsonl"

  class Dying(writers.Vision):
    left = 0

    def answer(self, questions):
      self.left -= 1
      if self.left < 0:
        raise Killed
      return super().answer(questions)

  for _ in range(50):
    dying = Dying(vision()._talk, threads=2)
    dying.left = int(rng.integers(1, 4))
    try:
      recaptioning.run(manifest, dying, ASKED)
      break
    except Killed:
      # What a kill in the middle of a write leaves.
      with open(answers, "a") as f:
        f.write('{"key": "ab')
  assert recaptioning.merge(manifest, dying, ASKED)[0] == 2 * COUNT
  assert manifest.read_bytes() == whole
  assert len(server.answered) == len(set(server.answered)) == 2 * COUNT


def test_processes_share_the_clips(server, vision, manifest):
  recaptioned(manifest, vision())
  whole, answered = manifest.read_bytes(), sorted(server.answered)
  shutil.rmtree(manifest.parent / recaptioning.FOLDER)
  server.answered.clear()
  for process in (2, 0, 1):
    assert recaptioning.merge(manifest, vision(), ASKED, 3) is None
    recaptioning.run(manifest, vision(), ASKED, Share(process, 3))
  assert recaptioning.merge(manifest, vision(), ASKED, 3)[0] == 2 * COUNT
  assert manifest.read_bytes() == whole and sorted(server.answered) == answered
  # One process alone goes on from what three have asked.
  recaptioned(manifest, vision())
  assert manifest.read_bytes() == whole and sorted(server.answered) == answered


def test_kept_values(tmp_path):
  with kept.Kept(tmp_path, "x", 1) as one, kept.Kept(tmp_path, "x", 0) as zero:
    one.add("a", [1])
    zero.add("a", [0])
    zero.add("b", "ä")
    assert "a" in one and one["a"] == [1] and "b" not in one
  long = tmp_path / "x-00000.jsonl"
  with open(long, "ab") as f:
    f.write(b"not json\n" + b"z" * 200_000)
  assert kept.read(tmp_path, "x") == {"a": [0], "b": "ä"}
  with kept.Kept(tmp_path, "x", 0) as zero:
    zero.add("c", 3)
  assert kept.read(tmp_path, "x") == {"a": [0], "b": "ä", "c": 3}


# --- a captioner of ours


class Double:
  """Stands for a trained captioner; what it says depends on the whole batch."""

  def __init__(self):
    self.calls, self._lock = [], threading.Lock()

  def caption(self, clips, style="descriptive", method="greedy", seed=0):
    assert self._lock.acquire(blocking=False)  # one batch at a time
    values = [int(frames.mean()) for frames, _ in clips]
    self.calls.append((values, style, method, seed))
    self._lock.release()
    return [f" {style}  {v} of {sum(values)} " for v in values]

  def similarity(self, clips, captions):
    return np.ones(len(clips), np.float32)


def test_a_captioner_of_ours(manifest):
  def trained(**fields):
    return writers.Trained(Double(), "captioner-1", size=4, **fields)

  asked = styles.trained(None, LEARNT)
  assert recaptioned(manifest, trained(), asked) == (2 * COUNT, 0, (0, 0))
  whole = manifest.read_bytes()
  first = read_manifest(manifest)[1].synthetic
  assert first == (
    SyntheticCaption("descriptive 40 of 240", "descriptive", "captioner-1"),
    SyntheticCaption("short 40 of 240", "short", "captioner-1"),
  )
  # After a kill the batch is the same, so that what is missing is what it was.
  answers = manifest.parent / recaptioning.FOLDER / "answers-00000.jsonl"
  lines = answers.read_text().splitlines(keepends=True)
  answers.write_text("".join(lines[:2] + lines[7:]))
  assert recaptioned(manifest, trained(), asked)[0] == 2 * COUNT
  assert manifest.read_bytes() == whole
  sampled = trained(method="nucleus", seed=3)
  recaptioned(manifest, sampled, asked[:1], replace=True)
  assert sampled._captioner.calls[0][1:] == ("descriptive", "nucleus", 3)
  assert {len(clip.synthetic) for clip in read_manifest(manifest)} == {1}


def test_styles():
  with pytest.raises(
    ValueError, match="'camera' is none of this captioner's: any, des"
  ):
    styles.trained(["camera"], LEARNT)
  # One that has learnt from one caption a clip knows no styles.
  assert [style.name for style in styles.trained(None, ("any",))] == ["any"]
  with pytest.raises(ValueError, match="'short' is none of this captioner's: any"):
    styles.trained(["short"], ("any",))
  with pytest.raises(ValueError, match="style 'camera' has no prompt"):
    styles.prompted(["camera"], {})
  with pytest.raises(ValueError, match="prompt of style 'x', which is none of"):
    styles.prompted(["short"], {"x": "y"})
  with pytest.raises(ValueError, match="occurs twice"):
    styles.trained(["short", "short"], LEARNT)
  assert len({style.digest for style in ASKED}) == 2 and not styles.Style("a").digest


# --- stages


def test_only_what_holds_captions_is_stale_after_it(server, vision, manifest):
  """The VAE, which is made of the same clips, stays; latent records do not."""
  workdir = manifest.parents[1]
  assert stages._recaptioned(workdir) is None
  before = stages.identity("data", workdir)
  recaptioned(manifest, vision())
  digest = stages._recaptioned(workdir)
  assert digest and stages.identity("data", workdir) != before
  recaptioned(manifest, vision())
  assert stages._recaptioned(workdir) == digest
  recaptioned(manifest, vision(), styles.prompted(["a"], {"a": "b"}))
  assert stages._recaptioned(workdir) != digest


# --- the command


@pytest.fixture(scope="module")
def values():
  """Flags of the command, not those of this process."""
  found = flags.FlagValues()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flags, "FLAGS", found)
    for name in ("string", "enum", "list", "multi_string", "integer", "float", "bool"):
      define = getattr(flags, f"DEFINE_{name}")
      patch.setattr(
        flags,
        f"DEFINE_{name}",
        lambda *a, define=define, **k: define(*a, **k, flag_values=found),
      )
    recaption._define_flags()
  return found


@pytest.fixture
def command(values, monkeypatch):
  monkeypatch.setattr(flags, "FLAGS", values)
  monkeypatch.setattr(cli, "start_logging", lambda: None)

  def run(*arguments):
    saved = flagsaver.save_flag_values(values)
    try:
      recaption._main(values(["recaption", *arguments]))
    finally:
      flagsaver.restore_flag_values(saved, values)

  return run


def test_the_command(server, command, manifest, monkeypatch, tmp_path):
  workdir = manifest.parents[1]
  (tmp_path / "ask.txt").write_text("What\nis it?\n")
  command(
    f"--workdir={workdir}", f"--endpoint={server.url}", "--model=v", "--styles=short,x",
    "--prompt=short:Say it: now.", f"--prompt_file=x:{tmp_path / 'ask.txt'}",
    "--price_in=2",
  )  # fmt: skip
  asked = {body["messages"][0]["content"][0]["text"] for body in server.bodies}
  assert asked == {"Say it: now.", "What\nis it?"}
  assert {c.by for c in read_manifest(manifest)[0].synthetic} == {"v"}
  # A captioner is loaded only where one is asked for.
  double = Double()
  fake = type("Captioner", (), {"from_checkpoint": staticmethod(lambda _: double)})
  module = type(sys)("sora_jax.encoders.captioner")
  module.Captioner = fake
  monkeypatch.setitem(sys.modules, module.__name__, module)
  with pytest.raises(ValueError, match="no complete model"):
    command(f"--manifest={manifest}", f"--captioner={tmp_path}")
  model = tmp_path / "captioner" / "model"
  model.mkdir(parents=True)
  meta = CaptionerMeta(
    CaptionerConfig(), "pixels", (1, 8, 8), LEARNT, 40, 160, 10, 24.0, 17, 4096, 16
  )
  saved = {"params": "params-0", "meta": meta.to_json()}
  (model / "model.json").write_text(json.dumps(saved))
  command(f"--manifest={manifest}", f"--captioner={tmp_path}", "--styles=descriptive")
  assert len(double.calls) == 1 and len(read_manifest(manifest)[0].synthetic) == 3


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "one of --manifest and --workdir is needed"),
    (["--manifest=/no/m.jsonl"], "/no/m.jsonl: no such manifest"),
    (["M"], "one of --captioner and --endpoint is needed"),
    (
      ["M", "--endpoint=http://x", "--model=v", "--prompt=x"],
      "--prompt=x is not STYLE",
    ),
    (["M", "--endpoint=http://x"], "name of the model is missing"),
    (["M", "--captioner=x", "--prompt=short:y"], "--prompt is for --endpoint"),
    (["M", "--captioner=x", "--process=2"], "--process and --processes are needed tog"),
    (["M", "--captioner=x", "--processes=2"], "--process and --processes are needed"),
    (
      ["M", "--captioner=x", "--process=2", "--processes=2"],
      "--process=2 is not below --processes=2",
    ),
    (["M", "y"], "unexpected arguments"),
  ],
)
def test_bad_flags(command, manifest, arguments, words, monkeypatch):
  monkeypatch.setenv(chat.KEY, SECRET)
  arguments = [a.replace("M", f"--manifest={manifest}", a == "M") for a in arguments]
  with pytest.raises(ValueError, match=words):
    command(*arguments)


def test_one_frame_of_many():
  assert writers.spread(17, 4) == [0, 5, 11, 16]
  assert writers.spread(3, 8) == [0, 1, 2] and writers.spread(1, 8) == [0]
  assert len(writers.jpeg(np.zeros((40, 90, 3), np.uint8), 32)) > 100
  assert len(question_digest({"messages": []})) == 8
