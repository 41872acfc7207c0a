"""The cases of the prompting suite fit their results; its tables say what they say."""

import json
import pathlib
import types

import numpy as np
import pytest
import tiny

from sora_jax.data import shapes
from sora_jax.evaluation import heldout, prompting_cases, prompting_suite
from sora_jax.run import recipe as recipes


def cases_of(clips, seed=3, world="whole"):
  """All cases of two clips, by a VAE that changes nothing."""
  autoencoder = types.SimpleNamespace(batch_size=lambda n: n, decode=lambda x: x)
  model = types.SimpleNamespace(autoencoder=autoencoder, encode=lambda x: x)
  return prompting_cases.cases_of(
    model, *clips, seed, heldout.lengths(recipe_of(world))
  )


def recipe_of(world="whole"):
  config = tiny.get_config()
  config.data.world = world
  return recipes.read(config)


@pytest.fixture(scope="module", params=["whole", "simple", "short"])
def world(request):
  return request.param


@pytest.fixture(scope="module")
def clips(world):
  return heldout.drawn_clips(recipe_of(world), 2)


@pytest.fixture(scope="module")
def cases(clips, world):
  return cases_of(clips, world=world)


def test_every_mode_is_a_case(cases, clips):
  assert len(cases) == 18
  for name, case in cases.items():
    job = case.job
    prompt = "" if name == "loop of video" else clips[0].caption
    assert (job.prompt, job.seed, job.fps) == (prompt, 3, clips[0].fps)
    assert case.truth in (None, clips[0].truth)


def frames_of(name, world):
  """Frames that a result has; a gap between two videos, or a loop's, has 11 or 15."""
  whole, given, sampled = {
    "whole": (33, 17, 17), "simple": (17, 9, 17), "short": (9, 5, 9)
  }[world]  # fmt: skip
  gap = max(given - 2, 11)
  return {
    "real": whole, "infill region": whole, "extend after": whole,
    "extend before": 2 * given - 1, "connect": 2 * given + gap,
    "connect parts": whole,
    "loop of video": given + gap, "loop, gap anew": given + gap,
    "interpolate": 2 * given - 1, "loop of text": sampled - 1,
  }.get(name, sampled)  # fmt: skip


def test_what_is_kept_lies_in_the_result(cases, world):
  for name, case in cases.items():
    frames = frames_of(name, world)
    for part, wanted_THWC in (*case.kept, *case.met):
      assert len(range(frames)[part]) == len(wanted_THWC), name
    # A seam is where frames that are kept and frames that are made meet.
    kept = {i for part, _ in case.kept for i in range(frames)[part]}
    for seam in case.seams:
      assert seam in range(frames), name
      if name not in ("real", "text, as a loop", "loop of text"):
        assert len({seam, (seam - 1) % frames} & kept) == 1, (name, seam)
    # What guides is made, at the end of a latent frame.
    for part, _ in case.met:
      assert not kept & set(range(frames)[part]), name


def test_what_is_new_is_beside_what_was_given(cases, world):
  """New frames lie in the result, are none that are kept, and begin at a seam."""
  without = {"text", "text, as a loop", "preview 0.6", "edit 0.6", "infill region"}
  assert {name for name, case in cases.items() if not case.parts} <= without
  for name, case in cases.items():
    frames = range(frames_of(name, world))
    kept = {i for part, _ in case.kept for i in frames[part]}
    for part in case.parts:
      new = frames[part.new]
      assert len(new) >= 4, name
      if name not in ("real", "infill region"):
        assert not set(new) & kept, name
      if part.side and name != "real":
        # Behind what is new comes the frame that it leads to, and then what is kept.
        seam = new[0] if part.side > 0 else (new[-1] + 2) % len(frames)
        middle = name in ("connect", "loop of text", "infill frames")
        images = ("last image", "both images", "connect parts")
        led_to = part.side < 0 and name in images and (new[-1] + 2) >= len(frames)
        assert seam in case.seams or middle or led_to, (name, seam)


def shown(case, video_THWC):
  """What is measured of a case, one value each."""
  measured = prompting_suite.measures_of(case, video_THWC)
  return {name: np.mean(values) for name, values in measured.items()}


def test_the_real_clip_is_a_perfect_result(clips, cases, world):
  """The clip itself, in place of what would be sampled, has all that is measured."""
  whole = clips[0].video_THWC
  for name, result in {
    "real": whole,
    "extend after": whole,
    "first image": whole[: len(whole) // 2 + 1 if world == "whole" else None],
    "infill frames": whole[: len(whole) // 2 + 1 if world == "whole" else None],
  }.items():
    measured = shown(cases[name], result)
    for share in ("identity", "joined", "moves_on", "color", "shape", "count"):
      assert measured[share] == 1.0, (name, share)
    assert measured["kept"] == 100.0
  # All of it: a part of a clip does not show all of a motion.
  assert shown(cases["real"], whole)["motion"] == 1.0


def test_another_object_in_the_sampled_part_is_seen():
  recipe = recipes.read(tiny.get_config())
  (clip,) = heldout.drawn_clips(recipe, 1, ("left", "right", "up", "down"))
  whole, (item, *_) = clip.video_THWC, clip.truth["objects"]
  case = cases_of([clip, clip])["extend after"]
  color = "blue" if item["color"] == "red" else "red"
  other = shapes.draw({**clip.truth, "objects": [{**item, "color": color}]})
  measured = shown(case, np.concatenate([whole[:17], other[17:]]))
  assert measured["identity"] == 0.0 and measured["joined"] == 1.0
  stays = np.repeat(whole[16:17], 16, axis=0)
  measured = shown(case, np.concatenate([whole[:17], stays]))
  assert measured["identity"] == 1.0 and measured["moves_on"] == 0.0


@pytest.mark.slow
def test_a_region_is_judged_where_an_object_crosses_its_border():
  recipe = recipes.read(tiny.get_config())
  for motion, side in {"right": 1, "down": 1, "left": -1, "up": -1, "turn": 0}.items():
    drawn = heldout.drawn_clips(recipe, 2, (motion,))
    regions = [cases_of([clip, clip])["infill region"] for clip in drawn]
    assert len([region for region in regions if region.parts]) == 2 * abs(side), motion
    for region, clip in zip(regions, drawn, strict=True):
      # What is kept is not in the mask, and the mask is the other half.
      assert not region.job.mask[region.region].any() and region.job.mask.mean() == 0.5
      for part in region.parts:
        assert part.side == side
        assert len(part.given) + len(range(33)[part.new]) == 33
        measured = shown(region, clip.video_THWC)
        assert measured["identity"] and measured["moves_on"]


def results():
  share = {"identity": 1.0, "color": 0.5}
  intervals = {"identity": (0.68, 1.0, 8), "color": (0.22, 0.78, 8)}
  row = {"kept": 31.25, "equal": True, "seam": 1.004, "step": 0.9}
  row |= {**share, "intervals": intervals, "seconds": 2.0, "n": 8}
  soft = {"met": 22.0, "equal": None, "seconds": 0.26, "n": 8}
  window = {"histogram": 0.125, "color": 1.0, "shape": 0.5, "identity": 0.75}
  return prompting_suite.Results(
    {"first image": row, "interpolate": soft},
    {0.0: [window] * 2, 0.1: [window] * 2},
    {},
  )


def test_tables():
  modes, drift, _ = results()
  lines = prompting_suite.format_rows(modes)
  assert lines[0].split()[:6] == ["mode", "kept", "met", "equal", "seam", "step"]
  assert lines[2].split()[2:] == [
    *("31.2", "-", "yes", "1.00", "0.90"),
    *("100%", "-", "-", "50%", "-", "-", "-", "2.0", "8"),
  ]
  assert lines[3].split()[1:4] == ["-", "22.0", "-"]
  lines = prompting_suite.format_drift(drift)
  assert lines[0].split() == ["window", "1", "2"]
  assert lines[2].split() == [
    *("drift,", "given_noise", "0:", "colour", "distance", "0.12", "0.12"),
  ]
  assert len(lines) == 2 + 8


def test_markdown():
  lines = prompting_suite.markdown(results()).splitlines()
  table, drift = lines[:4], lines[5:]
  assert lines[4] == "" and len(drift) == 2 + 8
  for part in (table, drift):
    assert len({line.count("|") for line in part}) == 1
    assert set(part[1]) == set("|-:")
  cells = [cell.strip() for cell in table[2].strip("|").split("|")]
  assert cells[0] == "first image" and cells[6] == "100% (68-100)"


# --- the suites, of models alone


def test_the_prompting_suite_needs_no_data(tiny_run, commands, tmp_path):
  log = commands.run(
    "evaluate", f"--config={tiny.__file__}", "--suite=prompting", "--clips=2",
    "--extensions=2", f"--checkpoint={tiny_run.workdir}", f"--workdir={tmp_path}",
  )  # fmt: skip
  folder = tmp_path / "evaluate"
  assert sorted(path.name for path in folder.iterdir()) == [
    "prompting.json", "prompting.md", "prompting.png"
  ]  # fmt: skip
  results = json.loads((folder / "prompting.json").read_text())
  assert len(results["modes"]) == 19
  for name, row in results["modes"].items():
    assert row["n"] == 2 and row["seconds"] > 0 and row["equal"] in (None, True), name
    for share, (low, high, n) in row["intervals"].items():
      assert 0 <= low <= row[share] <= high <= 1 and 1 <= n <= 2, (name, share)
  assert {"identity", "joined", "moves_on"} <= set(results["modes"]["extend after"])
  assert [len(rows) for rows in results["drift"].values()] == [2, 2]
  assert all(0 <= row["identity"] <= 1 for row in results["drift"]["0.0"])
  assert (
    "loop of text" in log and "loop of text" in (folder / "prompting.md").read_text()
  )


def test_the_suite_of_the_vae_needs_no_dit(tiny_run, commands, tmp_path):
  for stage in ("data", "vae"):
    (tmp_path / stage).symlink_to(pathlib.Path(tiny_run.workdir) / stage)
  commands.run(
    "evaluate", f"--config={tiny.__file__}", "--suite=vae", f"--workdir={tmp_path}"
  )
  results = json.loads((tmp_path / "evaluate" / "vae.json").read_text())
  assert results["vae"]["psnr"] > 0 and results["vae"]["latents"]["channels"] == 4
  assert {"color", "shape", "count"} <= set(results["ceiling"])


def test_the_sampling_suite(tiny_run, commands, tmp_path):
  commands.run(
    "evaluate", f"--config={tiny.__file__}", "--suite=sampling", "--guidance=1,3",
    "--steps=1", "--config.evaluate.clips=3", "--config.evaluate.seeds=2",
    f"--checkpoint={tiny_run.workdir}", f"--workdir={tmp_path}",
  )  # fmt: skip
  rows = json.loads((tmp_path / "evaluate" / "sampling.json").read_text())["rows"]
  pairs = [(row["guidance_scale"], row["steps"]) for row in rows]
  assert pairs == [(1.0, 2), (3.0, 2), (3.0, 1)]
  for row in rows:
    assert row["samples"] == 6 and row["seconds_a_sample"] > 0
    assert row["attributes"]["color"]["n"] == 6
  table = (tmp_path / "evaluate" / "sampling.md").read_text().splitlines()
  assert len(table) == 2 + len(rows)


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
