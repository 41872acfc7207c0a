"""Sizes, shapes of pixels and orientations of what is read."""

import fractions

import numpy as np
import PIL.Image
import pytest
from data import video_files
from data.media_samples import psnr

from sora_jax.data import sources
from sora_jax.data.video import images, media, probe, reader, resizing
from sora_jax.sampling import media as sampling_media
from sora_jax.sampling.job import Job


def test_no_size_and_no_budget_fails():
  rng = np.random.default_rng(0)
  budgets = (16 * 16, 96 * 64, 480 * 320, 512 * 512, 832 * 480)
  shapes = [(480, 640), (333, 500), (1, 1), (1, 400), (400, 1), (720, 1280)]
  shapes += [tuple(map(int, rng.integers(1, 1500, 2))) for _ in range(1500)]
  for height, width in shapes:
    for budget in budgets:
      size = sources.legal_size(height, width, budget, 16)
      for fit in ("crop", "pad"):
        scaled, out = resizing.place((height, width), size, fit)
        assert out == size
        inner = [min(n, m) for n, m in zip(scaled, size, strict=True)]
        assert inner == list(size) if fit == "crop" else inner == list(scaled)
        if fit == "crop":
          # All of one side is there, the other is cut evenly, to less than a pixel.
          assert any(n == m for n, m in zip(scaled, size, strict=True))
          assert all((n - m) % 2 == 0 for n, m in zip(scaled, size, strict=True))
          scale = max(size[0] / height, size[1] / width)
          assert abs(scaled[0] - height * scale) <= 1 + 1e-6
          assert abs(scaled[1] - width * scale) <= 1 + 1e-6


def test_frames_of_all_sizes_are_resized():
  rng = np.random.default_rng(1)
  shapes = [(480, 640), (333, 500), (1, 1), (1, 97), (97, 1)]
  shapes += [tuple(map(int, rng.integers(1, 200, 2))) for _ in range(150)]
  for height, width in shapes:
    frame = np.full((height, width, 3), (10, 200, 90), np.uint8)
    size = sources.legal_size(height, width, 96 * 64, 16)
    for fit in ("crop", "pad"):
      got = resizing.fit_frame(frame, size, fit)
      assert got.shape == (*size, 3)
      assert (got[(size[0] - 1) // 2, (size[1] - 1) // 2] == (10, 200, 90)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (46, 61), (120, 90)])
def test_videos_of_all_sizes_are_resized(tmp_path, shape):
  path = tmp_path / "a.mkv"
  frame = video_files.rgb_frame(np.full((*shape, 3), (10, 200, 90), np.uint8))
  video_files.write(path, [frame] * 2, "ffv1")
  info = probe.probe(path)
  assert (info.height, info.width) == shape
  for size in (None, (16, 16), (64, 96), (32, 256)):
    for fit in ("crop", "pad"):
      got = reader.read(path, size=size, fit=fit)
      assert got.shape[1:3] == (size or shape)
      middle = got[0, (got.shape[1] - 1) // 2, (got.shape[2] - 1) // 2].astype(int)
      assert np.abs(middle - (10, 200, 90)).max() <= 2


def test_strips_do_not_fill_the_memory(tmp_path):
  path = tmp_path / "strip.mkv"
  frame = video_files.rgb_frame(np.full((2, 8192, 3), 90, np.uint8))
  video_files.write(path, [frame], "ffv1")
  got = reader.read(path, size=(256, 256))  # 1,048,576 pixels wide before the crop
  assert got.shape == (1, 256, 256, 3) and np.abs(got.astype(int) - 90).max() <= 1


def smooth(height, width):
  y, x = np.mgrid[:height, :width]
  waves = (np.sin(x / 9 + y / 14), np.sin(y / 8 + 1), np.cos((x + y) / 13))
  return np.stack([128 + 90 * wave for wave in waves], -1).round().astype(np.uint8)


def test_every_way_of_resizing_gives_the_same(tmp_path):
  picture = smooth(180, 250)
  png, video = tmp_path / "a.png", tmp_path / "a.mkv"
  PIL.Image.fromarray(picture).save(png)
  video_files.write(video, [video_files.rgb_frame(picture)], "ffv1")
  for size in ((64, 96), (90, 90), (240, 240)):
    for fit in ("crop", "pad"):
      want = resizing.resize(picture[None], size, fit)
      np.testing.assert_array_equal(reader.read(png, size=size, fit=fit), want)
      assert psnr(reader.read(video, size=size, fit=fit), want) > 42


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_pixels_become_square(tmp_path, suffix):
  path = tmp_path / f"wide{suffix}"
  stored = smooth(96, 64)
  frame = video_files.rgb_frame(stored, "yuv420p")
  aspect = fractions.Fraction(2, 1)
  video_files.write(path, [frame] * 5, sample_aspect_ratio=aspect)
  info = probe.probe(path)
  assert (info.height, info.width) == (96, 128)
  whole = np.asarray(PIL.Image.fromarray(stored).resize((128, 96), 3))
  got = reader.read(path)
  assert got.shape == (5, 96, 128, 3) and psnr(got[0], whole) > 33
  # A square of the shown picture's middle is one of half as many stored columns.
  want = np.asarray(PIL.Image.fromarray(stored[:, 8:56]).resize((48, 48), 3))
  assert psnr(reader.read(path, size=(48, 48))[0], want) > 33
  job = Job("", video=path, loop=True)
  canvas = sampling_media.canvas(job)
  assert canvas.size == (96, 128)
  np.testing.assert_array_equal(sampling_media.read_video(job, canvas, path), got)


def test_a_pixel_that_no_screen_has_is_refused(tmp_path):
  path = tmp_path / "a.mkv"
  frame = video_files.flat(32, 32, 90, 128, 128)
  aspect = fractions.Fraction(20, 1)
  video_files.write(path, [frame], sample_aspect_ratio=aspect)
  for call in (probe.probe, reader.read):
    with pytest.raises(media.ClipError, match="20 times as wide as high; 1/10 to 10"):
      call(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_videos_are_upright(tmp_path, orientation):
  path = tmp_path / "a.mp4"
  picture = video_files.corners()
  video_files.write(path, [video_files.rgb_frame(picture, "yuv420p")] * 5)
  video_files.turn(path, *video_files.MATRICES[orientation])
  want = video_files.exif_upright(picture, orientation)
  info = probe.probe(path)
  assert (info.height, info.width) == want.shape[:2]
  assert psnr(reader.read(path)[0], want) > 28
  small = resizing.fit_frame(np.ascontiguousarray(want), (24, 16))
  assert psnr(reader.read(path, size=(24, 16))[0], small) > 28
  job = Job("", video=path, loop=True)
  canvas = sampling_media.canvas(job)
  assert psnr(sampling_media.read_video(job, canvas, path)[0], want) > 28


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, suffix, orientation):
  path = tmp_path / f"a{suffix}"
  picture = video_files.corners()
  exif = PIL.Image.Exif()
  exif[0x112] = orientation
  PIL.Image.fromarray(picture).save(path, exif=exif, quality=98)
  want = video_files.exif_upright(picture, orientation)
  got = images.read(path)
  assert got.shape == want.shape and psnr(got, want) > 28
  if media.is_image(path):
    info = probe.probe(path)
    assert (info.height, info.width) == want.shape[:2]
    job = Job("", image=path)
    canvas = sampling_media.canvas(job)
    assert psnr(sampling_media.read_image(job, canvas, path)[0], want) > 28


def test_another_angle_than_quarters_is_refused(tmp_path):
  path = tmp_path / "a.mp4"
  video_files.write(path, [video_files.flat(16, 16, 90, 128, 128)] * 3)
  video_files.turn(path, 3, 2, -2, 3)
  for call in (probe.probe, reader.read):
    with pytest.raises(media.ClipError, match="only quarter turns and mirrors"):
      call(path)


def test_frames_that_change_their_size(tmp_path):
  path = tmp_path / "a.mkv"
  write_changing(path, ((48, 64), (24, 32)))
  assert reader.read(path, size=(16, 16)).shape == (8, 16, 16, 3)
  with pytest.raises(media.ClipError, match="change from 64x48 to 32x24"):
    reader.read(path)


def write_changing(path, sizes):
  """Four VP8 frames of each size, one after the other in one stream."""
  import av

  number = 0
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libvpx", rate=8)
    stream.height, stream.width = sizes[0]
    stream.pix_fmt = "yuv420p"
    for height, width in sizes:
      encoder = av.CodecContext.create("libvpx", "w")
      encoder.height, encoder.width, encoder.pix_fmt = height, width, "yuv420p"
      encoder.time_base, encoder.framerate = fractions.Fraction(1, 8), 8
      encoder.options = {"auto-alt-ref": "0", "lag-in-frames": "0"}
      for k in range(4):
        frame = video_files.flat(height, width, 90, 128, 128)
        frame.pts, frame.time_base = k, fractions.Fraction(1, 8)
        for packet in encoder.encode(frame):
          copy = av.Packet(bytes(packet))
          copy.pts = copy.dts = number
          copy.time_base, copy.stream = fractions.Fraction(1, 8), stream
          copy.is_keyframe = packet.is_keyframe
          container.mux(copy)
          number += 1
