"""Whole files of rare kinds that were refused once, or read wrongly without a word."""

import fractions
import io
import itertools
import json
import tarfile

import av
import numpy as np
import PIL.Image
import pytest
import tiny
from data import video_files
from data.media_samples import noise, numbered, numbers
from data.test_colour_profiles import COLOURS, P3, SRGB, decoded, encoded, to_xyz

from sora_jax import prepare
from sora_jax.data import clips, listing, sources
from sora_jax.data.intake import ledger, measure
from sora_jax.data.video import media, pictures, probe, reader, writer
from sora_jax.run import recipe as recipes

LIMITS = {"max_frames": 17, "max_pixels": 64 * 96, "size_multiple": 16}


def test_a_last_frame_that_stays(tmp_path):
  frames = [PIL.Image.fromarray(frame) for frame in numbered(25)]
  path = tmp_path / "a.gif"
  durations = [100] * 24 + [400]
  frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations)
  info = measure.measure_file(path)["info"]
  assert info["frames"] == 25 and info["duration"] == pytest.approx(2.8)


def test_frames_in_avi_that_refer_to_later_ones(tmp_path):
  path = tmp_path / "a.avi"
  options = {"g": "8", "bf": "3", "qp": "4"}
  video_files.write(path, video_files.yuv_frames(numbered(33)), fps=10, options=options)
  with av.open(str(path)) as container:
    times = [frame.pts for frame in container.decode(video=0)]
  assert times != sorted(times)  # else the file shows nothing
  assert numbers(reader.read(path), 33) == list(range(33))
  assert numbers(reader.read(path, fps=10.0, frames=33), 33) == list(range(33))
  for start in (1, 8, 9, 17, 24):
    found = reader.read(path, start=start / 10, fps=10.0, frames=9)
    assert numbers(found, 33) == list(range(start, start + 9))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_tiffs_on_their_side_that_are_not_compressed(tmp_path, mode, orientation):
  image = PIL.Image.fromarray(noise(1, 48, 64)[0]).convert("L").convert(mode)
  upright = np.asarray(image.convert("RGB"))
  turn = {  # as TIFF 6.0 has it: where row 0 and column 0 are
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
  }[orientation]
  exif = PIL.Image.Exif()
  exif[0x112] = orientation
  image.save(tmp_path / "a.tiff", exif=exif)
  np.testing.assert_array_equal(reader.read(tmp_path / "a.tiff")[0], turn(upright))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_an_animation_by_the_name_of_an_image(tmp_path, suffix):
  frames = [PIL.Image.fromarray(frame) for frame in numbered(3)]
  path = tmp_path / f"a{suffix}"
  frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
  with pytest.raises(media.ClipError, match="3 pictures in it"):
    reader.read(path)


@pytest.mark.parametrize("kind, mode", [(np.float32, "F"), (np.int32, "I")])
def test_numbers_without_a_range(tmp_path, kind, mode):
  PIL.Image.fromarray(np.ones((16, 16), kind)).save(tmp_path / "a.tiff")
  with pytest.raises(media.ClipError, match=f"32 bits \\(mode {mode}\\)"):
    reader.read(tmp_path / "a.tiff")


def test_a_damaged_avif(tmp_path):
  path = tmp_path / "a.avif"
  PIL.Image.fromarray(noise(1)[0]).save(path)
  whole = path.read_bytes()
  at = whole.index(b"mdat") + 4
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(20):
    data = bytearray(whole)
    for place in at + rng.integers(0, 30, 20):
      data[place] = rng.integers(256)
    path.write_bytes(data)
    try:
      reader.read(path)
    except media.ClipError:
      refused += 1
  assert refused


def film_and(path, before, codec, base=8):
  """A film of 17 numbered frames, and a track of other frames before it."""
  with av.open(str(path), "w") as container:
    streams = []
    for frames, name, rate in ((before, codec, base), (numbered(17, 96, 128), "", 8)):
      stream = container.add_stream(name or "libx264", rate=rate)
      stream.height, stream.width = frames.shape[1:3]
      stream.pix_fmt = "yuvj420p" if name == "mjpeg" else "yuv420p"
      streams.append((stream, frames, rate))
    streams[1][0].disposition = av.stream.Disposition.default
    packets = []
    for stream, frames, rate in streams:
      for number, frame in enumerate(frames):
        made = av.VideoFrame.from_ndarray(frame, format="rgb24")
        made = made.reformat(format=stream.pix_fmt)
        made.pts, made.time_base = number, fractions.Fraction(1, rate)
        packets += stream.encode(made)
      packets += stream.encode(None)
    for packet in sorted(packets, key=lambda p: float(p.dts * p.time_base)):
      container.mux(packet)


@pytest.mark.parametrize("kind", ["a picture", "a small film"])
def test_the_film_behind_another_track(tmp_path, kind):
  path = tmp_path / "a.mkv"
  if kind == "a picture":
    path = tmp_path / "a.mp4"
    film_and(path, noise(1, 48, 64), "mjpeg", 1)
  else:
    film_and(path, noise(9, 16, 32), "libx264")
  info = probe.probe(path)
  assert (info.frames, info.height, info.width) == (17, 96, 128)
  assert numbers(reader.read(path), 17) == list(range(17))


@pytest.mark.parametrize("late", [0, 4, 50])
def test_windows_media_that_begins_late(tmp_path, late):
  path = tmp_path / "a.wmv"
  pts = [late + n for n in range(33)]
  video_files.write(path, video_files.yuv_frames(numbered(33)), "wmv2", fps=10, pts=pts,
                    options={"b": "2M"})  # fmt: skip
  info = probe.probe(path)
  assert info.frames == 33 and info.duration == pytest.approx(3.3, abs=0.11)
  assert numbers(reader.read(path, fps=10.0, frames=33), 33) == list(range(33))


def test_flash_of_h264_whose_frames_stay_for_different_times(tmp_path):
  path = tmp_path / "a.flv"
  pts = np.cumsum([0, *np.random.default_rng(1).choice([1, 1, 1, 2, 5], 32)])
  frames, options = (
    video_files.yuv_frames(numbered(33)),
    {"bf": "2", "g": "8", "qp": "10"},
  )
  video_files.write(path, frames, fps=10, pts=pts.tolist(), options=options)
  assert probe.probe(path).frames == 33
  assert numbers(reader.read(path), 33) == list(range(33))


@pytest.mark.parametrize(
  "name, codec", [("a.avi", "mpeg4"), ("a.mov", "mpeg2video"), ("a.ts", "mpeg2video")]
)
def test_a_window_of_interlaced_video_is_a_part_of_the_whole(tmp_path, name, codec):
  rng = np.random.default_rng(0)
  edges = rng.integers(0, 255, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
  video = np.stack([np.roll(edges, 2 * t, 1) for t in range(33)])
  options = {"flags": "+ildct+ilme", "g": "8", "b": "4M"}
  video_files.write(
    tmp_path / name, video_files.yuv_frames(video), codec, fps=25, options=options
  )
  whole = reader.read(tmp_path / name)
  for start in range(30):
    part = reader.read(tmp_path / name, start=start / 25, fps=25.0, frames=3)
    np.testing.assert_array_equal(part, whole[start : start + 3], str(start))


def test_wide_colours_of_a_video(tmp_path):
  """Standard range in Display P3's primaries is shown in sRGB's, as an image's is."""
  path = tmp_path / "a.mp4"
  squares = np.array(COLOURS, np.uint8).repeat(8, 0)[None].repeat(16, 0)
  frames = [video_files.rgb_frame(squares)] * 9
  tags = {"color_primaries": 12, "color_trc": 1, "colorspace": 5, "color_range": 1}
  video_files.write(path, frames, **tags)
  linear = decoded(np.array(COLOURS))
  want = encoded(linear @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(P3)).T)
  found = reader.read(path)[0][8, 4::8].astype(float)
  assert np.abs(found - want).max() <= 6
  assert np.abs(np.array(COLOURS) - want).max() > 15


def test_files_of_one_name_in_tar_files_of_one_name(tmp_path):
  for number, video in enumerate((numbered(9), noise(9))):
    writer.write(tmp_path / "a.mp4", video, 8)
    folder = tmp_path / f"p{number}"
    folder.mkdir()
    with tarfile.open(folder / "000.tar", "w") as tar:
      tar.add(tmp_path / "a.mp4", "a.mp4")
  ids = []
  for _ in range(2):  # they stay what they are
    listed = listing.of_source(str(tmp_path / "p*" / "000.tar"), tmp_path)
    found, rejected = sources.scan("x", listed=listed, **LIMITS)
    assert len(found) == 2 and not rejected
    ids.append([clip.id for clip in found])
  assert ids[0] == ids[1] and len({*ids[0]}) == 2
  clips.write_manifest(tmp_path / "manifest.jsonl", found)
  assert clips.read_manifest(tmp_path / "manifest.jsonl") == found


@pytest.mark.parametrize("line", ["{}", "[]", "3", "null"])
def test_a_line_of_measurements_that_is_none(tmp_path, line):
  path = tmp_path / "measured.jsonl"
  with ledger.Ledger(path, ledger.version()) as kept:
    kept.add("a", {"record": 1})
  with path.open("a") as file:
    file.write(line + "\n")
  with ledger.Ledger(path, ledger.version()) as kept:
    assert kept.get("a") == {"record": 1}
    kept.add("b", {"record": 2})
    assert "b" in kept
  assert json.loads(path.read_text().splitlines()[-1])["key"] == "b"


def test_encoded_images_are_read_as_files_are(tmp_path):
  """Pictures in a data set: transparency on white, 16 bits, turned, by `pictures`."""

  def bytes_of(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())

  clear = np.zeros((16, 16, 4), np.uint8)
  clear[..., 0] = 200
  assert (pictures.decoded("x", bytes_of(PIL.Image.fromarray(clear))) == 255).all()
  grey = PIL.Image.fromarray(np.full((16, 16), 20000, np.uint16))
  assert (pictures.decoded("x", bytes_of(grey)) == 78).all()
  exif = PIL.Image.Exif()
  exif[0x112] = 6
  turned = pictures.decoded(
    "x", bytes_of(PIL.Image.fromarray(noise(1, 16, 32)[0]), "jpeg", exif=exif)
  )
  assert turned.shape == (32, 16, 3)


def test_all_kinds_of_odd_files_are_counted(tmp_path):
  """Each is a clip, or has a reason."""
  folder = tmp_path / "clips"
  folder.mkdir()
  for number, suffix in itertools.product(range(2), (".png", ".gif")):
    frames = [PIL.Image.fromarray(frame) for frame in numbered(9)]
    frames[0].save(folder / f"{number}{suffix}", "GIF", save_all=True,
                   append_images=frames[1:], duration=[100] * 8 + [900])  # fmt: skip
  found, rejected = sources.scan(folder, min_frames=5, **LIMITS)
  assert sorted(clip.id for clip in found) == ["0.gif", "1.gif"]
  assert [reason for _, reason in rejected] == [
    "9 pictures in it, an animation or pages"
  ] * 2


def test_a_manifest_that_holds_all_clips_out(tmp_path):
  folder = tmp_path / "clips"
  for number in range(3):
    writer.write(folder / f"{number}.mp4", noise(9), 8)
  rows = [{"path": f"{number}.mp4", "split": "heldout"} for number in range(3)]
  clips.write_lines(folder / "manifest.jsonl", map(json.dumps, rows))
  config = tiny.get_config()
  config.data.source = str(folder)
  with pytest.raises(ValueError, match="all 3 clips are marked as held out"):
    prepare.run(recipes.read(config), tmp_path / "run")


def test_keys_of_a_manifest_that_nothing_reads(tmp_path, caplog):
  writer.write(tmp_path / "a.mp4", noise(9), 8)
  row = {"path": "a.mp4", "caption": "x", "start": 0.5, "end": 1.0}
  clips.write_lines(tmp_path / "manifest.jsonl", [json.dumps(row)])
  sources.scan(tmp_path, **LIMITS)
  assert "manifest.jsonl: keys that nothing reads: end, start" in caplog.text
