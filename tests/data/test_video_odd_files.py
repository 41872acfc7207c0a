"""Files that are damaged or of a rare kind: the right frames, or a reason."""

import fractions

import av
import numpy as np
import PIL.Image
import pytest
from data import video_files
from data.media_samples import noise, numbered, numbers, psnr, write_pts

from sora_jax.data import sources
from sora_jax.data.video import media, probe, reader, resizing, writer

MS = fractions.Fraction(1, 1000)


def encoded(frames, count, size=(48, 64)):
  """VideoFrames that tell their number by brightness."""
  return video_files.yuv_frames(numbered(frames, *size)[:count])


def with_sound(path, codec, sound_codec, late):
  """17 frames at 8 fps that begin `late` seconds after the sound."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=8)
    stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
    stream.options = {"b": "2M"}
    stream.codec_context.time_base = MS
    audio = container.add_stream(sound_codec, rate=48000, layout="mono")
    for start in range(0, int((late + 17 / 8) * 48000), 960):
      silence = np.zeros((1, 960), np.float32)
      frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
      frame.sample_rate, frame.pts = 48000, start
      container.mux(audio.encode(frame))
    container.mux(audio.encode(None))
    for number, frame in enumerate(encoded(17, 17)):
      frame.pts, frame.time_base = round(1000 * late) + 125 * number, MS
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


@pytest.mark.parametrize("late", [0.0, 0.12, 0.5, 3.0])
@pytest.mark.parametrize(
  "suffix, codecs",
  [
    (".mkv", ("libx264", "aac")),
    (".webm", ("libvpx", "libopus")),
    (".mp4", ("libx264", "aac")),
    (".ts", ("libx264", "aac")),
  ],
)
def test_video_that_starts_late(tmp_path, suffix, codecs, late):
  path = tmp_path / f"late{suffix}"
  with_sound(path, *codecs, late)
  info = probe.probe(path)
  assert info.frames == 17 and info.duration == pytest.approx(17 / 8, abs=0.02)
  assert numbers(reader.read(path), 17) == list(range(17))
  got = numbers(reader.read(path, start=1.0, fps=8, frames=5), 17)
  assert got == [8, 9, 10, 11, 12]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".webm", ".ts"])
def test_stream_that_starts_late_without_sound(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"
  codec = "libvpx" if suffix == ".webm" else "libx264"
  pts = [5000 + 125 * n for n in range(17)]
  video_files.write(path, encoded(17, 17), codec, pts=pts, base=MS,
                    options={"g": "4"})  # fmt: skip
  assert probe.probe(path).frames == 17
  assert numbers(reader.read(path), 17) == list(range(17))
  assert numbers(reader.read(path, start=1.25, fps=8, frames=3), 17) == [10, 11, 12]


@pytest.mark.parametrize("late", [1, 40])
def test_an_avi_that_starts_late(tmp_path, late):
  # Its times are counts of frames, from 0, and FFmpeg says that all of them begin at 0.
  path = tmp_path / "a.avi"
  pts = [late + n for n in range(17)]
  video_files.write(path, encoded(17, 17), pts=pts, options={"g": "4"})
  with av.open(str(path)) as container:
    assert min(p.pts for p in container.demux() if p.size) >= late
  info = probe.probe(path)
  assert info.frames == 17 and info.duration == 17 / 8 and info.fps == 8
  assert numbers(reader.read(path), 17) == list(range(17))
  assert numbers(reader.read(path, start=1.25, fps=8, frames=3), 17) == [10, 11, 12]


@pytest.mark.parametrize(
  "suffix, reason",
  [(".mkv", "cut off: .* (3.9|4.0). s declared"), (".avi", "damaged after 19 frames")],
)
def test_a_late_file_that_is_cut_off_is_still_refused(tmp_path, suffix, reason):
  path, fps = tmp_path / f"a{suffix}", 10
  pts = [3 * fps + n for n in range(40)]
  frames = video_files.yuv_frames(noise(40))
  video_files.write(path, frames, fps=fps, pts=pts)
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(media.ClipError, match=reason):
    probe.probe(path)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_times_below_zero(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"
  options = {"avoid_negative_ts": "disabled"}
  with av.open(str(path), "w", options=options) as container:
    stream = container.add_stream("mpeg4", rate=8)
    stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
    stream.options, stream.codec_context.time_base = {"qmin": "1", "qmax": "2"}, MS
    for number, frame in enumerate(encoded(17, 17)):
      frame.pts, frame.time_base = -500 + 125 * number, MS
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  info = probe.probe(path)
  got = numbers(reader.read(path), 17)
  # Matroska cannot say times below zero: FFmpeg and players leave these frames out.
  assert got in (list(range(17)), list(range(4, 17)))
  assert info.frames == len(got)
  assert numbers(reader.read(path, start=1.0, fps=8, frames=3), 17) == got[8:11]


@pytest.mark.parametrize("backward", ["0", "3"])
def test_an_edit_list_trims_the_start(tmp_path, backward):
  path = tmp_path / "a.mp4"
  video_files.write(path, encoded(17, 17), options={"bf": backward, "g": "17"})
  data = bytearray(path.read_bytes())
  at = data.index(b"elst") + 4
  assert int.from_bytes(data[at + 4 : at + 8], "big") == 1
  with av.open(str(path)) as container:
    ticks = round(0.5 / container.streams.video[0].time_base)
  duration = int.from_bytes(data[at + 8 : at + 12], "big") - 500  # ms
  data[at + 8 : at + 12] = duration.to_bytes(4, "big")
  ticks += int.from_bytes(data[at + 12 : at + 16], "big")
  data[at + 12 : at + 16] = ticks.to_bytes(4, "big")
  path.write_bytes(data)
  assert probe.probe(path).frames == 13
  assert numbers(reader.read(path), 17) == list(range(4, 17))
  assert numbers(reader.read(path, start=0.5, fps=8, frames=2), 17) == [8, 9]


def woven(number, top_first, height=96, width=128):
  """A frame of two fields of a bar that moves, and its first field with all lines."""
  fields = []
  for field in (2 * number, 2 * number + 1):
    picture = np.full((height, width), 60, np.uint8)
    picture[:, 3 * field : 3 * field + 16] = 200
    fields.append(picture)
  both = fields[0].copy()
  later = slice(1 if top_first else 0, None, 2)
  both[later] = fields[1][later]
  return both, fields[0]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("order", ["tff", "bff"])
def test_interlaced_video_has_no_combs(tmp_path, suffix, order):
  path = tmp_path / f"a{suffix}"
  frames, wanted = [], []
  for number in range(12):
    both, first = woven(number, order == "tff")
    chroma = [np.full((48, 64), 128, np.uint8)] * 2
    frame = video_files.planes_frame("yuv420p", [both, *chroma])
    frames.append(video_files.filtered(frame, [("setfield", order)]))
    wanted.append((first.astype(float) - 16) * 255 / 219)
  options = {"x264-params": f"{order}=1", "g": "4", "qp": "4"}
  video_files.write(path, frames, options=options, fps=25)
  got = reader.read(path)
  assert len(got) == 12 and probe.probe(path).frames == 12
  for picture, first in zip(got, wanted, strict=True):
    assert psnr(picture[..., 1], first) > 40  # with combs 20, of the other field 17
  # From anywhere in the file the same pixels.
  some = reader.read(path, start=5 / 25, fps=25, frames=4)
  np.testing.assert_array_equal(some, got[5:9])


def test_pictures_of_the_cover_are_no_video(tmp_path):
  path = tmp_path / "a.mp4"
  image = tmp_path / "cover.jpg"
  PIL.Image.new("RGB", (64, 64), (0, 255, 0)).save(image)
  for with_video in (True, False):
    with av.open(str(path), "w") as container:
      cover = container.add_stream("mjpeg", rate=1)
      cover.width = cover.height = 64
      cover.pix_fmt = "yuvj420p"
      cover.disposition = av.stream.Disposition.attached_pic
      streams = [cover]
      if with_video:
        streams.append(container.add_stream("libx264", rate=8))
        streams[1].height, streams[1].width, streams[1].pix_fmt = 48, 64, "yuv420p"
      packets = streams[1].encode(encoded(9, 9)[0]) if with_video else []
      packet = av.Packet(image.read_bytes())
      packet.pts = packet.dts = 0
      packet.time_base, packet.stream = fractions.Fraction(1), cover
      packet.is_keyframe = True
      container.mux(packet)
      container.mux(packets)
      if with_video:
        for frame in encoded(9, 9)[1:]:
          container.mux(streams[1].encode(frame))
        container.mux(streams[1].encode(None))
    if with_video:
      assert probe.probe(path).frames == 9
      assert numbers(reader.read(path), 9) == list(range(9))
    else:
      for call in (probe.probe, reader.read):
        with pytest.raises(media.ClipError, match="only a cover picture"):
          call(path)


@pytest.mark.parametrize("suffix", [".mp4", ".ts", ".avi"])
def test_damage_in_the_middle_is_noticed(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"
  frames = video_files.yuv_frames(noise(30))
  codec = "mpeg4" if suffix == ".avi" else "libx264"
  options = {"g": "10"} | ({"b": "3M"} if suffix == ".avi" else {"qp": "20"})
  video_files.write(path, frames, codec, fps=10, options=options)
  data = bytearray(path.read_bytes())
  rng = np.random.default_rng(0)
  # A decoder may take noise for a picture, so there are several places.
  for at in np.linspace(0.4, 0.7, 6) * len(data):
    data[int(at) : int(at) + 300] = rng.integers(0, 256, 300, np.uint8).tobytes()
  path.write_bytes(data)
  with pytest.raises(media.ClipError, match=r"a\.\w+: (damaged|cut off|too short)"):
    reader.read(path)
  # What comes before it can be used.
  assert reader.read(path, fps=10, frames=5).shape == (5, 64, 64, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".ts", ".avi"])
def test_a_file_cut_or_garbled_anywhere_raises_nothing_else(tmp_path, suffix):
  whole = tmp_path / f"whole{suffix}"
  codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(suffix, "libx264")
  options = {"b": "1M", "g": "6"} if codec != "libx264" else {"qp": "25", "g": "6"}
  video_files.write(whole, encoded(12, 12), codec, options=options)
  data = whole.read_bytes()
  rng = np.random.default_rng(0)
  path = tmp_path / f"a{suffix}"
  outcomes = set()
  for turn in range(60):
    damaged = bytearray(data)
    at = int(rng.integers(len(data)))
    if turn % 2:
      damaged[at : at + 40] = rng.integers(0, 256, 40, np.uint8).tobytes()
    else:
      del damaged[at:]
    path.write_bytes(damaged)
    for call in (probe.probe, reader.read):
      try:
        call(path)
        outcomes.add("read")
      except media.ClipError as e:
        assert e.reason and str(path) in str(e)
        outcomes.add("refused")
  assert outcomes == {"read", "refused"}


def test_the_frames_count_more_than_the_header(tmp_path):
  path = tmp_path / "a.mp4"
  writer.write(path, numbered(9), 8)
  data = bytearray(path.read_bytes())
  for box, offset in ((b"mvhd", 16), (b"mdhd", 16), (b"tkhd", 20)):
    at = data.index(box) + 4 + offset
    ticks = int.from_bytes(data[at : at + 4], "big")
    data[at : at + 4] = (10 * ticks).to_bytes(4, "big")
  path.write_bytes(data)
  # FFmpeg adds up the table of samples, so this is no file that is cut off.
  assert probe.probe(path).duration == pytest.approx(9 / 8, abs=0.01)
  assert numbers(reader.read(path), 9) == list(range(9))


def test_a_header_that_promises_more_is_said(tmp_path):
  path = tmp_path / "a.mkv"
  writer.write(path, numbered(9), 8)
  data = path.read_bytes()
  assert data.count(b"00:00:01.125000000") == 1
  path.write_bytes(data.replace(b"00:00:01.125000000", b"00:00:11.125000000"))
  with pytest.raises(media.ClipError, match="cut off: 1.12 s found, 11.12 s declared"):
    probe.probe(path)


def test_one_pixel_and_eight_thousand(tmp_path):
  for name, size in (("dot.mkv", (1, 1)), ("wide.mkv", (16, 8192))):
    frames = [
      video_files.flat(*size, y, 128, 128, fmt="yuv444p")
      for y in (60, 90, 120, 150, 180)
    ]
    video_files.write(tmp_path / name, frames, "ffv1")
    info = probe.probe(tmp_path / name)
    assert (info.height, info.width, info.frames) == (*size, 5)
  clips, rejected = sources.scan(
    tmp_path, max_frames=5, max_pixels=96 * 64, size_multiple=16
  )
  assert not rejected and [clip.id for clip in clips] == ["dot", "wide"]
  for clip in clips:
    video = reader.read(
      clip.path, fps=clip.fps, frames=clip.frames, size=(clip.height, clip.width)
    )
    assert np.abs(video[:, 0, 0, 0] - [51, 86, 121, 156, 191]).max() <= 1


def test_a_fault_of_ours_is_not_called_damage(tmp_path, monkeypatch):
  path = tmp_path / "a.mp4"
  writer.write(path, numbered(5), 8)

  def fail(*args):
    raise ValueError("box offset can't be negative")

  monkeypatch.setattr(resizing, "place", fail)
  for call in (lambda: probe.probe(path), lambda: reader.read(path, size=(16, 16))):
    with pytest.raises(ValueError, match="box offset") as error:
      call()
    assert not isinstance(error.value, media.ClipError)


def test_names_inside_that_are_no_utf8(tmp_path):
  path = tmp_path / "a.mp4"
  writer.write(path, numbered(5), 8, metadata={"comment": "Gruesse XX"})
  path.write_bytes(path.read_bytes().replace(b"Gruesse XX", b"Gr\xfc\xdfe     "))
  assert probe.probe(path).frames == 5


def test_the_rest_of_a_folder_survives(tmp_path):
  writer.write(tmp_path / "good.mp4", numbered(9), 8)
  data = (tmp_path / "good.mp4").read_bytes()
  (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
  (tmp_path / "text.mkv").write_text("not a video at all")
  write_pts(tmp_path / "vfr.mkv", numbered(9), np.arange(9) ** 2 * 10 + 1000, MS)
  clips, rejected = sources.scan(
    tmp_path, max_frames=9, max_pixels=64 * 48, size_multiple=16
  )
  assert {clip.id for clip in clips} == {"good", "vfr"}
  assert all(reason for _, reason in rejected) and len(rejected) == 2
