"""Every config builds; wrong ones fail with the key, before any work is done."""

import ast
import dataclasses
import importlib.util
import inspect
import math
import pathlib
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from sora_jax.models import dit, rounded_matmul, vae
from sora_jax.packing import packed_row
from sora_jax.run import build, init_from, recipe
from sora_jax.runtime import sharding
from sora_jax.tasks import dit as dit_task
from sora_jax.tasks import vae as vae_task
from sora_jax.training import loop, optim

ROOT = pathlib.Path(recipe.__file__).parents[2]
KEY = jax.random.key(0)


def config_cases():
  """Each file of configs/, and each of its variants."""
  for path in sorted((ROOT / "configs").glob("*.py")):
    spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      continue
    slow = [pytest.mark.slow] * (path.stem in ("captioner", "pod"))
    yield pytest.param(module.get_config, id=path.stem, marks=slow)
    parameters = inspect.signature(module.get_config).parameters
    default = parameters["variant"].default if parameters else None
    for variant in getattr(module, "VARIANTS", ()):
      if variant != default:
        yield pytest.param(
          lambda module=module, variant=variant: module.get_config(variant),
          id=f"{path.stem}:{variant}",
          marks=pytest.mark.slow,
        )


def vae_batch(stage):
  rows = stage.batch_size
  return {
    "video_THWC": ((rows, *stage.crop, 3), jnp.uint8),
    "valid_3": ((rows, 3), jnp.int32),
  }


def dit_batch(built):
  return {
    name: ((built.dit.rows, *value.shape), value.dtype)
    for name, value in build.empty_row(built).items()
    if not name.startswith("clip")
  }


def captioner_batch(built):
  stage = built.captioner
  width = 12 * math.prod(stage.patch_size)
  row = packed_row.empty(
    packed_row.PackedRow, packed_row.RowSize(build.budget(stage), width)
  )
  return {
    name: ((stage.rows, *value.shape), value.dtype)
    for name, value in row.items()
    if not name.startswith("clip")
  }


def abstract(shapes):
  batch = {name: jax.ShapeDtypeStruct(*value) for name, value in shapes.items()}
  return {**batch, "step": jax.ShapeDtypeStruct((), jnp.int32)}


_TRACED: set[str] = set()


def check_stage(make, stage, batch, *others):
  """Checks what a stage learns, once for all variants that only train it otherwise.

  make: returns its task and rules. others: what these hang on beside the stage.
  """
  what = repr((dataclasses.replace(stage, train=None), batch, others))
  if what not in _TRACED:
    check_task(*make(), abstract(batch), stage.train)
    _TRACED.add(what)


def check_task(task, rules, batch, train):
  """Shapes of init, loss, gradients and evaluation; sharding; optimizer."""
  params = jax.eval_shape(task.init, KEY)
  for leaf in jax.tree.leaves(params):
    assert leaf.dtype == jnp.float32
  sharding.param_shardings(params, rules, sharding.make_mesh())
  optim.make(train, params)

  def step(params, batch, key, *frozen):
    (loss, metrics), gradients = jax.value_and_grad(task.loss, has_aux=True)(
      params, batch, key, *frozen
    )
    values = task.evaluate(params, batch, key, *frozen)
    return {"loss": loss, **metrics, **values}, gradients

  frozen = () if task.frozen is None else (task.frozen,)
  values, gradients = jax.eval_shape(step, params, batch, KEY, *frozen)
  shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (gradients, params)]
  assert shapes[0] == shapes[1]
  for name, value in values.items():
    assert value.shape == () and value.dtype in (jnp.float32, jnp.int32), name


@pytest.mark.parametrize("get_config", config_cases())
def test_a_config_is_short(get_config, monkeypatch):
  """It says what is its own; sizes of a preset, and defaults, are not counted."""
  monkeypatch.setattr(recipe, "complete", lambda config: config)
  monkeypatch.setattr(recipe, "preset", lambda presets, name: ConfigDict())
  assert len(list(leaves(get_config().to_dict()))) <= 56


@pytest.mark.parametrize("get_config", config_cases())
def test_config_builds(get_config):
  config = get_config()
  config.lock()
  built = recipe.read(config)
  # All that the config says is in the recipe.
  assert_same(config.to_dict(), dataclasses.asdict(built), "config")
  vae, dit = built.vae, built.dit
  if not vae.folder:  # else nothing is trained
    check_stage(lambda: make_vae(built), vae, vae_batch(vae), built.dtype)
  others = built.dtype, built.text.folder
  check_stage(lambda: make_dit(built), dit, dit_batch(built), *others)
  if "captioner" in built.stages:
    batch = captioner_batch(built)
    check_stage(
      lambda: build.make_captioner(built), built.captioner, batch, built.dtype
    )


def make_vae(built):
  model, loss = built.vae.model, built.vae.loss
  return vae_task.make(model, loss, built.dtype), vae_task.sharding_rules(model, loss)


def make_dit(built):
  task, rules = build.make_task(built)
  if not built.dit.lora.rank:
    return task, rules
  base = jax.eval_shape(task.init, KEY)
  return init_from.adapt(built.dit.lora, task, rules, base)


def leaves(config):
  for value in config.values():
    yield from leaves(value) if isinstance(value, dict) else [value]


def assert_same(config, built, where):
  for key, value in config.items():
    if isinstance(value, dict):
      assert_same(value, built[key], f"{where}.{key}")
    else:
      assert built[key] == value, f"{where}.{key}"


# --- nothing is in the recipe that nothing reads


def sections(cls):
  """The dataclass and all dataclasses in its fields."""
  yield cls
  for kind in typing.get_type_hints(cls).values():
    if dataclasses.is_dataclass(kind):
      yield from sections(kind)


@pytest.mark.slow
def test_every_key_is_read():
  """As an attribute somewhere, or as an argument where a section is spread out."""
  read = set()
  for path in (ROOT / "sora_jax").rglob("*.py"):
    if path.name == "recipe.py":  # checking a key is not using it
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        read.add(node.attr)
  spread = {recipe.Mesh: set(inspect.signature(sharding.make_mesh).parameters)}
  # `dtype` and `matmuls` are what the rest reads of them.
  own = {recipe.Recipe: {"precision", "matmul_precision"}}
  for section in sections(recipe.Recipe):
    names = {field.name for field in dataclasses.fields(section)}
    known = read | spread.get(section, set()) | own.get(section, set())
    assert names <= known, (section.__name__, names - known)


# --- presets


def preset_config(dit_name, vae_name="wan2.1"):
  config = ConfigDict(minimal())
  config.vae.model = recipe.preset(vae.PRESETS, vae_name)
  config.dit.model = recipe.preset(dit.PRESETS, dit_name)
  return recipe.complete(config)


def test_flags_change_a_preset():
  config = preset_config("XL")
  config.lock()
  config.update_from_flattened_dict({"dit.model.depth": 2, "vae.model.blocks": 1})
  built = recipe.read(config)
  assert built.dit.model == dataclasses.replace(
    dit.PRESETS["XL"], depth=2, channels=16, text_width=256
  )
  assert built.vae.model == dataclasses.replace(vae.PRESETS["wan2.1"], blocks=1)


@pytest.mark.parametrize("presets", [dit.PRESETS, vae.PRESETS])
def test_unknown_presets(presets):
  with pytest.raises(ValueError, match=f"'XXL', only {', '.join(presets)}$"):
    recipe.preset(presets, "XXL")


@pytest.mark.parametrize(
  "get_config", [case for case in config_cases() if case.id.startswith("finetune_wan")]
)
def test_fine_tuning_is_sharded(get_config):
  """Its whole state, and the base, on 8 devices."""
  built = recipe.read(get_config())
  task, rules = build.make_task(built)
  base, mesh = jax.eval_shape(task.init, KEY), sharding.make_mesh(fsdp=8)
  if built.dit.lora.rank:
    task, rules = init_from.adapt(built.dit.lora, task, rules, base)
  state = loop.build(task, built.dit.train, mesh, rules, built.seed).abstract
  leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
  shards = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
  assert shards <= 1.05 * sum(leaf.size for leaf in leaves) / 8


@pytest.mark.parametrize("name", dit.PRESETS)
def test_each_size_trains_sharded(name):
  """Its whole state, on 8 devices, without making it."""
  published = name.startswith("wan")
  model = dit.PRESETS[name]
  config = preset_config(name, "wan2.2" if model.channels == 48 else "wan2.1")
  if model.condition_channels:
    config.dit.given_prob = config.dit.extra_prob = 0.0
    config.dit.init_from = "wan"  # with the encoder of images
  config.data.size_multiple = 32
  if published:
    config.text = ConfigDict({"folder": "umt5-xxl"})
    config.dit.text_tokens = 512
  built = recipe.read(config)
  if published:
    assert built.dit.model == dit.PRESETS[name]
  stage = built.dit
  state = loop.build(
    dit_task.make(
      stage.model, None if published else stage.text, stage.loss, stage.segments
    ),
    stage.train,
    sharding.make_mesh(fsdp=8),
    dit_task.DIT_RULES if published else dit_task.SHARDING_RULES,
    built.seed,
  ).abstract
  params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
  assert sum(leaf.size for leaf in leaves) == 4 * params  # with ema and two moments
  shards = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
  assert shards <= 1.05 * 4 * params / 8


# --- messages


def minimal():
  return {
    "data": {},
    "vae": {"train": {"steps": 10}},
    "dit": {"train": {"steps": 10}},
  }


def changed(path, value):
  """The minimal config with one entry set, or removed where the value is `...`."""
  config = minimal()
  *sections, key = path.split(".")
  inner = config
  for section in sections:
    inner = inner.setdefault(section, {})
  if value is ...:
    del inner[key]
  else:
    inner[key] = value
  return config


def test_minimal_config_gives_defaults():
  built = recipe.read(ConfigDict(minimal()))
  assert built.stages == recipe.DEFAULT_STAGES and built.encode == recipe.Encode()
  assert built.vae.train.steps == 10
  assert recipe.read(minimal()) == built


def test_derived_sizes():
  config = changed("dit.text", {"width": 96})
  config["vae"]["model"] = {"latent_channels": 12}
  built = recipe.read(config)
  assert built.dit.model.channels == 12 and built.dit.model.text_width == 96
  assert built.dit.model.patch_width == 4 * 12


def test_values_keep_or_get_their_type():
  built = recipe.read(changed("data.fps", 8))
  assert built.data.fps == 8.0 and isinstance(built.data.fps, float)
  rates = [["discriminator/.*", 1]]
  built = recipe.read(changed("vae.train.learning_rates", rates))
  assert built.vae.train.learning_rates == (("discriminator/.*", 1.0),)
  prompt = ("a circle", (64, 32), 17, 12)
  built = recipe.read(changed("sample.prompts", (prompt,)))
  assert built.sample.prompts == (("a circle", (64, 32), 17, 12.0),)
  assert np.dtype(recipe.read(changed("precision", "bfloat16")).dtype) == jnp.bfloat16


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("dita", {}, r"config\.dita is not a key .* did you mean config\.dit\?"),
    ("vae.train.learning_rat", 1.0, r"vae\.train\.learning_rat is .*learning_rate\?"),
    ("dit.model.zzz", 1, r"config\.dit\.model\.zzz is not a key that anything reads$"),
    ("dit.model.channels", 16, r"config\.dit\.model\.channels .* follows from"),
    ("dit.model.text_width", 16, r"config\.dit\.model\.text_width .* follows from"),
    ("data", ..., r"config\.data is missing"),
    ("vae.train", ..., r"config\.vae\.train is missing"),
    ("dit.train.steps", ..., r"config\.dit\.train\.steps is missing"),
    ("data", "shapes", r"config\.data must be a ConfigDict, not 'shapes'"),
    ("encode", 3, r"config\.encode must be a ConfigDict, not 3"),
    ("dit.rows", "4", r"config\.dit\.rows must be of type int, not '4'"),
    ("dit.rows", 4.0, r"config\.dit\.rows must be of type int, not 4\.0"),
    ("dit.rows", True, r"config\.dit\.rows must be of type int, not True"),
    ("data.fps", True, r"config\.data\.fps must be of type float, not True"),
    ("data.fps", None, r"config\.data\.fps must be of type float, not None"),
    ("vae.model.middle", 1, r"config\.vae\.model\.middle must be of type bool, not 1"),
    ("vae.crop", 17, r"config\.vae\.crop must be a tuple, not 17"),
    ("vae.crop", (17, 64), r"config\.vae\.crop must have 3 entries, not \(17, 64\)"),
    ("stages", "data", r"config\.stages must be a tuple, not 'data'"),
    ("stages", ("data", 3), r"config\.stages\[1\] must be of type str, not 3"),
    (
      "sample.prompts",
      (("a circle", (64, "64"), 17, 12.0),),
      r"config\.sample\.prompts\[0\]\[1\]\[1\] must be of type int, not '64'",
    ),
    # What the sections check themselves.
    ("dit.model.width", 385, r"config\.dit\.model: dit width 385 over 6 heads"),
    ("dit.model.remat", "some", r"config\.dit\.model: dit remat 'some'"),
    ("vae.model.downsample", ("s",), r"config\.vae\.model: vae downsample \('s',\)"),
    # What has to fit together.
    ("stages", ("data", "train"), r"config\.stages: \['train'\] are none of"),
    ("precision", "float16", r"config\.precision 'float16' is not"),
    (
      "data.size_multiple",
      24,
      r"config\.data\.size_multiple 24 must be a multiple of 16: .* 8 x .* 2",
    ),
    ("dit.model.patch_size", (2, 2, 2), r"config\.dit\.model\.patch_size \(2, 2, 2\)"),
    ("dit.model.patch_size", (1, 2, 1), r"config\.dit\.model\.patch_size \(1, 2, 1\)"),
    (
      "vae.model.downsample",
      ("s", "s", "st"),
      r"config\.vae\.model compresses time 2 times, not 4",
    ),
    ("data.max_pixels", 200, r"config\.data\.max_pixels 200 .* size_multiple 16"),
    ("data.heldout_share", 1.5, r"config\.data\.heldout_share 1\.5 must be from 0 to"),
    ("data.cut_threshold", 1.0, r"data\.cut_threshold 1 must be 0, or at least"),
    ("data.filter", {"motion": (2.0, 1.0)}, r"data\.filter: motion \(2, 1\): the"),
    ("data.filter", {"scores": (("a", 1.0),)}, r"filter\.scores needs .*score_fn"),
    ("data", {"source": "/a", "measure": False, "crop_borders": True},
     r"data\.measure=False measures"),
    ("data.filter", {"motion": (0.1, 9.0)}, r'source "shapes": .* are not measured'),
    ("data.score_fn", "os:getcwd", r'source "shapes": .* are not measured'),
    ("vae.crop", (18, 64, 64), r"config\.vae\.crop: .* 18 frames"),
    ("vae.crop", (17, 64, 60), r"config\.vae\.crop: .* 17 frames of 60x64"),
    ("encode.frame_buckets", (1, 8), r"config\.encode\.frame_buckets: 8 is not 1"),
    ("encode.budgets", ((100, 9),), r"encode\.budgets: 100 pixels are not between"),
    ("encode.budgets", ((1024, 99),), r"encode\.budgets: 99 frames are not between"),
    ("encode.stream_frames", 6, r"stream_frames 6 must be a multiple of 4"),
    ("dit.schedule", (0, 9), r"dit\.schedule has 2 steps, config\.encode\.budgets 0"),
    ("dit.schedule", (5,), r"dit\.schedule \(5,\) must begin with 0 and ascend"),
    ("dit.image_share", (0.5, 0.1), r"image_share has 2 shares for 1 parts"),
    ("dit.image_share", (1.5,), r"dit\.image_share \(1\.5,\) is not from 0 to 1"),
    ("data.mixture", (("/a", 1.0),), r'data\.source "mixture" needs .* are .shapes.'),
    ("data.source", "mixture", r"data\.mixture = .* they are 'mixture' and \(\)"),
    (
      "dit.tokens",
      200,
      r"config\.dit\.tokens 200: .*max_frames 33 and max_pixels 6144 .* 216 tokens",
    ),
    ("dit.train.schedule", "linear", r"config\.dit\.train: schedule 'linear'"),
    ("vae.train.warmup_steps", 11, r"config\.vae\.train: warmup_steps 11"),
    ("sample.method", "rk4", r"config\.sample: sampling method 'rk4' is not one of"),
    ("sample.eta", 0.5, r"config\.sample: sampling eta 0\.5 is for ddim"),
    ("dit.loss.target", "score", r"dit target 'score' is none of"),
    ("dit.loss.target", "eps", r"config\.sample: a flow starts from noise alone"),
  ],
)  # fmt: skip
def test_wrong_configs(path, value, message):
  config = changed(path, value)
  with pytest.raises(ValueError, match=message):
    recipe.read(config)


@pytest.mark.parametrize(
  "backend, has, expected",
  [("cpu", False, False), ("cpu", True, True), ("gpu", False, True)],
)
def test_only_a_cpu_without_bfloat16_multiplies_in_float32(
  monkeypatch, backend, has, expected
):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(recipe.cpu, "multiplies_bfloat16", lambda: has)
  config = changed("matmul_precision", rounded_matmul.PRECISION)
  with recipe.read(config).matmuls():
    assert rounded_matmul.is_wanted()
    assert rounded_matmul._native.get() is expected
  assert rounded_matmul._native.get() and not rounded_matmul.is_wanted()
