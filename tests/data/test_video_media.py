"""Files that are damaged, cut off or no media are refused, and the error says why."""

import fractions
import pickle

import av
import numpy as np
import pytest
from data.media_samples import noise, sound, write_pts

from sora_jax.data.video import media, probe, reader, writer


def _fails(path, *words, **asked):
  """Both probe and read refuse the file; returns the message of probe."""
  messages = []
  for call in (lambda: probe.probe(path), lambda: reader.read(path, **asked)):
    with pytest.raises(media.ClipError) as error:
      call()
    messages.append(str(error.value))
    assert str(path) in messages[-1]
  for word in words:
    assert word in messages[0]


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
    frames = noise(1 if suffix == ".png" else 30, 48, 48)
    writer.write(whole, frames, 10, crf=20)
    data = whole.read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    _fails(path)
    if suffix != ".png":
      with pytest.raises(media.ClipError, match=r"cut\.\w+"):
        reader.read(path, fps=10, frames=29)
      assert len(reader.read(path, fps=10, frames=5)) == 5  # what is there still reads


def test_mp4_without_its_index(tmp_path):
  path = tmp_path / "cut.mp4"
  write_pts(path, noise(10), np.arange(10), fractions.Fraction(1, 10))
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])  # the index is at the end
  _fails(path, "not a video")


def test_audio_only(tmp_path):
  path = tmp_path / "sound.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=16000, layout="mono")
    container.mux(sound(stream, 1))
  _fails(path, "no video stream")


def test_clip_error_survives_a_process_boundary():
  error = pickle.loads(pickle.dumps(media.ClipError("a.mp4", "too short")))
  assert str(error) == "a.mp4: too short" and error.reason == "too short"
