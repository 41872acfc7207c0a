"""Where the samples of colour lie between those of brightness.

Most codecs put colour in line with the left pixels, so a reader that centres it shifts
colours by half a pixel. FFmpeg knows what a stream says about it, but PyAV does not
show it, hence the look into the sequence parameters of H.264, HEVC and AV1 here.
"""

import av

# FFmpeg's names, in the order of H.264's chroma_sample_loc_type.
NAMES = ("left", "center", "topleft", "top", "bottomleft", "bottom")
# Codecs whose specification centres colour as JPEG does.
_CENTERED = ("mjpeg", "mpeg1video", "theora")
_BT2020 = 9
# Profiles whose sequence parameters name their chroma format.
_HIGH = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)


def of(stream: av.VideoStream, colorspace: int) -> str:
  """The siting of a stream, by FFmpeg's name; its codec's default if it is not said."""
  context = stream.codec_context
  if context.name in _CENTERED:
    return "center"
  said = location(context.codec.canonical_name, context.extradata or b"")
  if said is not None:
    return NAMES[said]
  # BT.2100 and BT.2020 have colour in line with the upper left pixels.
  return "topleft" if colorspace == _BT2020 else "left"


def location(codec: str, extradata: bytes) -> int | None:
  """chroma_sample_loc_type of H.264, HEVC and AV1; None where it is not said.

  Data that is cut short has no say: the decoder will complain of it.
  """
  try:
    if codec == "av1":
      # av1C: its chroma_sample_position is unknown, left or top left.
      version, said = extradata[0], extradata[2] & 3
      return {1: 0, 2: 2}.get(said) if version == 0x81 else None
    if codec == "h264":
      unit = _h264_parameters(extradata)
      found = unit and _h264_location(_Bits(unit[1:]))
    elif codec == "hevc":
      unit = _hevc_parameters(extradata)
      found = unit and _hevc_location(_Bits(unit[2:]))
    else:
      return None
  except IndexError:
    return None
  return found if isinstance(found, int) and found < len(NAMES) else None


def _h264_parameters(extradata):
  """The first sequence parameters, as in an mp4 (avcC) or a stream (Annex B)."""
  if extradata[:1] == b"\x01" and len(extradata) > 8 and extradata[5] & 31:
    length = int.from_bytes(extradata[6:8], "big")
    return _unescaped(extradata[8 : 8 + length])
  return _in_stream(extradata, lambda unit: unit[0] & 31 == 7)


def _hevc_parameters(extradata):
  """The first sequence parameters, as in an mp4 (hvcC) or a stream."""
  if extradata[:1] != b"\x01":
    return _in_stream(extradata, lambda unit: unit[0] >> 1 & 63 == 33)
  at = 23
  for _ in range(extradata[22]):
    kind, count = extradata[at] & 63, int.from_bytes(extradata[at + 1 : at + 3], "big")
    at += 3
    for _ in range(count):
      length = int.from_bytes(extradata[at : at + 2], "big")
      if kind == 33:
        return _unescaped(extradata[at + 2 : at + 2 + length])
      at += 2 + length
  return None


def _in_stream(extradata, wanted):
  units = extradata.split(b"\x00\x00\x01")[1:]
  return _unescaped(next((u for u in units if u and wanted(u)), b""))


def _unescaped(unit):
  return unit.replace(b"\x00\x00\x03", b"\x00\x00")


class _Bits:
  """Reads bits and Exp-Golomb numbers; IndexError at the end."""

  def __init__(self, data):
    self._bits = "".join(f"{byte:08b}" for byte in data)
    self._at = 0

  def take(self, count=1):
    self._at += count
    if self._at > len(self._bits):
      raise IndexError(self._at)
    return int(self._bits[self._at - count : self._at] or "0", 2)

  def golomb(self, times=1):
    value = 0
    for _ in range(times):
      zeros = 0
      while not self.take():
        zeros += 1
      value = (1 << zeros) - 1 + self.take(zeros)
    return value

  def signed(self):
    value = self.golomb()
    return (value + 1) // 2 if value % 2 else -(value // 2)


def _h264_location(bits):
  """Walks H.264, 7.3.2.1.1 and E.1.1, up to chroma_sample_loc_type_top_field."""
  profile = bits.take(8)
  bits.take(16)
  bits.golomb()
  if profile in _HIGH:
    _skip_high(bits)
  bits.golomb()
  order = bits.golomb()
  if order == 0:
    bits.golomb()
  elif order == 1:
    bits.take()
    bits.golomb(2)
    bits.golomb(bits.golomb())
  bits.golomb()
  bits.take()
  bits.golomb(2)  # the size
  if not bits.take():  # fields
    bits.take()
  bits.take()
  if bits.take():
    bits.golomb(4)  # the crop
  return _usability_location(bits) if bits.take() else None


def _usability_location(bits):
  """The beginning of VUI parameters, which is the same in H.264 and HEVC."""
  if bits.take() and bits.take(8) == 255:  # the pixel's shape
    bits.take(32)
  if bits.take():  # overscan
    bits.take()
  if bits.take():  # the signal
    bits.take(4)
    if bits.take():
      bits.take(24)
  return bits.golomb() if bits.take() else None


def _skip_high(bits):
  """Chroma format, depths and scaling lists of the high profiles."""
  chroma = bits.golomb()
  if chroma == 3:
    bits.take()
  bits.golomb(2)
  bits.take()
  if not bits.take():
    return
  for index in range(12 if chroma == 3 else 8):
    if not bits.take():
      continue
    last = following = 8
    for _ in range(16 if index < 6 else 64):
      if following:
        following = (last + bits.signed()) % 256
      last = following or last


def _hevc_location(bits):
  """Walks HEVC, 7.3.2.2 and E.2.1, up to chroma_sample_loc_type_top_field."""
  bits.take(4)
  layers = bits.take(3)  # more than one
  bits.take()
  _skip_profiles(bits, layers)
  bits.golomb()
  if bits.golomb() == 3:
    bits.take()
  bits.golomb(2)  # the size
  if bits.take():
    bits.golomb(4)  # the crop
  bits.golomb(2)
  order_bits = bits.golomb() + 4
  bits.golomb(3 * (layers + 1 if bits.take() else 1))
  bits.golomb(6)  # sizes of blocks
  if bits.take() and bits.take():
    _skip_scaling(bits)
  bits.take(2)
  if bits.take():  # blocks without prediction
    bits.take(8)
    bits.golomb(2)
    bits.take()
  _skip_references(bits, bits.golomb())
  if bits.take():  # references far back
    bits.take((order_bits + 1) * bits.golomb())
  bits.take(2)
  return _usability_location(bits) if bits.take() else None


def _skip_profiles(bits, layers):
  bits.take(96)
  present = [(bits.take(), bits.take()) for _ in range(layers)]
  bits.take(2 * (8 - layers) if layers else 0)
  for profile, level in present:
    bits.take(88 * profile + 8 * level)


def _skip_scaling(bits):
  for size in range(4):
    for _ in range(2 if size == 3 else 6):
      if not bits.take():
        bits.golomb()
      else:
        bits.golomb((size > 1) + min(64, 16 << 2 * size))


def _skip_references(bits, sets):
  """Sets of reference pictures, of which one may be told by the one before it."""
  distances: list[int] = []
  for index in range(sets):
    if index and bits.take():
      sign = -1 if bits.take() else 1
      shift = sign * (bits.golomb() + 1)
      # Each has the flags "used" and, where it is not, "kept".
      kept = [d + shift for d in [*distances, 0] if bits.take() or bits.take()]
    else:
      kept, counts = [], (bits.golomb(), bits.golomb())
      for direction, count in zip((-1, 1), counts, strict=True):
        distance = 0
        for _ in range(count):
          distance += direction * (bits.golomb() + 1)
          bits.take()
          kept.append(distance)
    before = sorted((d for d in kept if d < 0), reverse=True)
    distances = before + sorted(d for d in kept if d > 0)
