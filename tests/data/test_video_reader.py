"""Each frame read is the one on screen at its time, whatever the file."""

import fractions
import struct

import av
import numpy as np
import PIL.Image
import pytest
from data import video_files
from data.media_samples import noise, numbered, numbers, sound, write_pts

from sora_jax.data.video import media, probe, reader, writer


def test_image_is_a_video_of_one_frame(tmp_path):
  path = tmp_path / "a.png"
  want = noise(1)
  writer.write(path, want, 1)
  np.testing.assert_array_equal(reader.read(path, frames=1, fps=1.0), want)
  assert probe.probe(path) == probe.Info(1, 1.0, 64, 64, 1.0, True)
  with pytest.raises(ValueError, match="1 frame, not 2"):
    writer.write(path, noise(2), 1)
  with pytest.raises(media.ClipError, match="1 frame, 5 asked"):
    reader.read(path, frames=5)


def test_gray_alpha_and_palette_images(tmp_path):
  gray = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
  PIL.Image.fromarray(gray).save(tmp_path / "gray.png")
  got = reader.read(tmp_path / "gray.png")
  np.testing.assert_array_equal(got, np.repeat(gray[None, ..., None], 3, axis=-1))

  deep = gray.astype(np.uint16) * 257
  PIL.Image.fromarray(deep).save(tmp_path / "deep.png")
  np.testing.assert_array_equal(reader.read(tmp_path / "deep.png"), got)

  rgba = np.zeros((8, 8, 4), np.uint8)
  rgba[:, :4] = [200, 0, 0, 255]
  rgba[:, 4:] = [0, 0, 0, 51]  # a fifth of black over white
  PIL.Image.fromarray(rgba).save(tmp_path / "alpha.png")
  got = reader.read(tmp_path / "alpha.png")[0]
  assert got[0, 0].tolist() == [200, 0, 0] and got[0, 7].tolist() == [204, 204, 204]

  flat = PIL.Image.new("P", (8, 8))
  flat.putpalette([10, 200, 30])
  flat.save(tmp_path / "palette.png")
  assert reader.read(tmp_path / "palette.png")[0, 0, 0].tolist() == [10, 200, 30]


def test_resize_covers_and_crops_the_centre(tmp_path):
  path = tmp_path / "wide.png"
  image = np.zeros((1, 40, 120, 3), np.uint8)
  image[:, :, 40:80] = 255
  writer.write(path, image, 1)
  got = reader.read(path, size=(20, 20))
  assert got.shape == (1, 20, 20, 3) and got[0, :, 1:-1].min() > 240
  assert reader.read(path, size=(80, 240))[0, :, :70].max() == 0


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate(tmp_path, suffix):
  path = tmp_path / f"vfr{suffix}"
  gaps = np.random.default_rng(0).choice([20, 33, 50, 100], 39)
  pts = np.concatenate([[0], np.cumsum(gaps)])
  write_pts(path, numbered(40), pts, fractions.Fraction(1, 1000))
  info = probe.probe(path)
  assert info.frames == 40
  assert info.fps == pytest.approx(39 / (pts[-1] / 1000), rel=0.01)
  for start, fps, frames in ((0.0, 10, 12), (0.5, 24, 17), (1.0, 7, 4)):
    got = numbers(reader.read(path, start=start, fps=fps, frames=frames), 40)
    times = start + np.arange(frames) / fps
    # On screen is the last frame that is not later, up to a rounded tick.
    assert got == (np.searchsorted(pts, times * 1000 + 1, side="right") - 1).tolist()


def test_rotation_is_applied(tmp_path):
  upright, path = tmp_path / "a.mp4", tmp_path / "rotated.mp4"
  frames = np.full((5, 32, 64, 3), 60, np.uint8)
  frames[:, :16, :32] = [220, 40, 40]  # red in the corner at the top left
  writer.write(upright, frames, 8)
  data = bytearray(upright.read_bytes())
  matrix = data.index(b"tkhd") + 4 + 40
  quarter = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
  data[matrix : matrix + 36] = quarter  # shown turned clockwise
  path.write_bytes(data)
  info = probe.probe(path)
  assert (info.height, info.width) == (64, 32)
  got = reader.read(path)
  assert got.shape == (5, 64, 32, 3)
  assert got[0, 8, 24, 0] > 180 and got[0, 8, 8, 0] < 100
  np.testing.assert_array_equal(got[0], np.rot90(reader.read(upright)[0], -1))


@pytest.mark.parametrize(
  "name, codec, options",
  [
    ("a.mp4", "libx264", {"x264-params": "open-gop=1:keyint=8:bframes=3"}),
    ("a.ts", "libx264", {"x264-params": "open-gop=1:keyint=8:bframes=3"}),
    ("a.mkv", "libx265", {"x265-params": "open-gop=1:keyint=8:log-level=none"}),
    ("a.mpg", "mpeg2video", {"g": "8", "bf": "2", "b": "4M"}),
    ("a.flv", "libx264", {"g": "8"}),
    ("a.avi", "mpeg4", {"g": "8", "b": "3M"}),
    ("a.wmv", "wmv2", {"g": "8", "b": "3M"}),
    ("a.webm", "libvpx-vp9", {"g": "8"}),
  ],
)
def test_every_frame_is_found_from_anywhere(tmp_path, name, codec, options):
  path = tmp_path / name
  frames = [video_files.rgb_frame(a, "yuv420p") for a in numbered(41)]
  video_files.write(path, frames, codec, options=options, fps=25)
  assert probe.probe(path).frames == 41
  assert numbers(reader.read(path, fps=25, frames=41), 41) == list(range(41))
  for first in range(1, 38, 3):
    got = reader.read(path, start=first / 25, fps=25, frames=3)
    assert numbers(got, 41) == [first, first + 1, first + 2]


def test_shorter_than_asked(tmp_path):
  path = tmp_path / "short.mp4"
  writer.write(path, numbered(9), 8)
  with pytest.raises(media.ClipError, match="9 frames at 8 fps from 0 s, 17 asked"):
    reader.read(path, fps=8, frames=17)
  with pytest.raises(media.ClipError, match="4 frames at 8 fps from 0.625 s, 5 asked"):
    reader.read(path, start=0.625, fps=8, frames=5)
  with pytest.raises(media.ClipError, match="no frames from 9 s"):
    reader.read(path, start=9.0)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_may_be_longer_than_the_video(tmp_path, suffix):
  path = tmp_path / f"both{suffix}"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=10)
    stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
    audio = container.add_stream("aac", rate=16000, layout="mono")
    frames = [av.VideoFrame.from_ndarray(x, format="rgb24") for x in numbered(10)]
    for frame in [*frames, None]:
      container.mux(stream.encode(frame))
    container.mux(sound(audio, 3))
  assert probe.probe(path).frames == 10
  assert numbers(reader.read(path), 10) == list(range(10))
