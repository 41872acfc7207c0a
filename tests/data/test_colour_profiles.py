"""Images with an ICC profile or colour tags, against what these mean by formulas."""

import itertools
import struct

import numpy as np
import PIL.Image
import pytest
from absl import logging
from PIL import ImageCms

from sora_jax.data.video import images, media, reader

WHITE = (0.3127, 0.3290)
P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
BT2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
# Bradford's adaptation of D65 to the white of profiles, D50 (ICC.1, annex E).
TO_D50 = np.array(
  [
    [1.047886, 0.022919, -0.050216],
    [0.029582, 0.990484, -0.017079],
    [-0.009252, 0.015073, 0.751678],
  ]
)
COLOURS = [(200, 40, 60), (30, 180, 90), (60, 70, 220), (128, 128, 128), (250, 240, 10),
           (0, 0, 0), (255, 255, 255), (180, 140, 120)]  # fmt: skip


def to_xyz(primaries):
  """Linear RGB to XYZ by the definition of primaries and white."""
  xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
  x, y = WHITE
  return xyz * np.linalg.solve(xyz, [x / y, 1, (1 - x - y) / y])


def profile(space, tags, kind=b"mntr", between=b"XYZ "):
  """An ICC profile of version 2 with these tags, into a space between devices."""
  table, body = b"", b""
  start = 128 + 4 + 12 * len(tags)
  for name, data in tags.items():
    table += name + struct.pack(">II", start + len(body), len(data))
    body += data + bytes(-len(data) % 4)
  content = struct.pack(">I", len(tags)) + table + body
  header = struct.pack(">I4sI4s4s4s", 128 + len(content), b"", 0x02400000, kind,
                       space, between)  # fmt: skip
  header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249)
  return header + bytes(128 - len(header)) + content


def fixed(*values):
  return struct.pack(f">{len(values)}i", *(round(65536 * v) for v in values))


def curve(gamma):
  return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))


def rgb_profile(primaries, gamma=2.2):
  tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)}
  columns = (TO_D50 @ to_xyz(primaries)).T
  for letter, column in zip(b"rgb", columns, strict=True):
    tags[bytes([letter]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*column)
    tags[bytes([letter]) + b"TRC"] = curve(gamma)
  return profile(b"RGB ", tags)


GREY = profile(b"GRAY", {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249),
                         b"kTRC": curve(1.0)})  # fmt: skip


def cmyk_profile(colour_of):
  """An ICC profile whose inks, all or nothing of each, make colours of sRGB.

  colour_of: (c, m, y, k), each 0 or 1 -> (r, g, b), 0 to 255.
  """
  grid = [colour_of(*inks) for inks in itertools.product((0, 1), repeat=4)]
  lab = encoded_lab(np.array(grid))
  line = bytes(range(256))
  table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
  table += fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + 4 * line + lab.tobytes() + 3 * line
  tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249), b"A2B0": table}
  return profile(b"CMYK", tags, b"prtr", b"Lab ")


def encoded_lab(colours):
  """Colours of sRGB as bytes of CIE L*a*b* under D50 (ICC.1, 10.10)."""
  xyz = decoded(colours) @ (TO_D50 @ to_xyz(SRGB)).T / (0.9642, 1.0, 0.8249)
  f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
  x, y, z = f.T
  lab = np.stack([(116 * y - 16) * 255 / 100, 500 * (x - y) + 128, 200 * (y - z) + 128])
  return np.round(np.clip(lab.T, 0, 255)).astype(np.uint8)


def decoded(colours):
  """Linear numbers of sRGB's, 0 to 255 (IEC 61966-2-1)."""
  signal = colours / 255
  return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def encoded(linear):
  """sRGB's numbers of linear ones, 0 to 255 (IEC 61966-2-1)."""
  linear = np.clip(linear, 0, 1)
  signal = np.where(
    linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055
  )
  return 255 * signal


def wanted(colours, primaries, gamma=2.2):
  linear = (np.array(colours) / 255) ** gamma
  return encoded(linear @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries)).T)


def picture(colours=COLOURS, mode="RGB"):
  """Squares of 8 pixels, one of each colour."""
  values = np.array(colours, np.uint8).repeat(8, 0)[None].repeat(8, 0)
  return PIL.Image.fromarray(values).convert(mode)


def squares(frame_HWC):
  return frame_HWC[4, 4::8].astype(float)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff", ".avif"])
@pytest.mark.parametrize("primaries", [P3, ADOBE])
def test_colours_are_those_that_a_browser_shows(tmp_path, suffix, primaries):
  path = tmp_path / f"a{suffix}"
  options = {
    ".jpg": {"quality": 100, "subsampling": 0},
    ".avif": {"quality": 100, "subsampling": "4:4:4"},
    ".webp": {"lossless": True},
  }.get(suffix, {})
  picture().save(path, icc_profile=rgb_profile(primaries), **options)
  error = np.abs(squares(reader.read(path)[0]) - wanted(COLOURS, primaries))
  assert error.max() <= (1.5 if suffix in (".png", ".webp", ".tiff") else 6)
  # Without the profile they are far from it.
  assert np.abs(np.array(COLOURS) - wanted(COLOURS, primaries)).max() > 15


def test_a_photograph_of_a_phone(tmp_path):
  heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
  heif.register_heif_opener()
  path = tmp_path / "a.heic"
  picture().save(path, icc_profile=rgb_profile(P3), quality=-1, chroma=444)
  error = np.abs(squares(reader.read(path)[0]) - wanted(COLOURS, P3))
  assert error.max() <= 6


def tag(path, primaries, transfer):
  """Says by other numbers of H.273 what the file's colours are."""
  data = path.read_bytes()
  before, kind, after = data.partition(b"colrnclx")
  assert kind
  path.write_bytes(before + kind + struct.pack(">HH", primaries, transfer) + after[4:])


def save_tagged(path, made, primaries, transfer):
  if path.suffix == ".heic":
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    heif.register_heif_opener()
    made.save(path, quality=-1, chroma=444)
  else:
    made.save(path, quality=100, subsampling="4:4:4")
  tag(path, primaries, transfer)


@pytest.mark.parametrize("suffix", [".avif", ".heic"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("number, primaries", [(12, P3), (9, BT2020)])
def test_colours_that_are_told_by_numbers(tmp_path, suffix, mode, number, primaries):
  path, made = tmp_path / f"a{suffix}", picture()
  if mode == "RGBA":
    made.putalpha(255)
  save_tagged(path, made, number, 13)
  linear = decoded(np.array(COLOURS))
  want = encoded(linear @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries)).T)
  assert np.abs(squares(reader.read(path)[0]) - want).max() <= 6
  assert np.abs(np.array(COLOURS) - want).max() > 15


def test_a_profile_says_more_than_numbers(tmp_path):
  path = tmp_path / "a.avif"
  options = {"quality": 100, "subsampling": "4:4:4"}
  picture().save(path, icc_profile=rgb_profile(P3), **options)
  tag(path, 9, 16)
  assert np.abs(squares(reader.read(path)[0]) - wanted(COLOURS, P3)).max() <= 6


@pytest.mark.parametrize("suffix", [".avif", ".heic"])
def test_an_image_of_high_dynamic_range(tmp_path, suffix):
  """Half of standard range's white, 203 cd/m2, by PQ (BT.2100, table 4)."""
  path = tmp_path / f"a{suffix}"
  m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
  y = (0.5 * 203 / 10000) ** m1
  code = round(255 * ((c1 + c2 * y) / (1 + c3 * y)) ** m2)
  save_tagged(path, picture([(code,) * 3] * 8), 9, 16)
  want = 255 * 0.5 ** (1 / 2.4)
  assert np.abs(squares(reader.read(path)[0]) - want).max() <= 4
  assert abs(code - want) > 40


@pytest.mark.parametrize(
  "primaries, transfer, reason",
  [(1, 8, "transfer 8 of H.273"), (10, 13, "primaries 10 of H.273")],
)
def test_numbers_that_nothing_knows(tmp_path, primaries, transfer, reason):
  path = tmp_path / "a.avif"
  save_tagged(path, picture(), primaries, transfer)
  with pytest.raises(media.ClipError, match=reason):
    reader.read(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_all_modes_have_their_colours(tmp_path, mode):
  path, made = tmp_path / "a.png", picture(mode=mode)
  given = made.convert("RGB")
  if mode == "RGBA":
    made.putalpha(128)
  made.save(path, icc_profile=rgb_profile(ADOBE))
  want = wanted(squares(np.asarray(given)), ADOBE)
  if mode == "RGBA":  # over white, once it is sRGB
    want = (want * 128 + 255 * 127) / 255
  assert np.abs(squares(reader.read(path)[0]) - want).max() <= 1.5


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_that_is_linear(tmp_path, mode):
  levels = np.arange(0, 256, 32, dtype=np.uint8)
  values = levels.repeat(8)[None].repeat(8, 0)
  made = PIL.Image.fromarray(
    values.astype(np.uint16) * 257 if mode == "I;16" else values
  )
  if mode == "LA":
    made.putalpha(255)
  made.save(tmp_path / "a.png", icc_profile=GREY)
  got = squares(reader.read(tmp_path / "a.png")[0])
  want = encoded(levels / 255)[:, None].repeat(3, 1)
  assert np.abs(got - want).max() <= 1.5


@pytest.mark.parametrize("suffix", [".jpg", ".tiff"])
def test_inks_of_a_press(tmp_path, suffix):
  """Those of a press are duller than Pillow's, which has 0, 255, 255 for cyan."""

  def colour_of(*amounts):
    colour = np.full(3, 255.0)
    inks = ((0, 150, 230), (220, 20, 130), (250, 235, 30), (60, 60, 60))
    for amount, ink in zip(amounts, inks, strict=True):
      colour *= np.array(ink) / 255 if amount else 1
    return np.round(colour)

  inks = np.array(list(itertools.product((0, 1), repeat=4)))
  values = (255 * inks).astype(np.uint8).repeat(8, 0)[None].repeat(8, 0)
  made = PIL.Image.fromarray(values, "CMYK")
  options = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
  path = tmp_path / f"a{suffix}"
  made.save(path, icc_profile=cmyk_profile(colour_of), **options)
  error = np.abs(squares(reader.read(path)[0]) - [colour_of(*each) for each in inks])
  assert error.max() <= 6  # bytes of L*a*b* are coarse
  made.save(path, **options)
  plain = squares(reader.read(path)[0])
  assert np.abs(plain[inks.sum(1) == 0] - 255).max() <= 2
  assert np.abs(plain[inks[:, 3] == 1]).max() <= 2


def test_srgb_keeps_its_very_numbers(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
  PIL.Image.fromarray(noise).save(tmp_path / "a.png", icc_profile=srgb)
  np.testing.assert_array_equal(images.read(tmp_path / "a.png"), noise)


def test_profiles_that_are_broken_are_ignored_with_one_warning(tmp_path, caplog):
  good = rgb_profile(P3)
  broken = {
    "short": good[:100],
    "noise": np.random.default_rng(0).bytes(500),
    "no curves": good.replace(b"TRC", b"xxx"),
    "of grey": GREY,
  }
  noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  logging._log_counter_per_token.clear()
  for name, content in broken.items():
    path = tmp_path / f"{name}.png"
    PIL.Image.fromarray(noise).save(path, icc_profile=content)
    np.testing.assert_array_equal(images.read(path), noise, err_msg=name)
  (warning,) = [r.getMessage() for r in caplog.records if "profile" in r.getMessage()]
  assert "short.png: its colour profile cannot be used" in warning
