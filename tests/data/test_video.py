"""Media files of all sorts, good and bad; each test writes its own."""

import fractions
import pickle
import struct

import av
import numpy as np
import PIL.Image
import pytest

from sora_jax.data import video


def _numbered(frames, height=48, width=64):
  """Frames that tell their number by brightness, in the left half."""
  video_THWC = np.full((frames, height, width, 3), 40, np.uint8)
  for t in range(frames):
    video_THWC[t, :, : width // 2] = 30 + 180 * t // max(frames - 1, 1)
  return video_THWC


def _numbers(video_THWC, frames):
  left = video_THWC[:, :, : video_THWC.shape[2] // 2 - 4].mean(axis=(1, 2, 3))
  return ((left - 30) * max(frames - 1, 1) / 180).round().astype(int).tolist()


def _noise(frames, height=64, width=64):
  """Frames that do not compress, so that a file can be cut anywhere."""
  shape = (frames, height, width, 3)
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _psnr(a, b):
  return 10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9))


def _write_pts(path, video_THWC, pts, base):
  """Writes frames at given times, with B-frames."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=30)
    stream.height, stream.width = video_THWC.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.options = {"bf": "3", "g": "12", "crf": "10"}
    stream.time_base = stream.codec_context.time_base = base
    for array, when in zip(video_THWC, pts, strict=True):
      frame = av.VideoFrame.from_ndarray(array, format="rgb24")
      frame.pts, frame.time_base = int(when), base
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _fails(path, *words, **asked):
  """Both probe and read refuse the file; returns the message of probe."""
  messages = []
  for call in (lambda: video.probe(path), lambda: video.read(path, **asked)):
    with pytest.raises(video.ClipError) as error:
      call()
    messages.append(str(error.value))
    assert str(path) in messages[-1]
  for word in words:
    assert word in messages[0]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".gif"])
def test_written_video_reads_back(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"
  want = _numbered(17)
  video.write(path, want, 12, metadata={"prompt": "ein grüner Kreis"})
  info = video.probe(path)
  assert (info.frames, info.height, info.width, info.is_image) == (17, 48, 64, False)
  assert info.fps == pytest.approx(12, rel=0.01)
  assert info.duration == pytest.approx(17 / 12, abs=0.02)
  got = video.read(path)
  assert got.dtype == np.uint8 and got.shape == want.shape
  assert _psnr(got, want) > 36
  np.testing.assert_array_equal(video.read(path, frames=17, fps=12), got)
  # Every start and rate gives the frame on screen at that time.
  assert _numbers(video.read(path, start=5 / 12, fps=6, frames=6), 17) == [
    5, 7, 9, 11, 13, 15,
  ]  # fmt: skip
  assert _numbers(video.read(path, fps=24, frames=4), 17) == [0, 0, 1, 1]
  assert list(tmp_path.iterdir()) == [path]  # nothing half written left behind


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".gif", ".png"])
def test_same_frames_give_same_bytes(tmp_path, suffix):
  frames = _numbered(1 if suffix == ".png" else 9)
  for name in "ab":
    video.write(tmp_path / f"{name}{suffix}", frames, 8)
  first, second = (tmp_path / f"{name}{suffix}" for name in "ab")
  assert first.read_bytes() == second.read_bytes()


def test_metadata_is_kept(tmp_path):
  path = tmp_path / "a.mp4"
  video.write(path, _numbered(5), 8, metadata={"prompt": "a red circle", "seed": 3})
  with av.open(str(path)) as container:
    assert container.metadata["prompt"] == "a red circle"
    assert container.metadata["seed"] == "3"


def test_image_is_a_video_of_one_frame(tmp_path):
  path = tmp_path / "a.png"
  want = _noise(1)
  video.write(path, want, 1)
  np.testing.assert_array_equal(video.read(path, frames=1, fps=1.0), want)
  assert video.probe(path) == video.Info(1, 1.0, 64, 64, 1.0, True)
  with pytest.raises(ValueError, match="1 frame, not 2"):
    video.write(path, _noise(2), 1)
  with pytest.raises(video.ClipError, match="1 frame, 5 asked"):
    video.read(path, frames=5)


def test_gray_alpha_and_palette_images(tmp_path):
  gray = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
  PIL.Image.fromarray(gray).save(tmp_path / "gray.png")
  got = video.read(tmp_path / "gray.png")
  np.testing.assert_array_equal(got, np.repeat(gray[None, ..., None], 3, axis=-1))

  deep = gray.astype(np.uint16) * 257
  PIL.Image.fromarray(deep).save(tmp_path / "deep.png")
  np.testing.assert_array_equal(video.read(tmp_path / "deep.png"), got)

  rgba = np.zeros((8, 8, 4), np.uint8)
  rgba[:, :4] = [200, 0, 0, 255]
  rgba[:, 4:] = [0, 0, 0, 51]  # a fifth of black over white
  PIL.Image.fromarray(rgba).save(tmp_path / "alpha.png")
  got = video.read(tmp_path / "alpha.png")[0]
  assert got[0, 0].tolist() == [200, 0, 0] and got[0, 7].tolist() == [204, 204, 204]

  flat = PIL.Image.new("P", (8, 8))
  flat.putpalette([10, 200, 30])
  flat.save(tmp_path / "palette.png")
  assert video.read(tmp_path / "palette.png")[0, 0, 0].tolist() == [10, 200, 30]


def test_resize_covers_and_crops_the_centre(tmp_path):
  path = tmp_path / "wide.png"
  image = np.zeros((1, 40, 120, 3), np.uint8)
  image[:, :, 40:80] = 255
  video.write(path, image, 1)
  got = video.read(path, size=(20, 20))
  assert got.shape == (1, 20, 20, 3) and got[0, :, 1:-1].min() > 240
  assert video.read(path, size=(80, 240))[0, :, :70].max() == 0


def test_odd_sizes_are_padded(tmp_path):
  path = tmp_path / "odd.mp4"
  want = _numbered(5, 47, 63)
  video.write(path, want, 8)
  got = video.read(path)
  assert got.shape == (5, 48, 64, 3)
  assert _psnr(got[:, :47, :63], want) > 36
  gif = tmp_path / "odd.gif"
  video.write(gif, want, 8)
  assert video.read(gif).shape == want.shape


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate(tmp_path, suffix):
  path = tmp_path / f"vfr{suffix}"
  gaps = np.random.default_rng(0).choice([20, 33, 50, 100], 39)
  pts = np.concatenate([[0], np.cumsum(gaps)])
  _write_pts(path, _numbered(40), pts, fractions.Fraction(1, 1000))
  info = video.probe(path)
  assert info.frames == 40
  assert info.fps == pytest.approx(39 / (pts[-1] / 1000), rel=0.01)
  for start, fps, frames in ((0.0, 10, 12), (0.5, 24, 17), (1.0, 7, 4)):
    got = _numbers(video.read(path, start=start, fps=fps, frames=frames), 40)
    times = start + np.arange(frames) / fps
    # On screen is the last frame that is not later, up to a rounded tick.
    assert got == (np.searchsorted(pts, times * 1000 + 1, side="right") - 1).tolist()


def test_rotation_is_applied(tmp_path):
  upright, path = tmp_path / "a.mp4", tmp_path / "rotated.mp4"
  frames = np.full((5, 32, 64, 3), 60, np.uint8)
  frames[:, :16, :32] = [220, 40, 40]  # red in the corner at the top left
  video.write(upright, frames, 8)
  data = bytearray(upright.read_bytes())
  matrix = data.index(b"tkhd") + 4 + 40
  quarter = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
  data[matrix : matrix + 36] = quarter  # shown turned clockwise
  path.write_bytes(data)
  info = video.probe(path)
  assert (info.height, info.width) == (64, 32)
  got = video.read(path)
  assert got.shape == (5, 64, 32, 3)
  assert got[0, 8, 24, 0] > 180 and got[0, 8, 8, 0] < 100
  np.testing.assert_array_equal(got[0], np.rot90(video.read(upright)[0], -1))


def test_shorter_than_asked(tmp_path):
  path = tmp_path / "short.mp4"
  video.write(path, _numbered(9), 8)
  with pytest.raises(video.ClipError, match="9 frames at 8 fps from 0 s, 17 asked"):
    video.read(path, fps=8, frames=17)
  with pytest.raises(video.ClipError, match="4 frames at 8 fps from 0.625 s, 5 asked"):
    video.read(path, start=0.625, fps=8, frames=5)
  with pytest.raises(video.ClipError, match="no frames from 9 s"):
    video.read(path, start=9.0)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".gif", ".png", ".jpg"])
def test_empty_text_and_missing_files(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"
  _fails(path, "No such file")
  path.write_bytes(b"")
  _fails(path, "empty file (0 bytes)")
  path.write_text("this is not a video\n" * 50)
  _fails(path, "not a")


def test_truncated_files(tmp_path):
  for suffix, share in ((".mp4", 0.5), (".mkv", 0.5), (".webm", 0.5), (".png", 0.5)):
    whole = tmp_path / f"whole{suffix}"
    frames = _noise(1 if suffix == ".png" else 30, 48, 48)
    video.write(whole, frames, 10, crf=20)
    data = whole.read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    _fails(path)
    if suffix != ".png":
      with pytest.raises(video.ClipError, match=r"cut\.\w+"):
        video.read(path, fps=10, frames=29)
      assert len(video.read(path, fps=10, frames=5)) == 5  # what is there still reads


def test_mp4_without_its_index(tmp_path):
  path = tmp_path / "cut.mp4"
  _write_pts(path, _noise(10), np.arange(10), fractions.Fraction(1, 10))
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])  # the index is at the end
  _fails(path, "not a video")


def _sound(stream, seconds):
  """Packets of silence."""
  for start in range(0, int(seconds * 16000), 1024):
    silence = np.zeros((1, 1024), np.float32)
    frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 16000, start
    yield from stream.encode(frame)
  yield from stream.encode(None)


def test_audio_only(tmp_path):
  path = tmp_path / "sound.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=16000, layout="mono")
    container.mux(_sound(stream, 1))
  _fails(path, "no video stream")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_may_be_longer_than_the_video(tmp_path, suffix):
  path = tmp_path / f"both{suffix}"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=10)
    stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
    sound = container.add_stream("aac", rate=16000, layout="mono")
    frames = [av.VideoFrame.from_ndarray(x, format="rgb24") for x in _numbered(10)]
    for frame in [*frames, None]:
      container.mux(stream.encode(frame))
    container.mux(_sound(sound, 3))
  assert video.probe(path).frames == 10
  assert _numbers(video.read(path), 10) == list(range(10))


def test_write_refuses_what_it_cannot_write(tmp_path):
  for array, fps, name, word in (
    (_noise(2).astype(np.float32), 8, "a.mp4", "float32"),
    (_noise(2)[..., 0], 8, "a.mp4", r"\(2, 64, 64\)"),
    (_noise(2)[:0], 8, "a.mp4", "empty"),
    (_noise(2), 0, "a.mp4", "fps must be positive, not 0"),
    (_noise(2), 8, "a.avi", "'.avi'"),
  ):
    with pytest.raises(ValueError, match=word):
      video.write(tmp_path / name, array, fps)
  assert not list(tmp_path.iterdir())


def test_contact_sheet(tmp_path):
  path = tmp_path / "sheet.png"
  videos = [_numbered(9), _numbered(1, 32, 96)]
  video.contact_sheet(path, videos, ["a red circle moves right " * 8, "x"])
  sheet = video.read(path)[0]
  assert sheet.shape[0] > 2 * (48 + 32) and sheet.shape[1] > 6 * 96 * 2
  assert sheet[10, 10].tolist() == [30, 30, 30]
  with pytest.raises(ValueError, match="1 captions for 2 videos"):
    video.contact_sheet(path, videos, ["x"])


def test_clip_error_survives_a_process_boundary():
  error = pickle.loads(pickle.dumps(video.ClipError("a.mp4", "too short")))
  assert str(error) == "a.mp4: too short" and error.reason == "too short"
