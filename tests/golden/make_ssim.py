"""Makes ssim.json: structural similarity by scikit-image, for evaluation/quality.py.

pip install scikit-image && python tests/golden/make_ssim.py
"""

import json
import pathlib

import numpy as np

PATH = pathlib.Path(__file__).parent / "ssim.json"


def cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Name -> two uint8 videos [T, H, W, 3]; neither square nor of one size."""
  t, y, x, c = np.meshgrid(
    np.arange(3), np.arange(29), np.arange(40), np.arange(3), indexing="ij"
  )
  wave = 127.5 + 90 * np.sin(x / 3 + t + c) * np.cos(y / 5 - t) + 20 * (x % 7 == 0)
  noise = np.random.default_rng(0).uniform(-1, 1, wave.shape)

  def video(values):
    return np.clip(np.round(values), 0, 255).astype(np.uint8)

  return {
    "equal": (video(wave), video(wave)),
    "a little noise": (video(wave), video(wave + 8 * noise)),
    "much noise": (video(wave), video(wave + 100 * noise)),
    "shifted": (video(wave), video(np.roll(wave, 2, axis=2))),
    "darker": (video(wave), video(0.7 * wave)),
    "negative": (video(wave), video(255 - wave)),
    "flat": (video(0 * wave + 100), video(0 * wave + 120)),
    "one channel differs": (video(wave), video(wave + 60 * noise * (c == 1))),
    "smallest": (video(wave[:1, :11, :11]), video(wave[:1, 8:19, :11])),
  }


def main():
  from skimage.metrics import structural_similarity

  def similarity(a_THWC, b_THWC):
    frames = [
      structural_similarity(
        a_HWC,
        b_HWC,
        channel_axis=-1,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
      )
      for a_HWC, b_HWC in zip(a_THWC, b_THWC, strict=True)
    ]
    return round(float(np.mean(frames)), 8)

  made = {name: similarity(*pair) for name, pair in cases().items()}
  PATH.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
  main()
