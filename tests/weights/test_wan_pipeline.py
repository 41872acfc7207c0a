"""Whole tiny pipelines from folders as published: the latents that diffusers makes.

golden/make_wan_pipeline.py made them; the folders are written here by its description.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from golden.random_weights import random_tensor
from safetensors.numpy import save_file

from sora_jax import export_weights, import_weights, sample
from sora_jax.diffusion.solvers import Options
from sora_jax.models.dit import DiTConfig
from sora_jax.run import cli
from sora_jax.runtime import sharding
from sora_jax.runtime.residency import Residency
from sora_jax.sampling import defaults, integrate
from sora_jax.sampling.conditioning import Prompt, Request
from sora_jax.sampling.job import Job
from sora_jax.sampling.pipeline import Sampler
from sora_jax.tasks import dit as dit_task
from sora_jax.weights import pipeline_config

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TOLD = json.loads((GOLDEN / "wan_pipeline.json").read_text())
STEM = {"vae": "diffusion_pytorch_model", "text_encoder": "model"}
STEM["transformer"] = STEM["vae"]
FPS = {"t2v-2.1": 16.0, "ti2v-2.2": 24.0}
METHODS = {"unipc": "flow_unipc", "euler": "flow_match_euler"}

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN / "wan_pipeline.npz") as arrays:
    return dict(arrays)


def write(folder, kind, golden):
  told = TOLD["kinds"][kind]
  for path, config in told["configs"].items():
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(json.dumps(config))
  for place, shapes in told["tensors"].items():
    tensors = {
      name: random_tensor(name, tuple(map(int, shape.split())))
      for name, shape in shapes.items()
    }
    save_file(tensors, folder / place / f"{STEM[place]}.safetensors", {"format": "pt"})
  (folder / "tokenizer").mkdir()
  (folder / "tokenizer" / "spiece.model").write_bytes(golden["spiece"].tobytes())


@pytest.fixture(scope="module")
def imported(tmp_path_factory, golden):
  """Folder of each kind's checkpoint."""
  folders = {}
  for kind in TOLD["kinds"]:
    source = tmp_path_factory.mktemp(kind)
    write(source, kind, golden)
    folders[kind] = tmp_path_factory.mktemp("imported") / kind
    import_weights.run(source, folders[kind])
  return folders


@pytest.fixture(scope="module")
def samplers(imported):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  made = {k: Sampler.from_checkpoint(folder, mesh) for k, folder in imported.items()}
  return {kind: short_rows(sampler) for kind, sampler in made.items()}


def options_of(sampler, method, steps):
  shift = sampler.defaults.options.shift
  return Options(
    steps, method, schedule=METHODS[method], shift=shift, guidance_scale=4.0
  )


def assert_equal(ours, theirs):
  assert ours.shape == theirs.shape
  error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
  largest = np.abs(ours - theirs).max() / np.abs(theirs).max()
  assert error < 1e-5 and largest < 2e-5, (error, largest)


@pytest.mark.slow
@pytest.mark.parametrize(
  "case, kind, size, method, steps",
  [
    ("text", "t2v-2.1", (9, 32, 48), "unipc", 8),
    ("text", "t2v-2.1", (9, 32, 48), "euler", 8),
    ("text", "t2v-2.1", (9, 32, 48), "unipc", 50),
    ("text", "t2v-2.1", (9, 32, 48), "euler", 50),
    ("text-2.2", "ti2v-2.2", (9, 64, 96), "unipc", 8),
    ("text-2.2", "ti2v-2.2", (9, 64, 96), "euler", 8),
    ("text-2.2", "ti2v-2.2", (9, 64, 96), "unipc", 50),
    ("text-2.2", "ti2v-2.2", (9, 64, 96), "euler", 50),
  ],
)
def test_text_to_video(samplers, golden, case, kind, size, method, steps):
  sampler, (frames, height, width) = samplers[kind], size
  request = Request(
    TOLD["prompt"], width, height, frames, FPS[kind], 5, TOLD["negative"]
  )
  (ours,) = sampler.latents(
    [Prompt(request, (3, 2, 3))], options_of(sampler, method, steps)
  )
  assert_equal(ours, golden[f"{case}/{method}/{steps}"])


def film(kind="t2v-2.1"):
  frames, height, width = (9, 32, 48)
  request = Request(
    TOLD["prompt"], width, height, frames, FPS[kind], 5, TOLD["negative"]
  )
  return Prompt(request, (3, 2, 3))


def short_rows(sampler):
  """Rows as short as the clips, for the tests' time."""
  sampler.denoiser.meta = dataclasses.replace(
    sampler.meta, tokens=18, text_tokens=512, segments=1
  )
  return sampler


@pytest.mark.slow
def test_networks_take_turns(imported, samplers, golden, monkeypatch):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  sampler = short_rows(
    Sampler.from_checkpoint(imported["t2v-2.1"], mesh, low_memory=True)
  )
  held, loaded = sampler.autoencoder.residency, []
  loads = dict(held._loads)
  # Programs that are compiled already, and a decoder that only looks.
  monkeypatch.setattr(
    sampler.denoiser, "integrate", samplers["t2v-2.1"].denoiser.integrate
  )
  monkeypatch.setattr(
    sampler.autoencoder, "_decode", lambda params, x, *_: ((x, params is not None), 0)
  )
  assert held.held == []
  for name in loads:
    held.put(name, lambda name=name: loaded.append(name) or loads[name]())
  options = options_of(sampler, "euler", 8)
  (ours,) = sampler.latents([film()], options)
  assert_equal(ours, golden["text/euler/8"])
  assert held.held == ["dit"]
  # The texts are known by now.
  sampler.latents([film()], options)
  assert loaded == ["text", "dit"]
  sampler.autoencoder.decode(ours[None])
  assert held.held == ["vae"]
  sampler.latents([film()], options)
  assert loaded == ["text", "dit", "vae", "dit"]


@pytest.mark.slow
def test_weights_in_fewer_bits(imported, samplers, golden, monkeypatch):
  sampler = samplers["t2v-2.1"]
  whole = sampler.params
  half = dit_task.stored(whole, "bfloat16")
  kernel = half["dit"]["blocks"]["mlp_up"]["kernel"]
  assert kernel.dtype == jnp.bfloat16
  assert half["dit"]["head"]["kernel"].dtype == jnp.float32
  # What a computation in bfloat16 makes of them is what it makes of the whole ones.
  jax.tree.map(
    np.testing.assert_array_equal,
    *(dit_task._cast_kernels(params["dit"], jnp.bfloat16) for params in (half, whole)),
  )
  monkeypatch.setattr(sampler.autoencoder, "residency", Residency())
  sampler.params = dit_task.stored(whole, "float8")
  (ours,) = sampler.latents([film()], options_of(sampler, "euler", 8))
  theirs = golden["text/euler/8"]
  assert 1e-3 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.2
  with pytest.raises(ValueError, match="weights 'int4' is none of bfloat16, float8"):
    dit_task.stored(whole, "int4")


def test_without_guidance_there_is_one_pass(samplers, monkeypatch):
  """Few steps of a distilled model: each is one row, and no negative text is read."""
  sampler, rows, texts = samplers["t2v-2.1"], [], []
  denoiser = sampler.denoiser
  program = functools.partial(integrate.integrate, denoiser._networks)

  def trace(params, batch, table, options, state, first, ends):
    part = functools.partial(program, options=options, ends=ends)
    shape = jax.eval_shape(part, params, batch, table, state=state, first=first)
    return np.zeros(shape.shape, shape.dtype)

  monkeypatch.setattr(denoiser, "integrate", trace)
  predict, encode = dit_task.predict, sampler.denoiser._encode_texts
  monkeypatch.setattr(
    dit_task, "predict", lambda *args: rows.append(len(args[2])) or predict(*args)
  )
  monkeypatch.setattr(
    sampler.denoiser, "_encode_texts", lambda t: texts.append(t) or encode(t)
  )
  request = dataclasses.replace(film().request, negative_prompt="")
  for scale, passes in ((1.0, 1), (2.0, 2)):
    options = Options(4, "euler", shift=5.0, guidance_scale=scale)
    sampler.latents([Prompt(request, (3, 2, 3))], options)
    assert rows == [passes]
    rows.clear()
  assert texts == [[TOLD["prompt"]], ["", TOLD["prompt"]]]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [8, 50])
@pytest.mark.parametrize("method", METHODS)
def test_image_to_video(samplers, golden, method, steps):
  """Wan 2.2 TI2V is told a level for each token: 0 where the image is given."""

  class Seen(Exception):
    """Latents are there: no need to decode them."""

  def watch(_, latent_THWC):
    made.append(latent_THWC)
    raise Seen

  sampler, made = samplers["ti2v-2.2"], []
  image_HWC = np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8)
  job = Job(
    TOLD["prompt"], image=image_HWC, frames=9, seed=5, negative_prompt=TOLD["negative"]
  )
  with pytest.raises(Seen):
    list(sampler.stream(job, options_of(sampler, method, steps), watch=watch))
  assert_equal(made[0], golden[f"image-2.2/{method}/{steps}"])


def test_a_checkpoint_says_how_it_is_sampled(imported):
  """Everything that a command with --prompt alone goes by, one by one."""
  wan, ti2v = (defaults.read(imported[kind]) for kind in ("t2v-2.1", "ti2v-2.2"))
  for of_kind, shift in ((wan, 3.0), (ti2v, 5.0)):
    assert of_kind.options == Options(
      steps=50,
      method="unipc",
      schedule="flow_unipc",
      shift=shift,
      guidance_scale=5.0,
    )
    assert of_kind.negative_prompt.startswith("色调艳丽，过曝，静态，")
    assert of_kind.negative_prompt.endswith("背景人很多，倒着走")
  assert (wan.size, wan.frames, wan.fps, wan.window) == ((832, 480), 81, 16.0, 81)
  assert (ti2v.size, ti2v.frames, ti2v.fps) == ((1280, 704), 121, 24.0)


def test_a_prompt_alone(imported, samplers, tmp_path, monkeypatch):
  """The command: what it would make of --checkpoint and --prompt."""
  made, values = {}, flags.FLAGS
  if "checkpoint" not in values:
    cli.define_flags()
    sample._define_flags()
  wan = samplers["t2v-2.1"]
  monkeypatch.setattr(sample.Sampler, "from_checkpoint", lambda *_, **__: wan)
  monkeypatch.setattr(
    sample.files,
    "write_jobs",
    lambda _, jobs, paths, options, *__: made.update(job=jobs[0], options=options),
  )
  own = (f"--checkpoint={imported['t2v-2.1']}", f"--out={tmp_path / 'x.mp4'}")

  def run(*more):
    with flagsaver.flagsaver():
      sample._main(values(["sample", *own, "--prompt=a red circle", *more]))
    return made["job"], made["options"]

  job, options = run()
  assert options == wan.defaults.options
  assert (job.size, job.frames, job.fps, job.window) == ((832, 480), 81, 16.0, 81)
  assert job.negative_prompt == wan.defaults.negative_prompt
  job, options = run("--guidance_scale=1", "--steps=4", "--shift=8")
  assert (options.steps, options.shift, options.guidance_scale) == (4, 8.0, 1.0)
  assert options.schedule == "flow_unipc"
  assert job.negative_prompt == ""  # there is nothing to lead away from
  assert run("--negative_prompt=blue")[0].negative_prompt == "blue"


def test_export_gives_back_how_it_is_sampled(imported, golden, tmp_path):
  for kind, folder in imported.items():
    out = tmp_path / kind
    export_weights.run(folder, out)
    told = TOLD["kinds"][kind]["configs"]
    for path, keys in (
      ("model_index.json", ("expand_timesteps", "boundary_ratio", "scheduler")),
      (
        "scheduler/scheduler_config.json",
        ("_class_name", "flow_shift", "use_flow_sigmas", "prediction_type"),
      ),
    ):
      made = json.loads((out / path).read_text())
      assert {key: made[key] for key in keys} == {key: told[path][key] for key in keys}


def scheduler_of(folder, **changes):
  path = folder / pipeline_config.SCHEDULER
  path.parent.mkdir(exist_ok=True)
  told = TOLD["kinds"]["t2v-2.1"]["configs"][pipeline_config.SCHEDULER]
  path.write_text(json.dumps({**told, **changes}))
  return pipeline_config.read(folder / "transformer", DiTConfig(channels=16))


def test_schedulers(tmp_path):
  assert scheduler_of(tmp_path, flow_shift=5)[0].shift == 5.0
  euler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}
  sampling, fps = scheduler_of(tmp_path, **euler)
  assert (sampling.method, sampling.schedule) == ("euler", "flow_match_euler")
  assert (sampling.shift, fps, sampling.expand_timesteps) == (7.0, 16.0, False)
  back = pipeline_config.scheduler_json(sampling)
  assert {key: back[key] for key in euler} == euler
  for changes, message in (
    ({"_class_name": "DDIMScheduler"}, "'DDIMScheduler' is none of UniPC"),
    ({"solver_order": 3}, "scheduler_config.json: solver_order is 3, only 2 is known"),
    ({"use_flow_sigmas": False}, "use_flow_sigmas is False, only True"),
    ({"flow_shift": 0}, "flow_shift is 0, not a number above 0"),
  ):
    with pytest.raises(ValueError, match=message):
      scheduler_of(tmp_path, **changes)
  (tmp_path / pipeline_config.INDEX).write_text('{"expand_timesteps": 1}')
  with pytest.raises(ValueError, match="model_index.json: expand_timesteps is 1"):
    scheduler_of(tmp_path)


def test_a_folder_that_is_no_pipeline_has_what_is_usual(tmp_path):
  wan, fps = pipeline_config.read(tmp_path / "x", DiTConfig(channels=16))
  assert (wan.method, wan.shift, fps) == ("unipc", 3.0, 16.0)
  ti2v, fps = pipeline_config.read(tmp_path / "x", DiTConfig(channels=48))
  assert (ti2v.shift, ti2v.expand_timesteps, fps) == (5.0, True, 24.0)
