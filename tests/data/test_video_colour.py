"""Colours of what is read, against the standards' formulas and Pillow's pixels."""

import fractions

import av
import numpy as np
import PIL.Image
import pytest
from data import video_files
from data.media_samples import psnr

from sora_jax.data.video import (
  chroma_siting,
  media,
  probe,
  reader,
  tone_mapping,
  writer,
)

BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)
MATRICES = {1: BT709, 5: BT601, 6: BT601, 9: BT2020}  # by FFmpeg's AVColorSpace


def rgb_of(y, u, v, weights, full=False, bits=8):
  """R'G'B' in 0..255 by the standards' formula; BT.709 3.2, BT.2020 table 4."""
  red, blue = weights
  step = 2 ** (bits - 8)
  low, high, chroma = (0, 255, 255) if full else (16, 219, 224)
  luma = (y / step - low) / high
  pb, pr = ((n / step - 128) / chroma for n in (u, v))
  r = luma + 2 * (1 - red) * pr
  b = luma + 2 * (1 - blue) * pb
  g = (luma - red * r - blue * b) / (1 - red - blue)
  return 255 * np.clip([r, g, b], 0, 1)


YUVS = [(81, 90, 240), (145, 54, 34), (41, 240, 110), (180, 128, 128), (120, 100, 150)]


@pytest.mark.parametrize("height", [64, 718, 720])
@pytest.mark.parametrize("tag", [None, 1, 5, 6, 9])
def test_the_matrix_is_the_tagged_one_or_that_of_the_lines(tmp_path, height, tag):
  path = tmp_path / "a.mp4"
  frames = [video_files.flat(height, 32, *yuv) for yuv in YUVS]
  tagged = {} if tag is None else {"colorspace": tag}
  video_files.write(path, frames, **tagged)
  weights = MATRICES.get(tag, BT709 if height >= 720 else BT601)
  got = reader.read(path)[:, height // 2, 16]
  for pixel, yuv in zip(got, YUVS, strict=True):
    assert np.abs(pixel - rgb_of(*yuv, weights)).max() <= 1.5
  small = reader.read(path, size=(16, 16))[:, 8, 8]  # each path of the conversion
  assert np.abs(small.astype(int) - got).max() <= 1


@pytest.mark.parametrize("tag, full", [(1, False), (2, True)])
@pytest.mark.parametrize("fmt", ["yuv420p", "yuv422p", "yuv444p"])
def test_ranges_and_samplings(tmp_path, fmt, tag, full):
  path = tmp_path / "a.mkv"
  frames = [video_files.flat(32, 32, *yuv, fmt) for yuv in YUVS]
  video_files.write(path, frames, "ffv1", color_range=tag, colorspace=1)
  got = reader.read(path)[:, 16, 16]
  for pixel, yuv in zip(got, YUVS, strict=True):
    assert np.abs(pixel - rgb_of(*yuv, BT709, full)).max() <= 1.5


@pytest.mark.parametrize("fmt, bits", [("yuv420p10le", 10), ("yuv444p12le", 12)])
def test_more_than_eight_bits(tmp_path, fmt, bits):
  path = tmp_path / "a.mkv"
  shift = int("420" in fmt)
  frames = [
    video_files.planes_frame(
      fmt,
      [
        np.full((32 >> s, 32 >> s), n * 2 ** (bits - 8) + 1, "<u2")
        for s, n in zip((0, shift, shift), yuv, strict=True)
      ],
    )
    for yuv in YUVS
  ]
  video_files.write(path, frames, "ffv1", colorspace=1)
  got = reader.read(path)[:, 16, 16]
  for pixel, yuv in zip(got, YUVS, strict=True):
    codes = [n * 2 ** (bits - 8) + 1 for n in yuv]
    assert np.abs(pixel - rgb_of(*codes, BT709, bits=bits)).max() <= 1.5


def test_grey_video(tmp_path):
  path = tmp_path / "a.mkv"
  ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 48, axis=0)
  video_files.write(path, [video_files.planes_frame("gray", [ramp])], "ffv1")
  got = reader.read(path)[0]
  np.testing.assert_allclose(got, np.repeat(ramp[..., None], 3, -1), atol=1)


def test_a_matrix_that_nothing_converts_is_refused(tmp_path):
  path = tmp_path / "a.mp4"
  video_files.write(path, [video_files.flat(16, 16, 90, 128, 128)], colorspace=8)
  for call in (probe.probe, reader.read):  # YCgCo
    with pytest.raises(media.ClipError, match=r"colour matrix 8 .* is none of"):
      call(path)


SITES = {"left": (0.0, 0.5), "center": (0.5, 0.5), "topleft": (0.0, 0.0)}


def sited_wave(height, width, location):
  """A wave in U and V, sampled where a siting says, and its U, V at all pixels."""

  def wave(y, x):
    return 128 + 60 * np.sin(x / 7 + y / 5), 128 + 60 * np.cos(x / 6 - y / 8)

  dx, dy = SITES[location]
  y, x = np.mgrid[: height // 2, : width // 2]
  small = [np.round(n).astype(np.uint8) for n in wave(2 * y + dy, 2 * x + dx)]
  y, x = np.mgrid[:height, :width]
  luma = np.full((height, width), 126, np.uint8)
  return video_files.planes_frame("yuv420p", [luma, *small]), wave(y, x)


@pytest.mark.parametrize(
  "codec, options, location",
  [
    ("libx264", {}, "left"),
    ("libx264", {"x264-params": "chromaloc=0"}, "left"),
    ("libx264", {"x264-params": "chromaloc=1"}, "center"),
    ("libx264", {"x264-params": "chromaloc=2"}, "topleft"),
    ("libx265", {"x265-params": "lossless=1"}, "left"),
    ("libx265", {"x265-params": "lossless=1:chromaloc=1"}, "center"),
    ("libx265", {"x265-params": "lossless=1:chromaloc=2"}, "topleft"),
    ("libsvtav1", {"svtav1-params": "crf=1:chroma-sample-position=left"}, "left"),
    ("libsvtav1", {"svtav1-params": "crf=1:chroma-sample-position=topleft"}, "topleft"),
    ("ffv1", {}, "left"),
    ("mpeg1video", {"qmin": "1", "qmax": "1"}, "center"),
  ],
)
def test_colour_samples_are_where_the_codec_says(tmp_path, codec, options, location):
  suffix = ".mp4" if codec.startswith("lib") else ".mkv"
  path = tmp_path / f"a{suffix}"
  frame, (u, v) = sited_wave(64, 96, location)
  video_files.write(path, [frame] * 3, codec, fps=25, options=options, colorspace=1)
  want = rgb_of(np.full(u.shape, 126.0), u, v, BT709).transpose(1, 2, 0)
  inner = np.s_[4:-4, 4:-4]
  error = np.abs(reader.read(path)[0] - want)[inner]
  assert error.mean() < 1.2, error.mean()  # half a pixel aside is 4.4 and more
  # Resized on the way, the middle stays where it is.
  resized = PIL.Image.fromarray(want.round().astype(np.uint8)).resize((48, 32), 3)
  small = reader.read(path, size=(32, 48))[0]
  assert np.abs(small.astype(float) - np.asarray(resized))[2:-2, 2:-2].mean() < 1.4


def test_siting_that_h264_says():
  for profile, more in (("baseline", ""), ("high", ":cqm=jvt"), ("high444", ":qp=0")):
    for said in (None, 1, 2, 3, 4, 5):
      context = av.CodecContext.create("libx264", "w")
      context.width, context.height, context.pix_fmt = 70, 46, "yuv420p"
      context.framerate, context.time_base = 8, 1 / fractions.Fraction(8)
      params = f"overscan=show{more}" + (f":chromaloc={said}" if said else "")
      context.options = {"profile": profile, "x264-params": params}
      context.flags |= av.codec.context.Flags.global_header
      context.open()
      assert chroma_siting.location("h264", context.extradata) == said
  cut = b"\x01\x64\x00\x1f\xff\xe1\x00\x04\x67\x64"
  for codec, short in (("h264", b""), ("h264", cut), ("hevc", b""), ("av1", b"\x81")):
    assert chroma_siting.location(codec, short) is None


@pytest.mark.parametrize(
  "more", ["", "scaling-list=default", "sar=2:overscan=show", "temporal-layers=3"]
)
def test_siting_that_hevc_says(more):
  for said in (None, 1, 2, 5):
    context = av.CodecContext.create("libx265", "w")
    context.width, context.height, context.pix_fmt = 70, 46, "yuv420p"
    context.framerate, context.time_base = 8, 1 / fractions.Fraction(8)
    params = [more] * bool(more) + [f"chromaloc={said}"] * bool(said)
    context.options = {"x265-params": ":".join(["log-level=none", *params])}
    context.flags |= av.codec.context.Flags.global_header
    context.open()
    assert chroma_siting.location("hevc", context.extradata) == said


def test_sets_of_references_that_follow_from_others():
  """Which x265 does not write: how many flags one has depends on the one before."""
  ue = {0: "1", 1: "010", 2: "011"}
  explicit = ue[2] + ue[1] + ue[0] + "1" + ue[1] + "1" + ue[1] + "1"  # -1, -3 and 2
  shifted = "1" + "0" + ue[0] + "1111"  # to 0, which is none, -2, 3 and 1
  again = "1" + "1" + ue[0] + "01" + "00" + "1" + "1"  # a flag for each, and one more
  bits = chroma_siting._Bits(b"")
  bits._bits = explicit + shifted + again
  chroma_siting._skip_references(bits, 3)
  assert bits._at == len(bits._bits)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_colours_that_are_written_stay_in_place(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"
  y, x = np.mgrid[:64, :96]
  waves = (np.sin(x / 5 + y / 7), np.sin(y / 6 + 1), np.cos((x + y) / 8))
  video = np.stack([128 + 90 * w for w in waves], -1).round().astype(np.uint8)
  writer.write(path, np.stack([video] * 3), 8, crf=4)
  got = reader.read(path)
  error = (got[1].astype(float) - video)[4:-4, 4:-4]
  assert np.abs(error).mean() < 2  # half a pixel aside is 4 and more


def transparent(height=48, width=64):
  """RGBA with colours under what is hidden, half hidden and opaque."""
  rgba = np.zeros((height, width, 4), np.uint8)
  rgba[..., :3] = (200, 40, 60)
  rgba[:, width // 3 :, 3] = 128
  rgba[:, 2 * width // 3 :, 3] = 255
  return rgba


@pytest.mark.parametrize(
  "suffix, codec, fmt, options",
  [
    (".webm", "libvpx", "yuva420p", {"auto-alt-ref": "0", "b": "3M"}),
    (".webm", "libvpx-vp9", "yuva420p", {"auto-alt-ref": "0", "crf": "8"}),
    (".mkv", "libvpx-vp9", "yuva420p", {"auto-alt-ref": "0", "crf": "8"}),
    (".mov", "prores_ks", "yuva444p10le", {"profile": "4"}),
    (".mov", "qtrle", "argb", {}),
    (".mov", "png", "rgba", {}),
  ],
)
def test_transparent_video_is_laid_over_white(tmp_path, suffix, codec, fmt, options):
  path = tmp_path / f"a{suffix}"
  rgba = transparent()
  frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=fmt)
  video_files.write(path, [frame] * 5, codec, options=options)
  image = PIL.Image.fromarray(rgba)
  white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
  want = np.asarray(PIL.Image.alpha_composite(white, image))[..., :3].astype(int)
  assert probe.probe(path).frames == 5
  for got in (reader.read(path), reader.read(path, start=0.2, fps=8, frames=2)):
    for column in (10, 32, 54):
      assert np.abs(got[-1, 24, column] - want[24, column]).max() <= 5
  small = reader.read(path, size=(12, 16))[0]
  assert small[6, 1].min() >= 250  # nothing of the hidden red


def pq_light(signal):
  """BT.2100's EOTF of PQ: cd/m2."""
  m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
  root = signal ** (1 / m2)
  return 10000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)


def hlg_light(signal):
  """BT.2100's inverse OETF and OOTF of [..., 3]: cd/m2 on a display of 1000."""
  a, b, c = 0.17883277, 0.28466892, 0.55991073
  scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
  luma = scene @ (0.2627, 0.6780, 0.0593)
  return 1000 * luma[..., None] ** 0.2 * scene


def to_xyz(*primaries):
  """Linear RGB to XYZ from the primaries' x, y and D65, by their definition."""
  xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
  x, y = 0.3127, 0.3290
  return xyz * np.linalg.solve(xyz, [x / y, 1, (1 - x - y) / y])


TO_709 = np.linalg.inv(to_xyz((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))) @ to_xyz(
  (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)
)


def hdr_frame(signal, u=512, v=512):
  luma = np.repeat(np.round(64 + 876 * signal)[None].astype("<u2"), 32, 0)
  small = (16, luma.shape[1] // 2)
  chroma = [np.full(small, n, "<u2") for n in (u, v)]
  return video_files.planes_frame("yuv420p10le", [luma, *chroma])


@pytest.mark.parametrize("transfer, light_of", [(16, pq_light), (18, hlg_light)])
def test_hdr_becomes_standard_range(tmp_path, transfer, light_of):
  path = tmp_path / "a.mkv"
  grid = np.repeat(np.linspace(0, 1, 877)[:, None], 3, axis=1)
  light = light_of(grid)[:, 0]
  codes = np.searchsorted(light, [203 * (k / 63) ** 2.4 for k in range(64)])
  codes = np.concatenate([codes, np.linspace(codes[-1], light.searchsorted(1000), 64)])
  codes = codes.round().astype(int).clip(0, 876)
  tags = {"color_trc": transfer, "color_primaries": 9, "colorspace": 9}
  video_files.write(path, [hdr_frame(codes / 876)] * 3, "ffv1", **tags)
  got = reader.read(path)[0, 16, :, 0].astype(int)
  share = light[codes] / 203
  below = share <= tone_mapping.KNEE
  # What standard range can show is as it was, the white of BT.2408 nearly.
  np.testing.assert_allclose(got[below], 255 * share[below] ** (1 / 2.4), atol=1)
  assert 238 <= got[63] <= 245 and got[-1] >= 254
  assert (np.diff(got[below.sum() :]) >= 0).all()
  small = reader.read(path, size=(16, 64))[0, 8, :, 0].astype(int)
  np.testing.assert_allclose(small[2:26], (got[4:52:2] + got[5:53:2]) / 2, atol=2)
  assert probe.probe(path).width == 128


@pytest.mark.parametrize("transfer, light_of", [(16, pq_light), (18, hlg_light)])
def test_hdr_colours_are_those_of_bt709(tmp_path, transfer, light_of):
  path = tmp_path / "a.mkv"
  uvs = [(512, 512), (540, 500), (490, 540), (520, 490), (500, 520)]
  frames = [hdr_frame(np.full(64, 0.42), u, v) for u, v in uvs]
  tags = {"color_trc": transfer, "color_primaries": 9, "colorspace": 9}
  video_files.write(path, frames, "ffv1", **tags)
  for frame, (u, v) in zip(reader.read(path), uvs, strict=True):
    signal = rgb_of(np.round(64 + 876 * 0.42), u, v, BT2020, bits=10) / 255
    light = TO_709 @ light_of(signal) / 203
    assert light.max() < tone_mapping.KNEE
    want = 255 * np.clip(light, 0, 1) ** (1 / 2.4)
    assert np.abs(frame[16, 32] - want).max() <= 1.5


def test_the_shoulder_is_ffmpegs_mobius():
  light = np.linspace(0, tone_mapping.PEAK / tone_mapping.WHITE, 64, dtype=np.float32)
  rows = np.repeat(light[None], 4, 0)
  frame = video_files.planes_frame("gbrpf32le", [rows] * 3)
  peak = tone_mapping.PEAK / tone_mapping.WHITE
  want = video_files.filtered(
    frame,
    [("tonemap", f"mobius:param={tone_mapping.KNEE}:desat=0:peak={peak}")],
  )
  np.testing.assert_allclose(
    tone_mapping.shoulder(light), want.to_ndarray()[0, :, 0], atol=1e-4
  )


def test_hdr_of_unknown_primaries_is_refused(tmp_path):
  path = tmp_path / "a.mkv"
  tags = {"color_trc": 16, "color_primaries": 8, "colorspace": 9}
  video_files.write(path, [hdr_frame(np.full(64, 0.4))] * 2, "ffv1", **tags)
  for call in (probe.probe, reader.read):
    with pytest.raises(media.ClipError, match="high dynamic range with .* primaries 8"):
      call(path)


def test_transparent_hdr_is_refused(tmp_path):
  path = tmp_path / "a.mkv"
  rgba = av.VideoFrame.from_ndarray(transparent(), format="rgba")
  frame = rgba.reformat(format="yuva444p10le")
  tags = {"color_trc": 18, "color_primaries": 9, "colorspace": 9}
  video_files.write(path, [frame] * 2, "ffv1", options={"level": "3"}, **tags)
  for call in (probe.probe, reader.read):
    with pytest.raises(media.ClipError, match="transparent in high dynamic range"):
      call(path)


def test_the_reader_agrees_with_pillow_on_motion_jpeg(tmp_path):
  picture = video_files.corners()
  image = tmp_path / "a.jpg"
  PIL.Image.fromarray(picture).save(image, quality=95, subsampling=2)
  path = tmp_path / "a.mkv"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mjpeg", rate=8)
    stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
    packet = av.Packet(image.read_bytes())
    packet.pts = packet.dts = 0
    packet.time_base, packet.stream = fractions.Fraction(1, 8), stream
    packet.is_keyframe = True
    container.mux(packet)
  assert psnr(reader.read(path)[0], np.asarray(PIL.Image.open(image))) > 33
