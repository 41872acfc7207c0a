"""What is measured of clips, where they are cut, and what limits leave out."""

import json
import os
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
import tiny

from sora_jax.data import clips, intake, sources
from sora_jax.data.intake import (
  measure,
  windows,
  workers,
)
from sora_jax.data.intake.filters import Filter
from sora_jax.data.intake.measuring import Measuring
from sora_jax.data.video import media, reader, writer

sys.path.insert(0, str(tiny.ROOT / "launch" / "benchmarks"))
import scene_cuts  # noqa: E402

sys.path.pop(0)

LIMITS = {"max_frames": 17, "max_pixels": 64 * 96, "size_multiple": 16}


def picture(seed=0, height=96, width=128, detail=12):
  """A picture like no other."""
  rng = np.random.default_rng(seed)
  noise = rng.integers(30, 226, (detail, detail, 3), np.uint8)
  return np.asarray(PIL.Image.fromarray(noise).resize((width, height)))


def moving(frames, seed=0, step=2, **size):
  return np.stack([np.roll(picture(seed, **size), step * t, 1) for t in range(frames)])


def movie(seed, lengths, noise=4):
  """Scenes of several kinds, with grain; the frames at which they begin."""
  rng = np.random.default_rng(seed)
  shots = []
  for n, length in enumerate(lengths):
    kind = rng.integers(4)
    # A pan, a shot where nothing moves, one that grows brighter, and a flicker.
    shot = moving(length, 100 * seed + n, step=(3, 0, 1, 0)[kind]).astype(np.float32)
    if kind == 2:
      shot *= np.linspace(0.7, 1.1, length)[:, None, None, None]
    if kind == 3:
      shot *= 1 + 0.05 * rng.standard_normal((length, 1, 1, 1))
    shots.append(shot + rng.normal(0, noise, shot.shape))
  video_THWC = np.concatenate(shots).clip(0, 255).astype(np.uint8)
  return video_THWC, np.cumsum(lengths)[:-1]


def clip_of(folder, name="x.mp4", **options):
  """The only clip of a folder that name begins."""
  found, _ = sources.scan(folder, **{**LIMITS, **options})
  return {clip.id: clip for clip in found}[os.path.splitext(name)[0]]


# --- cuts


@pytest.mark.slow
def test_cuts_are_found_and_no_clip_holds_one(tmp_path):
  rng = np.random.default_rng(1)
  right = found = wanted = theirs = holding = pieces = 0
  for seed in range(4):
    folder = tmp_path / str(seed)
    video_THWC, begins = movie(seed, rng.integers(10, 30, 6))
    writer.write(folder / "x.mp4", video_THWC, 24, crf=23)
    for clip in sources.scan(folder, **{**LIMITS, "max_frames": 9})[0]:
      first = round(clip.start * 24)
      pieces += 1
      holding += any(first < begin < first + clip.frames for begin in begins)
    cuts = measure.measure_file(folder / "x.mp4")["cuts"]
    ours = {round(time * 24) for time, ratio, content in cuts
            if ratio >= 3 and content >= windows.CONTENT}  # fmt: skip
    right, found, wanted = (
      right + len(ours & {*begins.tolist()}), found + len(ours), wanted + len(begins)
    )  # fmt: skip
    scenes = scene_cuts.ffmpeg_scenes(folder / "x.mp4", 0.3)
    theirs += len({round(24 * time) for time in scenes} & {*begins.tolist()})
  recall, precision = right / wanted, right / found
  assert recall >= 0.95 and precision >= 0.95 and right > theirs
  assert pieces > 35 and holding / pieces < 0.02


def test_cuts_beside_the_first_and_the_last_frame(tmp_path):
  video_THWC = np.concatenate([moving(1, 1), moving(20, 2), moving(1, 3)])
  writer.write(tmp_path / "x.mp4", video_THWC, 10)
  clip = clip_of(tmp_path)
  assert (clip.start, clip.frames) == (pytest.approx(0.1), 17)
  assert clip_of(tmp_path, cut_threshold=0.0, max_frames=21).frames == 21


def test_scenes_that_are_all_too_short(tmp_path):
  video_THWC = np.concatenate([moving(4, seed) for seed in range(5)])
  writer.write(tmp_path / "x.mp4", video_THWC, 10)
  with pytest.raises(ValueError, match="scenes, all too short: . frames at 10 fps, 17"):
    sources.scan(tmp_path, **LIMITS, min_frames=17)


# --- figures


@pytest.mark.slow
def test_figures_tell_videos_apart(tmp_path):
  grain = np.random.default_rng(0).normal(0, 2, (17, 96, 128, 3))
  still = np.repeat(moving(1), 17, 0)
  fine = picture(3, detail=48)
  blurred = PIL.Image.fromarray(fine).filter(PIL.ImageFilter.GaussianBlur(2))
  videos = {
    "short": moving(6, step=1),  # whose last frame is looked at, too
    "still": (still + grain).clip(0, 255).astype(np.uint8),
    "slow": moving(17, step=1),
    "fast": moving(17, step=4),
    "dark": moving(17) // 8,
    "sharp": np.repeat(fine[None], 17, 0),
    "blurred": np.repeat(np.asarray(blurred)[None], 17, 0),
  }
  for name, video_THWC in videos.items():
    writer.write(tmp_path / f"{name}.mp4", video_THWC, 10)
  PIL.Image.fromarray(picture(7)).save(tmp_path / "image.png")
  found, _ = sources.scan(tmp_path, **LIMITS)
  figures = {clip.id: clip.measured for clip in found}
  assert figures["still"]["motion"] < 0.5
  # Of 128 pixels 1 or 4 a frame, 10 times a second.
  assert figures["slow"]["motion"] == pytest.approx(7.8, rel=0.4)
  assert figures["short"]["motion"] == pytest.approx(7.8, rel=0.4)
  assert figures["fast"]["motion"] == pytest.approx(31, rel=0.4)
  assert figures["dark"]["brightness"] < 25 < 80 < figures["slow"]["brightness"]
  assert figures["blurred"]["sharpness"] < 0.3 * figures["sharp"]["sharpness"]
  assert figures["image"]["motion"] == 0 and figures["image"]["cut"] == 0
  for limits, gone in (
    (Filter(motion=(1.0, 1e9)), {"still", "sharp", "blurred"}),
    (Filter(brightness=(25.0, 255.0)), {"dark"}),
    (Filter(motion=(0.0, 20.0)), {"fast"}),
  ):
    kept, left_out = sources.scan(tmp_path, **LIMITS, limits=limits)
    assert {*videos, "image"} - {clip.id for clip in kept} == gone
    assert {reason.split(":")[0] for _, reason in left_out} == {
      f"clip {name}" for name in gone
    }
    assert all("(config.data.filter." in reason for _, reason in left_out)


def test_black_borders_are_cropped(tmp_path):
  video_THWC = np.zeros((17, 128, 128, 3), np.uint8)
  video_THWC[:, 16:112] = moving(17)
  writer.write(tmp_path / "x.mp4", video_THWC, 10)
  frame_HWC = np.zeros((96, 160, 3), np.uint8)
  frame_HWC[:, 16:144] = picture()
  PIL.Image.fromarray(frame_HWC).save(tmp_path / "y.png")
  clip = clip_of(tmp_path)
  assert clip.measured["borders"] == pytest.approx(0.25, abs=0.01)
  assert clip.crop is None
  options = {"crop_borders": True, "max_pixels": 96 * 128}
  clip = clip_of(tmp_path, **options)
  assert (clip.height, clip.width) == (96, 128)
  assert (
    clip.crop == pytest.approx((0.125, 0.0, 0.125, 0.0), abs=0.004)
    and clip.measured["borders"] == 0
  )
  got = reader.read(
    clip.path, frames=17, fps=10, size=(clip.height, clip.width), crop=clip.crop
  )
  assert np.abs(got.astype(int) - moving(17)).mean() < 3
  image = clip_of(tmp_path, "y.png", **options)
  assert image.crop == (0.0, 0.1, 0.0, 0.1)
  got = reader.read(image.path, size=(96, 128), crop=image.crop)[0]
  np.testing.assert_array_equal(got, picture())
  clips.write_manifest(tmp_path / "m.jsonl", [clip])
  assert clips.read_manifest(tmp_path / "m.jsonl")[0].crop == clip.crop


# --- measured once, anywhere


def make_folder(folder, count=6):
  for seed in range(count):
    writer.write(folder / f"{seed}.mp4", moving(9, seed, height=48, width=64), 10)
  (folder / "bad.mp4").write_bytes(b"no video")


def as_rows(found):
  return [(clip, clip.measured) for clip in found]


def test_nothing_is_measured_again(tmp_path, monkeypatch):
  folder, ledger = tmp_path / "clips", tmp_path / "out" / "measured.jsonl"
  make_folder(folder)
  how = Measuring(ledger=ledger)
  asked = []
  do = workers.do
  monkeypatch.setattr(workers, "do", lambda job: asked.append(job) or do(job))
  first, left_out = sources.scan(folder, **LIMITS, how=how)
  assert len(asked) == 7 and len(first) == 6
  # Not for other limits, cuts, lengths or sizes either.
  again, other = sources.scan(folder, **LIMITS, how=how)
  assert (as_rows(again), other) == (as_rows(first), left_out)
  options = {"limits": Filter(motion=(1.0, 1e9), sharpness=(1.0, 1e6)),
             "cut_threshold": 5.0, "crop_borders": True}  # fmt: skip
  sources.scan(folder, **{**LIMITS, "max_frames": 5}, how=how, **options, heldout_min=2)
  assert len(asked) == 7
  # A file that was changed is, and what a killed run had not written whole.
  writer.write(folder / "0.mp4", moving(9, 77, height=48, width=64), 10)
  lines = ledger.read_bytes().splitlines(keepends=True)
  ledger.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
  sources.scan(folder, **LIMITS, how=how)
  assert len(asked) == 9
  # And what a disk has lost in the middle.
  lines = ledger.read_bytes().splitlines(keepends=True)
  ledger.write_bytes(b"".join([*lines[:1], b"\0" * 40 + b"\n", *lines[1:]]))
  sources.scan(folder, **LIMITS, how=how)
  assert len(asked) == 9
  # So is everything by another version of the figures, and never a mixture.
  lines = ledger.read_bytes().split(b"\n")
  ledger.write_bytes(b"\n".join([b'{"measure": "0"}', *lines[1:]]))
  sources.scan(folder, **LIMITS, how=how)
  assert len(asked) == 16


@pytest.mark.slow
def test_processes_give_the_same(tmp_path):
  make_folder(tmp_path)
  alone = sources.scan(tmp_path, **LIMITS)
  several = sources.scan(tmp_path, **LIMITS, how=Measuring(processes=2))
  assert as_rows(several[0]) == as_rows(alone[0]) and several[1] == alone[1]


def crash_at(folder, name, monkeypatch):
  """Has processes die at a file, as of a fault in a decoder."""
  (folder / "crash.py").write_text(
    "import os\n"
    "from sora_jax.data.intake import measure\n"
    "original = measure.measure_file\n"
    "def measure_file(path):\n"
    f"  if path.endswith({name!r}):\n"
    "    os.abort()\n"
    "  return original(path)\n"
    "measure.measure_file = measure_file\n"
  )
  monkeypatch.syspath_prepend(folder)
  monkeypatch.setattr(workers, "_START", "import crash; " + workers._START)


@pytest.mark.slow
def test_a_decoder_that_crashes_costs_its_file(tmp_path, monkeypatch):
  make_folder(tmp_path)
  crash_at(tmp_path, "3.mp4", monkeypatch)
  found, left_out = sources.scan(tmp_path, **LIMITS, how=Measuring(processes=2))
  assert [clip.id for clip in found] == ["0", "1", "2", "4", "5"]
  reasons = {os.path.basename(path): reason for path, reason in left_out}
  assert reasons["3.mp4"] == (
    "its decoder has crashed the process that measured it (SIGABRT)"
  )


def test_beam_that_is_not_installed(tmp_path, monkeypatch):
  make_folder(tmp_path, 1)
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  monkeypatch.delitem(sys.modules, "sora_jax.data.intake.beam_pipeline", raising=False)
  monkeypatch.delattr(intake, "beam_pipeline", raising=False)
  how = Measuring(ledger=tmp_path / "out" / "measured.jsonl", beam=("--runner=x",))
  with pytest.raises(ValueError, match=r"--beam needs .*sora_jax\[beam\]"):
    sources.scan(tmp_path, **LIMITS, how=how)


def test_whoever_stops_does_not_wait_for_long_jobs(monkeypatch):
  monkeypatch.setattr(workers, "_START", "import time; time.sleep(100)")

  def jobs():
    yield {"do": "measure", "path": "a"}
    raise KeyboardInterrupt

  begin = time.monotonic()
  with pytest.raises(KeyboardInterrupt):
    list(workers.run(jobs(), 2))
  assert time.monotonic() - begin < 20


def test_damage_in_the_middle_is_seen(tmp_path):
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (17, 8, 10, 3), np.uint8).repeat(8, 1).repeat(8, 2)
  writer.write(tmp_path / "x.mp4", noise, 10)
  writer.write(tmp_path / "y.mp4", moving(17), 10)
  data = bytearray((tmp_path / "x.mp4").read_bytes())
  data[len(data) // 2 :] = b"\xff" * len(data[len(data) // 2 :])
  (tmp_path / "x.mp4").write_bytes(data)
  found, left_out = sources.scan(tmp_path, **LIMITS)
  assert [clip.id for clip in found] == ["y"] and "damaged" in left_out[0][1]
  found, _ = sources.scan(tmp_path, **LIMITS, how=Measuring(decode=False))
  assert len(found) == 2 and {*found[0].measured} == {"digest", "scene"}


MEMORY = """
import resource, sys
from sora_jax.data.intake import measure
measure.measure_file(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
measure.measure_file(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(tmp_path):
  part = moving(25)
  writer.write_chunks(tmp_path / "short.mp4", [part] * 2, 25)
  writer.write_chunks(tmp_path / "long.mp4", [part] * 24, 25)
  done = subprocess.run(
    [sys.executable, "-c", MEMORY, tmp_path / "short.mp4", tmp_path / "long.mp4"],
    check=True, capture_output=True, text=True,
  )  # fmt: skip
  # Its frames would be 21 MiB.
  assert int(done.stdout) < 5 * 1024


# --- scores and texts

SCORES = """
calls = []
def light(video_THWC, captions):
  print("this is no result")
  calls.append(captions)
  return {"light": video_THWC.mean(), "texts": len(captions)}
def one(video_THWC, captions):
  return float(video_THWC[0].mean())
def wrong(video_THWC, captions):
  raise TypeError("no such model")
"""


@pytest.fixture
def scored(tmp_path, monkeypatch):
  """A folder of a dark and a light video, and the name of a module with scores."""
  folder = tmp_path / "clips"
  for name, level in (("a", 40), ("b", 200)):
    writer.write(folder / f"{name}.mp4", moving(9) // 8 + np.uint8(level), 10)
    (folder / f"{name}.txt").write_text("one\ntwo")
  module = f"scores_{tmp_path.name}"
  (tmp_path / f"{module}.py").write_text(SCORES)
  monkeypatch.syspath_prepend(tmp_path)
  return folder, module


def test_scores_of_a_function(scored, tmp_path):
  folder, module = scored
  ledger = tmp_path / "measured.jsonl"
  how = Measuring(score_fn=f"{module}:light", ledger=ledger)
  found, _ = sources.scan(folder, **LIMITS, how=how)
  scores = [clip.measured["scores"] for clip in found]
  assert [s["texts"] for s in scores] == [2, 2]
  assert scores[0]["light"] + 150 < scores[1]["light"]
  limits = Filter(scores=(("light", 100.0),))
  found, left_out = sources.scan(folder, **LIMITS, how=how, limits=limits)
  assert [clip.id for clip in found] == ["b"]
  assert "clip a: score light" in left_out[0][1] and "below 100" in left_out[0][1]
  assert len(sys.modules[module].calls) == 2  # the second time none
  one = Measuring(score_fn=f"{module}:one", ledger=ledger, processes=1)
  assert "one" in sources.scan(folder, **LIMITS, how=one)[0][0].measured["scores"]
  with pytest.raises(ValueError, match="no score 'good', only .'light', 'texts'"):
    sources.scan(folder, **LIMITS, how=how, limits=Filter(scores=(("good", 1.0),)))


@pytest.mark.parametrize(
  "name, message",
  [
    ("{}:wrong", r"fails on .*a\.mp4: TypeError: no such model"),
    ("{}:gone", "cannot be imported"),
    ("gone", 'must be "module:function"'),
  ],
)
def test_wrong_score_functions(scored, name, message):
  folder, module = scored
  how = Measuring(score_fn=name.format(module))
  with pytest.raises(ValueError, match=message):
    sources.scan(folder, **LIMITS, how=how)


def test_captions_are_filtered(tmp_path):
  for i, text in enumerate(("a cat\nSign up NOW", "sign up", "no\na long text", "")):
    PIL.Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    (tmp_path / f"{i}.txt").write_text(text)
  limits = Filter(caption_without=(r"\bsign up\b",), caption_chars=(3.0, 100.0))
  found, left_out = sources.scan(tmp_path, **LIMITS, limits=limits)
  assert {clip.id: clip.captions for clip in found} == {
    "0": ("a cat",), "2": ("a long text",), "3": ()
  }  # fmt: skip
  ((path, reason),) = left_out
  assert path.endswith("1.png") and "caption_without" in reason


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"motion": (2.0, 1.0)}, r"motion \(2, 1\): the least is above the most"),
    ({"copies": 9}, "copies 9 must be -1 to 4 bits"),
    ({"caption_without": ("(",)}, r"caption_without '\(' is no expression"),
  ],
)
def test_wrong_limits(wrong, message):
  with pytest.raises(ValueError, match=message):
    Filter(**wrong)


def test_figures_are_json(tmp_path):
  PIL.Image.fromarray(picture()).save(tmp_path / "x.png")
  record = measure.measure_file(tmp_path / "x.png")
  assert json.loads(json.dumps(record)) == record
  with pytest.raises(media.ClipError, match="cannot be read"):
    measure.measure_file(tmp_path / "gone.png")


def test_frames_that_change_their_size(tmp_path):
  with av.open(str(tmp_path / "x.mkv"), "w") as container:
    stream = container.add_stream("libvpx", rate=10)
    stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
    for part, size in enumerate(((96, 128), (48, 64))):
      encoder = av.CodecContext.create("libvpx", "w")
      encoder.height, encoder.width = size
      encoder.pix_fmt, encoder.time_base = "yuv420p", Fraction(1, 10)
      encoder.options = {"auto-alt-ref": "0", "lag-in-frames": "0"}
      video_THWC = moving(10, height=size[0], width=size[1])
      for t, array in enumerate(video_THWC):
        frame = av.VideoFrame.from_ndarray(array, format="rgb24")
        frame.pts, frame.time_base = t, Fraction(1, 10)
        for packet in encoder.encode(frame):
          copy = av.Packet(bytes(packet))
          copy.pts = copy.dts = 10 * part + t
          copy.duration, copy.time_base, copy.stream = 1, Fraction(1, 10), stream
          copy.is_keyframe = packet.is_keyframe
          container.mux(copy)
  (clip,), left_out = sources.scan(tmp_path, **LIMITS)
  assert not left_out and clip.frames == 17
