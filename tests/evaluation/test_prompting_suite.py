"""The cases of the prompting suite fit their results; its tables say what they say."""

import types

import numpy as np
import pytest

from sora_jax.data.clips import Clip
from sora_jax.data.video import writer
from sora_jax.evaluation import prompting_cases, prompting_suite

FPS = 8.0
TRUTH = {"count": 1, "occluder": True, "objects": [], "frames": 17}


@pytest.fixture
def cases(tmp_path):
  """All cases of two clips, by a VAE that changes nothing."""
  clips = []
  for seed, name in enumerate("ab"):
    path = tmp_path / f"{name}.mp4"
    rng = np.random.default_rng(seed)
    writer.write(path, rng.integers(0, 256, (17, 64, 64, 3), np.uint8), FPS)
    sizes = (0.0, 17, FPS, 64, 64)
    clips.append(Clip(name, str(path), *sizes, (f"clip {name}",), truth=TRUTH))
  autoencoder = types.SimpleNamespace(batch_size=lambda n: n, decode=lambda x: x)
  model = types.SimpleNamespace(autoencoder=autoencoder, encode=lambda x: x)
  return prompting_cases.cases_of(model, *clips, seed=3)


def test_every_mode_is_a_case(cases):
  assert len(cases) == 17
  for case in cases.values():
    assert case.job.prompt == "clip a" and case.job.seed == 3 and case.job.fps == FPS
    assert case.truth in (None, {**TRUTH, "occluder": False})


# Frames that a result has: 17, and 16 more for 2 seconds, of which a gap between two
# videos, or a loop's, has 15.
LENGTHS = {
  "extend after": 33, "extend before": 33, "connect": 49, "loop of video": 32,
  "loop, gap anew": 32, "interpolate": 33, "text, as a loop": 17, "loop of text": 16,
}  # fmt: skip


def test_what_is_kept_lies_in_the_result(cases):
  for name, case in cases.items():
    frames = LENGTHS.get(name, 17)
    for part, wanted_THWC in case.kept:
      assert len(range(frames)[part]) == len(wanted_THWC), name
    # Seams between frames that are kept would say nothing.
    kept = {i for part, _ in case.kept for i in range(frames)[part]}
    for seam in case.seams:
      assert seam in range(frames), name
      if name != "real":
        assert not {seam, (seam - 1) % frames} <= kept, (name, seam)


def test_tables():
  row = {"kept": 31.25, "equal": True, "soft": False, "seam": 1.004, "step": 0.9}
  row |= {"color": 1.0, "shape": 0.5, "seconds": 2.0, "n": 8}
  soft = {"kept": 22.0, "equal": None, "soft": True, "seconds": 0.26, "n": 8}
  lines = prompting_suite.format_rows({"first image": row, "interpolate": soft})
  assert lines[0].split()[:3] == ["mode", "kept", "equal"]
  assert lines[2].split()[2:] == [
    *("31.2", "yes", "1.00", "0.90"),
    *("100%", "50%", "-", "2.0", "8"),
  ]
  assert lines[3].split()[1:3] == ["(22.0)", "-"]
  windows = [{"histogram": 0.125, "color": 1.0, "shape": 0.5}] * 2
  lines = prompting_suite.format_drift({0.0: windows, 0.1: windows})
  assert lines[0].split() == ["window", "1", "2"]
  assert lines[2].split() == [
    "drift,",
    "given_noise",
    "0:",
    "histogram",
    "0.12",
    "0.12",
  ]
  assert len(lines) == 2 + 6


# --- the measures


def test_seam_ratio():
  frames = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones(
    (1, 4, 4, 3), np.uint8
  )
  assert prompting_suite.seam_ratio(frames, 3) == 1.0
  assert prompting_suite.seam_ratio(frames, 0) == 7.0
  frames[5:] += 4
  assert prompting_suite.seam_ratio(frames, 5) == 5.0
  assert prompting_suite.seam_ratio(frames, 4, [5]) == 0.2
  assert prompting_suite.alike(17, 5) == [1, 9, 13]
  assert prompting_suite.alike(16, 0, (8,)) == [4, 12]


def test_histogram_distance():
  black, white = np.zeros((2, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
  assert prompting_suite.histogram_distance(black, black) == 0.0
  assert prompting_suite.histogram_distance(black, white) == 1.0
