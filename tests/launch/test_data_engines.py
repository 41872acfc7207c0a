"""One data set through every engine, small, by the script that runs 10,000 clips."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
import tiny

sys.path.insert(0, str(tiny.ROOT / "launch" / "benchmarks"))
import data_engines  # noqa: E402
import scene_cuts  # noqa: E402

sys.path.pop(0)

from sora_jax.data.intake import workers  # noqa: E402
from sora_jax.data.video import writer  # noqa: E402


@pytest.mark.slow
def test_every_engine_gives_the_same(tmp_path, monkeypatch):
  """By Beam, too, where it is installed. What processes give is tested elsewhere."""
  monkeypatch.setattr(workers, "cores", lambda: 0)  # none are started
  figures = data_engines.compare(tmp_path, 20, 4)
  assert {"one core", "all cores", "TFDS, made", "TFDS, prepared"} <= {*figures}
  with_beam = importlib.util.find_spec("apache_beam") is not None
  assert ("Beam, two workers" in figures) == with_beam
  # And the comparison sees what differs.
  manifest = tmp_path / "all cores" / "data" / "manifest.jsonl"
  rows = [json.loads(line) for line in manifest.read_text().splitlines()]
  assert len(rows) == 20
  before = data_engines.batches_hash(manifest, 4)
  train = [row for row in rows if row["split"] == "train" and row["frames"] > 5]
  train[0]["start"] += 1 / train[0]["fps"]
  train[0]["frames"] -= 4
  manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert data_engines.batches_hash(manifest, 4) != before
  assert data_engines.facts(manifest) != data_engines.facts(
    pathlib.Path(str(manifest).replace("all cores", "one core"))
  )


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_cuts_are_counted(tmp_path, suffix):
  rng = np.random.default_rng(0)
  scenes = [rng.integers(0, 256, (6, 8, 3), np.uint8).repeat(12, 0).repeat(12, 1)
            for _ in range(3)]  # fmt: skip
  video = np.concatenate([[scene] * 10 for scene in scenes])
  path = tmp_path / f"a{suffix}"
  writer.write(path, video, 10)
  times, cuts = scene_cuts.frame_times(path), (10, 20)
  assert times == pytest.approx([k / 10 for k in range(30)], abs=1e-3)
  said = scene_cuts.said_by(path, scene_cuts.probe.probe(path))
  assert scene_cuts.tally(times, cuts, said["prepare"]) == (2, 2, 2)
  assert scene_cuts.tally(times, cuts, said["FFmpeg, 0.3"]) == (2, 2, 2)
  assert scene_cuts.tally(times, (10, 25), [1.0, 2.0, 2.2]) == (2, 3, 1)
  assert scene_cuts.holding(path, times, cuts, 3.0, 17) == (3, 0)
  assert scene_cuts.holding(path, times, cuts, 0.0, 17) == (2, 2)
