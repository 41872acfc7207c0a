"""Where the samples of colour lie between those of brightness.

Most codecs put colour in line with the left pixels, so a reader that centres it shifts
colours by half a pixel. FFmpeg knows what a stream says about it, but PyAV does not
show it, hence the look into H.264's sequence parameters here.
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
  if context.name == "h264":
    # Data that is cut short has no say here: the decoder will complain of it.
    said = h264_location(context.extradata or b"")
    if said is not None:
      return NAMES[said]
  # BT.2100 and BT.2020 have colour in line with the upper left pixels.
  return "topleft" if colorspace == _BT2020 else "left"


def h264_location(extradata: bytes) -> int | None:
  """chroma_sample_loc_type of the sequence parameters; None if they do not say."""
  unit = _sequence_parameters(extradata)
  if unit is None:
    return None
  try:
    location = _location(_Bits(unit[1:]))
  except IndexError:
    return None
  return location if location is not None and location < len(NAMES) else None


def _sequence_parameters(extradata):
  """The first such unit, as in an mp4 (avcC) or as in a stream (Annex B)."""
  if extradata[:1] == b"\x01" and len(extradata) > 8 and extradata[5] & 31:
    length = int.from_bytes(extradata[6:8], "big")
    unit = extradata[8 : 8 + length]
  else:
    units = extradata.split(b"\x00\x00\x01")[1:]
    unit = next((u for u in units if u and u[0] & 31 == 7), None)
  return unit and unit.replace(b"\x00\x00\x03", b"\x00\x00")


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


def _location(bits):
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
  if not bits.take():
    return None
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
