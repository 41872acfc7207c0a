"""Each field of a config says what a change of it does, and stages do that."""

import dataclasses
import json

import pytest
import sealed
from run.fake_stages import ALL, BASE, change

from sora_jax.data.intake.filters import Filter
from sora_jax.run import recipe as recipes
from sora_jax.run import stages
from sora_jax.runtime import fields

TRAIN = {
  "steps": "extends", "grad_accumulation": "free", "log_every": "free",
  "eval_every": "free", "save_every": "free", "keep": "free",
  "keep_every": "free", "keep_best": "free", "save_failures": "free",
  "max_skipped": "free", "spike_threshold": "free", "deadline": "free",
  "rollback_threshold": "free", "max_rollbacks": "free",
}  # fmt: skip
# Every key whose change is no reason to make a stage anew; a section: all keys in it.
DOCUMENTED = {
  "mesh": "free",
  "profile": "free",
  "stages": "free",
  "precision": "free",
  "matmul_precision": "free",
  "replay": "free",
  "data.workers": "free",
  "data.leave_out": "free",
  "data.max_unreadable": "free",
  "data.cut_threshold": "extends",
  "data.crop_borders": "extends",
  "data.score_fn": "extends",
  **{f"data.filter.{field.name}": "extends" for field in dataclasses.fields(Filter)},
  "data.cache": "free",
  "data.beam": "free",
  "vae.eval_batches": "free",
  "encode.batch_size": "free",
  "encode.devices_per_clip": "free",
  "encode.frame_buckets": "free",
  "dit.model.remat": "free",
  "dit.eval_batches": "free",
  "captioner.model.remat": "free",
  "captioner.eval_batches": "free",
  "expander.eval_batches": "free",
  "encode.stream_frames": "free",
  "evaluate.captioner": "extends",
  "sample.prompts": "extends",
  "sample.rows": "free",
  "evaluate.clips": "extends",
  "evaluate.seeds": "extends",
  "evaluate.split": "extends",
  **{f"vae.train.{key}": kind for key, kind in TRAIN.items()},
  **{f"dit.train.{key}": kind for key, kind in TRAIN.items()},
  **{f"captioner.train.{key}": kind for key, kind in TRAIN.items()},
  **{f"expander.train.{key}": kind for key, kind in TRAIN.items()},
}


def kinds(section, path=()):
  """Key -> kind of every field that is no section, and of sections that are free."""
  for field in dataclasses.fields(section):
    key, value = (*path, field.name), getattr(section, field.name)
    kind = fields.change_of(field)
    assert kind in (fields.FREE, fields.EXTENDS, fields.REMAKES), key
    if dataclasses.is_dataclass(value) and kind != fields.FREE:
      assert kind == fields.REMAKES, key
      yield from kinds(value, key)
    else:
      yield ".".join(key), kind


def test_every_field_is_of_the_kind_that_is_documented():
  found = dict(kinds(BASE))
  assert len(found) > 100
  assert {k: v for k, v in found.items() if v != fields.REMAKES} == DOCUMENTED


def rerun(workdir, before, path, value):
  """The names that run after a key of a finished run has changed."""
  recipe = change(BASE, path, value)
  before.clear()
  stages.run(ALL, recipe, workdir)
  again = list(before)
  before.clear()
  stages.run(ALL, recipe, workdir)
  assert not before  # all is complete again
  return again


@pytest.mark.parametrize(
  "path, value, again",
  [
    # The samples and numbers of another model are other ones.
    ("dit.train.steps", 20, ["dit", "sample", "evaluate"]),
    ("sample.prompts", (("a star", (64, 64), 17, 12.0),), ["sample"]),
    ("sample.steps", 5, ["sample", "evaluate"]),
    ("evaluate.clips", 5, ["evaluate"]),
    ("dit.model.remat", "full", []),
    ("dit.train.log_every", 3, []),
    ("mesh.context", 2, []),
    ("precision", "bfloat16", []),
  ],
)
def test_what_a_finished_run_does(runs, tmp_path, path, value, again):  # noqa: F811
  stages.run(ALL, BASE, tmp_path)
  assert rerun(tmp_path, runs, path, value) == again


def test_the_log_says_why_a_stage_runs(runs, tmp_path, caplog):  # noqa: F811
  stages.run(ALL, BASE, tmp_path)
  caplog.clear()
  with caplog.at_level("INFO", logger="absl"):
    stages.run(ALL, change(BASE, "dit.train.steps", 20), tmp_path)
  text = "\n".join(caplog.messages)
  assert "stage dit: config.dit.train.steps is 20 and was 10: goes on" in text
  assert f"stage sample: {tmp_path / 'dit'} is not what it was made from: runs" in text


@pytest.fixture
def unfinished(runs, tmp_path):  # noqa: F811
  """A run whose DiT was stopped: of its 10 steps a checkpoint has 8."""
  stages.run(ALL, BASE, tmp_path)
  path = tmp_path / "dit" / "stage.json"
  sealed.rewrite(path, complete=False)
  # Of step 9 there is only what was being written.
  (tmp_path / "dit" / "checkpoints" / "9.orbax-checkpoint-tmp-1").mkdir()
  return tmp_path


@pytest.mark.parametrize("steps", [8, 9, 20])
def test_an_unfinished_stage_takes_other_steps(unfinished, runs, steps):  # noqa: F811
  again = rerun(unfinished, runs, "dit.train.steps", steps)
  assert again == ["dit", "sample", "evaluate"]


def test_refused_steps_of_an_unfinished_stage_are_not_noted(
  unfinished, runs, caplog  # noqa: F811
):  # fmt: skip
  before = {path: path.read_bytes() for path in unfinished.glob("*/stage.json")}
  message = r"config\.dit\.train\.steps is 5, but stage dit .* has trained 8 steps"
  for _ in range(2):
    with pytest.raises(ValueError, match=message):
      stages.run(ALL, change(BASE, "dit.train.steps", 5), unfinished)
  assert before == {path: path.read_bytes() for path in before} and runs == ALL
  # The next try compares with what the stage was made with.
  with caplog.at_level("INFO", logger="absl"):
    stages.run(ALL, change(BASE, "dit.train.steps", 20), unfinished)
  assert "stage dit: config.dit.train.steps is 20 and was 10: goes on" in caplog.text


def test_fewer_steps_of_a_finished_stage(runs, tmp_path):  # noqa: F811
  stages.run(ALL, BASE, tmp_path)
  message = r"config\.dit\.train\.steps is 5, but .* has trained 10 steps already"
  with pytest.raises(ValueError, match=message):
    stages.run(ALL, change(BASE, "dit.train.steps", 5), tmp_path)
  assert runs == ALL


def test_a_longer_vae_does_not_take_the_dit_its_latents(runs, tmp_path):  # noqa: F811
  recipe = change(BASE, "vae.train.steps", 20)
  stages.run(ALL, BASE, tmp_path)
  message = rf"vae was made with 10, and {tmp_path}/encode and {tmp_path}/dit of it"
  message = rf"{tmp_path}/{message}.*delete {tmp_path}/encode and {tmp_path}/dit"
  with pytest.raises(ValueError, match=message):
    stages.run(ALL, recipe, tmp_path)
  assert runs == ALL
  for name in ("encode", "dit"):
    sealed.delete(tmp_path / name / "stage.json")
  stages.run(ALL, recipe, tmp_path)
  assert runs == [*ALL, *ALL[1:]]


def test_other_limits_choose_clips_anew(runs, tmp_path):  # noqa: F811
  """Until a stage is made of the clips; then they stay."""
  recipe = change(BASE, "data.filter.motion", (1.0, 100.0))
  stages.run(["data"], BASE, tmp_path)
  stages.run(["data"], recipe, tmp_path)
  stages.run(ALL, recipe, tmp_path)
  assert runs == ["data", *ALL]
  message = (
    r"config\.data\.crop_borders is True, but .*/vae and .*/encode and .*/dit was made "
    r"of clips that were chosen with False. .* or delete .*/vae"
  )
  with pytest.raises(ValueError, match=message):
    stages.run(ALL, change(recipe, "data.crop_borders", True), tmp_path)
  assert runs == ["data", *ALL]


@pytest.mark.parametrize(
  "path, value, said, unsaid",
  [
    ("dit.model.width", 768, ["cannot help"], ["--config.dit.init_from"]),
    ("dit.train.learning_rate", 1.0, ["--workdir=NEW", "--config.dit.init_from=RUN",
                                      "--config.vae.folder=RUN"], ["cannot"]),
    ("vae.train.learning_rate", 1.0, ["raise config.vae.train.steps"], ["init_from"]),
    ("encode.extras", 1, [], ["init_from", "train.steps"]),
  ],
)  # fmt: skip
def test_a_refusal_says_what_is_possible(
  runs, tmp_path, path, value, said, unsaid  # noqa: F811
):  # fmt: skip
  stages.run(ALL, BASE, tmp_path)
  with pytest.raises(ValueError) as error:
    stages.run(ALL, change(BASE, path, value), tmp_path)
  message = str(error.value).replace(str(tmp_path), "RUN")
  name = path.partition(".")[0]
  usual = ("Put it back", "another --workdir", f"delete RUN/{name} to make")
  for text in (*usual, *said):
    assert text in message
  assert not any(text in message for text in unsaid)
  assert runs == ALL


def test_a_run_of_the_version_before(runs, tmp_path):  # noqa: F811
  """Its stage.json holds keys that are free now."""
  recipe = change(BASE, "dit.model.remat", "full")
  stages.run(ALL, recipe, tmp_path)
  for name in ALL:
    path = tmp_path / name / "stage.json"
    stage = json.loads(path.read_text())
    stage["config"]["precision"] = "float32"
    if name == "dit":
      stage["config"]["dit"]["model"]["remat"] = "full"
    if name == "evaluate":
      stage["config"]["sample"]["prompts"] = [["a star", [64, 64], 17, 12.0]]
    # What was made from it was told so.
    made_from = {i: stages.fingerprint(i, tmp_path) for i in stage["inputs"]}
    sealed.rewrite(path, **{**stage, "inputs": made_from})
  assert rerun(tmp_path, runs, "dit.model.remat", "none") == []
  assert rerun(tmp_path, runs, "dit.train.steps", 20) == ["dit", "sample", "evaluate"]


def test_sections_and_stages_agree():
  """Nothing of a stage but samples and numbers is made again without being asked."""
  cheap = {name for name, stage in stages.STAGES.items() if stage.cheap}
  assert cheap == {"sample", "evaluate"} and set(stages.STAGES) == set(recipes.STAGES)
