"""Whole pipelines of Wan's models with experts and images equal diffusers'.

Folders are written as they are published, from golden/make_wan_models.py, then imported
and sampled.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.random_weights import random_tensor, smooth_images
from safetensors.numpy import load_file, save_file

from sora_jax import export_weights, import_weights
from sora_jax.diffusion.solvers import Options
from sora_jax.encoders import model_folders
from sora_jax.encoders.autoencoder import Autoencoder
from sora_jax.encoders.image_encoder import FrozenImageEncoder
from sora_jax.runtime import checkpoint, sharding
from sora_jax.runtime.residency import Residency
from sora_jax.sampling import experts, windows
from sora_jax.sampling.job import Job
from sora_jax.sampling.pipeline import Sampler
from sora_jax.weights import hf_config

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SAID = json.loads((GOLDEN / "wan_models.json").read_text())
FRAMES, HEIGHT, WIDTH = 9, 32, 48
# As in make_wan_models.py: flow shift, guidance of either expert, steps.
SHIFT = {"t2v-a14b": 5.0, "i2v-a14b": 5.0, "i2v-2.1": 3.0, "flf2v-2.1": 5.0}
NAMES = ("dit", "dit_low")  # networks of two experts
GUIDANCE = {"t2v-a14b": (4.0, 3.0), "i2v-a14b": (3.5, 3.5)}
# One network takes little time to compile; of the others the golden values of unipc/8
# and euler/50 are there, too.
CASES = [
  ("i2v-2.1", method, steps) for method in ("unipc", "euler") for steps in (8, 50)
]
for kind in ("t2v-a14b", "i2v-a14b", "flf2v-2.1"):
  CASES += [(kind, "unipc", 50), (kind, "euler", 8)]
SCHEDULES = {"unipc": "flow_unipc", "euler": "flow_match_euler"}

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def golden():
  return dict(np.load(GOLDEN / "wan_models.npz"))


def write(folder, kind):
  """The folder of a pipeline as it is published, without its text encoder."""
  said = SAID["configs"][kind]
  folder.mkdir()
  index = {**said["model_index"]}
  (folder / "model_index.json").write_text(json.dumps(index))
  places = {"vae": "vae", "transformer": "transformer"}
  places |= {"transformer_2": "transformer"} if index["boundary_ratio"] else {}
  places |= {"image_encoder": "image_encoder"} if "image_encoder" in said else {}
  for place, config in places.items():
    (folder / place).mkdir()
    (folder / place / "config.json").write_text(json.dumps(said[config]))
    prefix = "transformer_2." if place == "transformer_2" else ""
    tensors = {
      e.name: random_tensor(prefix + e.name.removeprefix("vision_model."), e.shape)
      for e in hf_config.from_json(said[config], place).entries()
    }
    stem = "model" if place == "image_encoder" else "diffusion_pytorch_model"
    save_file(tensors, folder / place / f"{stem}.safetensors", {"format": "pt"})
  return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  """Kind -> folder of the imported model."""
  base, made = tmp_path_factory.mktemp("wan"), {}

  def folder(kind):
    if kind not in made:
      made[kind] = base / f"{kind}-imported"
      import_weights.run(write(base / kind, kind), made[kind])
    return made[kind]

  return folder


def features(texts, limit):
  """What the golden pipelines were given as features of the texts."""
  seeds = {"what it shows": 1, "what it does not": 2}
  return [
    np.random.default_rng(seeds[text]).standard_normal((limit, 24), np.float32)
    for text in texts
  ]


def sampler(folder, low_memory=False):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  meta, loads = experts.load(folder, mesh)
  residency = Residency(low_memory)
  vae = Autoencoder(folder / "vae" / "model", mesh, residency=residency)
  made = Sampler(loads[0], meta, vae, "", jnp.float32, features)
  if len(loads) > 1:
    residency.put("dit_low", loads[1])
  if meta.model.image_width:
    images = FrozenImageEncoder(folder, mesh, expected=meta.image, residency=residency)
    made.encode_images = images.encode
  # Rows as short as the clip, for the test's time.
  small = dataclasses.replace(meta, tokens=32, text_tokens=512, segments=1)
  made.denoiser.meta = small
  return made


def given(kind):
  first, last = smooth_images(HEIGHT, WIDTH)
  if "i2v" in kind:
    return {"image": first}
  return {"image": first, "last_image": last} if "flf" in kind else {}


def prompt_of(model, kind):
  """What `Sampler.stream` asks its model for, without the decoding of the result."""
  job = Job(
    "what it shows",
    negative_prompt="what it does not",
    size=(WIDTH, HEIGHT),
    frames=FRAMES,
    fps=16.0,
    seed=5,
    **given(kind),
  )
  timeline, cut = model.timeline(job)
  state = windows.begin(timeline)
  return windows.next_window(timeline, cut, state).prompt


def latents_of(model, prompt, kind, method, steps):
  scale, scale_2 = GUIDANCE.get(kind, (5.0, 0.0))
  options = Options(
    steps=steps,
    method=method,
    schedule=SCHEDULES[method],
    shift=SHIFT[kind],
    guidance_scale=scale,
    guidance_scale_2=scale_2,
  )
  return model.latents([prompt], options)[0]


def relative_error(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHIFT)
def test_whole_pipelines(imported, golden, kind):
  model = sampler(imported(kind))
  prompt = prompt_of(model, kind)
  for _, method, steps in (case for case in CASES if case[0] == kind):
    latent_THWC = latents_of(model, prompt, kind, method, steps)
    expected = golden[f"{kind}/{method}/{steps}"]
    assert relative_error(latent_THWC, expected) <= 1e-4, (method, steps)
  if given(kind):
    condition_THWC = golden[f"{kind}/condition"]
    assert relative_error(prompt.condition_THWC, condition_THWC) <= 1e-5
    np.testing.assert_array_equal(
      prompt.condition_THWC[..., :4], condition_THWC[..., :4]
    )
  if model.encode_images:
    image_JV = golden[f"{kind}/image"].reshape(-1, 16)
    assert relative_error(prompt.image_JV, image_JV) <= 1e-5


@pytest.mark.slow
def test_one_expert_in_memory_at_a_time(imported, golden):
  model, seen = sampler(imported("t2v-a14b"), low_memory=True), []
  residency = model.autoencoder.residency
  get = residency.get

  def watched(name):
    params = get(name)
    seen.append(residency.held)
    return params

  residency.get = watched
  latent_THWC = latents_of(model, prompt_of(model, "t2v-a14b"), "t2v-a14b", "unipc", 8)
  assert seen == [["dit"], ["dit_low"]]
  assert relative_error(latent_THWC, golden["t2v-a14b/unipc/8"]) <= 1e-4


@pytest.mark.slow
def test_what_tells_a_model_apart_is_loaded_once(imported):
  model = sampler(imported("i2v-2.1"), low_memory=True)
  residency = model.autoencoder.residency
  first = model.model_id  # was never loaded
  assert residency.held == ["dit"]
  residency.get("vae")
  assert model.model_id == first == sampler(imported("i2v-2.1")).model_id
  assert residency.held == ["vae"]


def run_of(folder, base, network, shift, begun=None):
  """A run that has changed one expert of a model by a number, and nothing else."""
  params, meta = checkpoint.load_model(base / network / "model")
  params = jax.tree.map(lambda leaf: leaf + np.float32(shift), params)
  meta |= {"network": "dit", "init_from": str(begun or base)}
  meta |= {"low_noise": True} if network == "dit_low" else {}
  meta["text"] = {**meta["text"], "folder": str(base)}
  checkpoint.save_model(folder / "dit" / "model", params, meta)
  vae, meta = checkpoint.load_model(base / "vae" / "model")
  checkpoint.save_model(folder / "vae" / "model", vae, meta)
  return folder


@pytest.mark.slow
def test_a_run_of_one_expert_samples_and_exports_with_the_other(imported, tmp_path):
  base, mesh = imported("t2v-a14b"), sharding.make_mesh(devices=jax.devices()[:1])
  high = run_of(tmp_path / "high", base, "dit", 1.0)
  low = run_of(tmp_path / "low", base, "dit_low", 2.0)
  both = run_of(tmp_path / "both", base, "dit_low", 2.0, begun=high)
  imports = [checkpoint.load_model(base / name / "model")[0] for name in NAMES]

  def shifts(folder):
    """What was added to the params of either expert."""
    loaded = [load() for load in experts.load(folder, mesh)[1]]
    assert len(loaded) == 2
    changes = jax.tree.map(lambda a, b: np.mean(np.asarray(a) - b), loaded, imports)
    return [np.round(np.mean(jax.tree.leaves(change)), 3) for change in changes]

  assert shifts(base) == [0, 0]
  assert experts.ids(base) == experts.ids(high)  # the runs here keep the base's
  meta = checkpoint.load_meta(high / "dit" / "model")
  checkpoint.save_meta(high / "dit" / "model", {**meta, "id": "another"})
  assert experts.ids(both) == ["another", experts.ids(base)[1]]
  assert shifts(high) == [1, 0] and shifts(low) == [0, 2] and shifts(both) == [1, 2]
  export_weights.run(both, tmp_path / "out", networks=NAMES)
  for part, shift in (("transformer", 1.0), ("transformer_2", 2.0)):
    [path] = (tmp_path / "out" / part).glob("*.safetensors")
    theirs = load_file(base.parent / "t2v-a14b" / part / path.name)
    name = "blocks.0.attn1.to_q.bias"
    np.testing.assert_allclose(load_file(path)[name], theirs[name] + shift, atol=1e-6)


@pytest.mark.slow
def test_one_of_two_experts_alone_is_an_error(imported, tmp_path, caplog):
  base = imported("t2v-a14b")
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  low = run_of(tmp_path / "low", base, "dit_low", 2.0, begun=tmp_path / "gone")
  message = "low is one of two experts .* for high .* neither has .*gone, .*--lora_low"
  with pytest.raises(ValueError, match=message):
    experts.load(low, mesh)
  export_weights.run(low, tmp_path / "out")
  assert f"not in {low}, nor in {tmp_path / 'gone'}, where it began" in caplog.text
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
    "transformer_2", "vae",
  ]  # fmt: skip
  params, meta = checkpoint.load_model(base / "dit_low" / "model")
  other = tmp_path / "other"
  run_of(other, base, "dit", 0.0)
  meta = {**meta, "model": {**meta["model"], "depth": 7}}
  checkpoint.save_model(other / "dit_low" / "model", params, meta)
  with pytest.raises(ValueError, match="of different models: their model.depth is"):
    experts.load(other, mesh)
  # Two of different models make no pipeline.
  high = run_of(tmp_path / "high", base, "dit", 0.0)
  params, meta = checkpoint.load_model(high / "dit" / "model")
  changed = {**meta, "vae": "another"}
  checkpoint.save_model(high / "dit" / "model", params, changed)
  with pytest.raises(ValueError, match="of different models: their vae is 'another'"):
    export_weights.run(high, tmp_path / "mixed")
  assert not (tmp_path / "mixed").exists()


@pytest.mark.slow
def test_a_checkpoint_of_one_expert_alone_is_used(imported, tmp_path):
  base, alone = imported("t2v-a14b"), tmp_path / "alone"
  shutil.copytree(base / "dit_low", alone / "dit_low")
  low = alone / "dit_low" / "model"
  assert model_folders.of_dit(alone, whole=False) == {"dit_low": low}
  high = run_of(tmp_path / "high", base, "dit", 1.0, begun=alone)
  both = {"dit": high / "dit" / "model", "dit_low": low}
  assert model_folders.of_dit(high) == both
  run = run_of(tmp_path / "low", base, "dit_low", 2.0, begun=alone)
  with pytest.raises(ValueError, match=f"for high .* neither has {alone}, where it"):
    model_folders.of_dit(run)


def test_a_run_reads_the_encoders_that_it_began_with(imported, tmp_path):
  base, texts = imported("i2v-2.1"), tmp_path / "texts"
  (texts / "text" / "model").mkdir(parents=True)
  meta = checkpoint.load_meta(base / "dit" / "model")
  params = {"dit": {"x": np.zeros(1, np.float32)}}
  # A run that began with a run.
  for name, *begun in (("first", base, texts), ("second", *2 * (tmp_path / "first",))):
    text = {"features": "t", "pad_to": 512, "folder": str(begun[1])}
    changed = {**meta, "init_from": str(begun[0]), "text": text}
    checkpoint.save_model(tmp_path / name / "dit" / "model", params, changed)
  for name in ("first", "second"):
    assert model_folders.of_images(tmp_path / name) == base / "image" / "model"
    assert model_folders.of_text(tmp_path / name) == texts / "text" / "model"
  assert model_folders.of_images(base) == base / "image" / "model"
  # Where there is none they name the place where it should be.
  assert model_folders.of_images(tmp_path) == tmp_path / "image" / "model"
  assert model_folders.of_text(base) == base / "text" / "model"


def test_prompts_change_experts_at_their_own_call():
  """One that begins below the boundary asks nothing of the first expert."""
  two = experts.Experts((dict, dict), 0.875)
  time = np.array([[1.0, 0.5], [0.9, 0.4], [0.875, 0.3], [0.2, 0.2]], np.float32)
  assert two.switch(time) == [3, 0]
  assert two.calls(3, 4) == [slice(0, 3), slice(3, 4)]


@pytest.mark.parametrize("kind", ["i2v-a14b", "flf2v-2.1"])
def test_exports_what_was_imported(imported, tmp_path, kind):
  export_weights.run(imported(kind), tmp_path / "out")
  source = imported(kind).parent / kind
  for place in SAID["configs"][kind]:
    if place in ("model_index", "image_processor"):
      continue
    [path] = (source / place).glob("*.safetensors")
    theirs, ours = load_file(path), load_file(tmp_path / "out" / place / path.name)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      np.testing.assert_array_equal(ours[name], value)


@pytest.mark.slow
def test_what_models_of_images_need(imported):
  model = sampler(imported("flf2v-2.1"))
  job = Job("x", size=(WIDTH, HEIGHT), frames=FRAMES, fps=16.0)
  with pytest.raises(ValueError, match="makes videos of given images: give --image"):
    model.timeline(job)
  with pytest.raises(ValueError, match="give --image and --last_image"):
    model.timeline(dataclasses.replace(job, image=smooth_images(HEIGHT, WIDTH)[0]))
  with pytest.raises(ValueError, match="guidance_scale_2 3.5 is for models with two"):
    latents_of(model, prompt_of(model, "flf2v-2.1"), "i2v-a14b", "euler", 2)
  with pytest.raises(ValueError, match="is one network for all levels"):
    experts.load(imported("flf2v-2.1"), model.denoiser.mesh, loras_low=[("x", 1.0)])
