"""Clips measured, and made a TFDS data set, by Apache Beam; as without it."""

import json
import pathlib

import pytest
import tensorflow_datasets as tfds
import tiny
from data import test_intake_measure as intake

from sora_jax.data import clips, sources, tfds_examples
from sora_jax.data.intake import ledger, workers
from sora_jax.data.intake.measuring import Measuring
from sora_jax.data.tfds_builder import SoraClips

beam = pytest.importorskip(
  "apache_beam", reason="Apache Beam is not installed: pip install '.[beam]'"
)
from sora_jax.data.intake import beam_pipeline  # noqa: E402

RUNNER = "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"
HERE = (RUNNER,)  # in a thread of this process
TWO = (RUNNER, "--direct_running_mode=multi_processing", "--direct_num_workers=2")


def by_beam(folder, ledger_path, **options):
  how = Measuring(ledger=ledger_path, beam=HERE, **options)
  found, left_out = sources.scan(folder, **intake.LIMITS, how=how)
  assert not list(ledger_path.with_name("beam").iterdir())  # all is taken
  return found, left_out


def test_prepare_gives_the_same_manifest_with_two_workers(commands, tmp_path):
  intake.make_folder(tmp_path / "clips")
  config = [f"--config={tiny.__file__}", f"--config.data.source={tmp_path}/clips"]
  for name, flags in (("cores", ()), ("beam", ("--beam", "--", *TWO))):
    commands.run("prepare", *config, f"--workdir={tmp_path / name}", *flags)
  cores, other = (tmp_path / name / "data" for name in ("cores", "beam"))
  for name in ("manifest.jsonl", "rejected.jsonl"):
    assert (cores / name).read_bytes() == (other / name).read_bytes()
  assert len(clips.read_manifest(other / "manifest.jsonl")) == 6
  # The second time nothing is left to do, and no pipeline starts.
  wrong = ("--beam", "--", "--runner=NoSuchRunner")
  commands.run("prepare", *config, f"--workdir={tmp_path / 'beam'}", *wrong)
  log = commands.run("prepare", *config, f"--workdir={tmp_path / 'new'}", *wrong,
                     returncode=1)  # fmt: skip
  assert "Unexpected pipeline runner: NoSuchRunner" in log


def test_scores_and_reasons_are_the_same(scored, tmp_path):
  folder, module = scored
  (folder / "bad.mp4").write_bytes(b"no video")
  score = f"{module}:light"
  want = sources.scan(folder, **intake.LIMITS, how=Measuring(score_fn=score))
  found = by_beam(folder, tmp_path / "measured.jsonl", score_fn=score)
  assert intake.as_rows(found[0]) == intake.as_rows(want[0]) and found[1] == want[1]
  assert found[0][0].measured["scores"]["texts"] == 2
  with pytest.raises(ValueError, match="no such model"):
    by_beam(folder, tmp_path / "measured.jsonl", score_fn=f"{module}:wrong")
  assert not list((tmp_path / "beam").glob("jobs-*"))


scored = intake.scored


def test_a_decoder_that_crashes_costs_its_file(tmp_path, monkeypatch):
  intake.make_folder(tmp_path / "clips", 3)
  intake.crash_at(tmp_path, "1.mp4", monkeypatch)
  found, left_out = by_beam(tmp_path / "clips", tmp_path / "measured.jsonl")
  assert [clip.id for clip in found] == ["0", "2"]
  reasons = {pathlib.Path(path).name: reason for path, reason in left_out}
  assert "crashed the process that measured it (SIGABRT)" in reasons["1.mp4"]
  # A crash is no result that stays, as without Beam.
  monkeypatch.undo()
  assert len(by_beam(tmp_path / "clips", tmp_path / "measured.jsonl")[0]) == 3


def jobs_of(folder):
  paths = sorted(folder.glob("*.mp4"))
  return [{"do": "measure", "path": str(p), "key": p.name} for p in paths]


def test_what_an_earlier_pipeline_has_left_is_taken(tmp_path):
  intake.make_folder(tmp_path / "clips", 3)
  jobs, place = jobs_of(tmp_path / "clips"), tmp_path / "beam"
  place.mkdir()
  rows = [
    {"key": "0.mp4", "version": ledger.version(), "result": {"record": "kept"}},
    {"key": "gone", "version": ledger.version(), "result": {"record": "of no use"}},
    {"key": "1.mp4", "version": ["0"], "result": {"record": "of other figures"}},
  ]
  (place / "done-x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (place / "done-y.jsonl.tmp").write_text('{"key": "2.mp4", "vers')  # being written
  results = {job["key"]: r for job, r in beam_pipeline.run(jobs, HERE, place)}
  assert results.pop("0.mp4") == {"record": "kept"}
  assert results == {job["key"]: workers.do(job) for job in jobs[1:]}
  assert [path.name for path in place.iterdir()] == ["done-y.jsonl.tmp"]


def test_a_pipeline_that_nobody_waits_for_does_nothing_more(tmp_path, monkeypatch):
  intake.make_folder(tmp_path / "clips", 2)
  monkeypatch.setattr(beam_pipeline, "_KEPT", 1)
  path = tmp_path / "jobs-x.jsonl"
  path.touch()
  worker = beam_pipeline.DoJobs(str(path), ledger.version())
  worker.setup()
  worker.start_bundle()
  job = json.dumps(jobs_of(tmp_path / "clips")[0])
  worker.process(job)
  path.unlink()
  worker.process(job)  # it looks after each file of results
  worker.start_bundle()
  worker.process(job)
  worker.finish_bundle()
  worker.teardown()
  assert len(list(tmp_path.glob("done-*.jsonl"))) == 2
  with pytest.raises(RuntimeError, match="a worker measures by .* install the same"):
    beam_pipeline.DoJobs(str(path), ["0"]).setup()


def test_results_that_do_not_arrive(tmp_path, monkeypatch):
  """As of workers that do not share the folder."""
  intake.make_folder(tmp_path / "clips", 1)
  monkeypatch.setattr(beam_pipeline.DoJobs, "process", lambda self, line: None)
  with pytest.raises(RuntimeError, match=r"2 of 2 results are not in .*--temp_loc"):
    list(beam_pipeline.run(jobs_of(tmp_path / "clips"), HERE, tmp_path / "beam"))


def test_temp_location_is_where_results_are(tmp_path):
  intake.make_folder(tmp_path / "clips", 1)
  flags = (*HERE, f"--temp_location={tmp_path}/shared")
  jobs = jobs_of(tmp_path / "clips")
  for run in ("a", "b"):
    assert len(list(beam_pipeline.run(jobs, flags, tmp_path / run))) == 2
  assert len(list((tmp_path / "shared").iterdir())) == 2  # one for each run
  assert not (tmp_path / "a").exists()


def test_a_tfds_data_set_by_beam(tmp_path):
  intake.make_folder(tmp_path / "clips", 5)
  found, _ = sources.scan(tmp_path / "clips", **intake.LIMITS, heldout_min=1)
  clips.write_manifest(tmp_path / "manifest.jsonl", found)
  options = beam.options.pipeline_options.PipelineOptions([*HERE])
  built = []
  for name, config in (
    ("alone", tfds.download.DownloadConfig()),
    ("beam", tfds.download.DownloadConfig(beam_options=options)),
  ):
    builder = SoraClips(
      manifest=str(tmp_path / "manifest.jsonl"), data_dir=str(tmp_path / name),
      file_format="array_record",
    )  # fmt: skip
    builder.download_and_prepare(download_config=config)
    info = tfds_examples.read_info(pathlib.Path(builder.data_dir))
    sizes = {split.name: split.num_examples for split in builder.info.splits.values()}
    examples = {
      (split, i): tfds_examples.read_example(info, split, i)
      for split, count in sizes.items()
      for i in range(count)
    }
    built.append((sizes, examples))
  assert built[0] == built[1] and sum(built[0][0].values()) == 5
