"""Files that a manifest names and that are gone are found before any work."""

import pytest

from sora_jax.data import presence
from sora_jax.data.clips import Clip


def clips_in(folder, count):
  return [
    Clip(f"c{i}", str(folder / f"{i}.mp4"), 0.0, 9, 8.0, 32, 32) for i in range(count)
  ]


def test_media_that_are_all_gone_are_an_error(tmp_path):
  clips = clips_in(tmp_path / "disk", 200)
  message = (
    rf"^{tmp_path}/disk: none of 64 media files looked at, of 200 in the manifest, is "
    r"there \(first .*disk/0\.mp4\); is the disk mounted"
  )
  with pytest.raises(ValueError, match=message):
    presence.check_media(clips)


def test_media_of_which_some_are_gone_are_a_warning(tmp_path, caplog):
  clips = clips_in(tmp_path, 12)
  for clip in clips[:9]:
    open(clip.path, "w").close()
  presence.check_media(clips[:9])
  assert not caplog.text
  presence.check_media(clips)
  assert "3 of 12 media files looked at, of 12 in the manifest, are gone" in caplog.text
  assert clips[9].path in caplog.text


def test_clips_to_leave_out_must_be_known():
  presence.check_left_out((), ())
  presence.check_left_out(("a",), {"a", "b"})
  with pytest.raises(ValueError, match=r"leave_out: no clip of this run .*'x'"):
    presence.check_left_out(("b", "x"), {"a", "b"})
