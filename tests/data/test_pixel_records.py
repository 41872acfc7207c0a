"""Clips of pixels as packed rows have them: their frames, their captions' styles."""

import pickle

import numpy as np
import pytest
from data.media_samples import noise

from sora_jax.data import pixel_records, tokenizer
from sora_jax.data.caption_texts import StyledCaptionIds
from sora_jax.data.clip_reader import read_clip
from sora_jax.data.clips import Clip
from sora_jax.data.packed_dataset import PackedDataset, PackedOptions
from sora_jax.data.video import writer
from sora_jax.packing import patches
from sora_jax.packing.caption_styles import STYLES
from sora_jax.packing.planner import Budget

CAPTIONS = ("a dot moves", "A grey dot moves from left to right.")
FIRST = 300


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(clips, data set of their rows): a video, an image, and a file that is broken."""
  folder = tmp_path_factory.mktemp("clips")
  clips = []
  for name, frames in (("a.mp4", 9), ("b.png", 1), ("c.mp4", 5)):
    path = folder / name
    writer.write(path, noise(frames, 32, 48), 8.0)
    clips.append(Clip(name, str(path), 0.0, frames, 8.0, 32, 48, CAPTIONS))
  (folder / "c.mp4").write_bytes(b"broken")
  vocabulary = folder / "tokenizer.model"
  tokenizer.train(CAPTIONS, str(vocabulary), FIRST)
  texts = StyledCaptionIds(tokenizer.Tokenizer(str(vocabulary)), 40, FIRST)
  options = PackedOptions(Budget(40, 120, 4), (1, 16, 16), 16.0, 0.0, 0.0, 0.0)
  rows = pixel_records.pixel_clips(clips)
  reader = pickle.loads(pickle.dumps(pixel_records.PixelReader(clips)))
  return clips, PackedDataset(rows, reader, texts, options, 0), texts


def test_frames_are_folded_as_latents_are():
  video_THWC = np.arange(9 * 2 * 3 * 3).reshape(9, 2, 3, 3)
  folded = patches.fold_time(video_THWC, 4)
  assert folded.shape == (3, 2, 3, 12)
  for frame in range(4):
    part = slice(3 * frame, 3 * frame + 3)
    np.testing.assert_array_equal(folded[0, ..., part], video_THWC[0])
    np.testing.assert_array_equal(folded[2, ..., part], video_THWC[5 + frame])
  with pytest.raises(ValueError, match="8 frames"):
    patches.fold_time(video_THWC[:8], 4)


def test_rows_hold_the_pixels_of_clips(made):
  clips, dataset, _ = made
  row = dataset[0]
  assert sorted(row["clip_N"]) == [-1, -1, 0, 1]  # the broken one takes no place
  for segment, index in enumerate(row["clip_N"][row["clip_N"] >= 0], 1):
    video_THWC = read_clip(clips[index])
    patch_LP = row["patch_LP"][row["segment_L"] == segment]
    latent = patches.unpatchify(patch_LP, (len(patch_LP) // 6, 2, 3), (1, 16, 16))
    pixels = np.round((latent + 1) * 127.5).astype(int)
    np.testing.assert_array_equal(pixels[0, ..., :3], video_THWC[0])
    np.testing.assert_array_equal(pixels[-1, ..., 9:], video_THWC[-1])
    t_L = row["position_L3"][row["segment_L"] == segment, 0]
    assert set(t_L) <= {0.0, 2.0, 4.0}  # twice the reference rate's distance


def test_texts_begin_with_their_style(made):
  _, dataset, texts = made
  row = dataset[0]
  for number in (1, 2):
    ids = row["text_S"][row["text_segment_S"] == number]
    style = STYLES[ids[0] - FIRST]
    assert texts.tokenizer.decode(ids[1:]) == CAPTIONS[STYLES.index(style) - 1]
    assert ids[-1] == tokenizer.EOS
  seen = {
    int(i) - FIRST
    for n in range(20)
    for i in dataset[n]["text_S"][dataset[n]["text_position_S"] == 0]
    if i >= FIRST
  }
  assert seen == {1, 2}


def test_long_texts_are_cut_and_lengths_are_those_of_texts(made):
  _, dataset, texts = made
  clip = dataset._clips[0]
  lengths = texts.lengths([clip])
  for caption in (0, 1, -1):
    assert lengths[caption] == len(texts.text(clip, {}, caption))
  long = texts.encode("dot " * 200, "short")
  assert len(long) == 40 and long[0] == FIRST + 1 and long[-1] == tokenizer.EOS
