"""Imports go one way, and other rules that a look at the source can check."""

import ast
import pathlib

import pytest

import sora_jax

PACKAGE = pathlib.Path(sora_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path):
  parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def imports_of(path):
  """Modules that a file imports, anywhere in it, by full name."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      # `from sora_jax.run import recipe` imports a module, `from x import name` x.
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        names.add(full if full in MODULES else node.module)
  return names


IMPORTS = {module_name(path): imports_of(path) for path in FILES}


def is_in(name, modules):
  return any(name == module or name.startswith(f"{module}.") for module in modules)


def inside(*modules):
  """The modules of the package at or below these names."""
  found = {n for n in IMPORTS if is_in(n, [f"sora_jax.{m}" for m in modules])}
  for module in modules:
    assert any(is_in(n, [f"sora_jax.{module}"]) for n in found), f"no {module}"
  return found


def own(name):
  """What a module imports of the package itself."""
  return {i for i in IMPORTS[name] if i in IMPORTS and i != "sora_jax"}


# Room -> the rooms, or single modules of one, that it may import; lowest first.
# A folder is a room, "" is the top of the package with the commands.
BELOW_RUN = (
  "packing", "diffusion", "runtime", "models", "data", "tasks", "weights", "training",
  "encoders",
)  # fmt: skip
ROOMS = {
  "packing": (),
  "diffusion": (),
  "runtime": (),
  "models": ("packing", "runtime.fields"),
  "data": ("packing", "runtime.files", "runtime.fields", "runtime.limits"),
  "tasks": ("models", "diffusion", "packing"),
  "weights": ("models", "runtime.safetensors_io"),
  "training": ("tasks", "runtime"),
  "encoders": ("models", "tasks", "data", "runtime", "packing"),
  "language": ("data", "models", "tasks", "encoders", "runtime"),
  "run": BELOW_RUN,
  "sampling": (
    "run.recipe", "language", "encoders", "tasks", "models", "data", "diffusion",
    "packing", "weights", "runtime",
  ),
  "evaluation": ("sampling", "run", "encoders", "data", "packing", "runtime"),
  "planning": (
    "sampling", "run", "training", "encoders", "tasks", "models", "data", "runtime",
    "packing",
  ),
}  # fmt: skip
COMMANDS = (
  "main", "prepare", "train_vae", "encode", "train_captioner", "train_dit",
  "train_expander", "sample", "evaluate", "plan", "inspect", "check", "recaption",
  "import_weights", "export_weights",
)  # fmt: skip


def room_of(name):
  """The folder of the package that a module is in; "" for its top."""
  parts = name.split(".")
  package = len(parts) > 2 or (PACKAGE / parts[1]).is_dir()
  return parts[1] if package else ""


def test_every_module_has_a_room():
  rooms = {room_of(name) for name in IMPORTS if name != "sora_jax"}
  assert rooms == {*ROOMS, ""}
  top = {name for name in IMPORTS if name != "sora_jax" and not room_of(name)}
  assert top == {f"sora_jax.{command}" for command in COMMANDS}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_what_is_below(room):
  allowed = [f"sora_jax.{r}" for r in (room, *ROOMS[room])]
  for name in inside(room):
    wrong = {i for i in own(name) if not is_in(i, allowed)}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_no_command_imports_a_command():
  commands = {f"sora_jax.{command}" for command in COMMANDS}
  for name in IMPORTS:
    assert not own(name) & commands, name


def test_training_knows_of_the_tasks_only_their_contract():
  for name in inside("training"):
    assert not {i for i in own(name) if i.startswith("sora_jax.tasks.")}, name


def test_no_import_cycles():
  done, path = set(), []

  def visit(name):
    assert name not in path, f"cycle: {' -> '.join([*path, name])}"
    if name not in done:
      path.append(name)
      for other in sorted(own(name)):
        visit(other)
      path.pop()
      done.add(name)

  for name in IMPORTS:
    visit(name)


def test_flax_is_only_in_models():
  for name, imports in IMPORTS.items():
    if not is_in(name, ["sora_jax.models"]):
      assert not any(is_in(i, ["flax"]) for i in imports), name


@pytest.mark.parametrize("layer", ["models", "tasks", "packing", "diffusion"])
def test_networks_and_math_do_no_io(layer):
  allowed = [
    "jax",
    "numpy",
    "ml_dtypes",
    "flax",
    "tokamax",
    "math",
    "bisect",
    "contextlib",
    "contextvars",
    "functools",
    "operator",
  ]
  allowed += ["collections", "dataclasses", "typing", "re", "sora_jax"]
  for name in inside(layer):
    wrong = {i for i in IMPORTS[name] if not is_in(i, allowed)}
    assert not wrong, f"{name} imports {sorted(wrong)}"


# Grain starts workers that import the data modules: what they import, each pays for.
WITHOUT_JAX = (
  "data.clips", "data.video", "data.sources", "data.shapes", "data.records",
  "data.tokenizer", "data.clip_tokenizer", "data.batches", "data.clip_dataset",
  "data.packed_dataset", "data.pixel_cache", "data.pixel_records",
  "data.cache_filling", "data.stored", "data.tfds_source", "data.presence",
  "data.listing", "data.mixture", "data.schedule",
  "packing", "runtime.files", "runtime.limits",
)  # fmt: skip


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_data_does_not_import_jax(module):
  names = inside(module)
  reached, todo = set(), [*names]
  while todo:
    for i in IMPORTS[todo.pop()]:
      if i in IMPORTS and i not in reached:
        reached.add(i)
        todo.append(i)
  for other in {*names, *reached}:
    assert not any(is_in(i, ["jax", "flax", "optax"]) for i in IMPORTS[other]), other


@pytest.mark.slow
def test_no_print():
  for path in FILES:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        assert node.func.id != "print", f"{path}:{node.lineno}"


@pytest.mark.slow
def test_nothing_is_unpickled_and_nothing_reaches_a_shell():
  pickles = ["pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch"]
  shells = {"os.system", "os.popen", "subprocess.getoutput", "eval", "exec"}
  for path in FILES:
    wrong = [i for i in IMPORTS[module_name(path)] if is_in(i, pickles)]
    assert not wrong, f"{path} imports {wrong}"
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call):
        options = {keyword.arg for keyword in node.keywords}
        assert not options & {"shell", "allow_pickle"}, f"{path}:{node.lineno}"
        assert ast.unparse(node.func) not in shells, f"{path}:{node.lineno}"


def test_names_say_what_is_inside():
  for path in [*FILES, *PACKAGE.rglob("*/")]:
    words = set(path.stem.split("_"))
    assert not words & {"util", "utils", "helper", "helpers", "misc", "common"}, path


def test_modules_and_public_functions_say_what_they_are():
  for path in FILES:
    tree = ast.parse(path.read_text())
    if not tree.body:
      continue
    assert ast.get_docstring(tree), path
    for node in tree.body:
      if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        described = node.name.startswith("_") or ast.get_docstring(node)
        assert described, f"{path}:{node.lineno}: {node.name} has no docstring"
