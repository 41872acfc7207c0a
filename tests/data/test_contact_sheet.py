"""A contact sheet shows frames and captions of each video."""

import pytest
from data.media_samples import numbered

from sora_jax.data.video import contact_sheet, reader


def test_contact_sheet(tmp_path):
  path = tmp_path / "sheet.png"
  videos = [numbered(9), numbered(1, 32, 96)]
  contact_sheet.write(path, videos, ["a red circle moves right " * 8, "x"])
  sheet = reader.read(path)[0]
  assert sheet.shape[0] > 2 * (48 + 32) and sheet.shape[1] > 6 * 96 * 2
  assert sheet[10, 10].tolist() == [30, 30, 30]
  with pytest.raises(ValueError, match="1 captions for 2 videos"):
    contact_sheet.write(path, videos, ["x"])
