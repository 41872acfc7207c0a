"""Copies of clips, and which clips are held out."""

import numpy as np
import PIL.Image
import PIL.ImageFilter
from data.test_intake_measure import LIMITS, moving

from sora_jax.data import clips, sources
from sora_jax.data.intake import (
  filters,
  perceptual_hash,
  split,
)
from sora_jax.data.intake.filters import Filter
from sora_jax.data.intake.measuring import Measuring
from sora_jax.data.video import writer

# --- copies


def test_copies_of_other_sizes_and_qualities(tmp_path):
  folder = tmp_path / "clips"
  for seed in range(4):
    writer.write(folder / f"{seed}.mp4", moving(17, seed), 10)
  big = np.stack([np.asarray(PIL.Image.fromarray(f).resize((256, 192)))
                  for f in moving(17, 2)])  # fmt: skip
  writer.write(folder / "copy.mkv", big, 10, crf=35)
  (folder / "same.mp4").write_bytes((folder / "1.mp4").read_bytes())
  options = {**LIMITS, "how": Measuring(ledger=tmp_path / "measured.jsonl")}
  found, _ = sources.scan(folder, **options)
  assert len(found) == 6
  found, left_out = sources.scan(folder, **options, limits=Filter(copies=3))
  assert [clip.id for clip in found] == ["0", "1", "2", "3"]
  assert {reason for _, reason in left_out} == {
    "clip same is a copy of 1 (config.data.filter.copies)",
    "clip copy is a copy of 2 (config.data.filter.copies)",
  }
  for share in (0.1, 0.3, 0.5):  # copies are on one side
    found, _ = sources.scan(folder, **options, heldout_share=share, heldout_min=1)
    side = {clip.id: clip.split for clip in found}
    assert side["same"] == side["1"] and side["copy"] == side["2"]
    assert {*side.values()} == {"train", "heldout"}


def test_near_hashes_are_grouped_as_all_pairs_would_be():
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 256, (300, 24), np.uint8)
  for i in range(100, 200):  # copies of the first hundred, with 0 to 17 other bits
    bits = np.unpackbits(codes[i - 100])
    bits[rng.choice(192, i % 18, replace=False)] ^= 1
    codes[i] = np.packbits(bits)
  hashes = [code.tobytes().hex() for code in codes]
  differ = np.unpackbits(codes[:, None] ^ codes[None], axis=-1).sum(-1)
  for bits in range(filters.MOST_BITS + 1):
    want = [int(np.flatnonzero(row <= 3 * bits)[0]) for row in differ]
    assert perceptual_hash.groups(hashes, bits).tolist() == want
  assert perceptual_hash.groups(["", "", hashes[0], ""], 3).tolist() == [0, 1, 2, 3]


# --- the held-out clips


def held(found, share, least):
  groups = [
    (clip.path, f"{clip.path}:{i // 2}", f"{i}") for i, clip in enumerate(found)
  ]
  after = split.hold_out(found, groups, share, least)
  return [clip for clip in after if clip.split == "heldout"]


def some(files, pieces=1, frames=17):
  return [
    clips.Clip(f"{i}#{k}", f"{i}", 0.0, frames, 8.0, 64, 64)
    for i in range(files) for k in range(pieces)
  ]  # fmt: skip


def test_a_share_of_clips_is_held_out(caplog):
  with caplog.at_level("INFO", logger="absl"):
    assert 40 <= len(held(some(1000), 0.05, 4)) <= 60
  assert "of 1000 clips (" in caplog.text and "heldout_share 5.0 %" in caplog.text
  assert len(held(some(40), 0.0, 4)) == 4
  assert len(held(some(5), 0.05, 4)) == 1  # at most a quarter
  assert not held(some(40), 0.0, 0)
  # Whole files; the parts of one only where there is no other.
  parts = held(some(10, pieces=6), 0.05, 4)
  assert len(parts) % 6 == 0 and len({clip.path for clip in parts}) == len(parts) // 6
  scene = held(some(1, pieces=12), 0.05, 2)
  assert len(scene) == 2
  assert "all clips are of one video or its copies" in caplog.text


def test_a_video_is_held_out_where_there_are_several():
  for names in range(20):
    images = [clips.Clip(f"{names}-{i}", f"{names}-{i}", 0, 1, 1.0, 8, 8)
              for i in range(40)]  # fmt: skip
    assert any(clip.frames > 1 for clip in held([*images, *some(3)], 0.05, 1))


def test_a_film_among_short_videos_is_trained_on():
  """It is most of the clips, so training would be left with the rest."""
  for names in range(20):
    film, *rest = (f"{names}-{i}" for i in range(3))
    found = [
      clips.Clip(f"{name}#{k}", name, 0.0, 17, 8.0, 64, 64)
      for name, pieces in ((film, 60), *((name, 3) for name in rest))
      for k in range(pieces)
    ]
    assert {clip.path for clip in held(found, 0.4, 4)} == set(rest)
    few = {clip.path for clip in held(found, 0.0, 2)}
    assert len(few) == 1 and few < set(rest)
    # Of images and one video beside it, that video is held out.
    images = [clips.Clip(f"{names}:{i}", f"{i}", 0.0, 1, 1.0, 8, 8) for i in range(20)]
    mixed = [clip for clip in found if clip.path != rest[1]]
    assert rest[0] in {clip.path for clip in held([*mixed, *images], 0.05, 1)}
