"""Models that a run begins with: checked before any work, loaded, and adapters merged.

config.vae.folder and config.dit.init_from name the folder of a checkpoint, which is
that of another run or what `import_weights` made: it holds vae/model, dit/model and,
for a frozen text encoder, text/model.
"""

import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.data.tokenizer import Tokenizer
from sora_jax.encoders import model_folders
from sora_jax.models import lora
from sora_jax.models.meta import DiTMeta, ImageMeta, TextMeta, VAEMeta
from sora_jax.run import recipe as recipes
from sora_jax.runtime import checkpoint, fields, sharding
from sora_jax.tasks import Task
from sora_jax.tasks import dit as dit_task
from sora_jax.tasks import lora as lora_task
from sora_jax.weights import lora as lora_files
from sora_jax.weights.merge import merge

ADAPTER = "adapter.safetensors"


def check(recipe: recipes.Recipe, trained=None) -> None:
  """Checks that the models are there, what the config says, and of each other.

  Args:
    trained: folder of a run whose own VAE is complete and stays; None if there is none
      yet. Without config.vae.folder it is the VAE whose latents the DiT gets.

  Raises:
    ValueError: naming the key, and what to set.
  """
  if recipe.vae.folder:
    folder = pathlib.Path(recipe.vae.folder) / "vae" / "model"
    saved = _meta(VAEMeta, folder, "config.vae.folder").model
    _compare("config.vae.model", recipe.vae.model, saved, folder)
  if recipe.dit.init_from:
    _check_dit(recipe, trained)


def _check_dit(recipe, trained):
  stage = recipe.dit
  folder, meta = _base(stage)
  if bool(meta.frozen_text) != bool(recipe.text.folder):
    raise ValueError(
      f"{folder} was trained "
      + (
        f"on features of a frozen text encoder ({meta.frozen_text.features}): set "
        "config.text.folder"
        if meta.frozen_text
        else "with a small text encoder of its own: config.text.folder must be empty"
      )
    )
  _compare("config.dit.model", stage.model, meta.model, folder)
  if meta.frozen_text:
    place = model_folders.of_text(recipe.text.folder)
    encoder = _meta(TextMeta, place, "config.text.folder")
    _equal("features of config.text.folder", encoder.id, meta.frozen_text.features,
           folder)  # fmt: skip
    _equal("config.text.pad_to", recipe.text.pad_to, meta.frozen_text.pad_to, folder)
  else:
    _compare("config.dit.text", stage.text, meta.text_encoder, folder)
  if meta.model.image_width:
    place = model_folders.of_images(stage.init_from)
    images = _meta(ImageMeta, place, "config.dit.init_from")
    _equal(f"image encoder {place}", images.id, meta.image, folder)
  for key in ("process", "target"):
    ours, saved = getattr(stage.loss, key), getattr(meta.noise, key)
    _equal(f"config.dit.loss.{key}", ours, saved, folder)
  _equal("config.dit.reference_fps", stage.reference_fps, meta.reference_fps, folder)
  levels = (0.0, meta.boundary) if stage.low_noise else (meta.boundary, 1.0)
  if meta.boundary and tuple(stage.loss.levels) != levels:
    raise ValueError(
      f"{folder} is one of two experts: set config.dit.loss.levels to its own, "
      f"{levels}, not {tuple(stage.loss.levels)}"
    )
  _check_latents(recipe, meta.vae, trained)
  if stage.lora.rank:
    names = lora.picked(_shapes(recipe), stage.lora)
    if others := [name for name in names if not name.startswith("dit/")]:
      raise ValueError(f"config.dit.lora.layers picks {others[0]}, which is not the "
                       "DiT's")  # fmt: skip
    lora_files.check(stage.model, [name.removeprefix("dit/") for name in names])


def _check_latents(recipe, wanted: str, trained):
  """Raises ValueError unless the DiT to begin with was trained on the run's latents."""
  begin, source = recipe.dit.init_from, recipe.vae.folder or trained
  ours = _vae_id(source) if source else None
  if ours == wanted:
    return
  found = "this run would train a VAE of its own"
  if source:
    found = f"that of {source} is {ours!r}"
  if not wanted:
    wanted_is = "a VAE that was not imported with it"
    advice = f"import it to {begin}, too, and set config.vae.folder={begin}"
  else:
    wanted_is, advice = f"the VAE {wanted!r}", f"set config.vae.folder={begin}"
    if _vae_id(begin) != wanted:
      advice = f"set config.vae.folder to where that VAE is; {begin} does not have it"
  if source and not recipe.vae.folder:
    advice += ", with another --workdir"
  raise ValueError(
    f"config.dit.init_from={begin} was trained on latents of {wanted_is}, but {found}: "
    f"{advice}"
  )


def base_meta(recipe: recipes.Recipe) -> DiTMeta | None:
  """What the model that the DiT begins with says of itself; None without one."""
  return _base(recipe.dit)[1] if recipe.dit.init_from else None


def base_folder(stage: recipes.DiTStage) -> pathlib.Path:
  """Folder of the model that training begins with. ValueError if there is none."""
  return _base(stage)[0]


def _base(stage) -> tuple[pathlib.Path, DiTMeta]:
  """(folder, meta) of the model that training begins with, or of the expert to train.

  Raises:
    ValueError: naming the key, if there is none.
  """
  name = model_folders.LOW if stage.low_noise else model_folders.HIGH
  try:
    folder = model_folders.of_expert(stage.init_from, name)
    return folder, model_folders.read_meta(folder)
  except ValueError as error:
    asked = " (config.dit.low_noise=True)" if stage.low_noise else ""
    raise ValueError(f"config.dit.init_from: {error}{asked}") from error


def _vae_id(folder) -> str | None:
  """Id of the VAE in a folder; None if there is none. ValueError if it is damaged."""
  place = pathlib.Path(folder) / "vae" / "model"
  if not (place / "model.json").exists():
    return None
  return VAEMeta.from_json(checkpoint.load_meta(place), place).id


def _meta(kind, folder, key):
  """Meta of the model that a key of the config names; ValueError naming both."""
  try:
    return kind.from_json(checkpoint.load_meta(folder), folder)
  except ValueError as error:
    raise ValueError(f"{key}: {error}") from error


def _compare(key, ours, saved, folder):
  others = fields.lasting(saved)
  for name, value in fields.lasting(ours).items():
    _equal(f"{key}.{name}", value, others[name], folder)


def _equal(key, ours, saved, folder):
  if ours != saved:
    raise ValueError(f"{key} is {ours!r}, but that of {folder} is {saved!r}")


# --- the VAE


def take_vae(recipe: recipes.Recipe, workdir) -> None:
  """Copies vae/model of config.vae.folder, with its id, into the run."""
  source = pathlib.Path(recipe.vae.folder) / "vae" / "model"
  params, meta = checkpoint.load_model(source)
  folder = pathlib.Path(workdir) / "vae" / "model"
  checkpoint.save_model(folder, params, meta)
  logging.info("%s was taken from %s, nothing is trained", folder, source)


# --- the DiT


def begin(
  recipe: recipes.Recipe, task: Task, rules: sharding.Rules, workdir, mesh
) -> tuple[Task, sharding.Rules, Callable | None]:
  """(task, rules, initial) for a run that begins with config.dit.init_from.

  initial: shardings of the params -> their first values; None for what the task inits.
  With config.dit.lora the params are adapters, and the base is what is frozen. Takes
  over the tokenizer of a small text encoder.

  Raises:
    ValueError: if the latents are of another VAE than those that it was trained on.
  """
  stage = recipe.dit
  if not stage.init_from:
    return task, rules, None
  folder, meta = _base(stage)
  place = pathlib.Path(workdir) / "vae" / "model"
  vae = VAEMeta.from_json(checkpoint.load_meta(place), place).id
  _equal(f"VAE of {workdir}", vae, meta.vae, folder)
  vocabulary = pathlib.Path(workdir) / "dit" / "tokenizer.model"
  if not recipe.text.folder and jax.process_index() == 0 and not vocabulary.exists():
    vocabulary.parent.mkdir(parents=True, exist_ok=True)
    words = folder / "tokenizer.model"
    Tokenizer(str(words), meta.vocabulary)  # which says so if it is another's
    shutil.copyfile(words, vocabulary)
  sharding.sync("tokenizer of the base")
  if not stage.lora.rank:
    return (
      task,
      rules,
      lambda places: checkpoint.load_model(folder, places, jnp.float32)[0],
    )
  shapes = frozen_shapes(recipe, task, rules, mesh)
  places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
  dtypes = jax.tree.map(lambda leaf: leaf.dtype, shapes)
  base, _ = checkpoint.load_model(folder, places, dtypes)
  return *adapt(stage.lora, task, rules, base), None


def adapt(
  config: lora.LoRAConfig, task: Task, rules: sharding.Rules, base
) -> tuple[Task, sharding.Rules]:
  """The task whose params are adapters of the base, arrays or shapes, and its rules."""
  return lora_task.make(task, config, base), lora.sharding_rules(base, rules, config)


def frozen_shapes(recipe: recipes.Recipe, task: Task, rules: sharding.Rules, mesh):
  """Shapes, dtypes and places of a base that adapters are trained beside.

  Its blocks' kernels are kept in the dtype of the computation, to which each step would
  round them anyway, and they are nearly all of the bytes.
  """
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  places = lora.flatten(sharding.param_shardings(shapes, rules, mesh))

  def described(path, leaf):
    is_kernel = "blocks" in path and path.endswith("kernel")
    dtype = recipe.dtype if is_kernel else jnp.float32
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=places[path])

  flat = lora.flatten(shapes)
  return lora.nest({path: described(path, leaf) for path, leaf in flat.items()})


def whole(task: Task, recipe: recipes.Recipe, params):
  """Params of the whole model during training: adapters are beside their kernels."""
  config = recipe.dit.lora
  return lora.attach(task.frozen, params, config.scale) if config.rank else params


def finish(recipe: recipes.Recipe, adapters, folder, rules: sharding.Rules, mesh):
  """Writes folder/adapter.safetensors; the merged model, float32.

  rules: of the base's params.
  """
  config = recipe.dit.lora
  replicated = NamedSharding(mesh, PartitionSpec())
  with jax.set_mesh(mesh):
    host = jax.device_get(jax.jit(lambda x: x, out_shardings=replicated)(adapters))
  flat = lora.flatten(host["dit"])
  pairs = {
    path.removesuffix(f"/{lora.A}"): (a, flat[path.removesuffix(lora.A) + lora.B])
    for path, a in flat.items()
    if path.endswith(f"/{lora.A}")
  }
  if jax.process_index() == 0:
    lora_files.write(folder / ADAPTER, pairs, recipe.dit.model, config.alpha)
    logging.info("the adapter is in %s", folder / ADAPTER)
  base, _ = checkpoint.load_model(
    _base(recipe.dit)[0],
    lambda shapes: sharding.param_shardings(shapes, rules, mesh),
    jnp.float32,
  )
  return merge(base, host, config.scale, mesh)


def _shapes(recipe):
  """Shapes of the DiT's params, without making them."""
  stage, text = recipe.dit, None if recipe.text.folder else recipe.dit.text
  task = dit_task.make(stage.model, text, stage.loss, stage.segments)
  return jax.eval_shape(task.init, jax.random.key(0))
