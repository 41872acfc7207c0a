"""LoRA: adapters alone are trained, the base stays, and both merge to the same output.

Runs are those of tiny.py, with the run of the others as their base.
"""

import hashlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden import make_losses
from jax.sharding import PartitionSpec as P

from sora_jax.data.video import reader
from sora_jax.models import dit, lora
from sora_jax.run import init_from
from sora_jax.run import recipe as recipes
from sora_jax.runtime import checkpoint, sharding, train_checkpoints
from sora_jax.tasks import dit as dit_task
from sora_jax.training import loop, optim

KEY = jax.random.key(0)
CONFIG = lora.LoRAConfig(rank=4, alpha=6.0)
TASK, _, RULES, make_batch = make_losses.CASES["dit"]


def base_params():
  """Of the tiny DiT of the golden losses, with nothing left at zero."""
  shapes = jax.eval_shape(TASK.init, KEY)
  rng = np.random.default_rng(0)

  def random(leaf):
    size = leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.1
    return np.float32(size * rng.standard_normal(leaf.shape))

  return jax.tree.map(random, shapes)


BASE = base_params()


def adapters_of(params, config, scale=0.3):
  """Adapters of which neither A nor B is zero."""
  shapes = jax.eval_shape(lambda: lora.init(KEY, params, config))
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: np.float32(scale * rng.standard_normal(leaf.shape)), shapes
  )


# --- functions of a tree


@pytest.mark.slow
def test_merging_keeps_the_output():
  config = lora.LoRAConfig(
    4, 6.0, r"dit/(blocks/.*|head|patch_embed|text_embed_2|time_projection)/kernel"
  )
  adapters = adapters_of(BASE, config)
  batch = {name: jnp.asarray(value) for name, value in make_batch(0).items()}
  t_BG = jnp.full((make_losses.ROWS, 2 * make_losses.SEGMENTS), 0.4)

  def run(params):
    text_BSE = dit_task.encode_text(make_losses.TEXT, params, batch)
    return dit_task.predict(
      make_losses.DIT,
      params,
      batch["patch_LP"],
      t_BG,
      dit.Context.of_batch(batch, text_BSE),
    )

  merge = jax.jit(lora.merge).lower(BASE, adapters, config.scale).compile()
  merged = merge(BASE, adapters, config.scale)
  attached = lora.attach(BASE, adapters, config.scale)
  new = lora.attach(BASE, adapters, 0.0)
  plain_run, lora_run = (
    jax.jit(run).lower(params).compile() for params in (merged, attached)
  )
  real = batch["segment_L"] > 0
  merged, plain, attached, new = (
    np.asarray(out_BLP)[real]
    for out_BLP in (
      plain_run(merged),
      plain_run(BASE),
      lora_run(attached),
      lora_run(new),
    )
  )
  assert np.abs(plain - merged).max() > 1
  np.testing.assert_allclose(attached, merged, rtol=1e-5, atol=1e-5 * merged.max())
  # Where B is zero, as at first, nothing changes.
  np.testing.assert_allclose(new, plain, rtol=1e-5, atol=1e-6)


def test_a_merged_kernel():
  adapters = adapters_of(BASE, CONFIG)
  merge = jax.jit(lora.merge)
  merged = lora.flatten(merge(BASE, adapters, CONFIG.scale))
  flat, base = lora.flatten(adapters), lora.flatten(BASE)
  a, b = (np.float64(flat[f"dit/blocks/mlp_up/{x}"][1]) for x in ("lora_a", "lora_b"))
  assert a.shape == (32, 4) and b.shape == (4, 64)
  np.testing.assert_allclose(
    merged["dit/blocks/mlp_up/kernel"][1],
    np.float64(base["dit/blocks/mlp_up/kernel"][1]) + 1.5 * a @ b,
    rtol=1e-5,
    atol=1e-6,
  )
  changed = {path for path in base if not np.array_equal(base[path], merged[path])}
  picked = {f"{name}/kernel" for name in lora.picked(BASE, CONFIG)}
  assert changed == picked and len(picked) == 10
  # The kernels of a base in bfloat16 stay so.
  low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE)
  for leaf in jax.tree.leaves(merge(low, adapters, CONFIG.scale)):
    assert leaf.dtype == jnp.bfloat16


def test_sharding_rules_share_all_of_an_adapter():
  config = lora.LoRAConfig(4, 4.0, r"dit/(blocks/(query|mlp_down)|head)/kernel")
  rules = dict(lora.sharding_rules(BASE, RULES, config))
  assert rules[re.escape("dit/blocks/query/lora_a")] == P(
    None, ("fsdp", "context", "tensor"), None
  )
  assert rules[re.escape("dit/blocks/query/lora_b")] == P(
    None, None, ("tensor", "fsdp", "context")
  )
  assert rules[re.escape("dit/blocks/mlp_down/lora_a")][1] == (
    "tensor",
    "fsdp",
    "context",
  )
  shapes = jax.eval_shape(lambda: lora.init(KEY, BASE, config))
  sharding.param_shardings(shapes, list(rules.items()), sharding.make_mesh())


@pytest.mark.slow
def test_weight_decay_reaches_adapters():
  adapters = lora.init(KEY, BASE, lora.LoRAConfig(4, 4.0, "dit/blocks/query/kernel"))
  config = loop.TrainConfig(steps=1, learning_rate=1.0, weight_decay=0.5)
  optimizer, _ = optim.make(config, adapters)
  zero = jax.tree.map(jnp.zeros_like, adapters)
  updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(adapters), adapters)
  a, b = (adapters["dit"]["blocks"]["query"][name] for name in ("lora_a", "lora_b"))
  assert 0.15 < jnp.abs(a).max() < 32**-0.5 and not b.any()
  np.testing.assert_allclose(updates["dit"]["blocks"]["query"]["lora_a"], -0.5 * a)


@pytest.mark.parametrize(
  "values, message",
  [
    ({"layers": "dit/nothing"}, "'dit/nothing' matches no param"),
    ({"layers": "dit/blocks/.*"}, r"picks dit/blocks/.*bias .*which is no kernel"),
    ({"layers": "dit/(blocks"}, r"'dit/\(blocks' is no regex"),
    ({"rank": 33}, r"rank 33 is above the width of dit/blocks/.* \(2, 32, 32\)"),
    ({"rank": -1}, "rank -1 must be at least 0"),
    ({"alpha": 0.0}, r"alpha 0\.0 positive"),
  ],
)
def test_wrong_settings(values, message):
  with pytest.raises(ValueError, match=message):
    lora.init(KEY, BASE, lora.LoRAConfig(**{"rank": 4, **values}))


def test_adapters_of_another_model():
  adapters = adapters_of(BASE, CONFIG)
  other = jax.tree.map(lambda leaf: leaf, BASE)
  other["dit"]["blocks"]["query"]["kernel"] = jnp.zeros((2, 32, 16))
  with pytest.raises(ValueError, match=r"dit/blocks/query with a kernel \(2, 32, 32\)"):
    lora.merge(other, adapters, 1.0)
  del other["dit"]["blocks"]["query"]
  with pytest.raises(ValueError, match="the model has no such layer"):
    lora.attach(other, adapters, 1.0)


# --- training


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_the_base(tmp_path):
  """On 8 devices: the state is that of the adapters, and so are its checkpoints."""
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  placed = sharding.param_shardings(BASE, RULES, mesh)
  task, rules = init_from.adapt(CONFIG, TASK, RULES, jax.device_put(BASE, placed))
  config = loop.TrainConfig(steps=12, learning_rate=2e-2, ema_decay=0.5)
  built = loop.build(task, config, mesh, rules, seed=0)
  batches = [sharding.shard_batch(make_batch(i % 2), mesh) for i in range(12)]
  with jax.set_mesh(mesh):
    state = built.init.lower().compile()()
    update = built.update.lower(state, batches[0], task.frozen).compile()
    losses = []
    for batch in batches:
      state, values = update(state, batch, task.frozen)
      losses.append(float(values["loss"]))
  assert np.mean(losses[-2:]) < 0.6 * np.mean(losses[:2]), losses
  jax.tree.map(np.testing.assert_array_equal, task.frozen, BASE)
  names = set(lora.flatten(state.params))
  assert names == {
    f"{name}/{x}" for name in lora.picked(BASE, CONFIG) for x in ("lora_a", "lora_b")
  }
  size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
  assert sum(leaf.size for leaf in leaves) == 4 * size  # with EMA and two moments
  checkpoints = train_checkpoints.Checkpoints(tmp_path, keep=1)
  checkpoints.save(12, state, {})
  checkpoints.wait()
  restored, _ = checkpoints.restore(12, built.abstract)
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, restored, state)


# --- runs


ONLY_DIT = "--config.stages=('data','vae','encode','dit')"


def flags(base, *more):
  return (
    f"--config.vae.folder={base}",
    f"--config.dit.init_from={base}",
    "--config.seed=4",
    ONLY_DIT,
    "--config.sample.prompts=()",
    *more,
  )


def hashes(folder):
  return {
    path: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


@pytest.fixture(scope="module")
def lora_run(tiny_run, commands):
  """A run of adapters on other clips than its base's; before it, the base's files."""
  before = hashes(tiny_run.workdir / "dit" / "model")
  workdir = commands.folder / "lora"
  log = commands.main(
    workdir, *flags(tiny_run.workdir, "--config.dit.lora.rank=4"), ONLY_DIT
  )
  return tiny.Run(workdir, log), before


def copy_of(run, folder):
  """Its stages before the DiT, for another one."""
  for stage in ("data", "vae", "encode"):
    shutil.copytree(run.workdir / stage, folder / stage)
  return folder


def losses(folder):
  rows = tiny.rows(folder / "dit" / "metrics.jsonl")
  return [row["loss"] for row in rows if "loss" in row]


def test_a_run_leaves_its_base(lora_run, tiny_run):
  run, before = lora_run
  assert hashes(tiny_run.workdir / "dit" / "model") == before
  assert "was taken from" in run.log and not (run.workdir / "vae/checkpoints").exists()
  models = [
    checkpoint.load_model(folder / "dit" / "model")
    for folder in (tiny_run.workdir, run.workdir)
  ]
  base, merged = (lora.flatten(params) for params, _ in models)
  changed = {name for name in base if not np.array_equal(base[name], merged[name])}
  assert changed and all(
    name.startswith("dit/blocks/") and name.endswith("/kernel") for name in changed
  )
  tokenizers = [
    (folder / "dit" / "model" / "tokenizer.model").read_bytes()
    for folder in (tiny_run.workdir, run.workdir)
  ]
  assert tokenizers[0] == tokenizers[1]
  saved = train_checkpoints.Checkpoints(run.workdir / "dit" / "checkpoints", keep=2)
  metadata = saved._manager.item_metadata(tiny.STEPS).state
  saved.close()
  names = set(lora.flatten(metadata["params"]))
  assert {name.rsplit("/")[-1] for name in names} == {"lora_a", "lora_b"}


def test_sampling_the_run_or_the_base_with_its_adapter(lora_run, tiny_run, commands):
  run, _ = lora_run
  videos = []
  for name, more in (
    ("merged", [f"--checkpoint={run.workdir}"]),
    (
      "adapter",
      [
        f"--checkpoint={tiny_run.workdir}",
        f"--lora={run.workdir}/dit/adapter.safetensors",
      ],
    ),
  ):
    out = run.workdir.parent / f"{name}.png"
    commands.run("sample", *more, "--prompt=a star", "--steps=2", f"--out={out}")
    videos.append(reader.read(out))
  np.testing.assert_array_equal(videos[0], videos[1])


def test_an_interrupted_run_of_adapters_goes_on_exactly(lora_run, tiny_run, commands):
  run, _ = lora_run
  workdir = copy_of(run, commands.folder / "lora_interrupted")
  wanted = flags(tiny_run.workdir, "--config.dit.lora.rank=4")
  code, log = commands.interrupt(workdir, "dit", 3, tiny.signal.SIGTERM, *wanted)
  assert code == 0 and "stopped by a signal" in log
  log = commands.main(workdir, *wanted)
  assert "stage encode: complete already" in log and "from step 0" not in log
  adapters = [
    folder / "dit" / "adapter.safetensors" for folder in (run.workdir, workdir)
  ]
  assert adapters[0].read_bytes() == adapters[1].read_bytes()
  assert losses(workdir) == losses(run.workdir)


def test_full_fine_tuning_begins_where_its_base_ended(lora_run, tiny_run, commands):
  run, _ = lora_run
  workdir = copy_of(run, commands.folder / "full")
  log = commands.main(workdir, *flags(tiny_run.workdir, "--config.dit.train.steps=2"))
  assert not (workdir / "dit" / "adapter.safetensors").exists(), log
  # Adapters begin with no effect: the first loss is that of the base in both.
  np.testing.assert_allclose(losses(workdir)[0], losses(run.workdir)[0], rtol=1e-5)
  assert losses(workdir)[0] < losses(tiny_run.workdir)[0]
  params, _ = checkpoint.load_model(workdir / "dit" / "model")
  base, _ = checkpoint.load_model(tiny_run.workdir / "dit" / "model")
  for name, leaf in lora.flatten(params).items():
    assert leaf.dtype == jnp.float32
    distance = np.abs(leaf - lora.flatten(base)[name]).max()
    assert distance < 0.03, name  # two small steps away


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("dit.model.depth", 3, r"config\.dit\.model\.depth is 3, but that of .* is 2"),
    ("dit.model.mlp_width", 32, r"config\.dit\.model\.mlp_width is 32"),
    ("dit.text.vocab_size", 301, r"config\.dit\.text\.vocab_size is 301"),
    ("dit.reference_fps", 8.0, r"config\.dit\.reference_fps is 8\.0"),
    ("dit.loss.target", "x0", r"config\.dit\.loss\.target is 'x0', .* is 'velocity'"),
    ("vae.model.blocks", 2, r"config\.vae\.model\.blocks is 2, but .*vae/model is 1"),
    ("dit.lora.layers", "text/.*/kernel", "picks text/.*, which is not the DiT's"),
    ("text.folder", "umt5", r"text encoder of its own: config\.text\.folder must be"),
    ("dit.init_from", "nowhere", "nowhere/dit/model: no complete model here"),
  ],
)
def test_a_base_that_the_config_does_not_fit(tiny_run, path, value, message):
  config = tiny.get_config()
  recipe = recipes.complete(config)
  recipe.text.max_tokens = 40
  recipe.dit.lora.rank = 4
  recipe.vae.folder = recipe.dit.init_from = str(tiny_run.workdir)
  init_from.check(recipes.read(recipe))
  *sections, key = path.split(".")
  inner = recipe
  for section in sections:
    inner = inner[section]
  inner[key] = value
  with pytest.raises(ValueError, match=message):
    init_from.check(recipes.read(recipe))


def test_adapters_need_a_base():
  config = recipes.complete(tiny.get_config())
  config.dit.lora.rank = 4
  with pytest.raises(
    ValueError, match=r"rank 4 needs a model .*config\.dit\.init_from"
  ):
    recipes.read(config)
