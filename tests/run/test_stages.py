"""Stages: what is done is skipped, what changed is an error that names the key."""

import dataclasses
import json
import shutil

import pytest
import sealed
from run import fake_stages
from run.fake_stages import ALL, BASE, change, manifest, weights

from sora_jax.models.dit import DiTConfig
from sora_jax.models.meta import DiTMeta, FrozenText, LowNoiseDiTMeta, TextMeta
from sora_jax.models.t5 import T5Config
from sora_jax.run import latent_shards, stages
from sora_jax.run import recipe as recipes


def remake(name, recipe, workdir):
  """Deletes a stage and makes it again."""
  sealed.delete(workdir / name / "stage.json")
  stages.run([name], recipe, workdir)


def test_stages_are_those_of_the_recipe():
  assert tuple(stages.STAGES) == recipes.STAGES
  for name, (module, sections, inputs, _) in stages.STAGES.items():
    assert (stages.pathlib.Path(stages.__file__).parents[1] / f"{module}.py").is_file()
    assert set(sections) <= {field.name for field in dataclasses.fields(BASE)}
    # A stage reads earlier ones only.
    order = recipes.STAGES.index
    assert all(order(other) < order(name) for other in inputs)


def test_complete_stages_are_skipped(runs, tmp_path):
  stages.run(ALL, BASE, tmp_path)
  assert runs == ALL
  stages.run(ALL, BASE, str(tmp_path))
  assert runs == ALL
  for name in ALL:
    assert json.loads((tmp_path / name / "stage.json").read_text())["complete"]


def test_order_is_that_of_the_chain_and_some_may_be_left_out(runs, tmp_path):
  stages.run(["vae", "data"], BASE, tmp_path)
  stages.run(["encode"], BASE, tmp_path)
  assert runs == ["data", "vae", "encode"]


def test_a_stage_that_failed_is_run_again(runs, tmp_path):
  fake_stages.runs_that_fail.add("vae")
  with pytest.raises(RuntimeError, match="vae failed"):
    stages.run(ALL, BASE, tmp_path)
  with pytest.raises(ValueError, match="stage encode needs stage vae, which is not"):
    stages.run(["encode"], BASE, tmp_path)
  fake_stages.runs_that_fail.clear()
  stages.run(ALL, BASE, tmp_path)
  assert runs == ALL


@pytest.mark.parametrize("name", [n for n in ALL if stages.STAGES[n][2]])
def test_missing_input(runs, tmp_path, name):
  first = stages.STAGES[name][2][0]
  message = f"stage {name} needs stage {first}, .*{tmp_path}.*sora_jax"
  with pytest.raises(ValueError, match=message):
    stages.run([name], BASE, tmp_path)
  assert not runs and not (tmp_path / name).exists()


@pytest.mark.parametrize(
  "path, value, stage, old",
  [
    ("seed", 1, "data", "0"),
    ("data.max_frames", 17, "data", "33"),
    ("vae.model.width", 64, "vae", "96"),
    ("vae.train.learning_rate", 1.0, "vae", "0.0001"),
    ("encode.extras", 1, "encode", "2"),
    ("dit.model.patch_size", (1, 1, 1), "dit", r"\[1, 2, 2\]"),
  ],
)
def test_changed_key(runs, tmp_path, path, value, stage, old):
  stages.run(ALL, BASE, tmp_path)
  shown = list(value) if isinstance(value, tuple) else value
  with pytest.raises(ValueError) as error:
    stages.run(ALL, change(BASE, path, value), tmp_path)
  message = str(error.value)
  assert (
    f"config.{path} is {shown!r}, but stage {stage} in {tmp_path / stage}" in message
  )
  assert f"made with {old}".replace("\\", "") in message
  assert "--workdir" in message and "more keys" not in message
  assert runs == ALL  # nothing ran, nothing was lost
  stages.run(ALL, BASE, tmp_path)
  assert runs == ALL


def test_several_changed_keys_are_counted(runs, tmp_path):
  stages.run(["data"], BASE, tmp_path)
  recipe = change(change(BASE, "data.fps", 4.0), "data.max_frames", 17)
  with pytest.raises(ValueError, match=r"and 1 more key"):
    stages.run(["data"], recipe, tmp_path)


def test_free_keys_may_change(runs, tmp_path):
  stages.run(ALL, BASE, tmp_path)
  recipe = BASE
  for path, value in {
    "precision": "bfloat16",
    "data.workers": 3,
    "encode.batch_size": 2,
    "dit.model.remat": "full",
    "dit.train.grad_accumulation": 2,
    "sample.rows": 1,
    "profile.steps": 2,
    "vae.eval_batches": 1,
    "vae.train.log_every": 1,
    "dit.train.eval_every": 7,
    "dit.train.save_every": 7,
    "dit.train.keep": 1,
    "mesh.fsdp": 4,
    "mesh.context": 2,
    "stages": ("data",),
  }.items():
    recipe = change(recipe, path, value)
  stages.run(ALL, recipe, tmp_path)
  assert runs == ALL


def test_later_stages_do_not_bind_earlier_ones(runs, tmp_path):
  """Another DiT may be trained on the same VAE and latents."""
  stages.run(["data", "vae", "encode", "dit"], BASE, tmp_path)
  recipe = change(BASE, "dit.train.steps", 20)
  stages.run(["data", "vae", "encode"], recipe, tmp_path)
  remake("dit", recipe, tmp_path)
  assert runs == ["data", "vae", "encode", "dit", "dit"]


def test_input_that_was_made_anew(runs, tmp_path):
  """Another VAE makes the latents and all behind them stale."""
  stages.run(ALL, BASE, tmp_path)
  recipe = change(BASE, "vae.train.steps", 20)
  remake("vae", recipe, tmp_path)
  with pytest.raises(ValueError, match="encode .* from another vae than .*delete"):
    stages.run(ALL, recipe, tmp_path)
  remake("encode", recipe, tmp_path)
  with pytest.raises(ValueError, match="stage dit .* from another encode than"):
    stages.run(ALL, recipe, tmp_path)
  assert runs == [*ALL, "vae", "encode"]


def test_the_same_stage_made_again_is_no_change(runs, tmp_path):
  stages.run(ALL, BASE, tmp_path)
  remake("data", BASE, tmp_path)
  stages.run(ALL, BASE, tmp_path)
  assert runs == [*ALL, "data"]


def less(text, *keys):
  """A stage.json without one key, wherever it is."""
  whole = json.loads(text)
  *path, last = keys
  place = whole
  for key in path:
    place = place[key]
  del place[last]
  return json.dumps(whole)


DAMAGE = {
  "empty": lambda text: "",
  "truncated": lambda text: text[: len(text) // 2],
  "a list": lambda text: "[]",
  "null": lambda text: "null",
  "no config": lambda text: less(text, "config"),
  "no inputs": lambda text: less(text, "inputs"),
  "a key less": lambda text: less(text, "config", "vae", "train", "steps"),
  "a key more": lambda text: text.replace('"seed"', '"warp": 9, "seed"'),
  "a bit": lambda text: text.replace('"steps": 10', '"steps": 18'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_stage_file_is_taken_from_its_spare(runs, tmp_path, damage, caplog):
  stages.run(["data", "vae"], BASE, tmp_path)
  path = tmp_path / "vae" / "stage.json"
  damaged = DAMAGE[damage](path.read_text())
  assert damaged != path.read_text()
  path.write_text(damaged)
  stages.run(["data", "vae", "encode"], BASE, tmp_path)
  assert runs == ["data", "vae", "encode"]
  assert f"{path} is damaged" in caplog.text and f"spare copy {path}.bak" in caplog.text
  # Nor is another config taken for the one that it was made with.
  with pytest.raises(
    ValueError, match=r"config\.vae\.model\.width is 64, but stage vae"
  ):
    stages.run(["vae"], change(BASE, "vae.model.width", 64), tmp_path)


def test_a_lost_stage_file_is_taken_from_its_spare(runs, tmp_path, caplog):
  stages.run(["data", "vae"], BASE, tmp_path)
  (tmp_path / "vae" / "stage.json").unlink()
  stages.run(["data", "vae"], BASE, tmp_path)
  assert runs == ["data", "vae"] and "stage.json is missing: taken" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"complete": tru', '{"config": {}}'])
def test_stage_file_and_spare_damaged(runs, tmp_path, text):
  stages.run(["data", "vae"], BASE, tmp_path)
  path = tmp_path / "vae" / "stage.json"
  for name in ("stage.json", "stage.json.bak"):
    path.with_name(name).write_text(text)
  message = f"{path} is damaged .*bak is damaged .*delete {path} and {path}.bak, .* or "
  for names in (["vae"], ["encode"]):
    with pytest.raises(ValueError, match=message) as error:
      stages.run(names, BASE, tmp_path)
    assert "\n" not in str(error.value)
  assert runs == ["data", "vae"]
  sealed.delete(path)  # as the message says: what the stage has made is taken over
  stages.run(["vae", "encode"], BASE, tmp_path)
  assert runs == ["data", "vae", "vae", "encode"]


def test_a_model_that_was_put_in_place_of_the_stage_s(runs, tmp_path):
  stages.run(ALL, BASE, tmp_path)
  for name, user in (("vae", "encode"), ("vae", "dit"), ("dit", "evaluate")):
    fake_stages.write_model(tmp_path / name, "of another training")
    message = rf"{name}/model is not the one that the stage {name} made \(of another"
    with pytest.raises(ValueError, match=message):
      stages.run([user], BASE, tmp_path)
    fake_stages.write_model(tmp_path / name, weights[name])
  stages.run(ALL, BASE, tmp_path)
  assert runs == ALL


def test_fingerprints(runs, tmp_path):
  assert stages.fingerprint("data", tmp_path) == ""
  stages.run(["data", "vae"], BASE, tmp_path)
  data, vae = (stages.fingerprint(name, tmp_path) for name in ("data", "vae"))
  assert len(data) == len(vae) == 16 and data != vae
  other = tmp_path / "other"
  recipe = change(BASE, "vae.train.log_every", 3)
  stages.run(["data", "vae"], recipe, other)
  assert stages.fingerprint("vae", other) == vae
  another = tmp_path / "another"
  stages.run(["data", "vae"], change(BASE, "data.fps", 4.0), another)
  # Through its inputs, though its own section is the same.
  assert stages.fingerprint("vae", another) != vae


def test_a_folder_with_other_files_makes_the_stages_after_it_stale(
  runs, tmp_path, monkeypatch
):
  stages.run(["data", "vae"], BASE, tmp_path)
  monkeypatch.setitem(manifest, "text", "two clips")
  remake("data", BASE, tmp_path)
  with pytest.raises(ValueError, match="vae.*was made from another data"):
    stages.run(["vae"], BASE, tmp_path)


def test_other_weights_are_noticed(runs, tmp_path, monkeypatch):
  """Free keys are not in the config, but they change what is trained."""
  stages.run(ALL, BASE, tmp_path)
  monkeypatch.setitem(weights, "vae", "vae-1")
  remake("vae", BASE, tmp_path)
  with pytest.raises(ValueError, match="encode.*was made from another vae"):
    stages.run(ALL, BASE, tmp_path)
  # The same weights again are what was there before.
  monkeypatch.setitem(weights, "vae", "vae-0")
  remake("vae", BASE, tmp_path)
  runs.clear()
  stages.run(ALL, BASE, tmp_path)
  assert not runs


def test_a_linked_stage_is_read_and_never_run(runs, tmp_path):
  base, other = tmp_path / "base", tmp_path / "other"
  stages.run(ALL, BASE, base)
  other.mkdir()
  for name in ("data", "vae", "encode", "dit"):
    (other / name).symlink_to(base / name)
  before = (base / "dit" / "stage.json").read_text()
  runs.clear()
  stages.run(ALL, BASE, other)
  assert runs == ["sample", "evaluate"]
  train = dataclasses.replace(BASE.dit.train, steps=2 * BASE.dit.train.steps)
  longer = dataclasses.replace(BASE, dit=dataclasses.replace(BASE.dit, train=train))
  with pytest.raises(ValueError, match="dit is a link to another run's"):
    stages.run(ALL, longer, other)
  assert (base / "dit" / "stage.json").read_text() == before


def test_more_steps_need_a_checkpoint(runs, tmp_path):
  stages.run(ALL, BASE, tmp_path)
  (tmp_path / "dit" / "checkpoints" / "8").rmdir()
  train = dataclasses.replace(BASE.dit.train, steps=2 * BASE.dit.train.steps)
  longer = dataclasses.replace(BASE, dit=dataclasses.replace(BASE.dit, train=train))
  with pytest.raises(ValueError, match="has no checkpoint to go on from"):
    stages.run(ALL, longer, tmp_path)


def test_a_section_that_is_new_leaves_old_runs_as_they_are(runs, tmp_path):
  stages.run(ALL, BASE, tmp_path)
  path = tmp_path / "encode" / "stage.json"
  state = json.loads(path.read_text())
  assert state["config"].pop("text") == {}
  del state["checksum"]  # nor had it one
  remade = json.dumps(state)
  sealed.delete(path)
  path.write_text(remade)
  runs.clear()
  stages.run(["encode"], BASE, tmp_path)
  assert not runs and path.read_text() == remade
  folder = _write_text_meta(tmp_path)
  with pytest.raises(ValueError, match=r"config\.text\.folder is .*encode.* with ''"):
    stages.run(["encode"], change(BASE, "text.folder", folder), tmp_path)


def test_the_text_encoder_is_looked_at_first(runs, tmp_path):
  recipe = change(BASE, "text.folder", str(tmp_path / "nothing"))
  stages.run(["data"], recipe, tmp_path)
  with pytest.raises(ValueError, match="nothing/text/model: no complete model"):
    stages.run(["vae"], recipe, tmp_path)
  recipe = change(BASE, "text.folder", _write_text_meta(tmp_path))
  recipe = change(recipe, "text.width", 8)
  with pytest.raises(ValueError, match=r"config\.text\.width is 8, .* have 4096"):
    stages.run(["vae"], recipe, tmp_path)
  assert runs == ["data"]


def test_models_to_begin_with_are_looked_at_first(runs, tmp_path):
  stages.run(["data"], BASE, tmp_path)
  for key in ("vae.folder", "dit.init_from"):
    recipe = change(BASE, key, str(tmp_path / "nothing"))
    for name in ("vae", "encode", "dit"):
      with pytest.raises(ValueError, match="nothing/.*/model: no complete model"):
        stages.run([name], recipe, tmp_path)
  assert runs == ["data"]


def _write_text_meta(folder):
  path = folder / "text" / "model"
  path.mkdir(parents=True)
  meta = TextMeta(T5Config(width=4096), id="text-0").to_json()
  model = {"params": "params-0", "meta": meta}
  (path / "model.json").write_text(json.dumps(model))
  return str(folder)


def test_models_that_a_run_begins_with(runs, tmp_path, monkeypatch):
  workdir, base = tmp_path / "run", tmp_path / "base"
  monkeypatch.setattr(stages.init_from, "check", lambda *_: None)
  place = base / "dit" / "model"
  monkeypatch.setattr(stages.init_from, "base_folder", lambda stage: place)

  def write(steps):
    for name in ("vae", "dit"):
      path = base / name / "model"
      path.mkdir(parents=True, exist_ok=True)
      model = {"params": "params-0", "meta": {"steps": steps}}
      (path / "model.json").write_text(json.dumps(model))

  write(1)
  recipe = change(BASE, "vae.folder", str(base))
  recipe = change(recipe, "dit.init_from", str(base))
  stages.run(ALL, recipe, workdir)
  # How a VAE would be trained has no effect.
  stages.run(ALL, change(recipe, "vae.train.steps", 20), workdir)
  assert runs == ALL
  with pytest.raises(ValueError, match=r"config\.dit\.init_from is '', but stage dit"):
    stages.run(["dit"], change(recipe, "dit.init_from", ""), workdir)
  with pytest.raises(ValueError, match=r"config\.dit\.lora\.rank is 8, but stage dit"):
    stages.run(["dit"], change(recipe, "dit.lora.rank", 8), workdir)
  write(2)  # other models in the same place
  for name, key in (("vae", "config.vae.folder"), ("dit", "config.dit.init_from")):
    place = base / name / "model"
    message = f"stage {name} .* from another {key} than the one in {place} now"
    with pytest.raises(ValueError, match=message):
      stages.run([name], recipe, workdir)
  assert runs == ALL


def test_a_run_does_not_replace_what_it_begins_with(runs, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  recipe = change(BASE, "dit.init_from", str(tmp_path))
  with pytest.raises(ValueError, match=r"the folder of the run itself.*--workdir"):
    stages.run(ALL, recipe, ".")
  assert runs == []


def test_the_expert_that_a_run_begins_with(runs, tmp_path, monkeypatch):
  """The other one of two does not change what it makes."""
  monkeypatch.setattr(stages.init_from, "check", lambda *_: None)
  workdir, base = tmp_path / "run", tmp_path / "base"
  sizes = {
    "model": DiTConfig(), "text": FrozenText("t", 24), "max_text_tokens": 24,
    "tokens": 128, "text_tokens": 96, "segments": 4, "reference_fps": 16.0,
    "conditional": True, "vae": "v", "boundary": 0.875,
  }  # fmt: skip

  def write(kind, weights_id):
    path = base / kind.network / "model"
    path.mkdir(parents=True, exist_ok=True)
    meta = kind(**sizes, id=weights_id).to_json()
    (path / "model.json").write_text(json.dumps({"params": "params-0", "meta": meta}))

  write(DiTMeta, "1")
  write(LowNoiseDiTMeta, "1")
  recipe = change(change(BASE, "dit.init_from", str(base)), "dit.low_noise", True)
  stages.run(ALL, recipe, workdir)
  write(DiTMeta, "2")
  stages.run(["dit"], recipe, workdir)
  write(LowNoiseDiTMeta, "2")
  with pytest.raises(
    ValueError, match=r"another config\.dit\.init_from .*dit_low/model"
  ):
    stages.run(["dit"], recipe, workdir)
  assert runs == ALL


def test_lost_shards_are_made_again(runs, tmp_path, caplog):
  stages.run(ALL, BASE, tmp_path)
  folder = tmp_path / "encode"
  shard = folder / "latents-00000-of-00001.array_record"
  shard.write_bytes(b"latents")
  latent_shards.write(folder, [latent_shards.describe(shard)])
  stages.run(["encode"], BASE, tmp_path)
  assert runs == ALL
  for damage, said in (
    (shard.unlink, "is missing"),
    (lambda: shard.write_bytes(b""), "has 0 bytes, not 7"),
    ((folder / "shards.json").unlink, None),  # as of an older version
    (lambda: (folder / "shards.json").write_text("{}"), "shards.json is damaged"),
    ((folder / "latents.jsonl").unlink, "latents.jsonl is missing"),
  ):
    shard.write_bytes(b"latents")
    latent_shards.write(folder, [latent_shards.describe(shard)])
    runs.clear()
    damage()
    if said:
      with pytest.raises(ValueError, match=f"{said}.*: python -m sora_jax.encode"):
        latent_shards.check(folder)
    with caplog.at_level("INFO", logger="absl"):
      stages.run(["encode", "dit"], BASE, tmp_path)
    assert runs == (["encode"] if said else []) and (said or "") in caplog.text
    caplog.clear()


def test_finished_shards_are_not_read_again(tmp_path, monkeypatch):
  """Of an encoding that was stopped: what is known of a shard is kept beside it."""
  shard = tmp_path / "latents-00000-of-00001.array_record"
  shard.write_bytes(b"latents")
  known = latent_shards.describe(shard)
  read = latent_shards.checksums.of_file
  monkeypatch.setattr(latent_shards.checksums, "of_file", None)
  assert latent_shards.described(shard, latent_shards.read(tmp_path)) == known
  latent_shards.write(tmp_path, [known])
  assert sorted(path.name for path in tmp_path.iterdir()) == [shard.name, "shards.json"]
  assert latent_shards.described(shard, latent_shards.read(tmp_path)) == known
  monkeypatch.setattr(latent_shards.checksums, "of_file", read)
  shard.write_bytes(b"others")  # another size
  other = latent_shards.described(shard, latent_shards.read(tmp_path))
  assert other == latent_shards.describe(shard) != known


def test_captions_make_stale_what_reads_them(runs, tmp_path):
  """The VAE is made from the same clips, and sees no captions."""
  every = [name for name in recipes.STAGES if name != "captioner"]
  stages.run(every, BASE, tmp_path)
  before = (tmp_path / "encode" / "stage.json").read_text()
  summary = tmp_path / "data" / "recaption.json"
  summary.write_text('{"captions": "a"}')
  stages.run(["data", "vae"], BASE, tmp_path)
  for name in ("encode", "expander"):
    match = f"made from another data/recaption.json .* delete {tmp_path / name} to make"
    with pytest.raises(ValueError, match=match):
      stages.run([name], BASE, tmp_path)
    shutil.rmtree(tmp_path / name)
    stages.run([name], BASE, tmp_path)
  stages.run(["encode", "expander"], BASE, tmp_path)
  assert runs == [*every, "encode", "expander"]
  # Captions that are gone are another change.
  summary.unlink()
  with pytest.raises(ValueError, match="another data/recaption.json"):
    stages.run(["encode"], BASE, tmp_path)
  shutil.rmtree(tmp_path / "encode")
  stages.run(["encode"], BASE, tmp_path)
  assert (tmp_path / "encode" / "stage.json").read_text() == before
  summary.write_text("[]")
  with pytest.raises(ValueError, match="recaption.json is damaged"):
    stages.run(["encode"], BASE, tmp_path)
