"""High dynamic range, PQ and HLG of BT.2100, as standard; wide primaries as BT.709.

What standard range can show stays as it is: BT.2408 puts its white at 203 cd/m2, and up
to three quarters of that nothing changes. What is brighter, up to 1000 cd/m2 as HLG's
nominal display has it, is pressed into the rest by the curve that FFmpeg calls mobius.
It is one function of the pixel, without the scene's peak: clips cut from one video
match and nothing flickers.
"""

import functools

import numpy as np

PQ, HLG = 16, 18  # FFmpeg's AVColorTransferCharacteristic
WHITE = 203.0  # cd/m2 of standard range's white, BT.2408
PEAK = 1000.0  # cd/m2 that become 255; what is brighter is cut off there
KNEE = 0.75  # share of white up to which nothing changes

_BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
# Linear light to that of BT.709's primaries, by FFmpeg's AVColorPrimaries.
_BT2020_TO_BT709 = (
  (1.660491, -0.587641, -0.072850),
  (-0.124550, 1.132900, -0.008349),
  (-0.018151, -0.100579, 1.118730),
)
_P3_TO_BT709 = (
  (1.224940, -0.224940, 0.0),
  (-0.042057, 1.042057, 0.0),
  (-0.019638, -0.078636, 1.098274),
)
_SAME = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
WIDE = (9, 12)  # those that hold colours which BT.709 has not
# Unspecified is BT.2020: BT.2100 has no other.
PRIMARIES = {1: _SAME, 2: _BT2020_TO_BT709, 9: _BT2020_TO_BT709, 12: _P3_TO_BT709}


def to_sdr(
  signal_HWC: np.ndarray, transfer: int, primaries: int, white: int = 65535
) -> np.ndarray:
  """Maps a frame of high dynamic range to BT.709 for a display of gamma 2.4.

  Args:
    signal_HWC: uint16 [H, W, 3], R'G'B'.
    transfer: PQ or HLG.
    primaries: one of PRIMARIES.
    white: the code of 1.

  Returns:
    uint8 [H, W, 3].
  """
  light_HWC = _light_of(transfer, white)[signal_HWC]
  if transfer == HLG:
    # The display's part: gamma 1.2 of the brightness, BT.2100, table 5.
    luma_HW1 = (light_HWC @ _BT2020_LUMA)[..., None]
    light_HWC *= (PEAK / WHITE) * np.maximum(luma_HW1, 1e-6) ** 0.2
  light_HWC = light_HWC @ np.array(PRIMARIES[primaries], np.float32).T
  # All three are scaled alike, by the brightest, so that colours keep their hue.
  brightest_HW1 = light_HWC.max(axis=-1, keepdims=True)
  light_HWC *= shoulder(brightest_HW1) / np.maximum(brightest_HW1, 1e-6)
  np.clip(light_HWC, 0, 1, out=light_HWC)
  return np.round(255 * light_HWC ** (1 / 2.4)).astype(np.uint8)


def to_bt709(pixels_HWC: np.ndarray, primaries: int) -> np.ndarray:
  """Maps standard range of wider primaries to BT.709's, by light (IEC 61966-2-1).

  Args:
    pixels_HWC: uint8 [H, W, 3], R'G'B'.
    primaries: one of PRIMARIES.

  Returns:
    uint8 [H, W, 3]; colours that BT.709 has not are cut off.
  """
  code = np.arange(256) / 255
  light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
  matrix = np.array(PRIMARIES[primaries], np.float32)
  light_HWC = np.clip(light.astype(np.float32)[pixels_HWC] @ matrix.T, 0, 1)
  low_HWC, high_HWC = 12.92 * light_HWC, 1.055 * light_HWC ** (1 / 2.4) - 0.055
  signal_HWC = np.where(light_HWC <= 0.0031308, low_HWC, high_HWC)
  return np.round(255 * signal_HWC).astype(np.uint8)


def shoulder(light: np.ndarray) -> np.ndarray:
  """Presses light in units of white up to PEAK below 1; below KNEE it is the identity.

  A fraction of first degree that goes on with slope 1 at the knee and reaches 1 at the
  peak, as FFmpeg's `tonemap=mobius`.
  """
  peak = PEAK / WHITE
  a = -KNEE * KNEE * (peak - 1) / (KNEE * KNEE - 2 * KNEE + peak)
  b = (KNEE * KNEE - 2 * KNEE * peak + peak) / (peak - 1)
  scale = (b * b + 2 * b * KNEE + KNEE * KNEE) / (b - a)
  above = np.maximum(light, KNEE)
  return np.where(light <= KNEE, light, scale * (above + a) / (above + b))


@functools.cache
def _light_of(transfer, white):
  """Light of each 16 bit code: PQ's in units of white, HLG's of the scene's peak."""
  code = np.minimum(np.arange(65536) / white, 1)
  if transfer == PQ:
    m1, m2 = 2610 / 16384, 2523 / 32
    c1, c2, c3 = 3424 / 4096, 2413 / 128, 2392 / 128
    root = code ** (1 / m2)
    light = 10000 / WHITE * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
  else:
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
  return light.astype(np.float32)
